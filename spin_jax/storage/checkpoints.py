"""Orbax checkpoints: the parameters at the end of a training phase, and the steps within a phase.

Orbax writes the arrays. A checkpoint counts when its folder is sealed (seals.py), and it is compared with its
seal before it is read, because orbax gives no error for a flipped bit or a wrong dtype.
"""

import contextlib
import errno
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint.experimental.v1 import options as ocp_options

from spin_jax import errors
from spin_jax.runtime import processes, stopwatch
from spin_jax.storage import files, seals


def _context() -> ocp.Context:
    context = ocp.Context()
    context.atomicity.mode = ocp_options.AtomicityMode.COMMIT_FILE  # object stores cannot rename
    return context


def size(tree: Any) -> int:
    """The most bytes that a checkpoint of a tree of arrays takes on disk: those of the arrays, and 1 MiB."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) + 2**20


@stopwatch.phase("checkpoint")
def save(path: epath.PathLike, tree: Any) -> None:
    """Writes a tree of arrays, in place of what `path` holds; NoRoom where the disk is too small or full."""
    path = epath.Path(path)
    files.remove(path)
    files.check_room(path, size(tree), f"the checkpoint {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _context():
            ocp.save(path, tree)
    except Exception as error:
        # Half a checkpoint only fills the disk. If its removal fails, the first error is still raised.
        with contextlib.suppress(OSError):
            if processes.first():
                files.remove_here(path)
        if any("No space left" in reason or "quota exceeded" in reason for reason in _reasons(error)):
            raise errors.NoRoom(errno.ENOSPC, f"the disk is full: {path} cannot be written; make room") from error
        raise
    seals.seal(path)


@stopwatch.phase("load")
def restore(path: epath.PathLike, like: Any) -> Any:
    """Reads a tree of arrays into the shapes, dtypes and shardings of `like`.

    Raises:
        Damaged: files differ from what was written.
        ValueError: the checkpoint does not fit `like`, or orbax cannot read it.
    """
    seals.check_seal(path)
    return _load(path, like)


def _load(path: epath.PathLike, like: Any) -> Any:
    try:
        with _context():
            stored = ocp.metadata(epath.Path(path)).metadata
            _check(stored, like)
            return ocp.load(epath.Path(path), like)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {[*_reasons(error)][-1]}") from error


def _reasons(error: BaseException | None) -> Iterator[str]:
    """The messages of an error and of its causes."""
    while error is not None:
        yield str(error)
        error = error.__cause__


def _check(stored: Any, like: Any) -> None:
    """Raises ValueError for another shape or dtype, which orbax would cast without an error."""

    def leaves(tree: Any) -> dict[str, Any]:  # a named tuple has the same names as the dict that orbax stores for it
        named = [
            (jax.tree_util.keystr(key, simple=True, separator="/"), x) for key, x in jax.tree.leaves_with_path(tree)
        ]
        return {name: (tuple(x.shape), str(x.dtype)) for name, x in named}

    ours, theirs = leaves(like), leaves(stored)
    if names := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
        first, more = names[0], f"; {len(names) - 1} more differ" if len(names) > 1 else ""
        there = f"{first} is {theirs.get(first)} there and {ours.get(first)} here"
        raise ValueError(f"it does not fit this run: {there}{more}")


class StepCheckpoints:
    """Checkpoints within one training phase, pruned to the newest `keep`."""

    def __init__(self, path: epath.PathLike, keep: int, on_save: Callable[[], None] = lambda: None):
        """`on_save` runs before each checkpoint; it saves what must be at least as new (the metrics)."""
        self._path = epath.Path(path)
        self._keep = keep
        self._on_save = on_save

    def _steps(self) -> list[list[int]]:
        """[step, whether it is complete] of each checkpoint, as process 0 sees them."""

        def steps() -> list[list[int]]:
            there = self._path.iterdir() if processes.first() and self._path.exists() else []
            return sorted([int(p.name), (p / files.SUMS).exists()] for p in there if p.name.isdigit())

        return processes.exchanged(processes.together(steps))[0]

    def steps_done(self) -> int:
        """The number of steps before the newest undamaged checkpoint; 0 if there is none.

        Newer checkpoints, which are incomplete or damaged, are removed.
        """
        for step, whole in reversed(self._steps()):
            try:
                if whole:
                    seals.check_seal(self._path / str(step))
                    return step
            except errors.Damaged as error:
                used = "the one before it is used, or the phase begins anew"
                processes.say(f"\nWARNING: {error}\nIt is removed; {used}.\n")
            files.remove(self._path / str(step))
        return 0

    @stopwatch.phase("load")
    def restore(self, steps_done: int, like: Any) -> Any:
        """Reads the state after so many steps, a number that the method `steps_done` returned."""
        return _load(self._path / str(steps_done), like)

    def check_room(self, state: Any) -> None:
        """Raises NoRoom if the disk has no room for the next checkpoint."""
        files.check_room(self._path, size(state), f"the next checkpoint in {self._path}")

    def save(self, steps_done: int, state: Any) -> None:
        """Writes a checkpoint, and only then removes the oldest ones."""
        self._on_save()
        save(self._path / str(steps_done), state)
        for step, _ in self._steps()[: -self._keep]:
            files.remove(self._path / str(step))
