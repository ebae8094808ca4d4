"""Several processes that run one program: what they agree on, and what one does for all.

Each process runs the same code with the same config, and arrays are spread over the devices of all. So
whatever only one can know (whether a file is there, whether someone pressed Ctrl-C) is agreed on before
anything follows from it, and what is written or printed once, process 0 writes and prints. With one process
all of this costs nothing.
"""

import functools
import hashlib
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Made = TypeVar("Made")


def connect(coordinator: str | None, processes: int | None, process_id: int | None) -> None:
    """Finds the other processes: those named, or those that JAX sees around it (TPU pods, SLURM, Open MPI).

    To be called before anything asks for a device.

    Raises:
        ValueError: some of the arguments are given and some are not.
    """
    given = [coordinator, processes, process_id]
    if given != [None] * 3:
        if None in given:
            raise ValueError("--coordinator, --num_processes and --process_id go together")
        jax.distributed.initialize(coordinator, processes, process_id)
        return
    if jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize()
    except ValueError as error:
        if "coordinator_address" not in str(error):
            raise
        return  # there are no others
    except RuntimeError as error:
        if "before any JAX" not in str(error):  # a notebook, say, has used JAX already: it is alone
            raise


def first() -> bool:
    """Whether this is the process that writes and prints. One that is alone asks no device for that."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def turn(number: int) -> bool:
    """Whether the number-th piece of work is this process's."""
    return number % jax.process_count() == jax.process_index()


def say(text: str) -> None:
    if first():
        print(text, flush=True)


def by_first(action: Callable[[], object]) -> None:
    """`action()` by process 0; all come back when it is done, and where it fails all do."""
    together(lambda: action() if first() else None)


def agreed(value: Any) -> np.ndarray:
    """Process 0's value: numbers of at most 32 bits, of one shape and dtype in all processes."""
    if jax.process_count() == 1:
        return np.asarray(value)
    return np.asarray(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def exchanged(value: Any) -> list[Any]:
    """Each process's value, in every process; values are what pickle takes."""
    if jax.process_count() == 1:
        return [value]
    mine = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(mine.size)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: mine.size] = mine
    everyones = np.asarray(multihost_utils.process_allgather(padded))
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(everyones, sizes, strict=True)]


def any_of(flag: bool) -> Any:
    """Whether it is so in any process: a bool, or what becomes one once the devices have come to it."""
    if jax.process_count() == 1:
        return bool(flag)
    mesh, count = _all_devices(), jax.device_count()
    with jax.set_mesh(mesh):
        flags = jax.make_array_from_callback(
            (count,), NamedSharding(mesh, PartitionSpec("all")), lambda index: np.full(count, flag)[index]
        )
        return _any(flags)


@functools.cache
def _all_devices() -> Mesh:
    return Mesh(np.array(jax.devices()), ("all",))


@functools.partial(jax.jit, out_shardings=PartitionSpec())
def _any(flags: jax.Array) -> jax.Array:
    return flags.any()


def together(make: Callable[[], Made]) -> Made:
    """`make()` in every process; where it fails in one, it fails in all. In it, no process waits for others.

    Raises:
        Exception: this process's own.
        ValueError: another process failed.
    """
    if jax.process_count() == 1:
        return make()
    error, made = None, None
    try:
        made = make()
    except Exception as raised:  # whatever it is: the others must not wait for this process
        error = raised
    if bool(any_of(error is not None)):
        raise error or ValueError("another process failed: it says why")
    return made  # pyright: ignore[reportReturnType]


def check_same(what: str, content: bytes) -> None:
    """Raises ValueError where processes differ in `content`: they would not run one program."""
    digest = np.frombuffer(hashlib.sha256(content).digest(), np.int32)
    differs = not np.array_equal(agreed(digest), digest)
    if bool(any_of(differs)):
        mine = ": this one's is not that of process 0" if differs else ""
        raise ValueError(f"{what} differ between processes{mine}")
