"""Orbax checkpoints: the parameters a phase ends with, and the steps within one.

Orbax writes the arrays; a checkpoint counts once its folder is sealed (files.py), and is compared with its
seal before it is read: orbax itself would load a flipped bit, and cast a wrong dtype, without a word.
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
from spin_jax.runtime import processes
from spin_jax.storage import files, seals

_SLACK = 2**20  # bytes that a checkpoint takes beside its arrays


def _context() -> ocp.Context:
    context = ocp.Context()
    context.atomicity.mode = ocp_options.AtomicityMode.COMMIT_FILE  # no renaming: object stores have none
    return context


def size(tree: Any) -> int:
    """Bytes that a checkpoint of a tree of arrays takes on disk, at most."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) + _SLACK


def exists(path: epath.PathLike) -> bool:
    """Whether a whole checkpoint stands at `path`."""
    return seals.sealed(path)


def save(path: epath.PathLike, tree: Any) -> None:
    """Writes a tree of arrays, replacing what stands there.

    Raises:
        files.NoRoom: the disk is full, or would be.
    """
    path = epath.Path(path)
    files.remove(path)
    files.check_room(path, size(tree), f"the checkpoint {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _context():
            ocp.save(path, tree)
    except Exception as error:
        # A part of it would keep a full disk full. What stands in the way of that is not the error to tell.
        with contextlib.suppress(OSError):
            if processes.first():
                files.remove_here(path)
        if any("No space left" in reason or "quota exceeded" in reason for reason in _reasons(error)):
            raise errors.NoRoom(
                errno.ENOSPC, f"the disk is full: {path} cannot be written; make room"
            ) from error
        raise
    seals.seal(path)


def restore(path: epath.PathLike, like: Any) -> Any:
    """Reads a tree of arrays into the shapes, dtypes and shardings of `like`.

    Raises:
        files.Damaged: files differ from what was written.
        ValueError: the checkpoint does not fit, with orbax's reason.
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
    """What orbax says, and in the causes of it what has happened."""
    while error is not None:
        yield str(error)
        error = error.__cause__


def _name(key: Any) -> str:
    """A leaf's path, alike for named tuples and for the dicts that orbax makes of them."""
    return jax.tree_util.keystr(key, simple=True, separator="/")


def _check(stored: Any, like: Any) -> None:
    """Orbax would cast a wrong dtype without a word."""

    def leaves(tree: Any) -> dict[str, Any]:
        flat, _ = jax.tree_util.tree_flatten_with_path(tree)
        return {_name(key): (tuple(x.shape), str(x.dtype)) for key, x in flat}

    ours, theirs = leaves(like), leaves(stored)
    if ours != theirs:
        names = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        raise ValueError(
            f"it does not fit this run: {names[0]} is {theirs.get(names[0])} there and "
            f"{ours.get(names[0])} here{f'; {len(names) - 1} more differ' if len(names) > 1 else ''}"
        )


class StepCheckpoints:
    """Checkpoints within one training phase, pruned to the newest `keep`."""

    def __init__(self, path: epath.PathLike, keep: int, on_save: Callable[[], None] = lambda: None):
        """`on_save` comes before each checkpoint: what a run must not have less of than of steps."""
        self._path = epath.Path(path)
        self._keep = keep
        self._on_save = on_save

    def _steps(self) -> list[tuple[int, bool]]:
        """Steps that have a checkpoint, and whether it is whole; as process 0 sees them."""

        def steps() -> list[list[int]]:
            there = self._path.iterdir() if processes.first() and self._path.exists() else []
            return sorted([int(p.name), (p / files.SUMS).exists()] for p in there if p.name.isdigit())

        return [(step, bool(whole)) for step, whole in processes.exchanged(processes.together(steps))[0]]

    def steps_done(self) -> int:
        """Steps behind the newest checkpoint that is as it was written; 0 where there is none.

        Those after it are removed: what a kill left half written, and what is damaged.
        """
        for step, whole in reversed(self._steps()):
            try:
                if whole:
                    seals.check_seal(self._path / str(step))
                    return step
            except errors.Damaged as error:
                processes.say(
                    f"\nWARNING: {error}\n"
                    "It is removed; the one before it is used, or the phase begins anew.\n"
                )
            files.remove(self._path / str(step))
        return 0

    def restore(self, steps_done: int, like: Any) -> Any:
        """The state behind so many steps: one that `steps_done` names."""
        return _load(self._path / str(steps_done), like)

    def check_room(self, state: Any) -> None:
        """Raises files.NoRoom where the next checkpoint would not fit."""
        files.check_room(self._path, size(state), f"the next checkpoint in {self._path}")

    def save(self, steps_done: int, state: Any) -> None:
        """Writes one, and removes those that are not needed any more: not before."""
        self._on_save()
        save(self._path / str(steps_done), state)
        for step, _ in self._steps()[: -self._keep]:
            files.remove(self._path / str(step))
