"""The layout that attention and its kernels share: token positions, and which tokens see each other."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

KEPT = "attended"  # the name under which remat policies keep what attention computed


class Layout(NamedTuple):
    """The position of each token of a row, and which tokens it may see.

    A token sees those of its own segment that stand before it, are not of another branch, and lie within
    the window. Segment 0 is padding; −s sees what s sees and is itself seen by none (`official` only).
    """

    positions: Any  # int32 [B, T]: within the token's own sequence, from 0
    segments: Any  # int32 [B, T]: the group
    branches: Any = None  # int32 [B, T]: 0 the prompt, 1 and up the answers to it; None: no answers
    unshared: Any = None  # int32 [B, U], for splash: the tokens, from 1, sequence by sequence; 0 fills up


def matmul_precision(dtype: Any) -> lax.Precision | None:
    """float32 means float32, on accelerators too (whose default is a shorter format)."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def on_cpu() -> bool:
    """Whether the program is for a CPU, where kernels are interpreted. The mesh says so."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (device.platform if device else jax.default_backend()) == "cpu"
