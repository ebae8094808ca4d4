"""Several processes that run one program: how they agree, and what process 0 does for all of them.

Each process runs the same code with the same config, and arrays are spread over the devices of all. What only
one process can know (whether a file exists, whether someone pressed Ctrl-C) must be agreed on before the code
depends on it. Process 0 does all writing and printing. With one process all of this costs nothing.
"""

import base64
import functools
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spin_jax.errors import OtherFailed, exit_code
from spin_jax.runtime.secrets import redacted

Result = TypeVar("Result")


def connect(coordinator: str | None, processes: int | None, process_id: int | None, heartbeat_s: int = 100) -> None:
    """Connects to the other processes: the given ones, or those that JAX finds (TPU pods, SLURM, Open MPI).

    Call it before any code asks for a device. All processes end when one is silent for `heartbeat_s` seconds.
    """
    given = [coordinator, processes, process_id]
    if None in given and given != [None] * 3:
        raise ValueError("--coordinator, --num_processes and --process_id go together")
    if coordinator is None and jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize(coordinator, processes, process_id, heartbeat_timeout_seconds=heartbeat_s)
    except (ValueError, RuntimeError) as error:
        # This is the only process if JAX finds no coordinator, or has been used before, as in a notebook.
        alone = "coordinator_address" in str(error) or "before any JAX" in str(error)
        if coordinator is not None or not alone:
            raise


def first() -> bool:
    """Whether this is the process that writes and prints. A single process needs no device to know it."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def turn(number: int) -> bool:
    """Whether this process does the piece of work with this number."""
    return number % jax.process_count() == jax.process_index()


def say(text: str) -> None:
    if first():
        print(redacted(text), flush=True)


def by_first(action: Callable[[], object]) -> None:
    """Process 0 runs `action()`; all processes return when it is done, and all fail if it fails."""
    together(lambda: action() if first() else None)


def exchanged(value: Any) -> list[Any]:
    """Returns the values of all processes; a value is JSON (lists, no tuples) and may hold flat arrays."""
    if jax.process_count() == 1:
        return [value]
    mine = np.frombuffer(json.dumps(value, default=_from_array).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(mine.size)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: mine.size] = mine
    everyones = np.asarray(multihost_utils.process_allgather(padded))
    texts = [row[:size].tobytes() for row, size in zip(everyones, sizes, strict=True)]
    return [json.loads(text, object_hook=_to_array) for text in texts]


def _from_array(array: np.ndarray) -> dict[str, str]:
    return {"dtype": str(array.dtype), "base64": base64.b64encode(array.tobytes()).decode()}


def _to_array(value: dict[str, Any]) -> Any:
    if value.keys() != {"dtype", "base64"}:
        return value
    return np.frombuffer(base64.b64decode(value["base64"]), value["dtype"]).copy()


def most(number: int) -> Any:
    """The largest number of all processes: an int, or an array on the devices that `int` waits for."""
    if jax.process_count() == 1:
        return int(number)
    mesh, count = _all_devices(), jax.device_count()
    layout, mine = NamedSharding(mesh, PartitionSpec("all")), np.full(count, number, np.int32)
    with jax.set_mesh(mesh):
        return _largest(jax.make_array_from_callback((count,), layout, lambda index: mine[index]))


@functools.cache
def _all_devices() -> Mesh:  # `most` is called between units of work
    return Mesh(np.array(jax.devices()), ("all",))


_largest = jax.jit(jnp.max, out_shardings=PartitionSpec())


def together(make: Callable[[], Result]) -> Result:
    """Calls `make` in every process; if it fails in one, all fail. `make` must not wait for other processes.

    Raises:
        Exception: `make` failed in this process.
        OtherFailed: it failed only in another process.
    """
    if jax.process_count() == 1:
        return make()
    error, made, code = None, None, 0
    try:
        made = make()
    except Exception as raised:  # any error counts: the others must not wait for this process
        error = raised
        code = exit_code(error)
    if code := int(most(code)):
        failure = error or OtherFailed(code)
        failure.__dict__["of_all"] = True  # `leave` asks
        raise failure
    return made  # pyright: ignore[reportReturnType]


def leave(error: Exception, code: int) -> int:
    """`code`, to exit with; but where only this process failed it ends here: the others would wait for it."""
    if jax.process_count() > 1 and not getattr(error, "of_all", False):
        said = "this process cannot go on (another that ended may be why): end all, and start all again"
        print(said, file=sys.stderr, flush=True)
        if first():
            time.sleep(3)  # with it the others lose their coordinator: first let them say what they know
        os._exit(code)
    return code


def check_same(what: str, content: Callable[[], bytes]) -> None:
    """Raises ValueError if `content` differs between processes: they would run different programs."""
    if jax.process_count() == 1:
        return
    digests = exchanged(together(lambda: hashlib.sha256(content()).hexdigest()))

    def compare() -> None:
        if len(set(digests)) > 1:
            mine = "" if digests[jax.process_index()] == digests[0] else ": this process differs from process 0"
            raise ValueError(f"{what} differ between processes{mine}")

    together(compare)
