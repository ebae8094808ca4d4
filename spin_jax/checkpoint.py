"""Orbax checkpoints: the parameters an iteration ends with, and the steps within one.

Every checkpoint is committed by a file written last, so that an interrupted save leaves no false one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint.experimental.v1 import options as ocp_options

from spin_jax import hosts


def _context() -> ocp.Context:
    context = ocp.Context()
    context.atomicity.mode = ocp_options.AtomicityMode.COMMIT_FILE
    return context


def abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree of arrays: what `restore` needs."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def exists(path: epath.PathLike) -> bool:
    """Whether a whole checkpoint stands at `path`."""

    def whole() -> bool:
        with _context():
            return hosts.first() and epath.Path(path).exists() and ocp.is_orbax_checkpoint(epath.Path(path))

    return bool(hosts.agreed(hosts.together(whole)))


def save(path: epath.PathLike, tree: Any) -> None:
    """Writes a tree of arrays, replacing what stands there."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _context():
        ocp.save(path, tree, overwrite=True)


def restore(path: epath.PathLike, like: Any) -> Any:
    """Reads a tree of arrays into the shapes, dtypes and shardings of `like`.

    Raises:
        ValueError: the checkpoint does not fit, with orbax's reason.
    """
    with _context():
        stored = ocp.metadata(epath.Path(path)).metadata
        _check(path, stored, like)
        return ocp.load(epath.Path(path), like)


def _check(path: epath.PathLike, stored: Any, like: Any) -> None:
    """Orbax would cast a wrong dtype without a word."""

    def leaves(tree: Any) -> dict[str, Any]:
        flat, _ = jax.tree_util.tree_flatten_with_path(tree)
        return {jax.tree_util.keystr(key): (tuple(x.shape), str(x.dtype)) for key, x in flat}

    ours, theirs = leaves(like), leaves(stored)
    if ours != theirs:
        names = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        raise ValueError(
            f"{path} does not fit this run: {names[0]} is {theirs.get(names[0])} there and "
            f"{ours.get(names[0])} here ({len(names)} parameters differ)"
        )


class StepCheckpoints:
    """Checkpoints within one training phase, pruned to the newest `keep`."""

    def __init__(self, checkpointer: Any, on_save: Callable[[], None]):
        self._checkpointer = checkpointer
        self._on_save = on_save

    @classmethod
    @contextmanager
    def open(
        cls, path: epath.PathLike, keep: int, on_save: Callable[[], None] = lambda: None
    ) -> Iterator["StepCheckpoints"]:
        """`on_save` comes before each checkpoint: what a run must not have less of than of steps."""
        policy: Any = ocp.training.preservation_policies.LatestN(keep)
        with _context():
            opened = ocp.training.Checkpointer(
                epath.Path(path), preservation_policy=policy, context=_context()
            )
            with opened as checkpointer:
                yield cls(checkpointer, on_save)

    def steps_done(self) -> int:
        """Steps behind the newest checkpoint; 0 where there is none."""
        latest = self._checkpointer.latest
        return int(hosts.agreed(latest.step if latest else 0))

    def restore(self, like: Any) -> Any:
        """The newest checkpoint's state."""
        return self._checkpointer.load(self.steps_done(), like)

    def save(self, steps_done: int, state: Any) -> None:
        if self.steps_done() < steps_done:
            self._on_save()
            self._checkpointer.save(steps_done, state, force=True)
