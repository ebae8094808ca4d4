"""Frozen weights in int8 or in NF4 (QLoRA, arXiv 2305.14314), stored by Google's qwix.

A QArray of qwix is a tree of two arrays: `qvalue` has the weight's shape and a few bits for each number, and `scale`
has a float32 for each block. A block is BLOCK numbers along one axis, or as many of them as divide it.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

BLOCK = 64
BYTES = {"int8": 1.0, "nf4": 0.5}  # of a number without its scale


def block(size: int) -> int:
    """How many numbers of an axis of this size share a scale."""
    return math.gcd(BLOCK, size)


def quantize(weight: Array, dtype: str, axis: int) -> Any:
    """A weight [L, …] as a QArray, with blocks along `axis`. One layer at a time, for NF4 takes 64 bytes a number."""
    import qwix

    def layer(w: Array) -> Any:
        within = axis - 1
        others = [n for n in range(w.ndim) if n != within]
        tiles = {within: block(w.shape[within])}
        return qwix.quantize(w.astype(jnp.float32), dtype, channelwise_axes=others, tiled_axes=tiles)

    return jax.lax.map(layer, weight)


def is_quantized(weight: Any) -> bool:
    """Whether a weight of a tree is a QArray."""
    return hasattr(weight, "qvalue")


def as_floats(tree: Any, by_parts: Callable[[Callable[[Any], Any], Any], Any]) -> Any:
    """The tree with float32 in place of each QArray. by_parts(run, weight) runs run(weight) on parts of a weight."""

    def plain(leaf: Any) -> Any:
        if not is_quantized(leaf):
            return leaf
        import qwix

        return by_parts(qwix.dequantize, leaf)

    return jax.tree.map(plain, tree, is_leaf=is_quantized)
