"""Spreads the sampler's copies of the weights, and its slots, over the devices."""

import jax

from spin_jax.models import cost
from spin_jax.models.architecture import Model
from spin_jax.runtime import chips, sharding
from spin_jax.sampling.continuous import cache_columns


def devices_per_copy(model: Model, batch_size: int, longest: int, beside: float = 0.0) -> int:
    """How many devices share one copy of the sampler's weights: the fewest that have room for it.

    A device holds its part of the copy and of the cache, beside its part of the float32 weights. A fifth of
    its memory is left for everything else.

    Args:
        batch_size: answers in progress at a time for each copy.
        longest: tokens of the longest prompt and its answer together.
        beside: bytes of all devices that something else takes while answers are sampled.
    """
    chip = chips.chip(model.mesh.devices.flat[0].device_kind)
    if chip is None:
        return 1
    heads, devices = model.config.num_key_value_heads, model.mesh.size
    stored = (4 * cost.all_params(model.config) + beside) / sharding.weight_shards(model.mesh)
    cached = cost.cached_numbers(model.config, cache_columns(model.config, longest)) * batch_size
    copy = model.dtype.itemsize * (cost.all_params(model.config) + cached)
    shares = [n for n in range(1, heads + 1) if heads % n == 0 and devices % n == 0]
    return next((n for n in shares if stored + copy / n < 0.8 * chip.memory), shares[-1])


def sampling_mesh(model: Model, devices_each: int) -> jax.sharding.Mesh:
    """A mesh of the model's devices, in which `devices_each` devices share a copy of the weights."""
    return sharding.make_mesh(-1, 1, devices_each, list(model.mesh.devices.flat))
