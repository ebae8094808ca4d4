"""The cache of keys and values: a ring whose rows all write the same column."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from spin_jax.kernels.layout import Layout
from spin_jax.models.architecture import ModelConfig
from spin_jax.runtime import sharding


class Cache(NamedTuple):
    """Keys and values of the tokens so far: one pair of arrays for each layer.

    It is a ring: the first column follows the last. All rows write the same column, so that each row's newest
    token stands there, its earlier tokens before it, and its position says where all others stand.
    """

    keys: tuple[Float[Array, "B K S H"], ...]
    values: tuple[Float[Array, "B K S H"], ...]
    column: Int[Array, ""]  # the next one that is written

    @property
    def columns(self) -> int:
        return self.keys[0].shape[2]


def ring_layout(newest: Int[Array, " B"], column: Int[Array, ""], columns: int) -> Layout:
    """The layout of a ring's columns, where `column` holds each row's newest token, whose position is `newest`.

    Columns without a token of the row are padding.
    """
    back = (column - jnp.arange(columns)) % columns
    positions = newest[:, None] - back
    return Layout(positions, (positions >= 0).astype(jnp.int32))


def new_cache(config: ModelConfig, rows: int, columns: int, dtype: Any) -> Cache:
    """An empty cache, laid out over the mesh in use."""
    shape = (rows, config.num_key_value_heads, columns, config.head_dim)
    layout = sharding.spec("batch", "kv_heads", None, None)

    def empty() -> tuple[jax.Array, ...]:
        return tuple(jnp.zeros(shape, dtype, out_sharding=layout) for _ in range(config.num_hidden_layers))

    return Cache(keys=empty(), values=empty(), column=jnp.zeros((), jnp.int32))
