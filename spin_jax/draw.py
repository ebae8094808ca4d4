"""Drawing the next token: temperature, top-k and top-p, each row with a key of its own.

Axes: B rows, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from spin_jax import sharding

KEYS = "threefry2x32"  # whatever JAX's default is: an answer is a function of seed and prompt


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: temperature 0 is greedy; top-k, then top-p, as in transformers."""

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: at least 1")
        if self.temperature != 0 and not 1e-30 <= self.temperature <= 1e30:  # float32 holds no smaller ones
            raise ValueError(f"temperature={self.temperature}: 0 (greedy), or from 1e-30 to 1e30")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: at least 1, or unset")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: in (0, 1], or unset")


def prompt_keys(
    seed: int, iteration: int, prompt_ids: Sequence[int], sample_id: int | Sequence[int] = 0
) -> Array:
    """One key an answer: fold_in(seed, iteration, prompt, sample), whatever the batch."""
    base = jax.random.fold_in(jax.random.key(seed, impl=KEYS), iteration)
    ids = np.asarray(prompt_ids, np.int64).astype(np.uint64)
    low, high = (ids & 0xFFFFFFFF).astype(np.uint32), (ids >> 32).astype(np.uint32)
    return _fold(base, low, high, np.broadcast_to(np.asarray(sample_id, np.uint32), low.shape))


@jax.jit
def _fold(base: Array, low: Array, high: Array, sample_ids: Array) -> Array:
    def fold(low, high, sample_id):
        key = jax.random.fold_in(base, low)
        key = jnp.where(high > 0, jax.random.fold_in(key, high), key)  # ids beyond 32 bits
        return jax.random.fold_in(key, sample_id)

    return jax.vmap(fold)(low, high, sample_ids)


def truncate_logits(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Sets to −inf what top-k and top-p leave out."""
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        smallest = lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if sampling.top_p is not None and sampling.top_p < 1:
        descending = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(descending, axis=-1)
        # Kept: the fewest tokens whose mass reaches top_p, that is, those with less than it before them.
        kept = jnp.cumsum(probabilities, axis=-1) - probabilities < sampling.top_p
        smallest = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return logits


def draw(logits: Float[Array, "B V"], keys: Array, sampling: Sampling) -> Int[Array, " B"]:
    """The next token of each row, drawn with the row's own key."""
    logits = sharding.reshard(logits, "batch", None)
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # The largest is 0, so that the smallest temperature overflows to −∞ only.
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / sampling.temperature
    return _categorical(truncate_logits(logits, sampling), keys)


_BLOCK = 256


def _categorical(logits: Float[Array, "B V"], keys: Array) -> Int[Array, " B"]:
    """Draws by inverting the distribution function, with one uniform number a row.

    Gumbel noise would take a random number for every entry of the vocabulary, which costs as much as
    projecting to it. The sums run over blocks first, then within the one that was hit. The largest logit
    is 0.
    """
    B, V = logits.shape
    weights = jnp.exp(logits)
    weights = jnp.pad(weights, ((0, 0), (0, -V % _BLOCK))).reshape(B, -1, _BLOCK)
    point = jax.vmap(jax.random.uniform)(keys)

    def invert(weights: Float[Array, "B n"], point: Float[Array, " B"]):
        """The first entry at which the running sum exceeds the point, and what is left of the point."""
        sums = jnp.cumsum(weights, axis=-1)
        # As rounded, they may first exceed the point where there is no weight, or nowhere at all.
        sums = jnp.minimum(sums, jnp.nextafter(point, jnp.inf)[:, None])
        index = jnp.argmax(jnp.where(weights > 0, sums, -jnp.inf), axis=-1)
        return index, point - jnp.sum(
            jnp.where(jnp.arange(weights.shape[1]) < index[:, None], weights, 0), axis=-1
        )

    blocks = jnp.sum(weights, axis=-1)
    block, rest = invert(blocks, point * jnp.sum(blocks, axis=-1))
    within, _ = invert(jnp.take_along_axis(weights, block[:, None, None], axis=1)[:, 0], rest)
    return (block * _BLOCK + within).astype(jnp.int32)
