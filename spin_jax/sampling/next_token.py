"""Draws the next token with temperature, top-k and top-p. Each row has its own random key.

Axes: B rows, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from spin_jax.runtime import sharding

KEYS = "threefry2x32"  # fixed, because an answer must not depend on JAX's default


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Temperature 0 is greedy; top-k comes before top-p, as in transformers."""

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: at least 1")
        if self.temperature != 0 and not 1e-30 <= self.temperature <= 1e30:  # float32 holds these
            raise ValueError(f"temperature={self.temperature}: 0 (greedy), or from 1e-30 to 1e30")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: at least 1, or unset")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: in (0, 1], or unset")


def prompt_keys(seed: int, iteration: int, prompt_ids: Sequence[int], sample_id: int | Sequence[int] = 0) -> Array:
    """A key for each answer: fold_in(seed, iteration, prompt, sample). It does not depend on the batch."""
    base = jax.random.fold_in(jax.random.key(seed, impl=KEYS), iteration)
    ids = np.asarray(prompt_ids, np.int64).astype(np.uint64)
    low, high = (ids & 0xFFFFFFFF).astype(np.uint32), (ids >> 32).astype(np.uint32)
    return _fold(base, low, high, np.broadcast_to(np.asarray(sample_id, np.uint32), low.shape))


@jax.jit
def _fold(base: Array, low: Array, high: Array, sample_ids: Array) -> Array:
    def fold(low, high, sample_id):
        key = jax.random.fold_in(base, low)
        key = jnp.where(high > 0, jax.random.fold_in(key, high), key)  # for ids of more than 32 bits
        return jax.random.fold_in(key, sample_id)

    return jax.vmap(fold)(low, high, sample_ids)


def truncate_logits(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Sets the logits of the tokens that top-k and top-p remove to −inf.

    Tokens with equal logits are kept or removed together. Top-k keeps a token if fewer than k tokens have a larger
    logit, exactly. Top-p keeps a token if the tokens with a larger logit have less than top_p of the probability mass,
    up to the rounding of its float32 sum (about 1e-6).
    """
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        ones = jnp.ones_like(logits)  # float32 counts exactly up to 2²⁴
        logits = jnp.where(_sortable(logits) < _cutoff(logits, ones, sampling.top_k), -jnp.inf, logits)
    if sampling.top_p is not None and sampling.top_p < 1:
        mass = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
        enough = sampling.top_p * jnp.sum(_blocks(mass).sum(axis=-1), axis=-1)
        enough = jnp.maximum(enough, jnp.finfo(jnp.float32).tiny)  # the likeliest token is always kept
        logits = jnp.where(_sortable(logits) < _cutoff(logits, mass, enough), -jnp.inf, logits)
    return logits


def _sortable(logits: Float[Array, "B V"]) -> Int[Array, "B V"]:
    """Integers in the same order as the logits: their bits, which are flipped for negative numbers."""
    bits = lax.bitcast_convert_type(jnp.where(logits == 0, 0.0, logits), jnp.int32)  # −0 is 0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _cutoff(
    logits: Float[Array, "B V"], amounts: Float[Array, "B V"], enough: Float[Array, " B"] | int
) -> Int[Array, "B 1"]:
    """The smallest integer, in the order of `_sortable`, above which the amounts sum to less than enough.

    The search reads the vocabulary a fixed number of times; sorting it would take several times as long. On a CPU each
    of 32 passes tries one integer. On other devices, where starting a kernel takes longer than the sums, each of 8
    passes tries 15.
    """
    cutoff = lax.platform_dependent(
        _sortable(logits),
        amounts,
        jnp.asarray(enough, jnp.float32),
        cpu=functools.partial(_search, bits=1),
        default=functools.partial(_search, bits=4),
    )
    return cutoff[:, None]


def _search(sortable: Array, amounts: Array, enough: Array, *, bits: int) -> Int[Array, " B"]:
    """Finds the cutoff from its highest bits down, `bits` of them in each pass."""
    lowest = jnp.iinfo(jnp.int32).min
    sortable, amounts = _blocks(sortable, lowest), _blocks(amounts)

    def find_next_bits(number, low):
        shift = 32 - bits * (number + 1)
        candidates = [low + (jnp.int32(step) << shift) for step in range(1, 2**bits)]
        above = [jnp.where(sortable > each[:, None, None], amounts, 0).sum(axis=-1) for each in candidates]
        too_low = jnp.stack(above, axis=1).sum(axis=-1) >= enough.reshape(-1, 1)
        return low + (jnp.sum(too_low, axis=-1, dtype=jnp.int32) << shift)

    # The passes find the largest integer that is still too low; the cutoff is the next one.
    return lax.fori_loop(0, 32 // bits, find_next_bits, jnp.full_like(sortable[:, 0, 0], lowest)) + 1


def draw(logits: Float[Array, "B V"], keys: Array, sampling: Sampling) -> Int[Array, " B"]:
    """The next token of each row, drawn with the row's own key."""
    logits = sharding.reshard(logits, "batch", None)
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # The largest logit becomes 0, so that a very small temperature can only overflow to −∞.
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / sampling.temperature
    return _categorical(truncate_logits(logits, sampling), keys)


_BLOCK = 256  # sums are taken over blocks first, which is fast and rounds less


def _blocks(x: Array, fill: float = 0) -> Array:
    """Reshapes [B, V] to [B, blocks, 256], padded with `fill` at the end."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % _BLOCK)), constant_values=fill).reshape(len(x), -1, _BLOCK)


def _categorical(logits: Float[Array, "B V"], keys: Array) -> Int[Array, " B"]:
    """Draws by inverting the distribution function, with one uniform number for each row. The largest logit is 0.

    Gumbel noise would need a random number for every entry of the vocabulary, which costs as much as the projection to
    it. The sums run over blocks first, and then within the block that contains the point.
    """
    weights = _blocks(jnp.exp(logits))
    point = jax.vmap(jax.random.uniform)(keys)

    def invert(weights: Float[Array, "B n"], point: Float[Array, " B"]):
        """The first entry at which the running sum exceeds the point, and the point minus the sum before."""
        sums = jnp.cumsum(weights, axis=-1)
        # Because of rounding they may first exceed the point where the weight is 0, or may never exceed it.
        sums = jnp.minimum(sums, jnp.nextafter(point, jnp.inf)[:, None])
        index = jnp.argmax(jnp.where(weights > 0, sums, -jnp.inf), axis=-1)
        return index, point - jnp.sum(jnp.where(jnp.arange(weights.shape[1]) < index[:, None], weights, 0), axis=-1)

    blocks = jnp.sum(weights, axis=-1)
    block, rest = invert(blocks, point * jnp.sum(blocks, axis=-1))
    within, _ = invert(jnp.take_along_axis(weights, block[:, None, None], axis=1)[:, 0], rest)
    return (block * _BLOCK + within).astype(jnp.int32)
