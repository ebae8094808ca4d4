"""From the config to the parts of the compiled programs: decoder, meshes, batch shapes, optimizer, sampling.

A run, `benchmark` and `plan` all use these functions, so that they compile the same programs.
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from spin_jax import config_values
from spin_jax.config import Config
from spin_jax.data.records import Pair
from spin_jax.forecast.job import Job
from spin_jax.models import cost, loading, lora
from spin_jax.models.architecture import Model, ModelConfig
from spin_jax.models.attention import kernel_for
from spin_jax.models.decoder import Decoder
from spin_jax.runtime import sharding
from spin_jax.sampling import placement
from spin_jax.sampling.next_token import Sampling
from spin_jax.selfplay.variants import reference_weights
from spin_jax.training import batch_shape, custom_loss
from spin_jax.training.optimizer import Optimization
from spin_jax.training.packing import RowShape, sizes
from spin_jax.training.step import SPIN


def decoder(config: Config, model: Model) -> Decoder:
    """The model as a function of its parameters, which policy and opponent share."""
    return Decoder(model.config, model.dtype, config.train.remat, kernel(config, model))


def kernel(config: Config, model: Model) -> str:
    """The kernel of attention. `official` needs `plain`, which alone can hide tokens from all others."""
    if config.official:
        return "plain"
    if model.config.sinks and config.model.attention not in (None, "plain"):
        raise ValueError(f"model.attention={config.model.attention}: only plain has this model's attention sinks")
    return config.model.attention or kernel_for(model.mesh.devices.flat[0].platform, model.dtype, model.config.sinks)


def spin(config: Config, model: Model) -> SPIN:
    """The objective of self-play: the config's loss on the model."""
    c = config.loss
    return SPIN(decoder(config, model), custom_loss.make(c), custom_loss.roles(c))


def optimization(config: Config, t: int) -> Optimization:
    """How iteration t is optimized."""
    values = _optimization_keys(config.train)
    for key in ("learning_rate", "epochs"):
        values[key] = config_values.per_iteration(values[key], t)
    return Optimization(**values)


def sft_optimization(config: Config, control: bool = False) -> Optimization:
    """How the start or the SFT control is optimized."""
    values, rate = _optimization_keys(config.sft), config.sft.control_learning_rate
    if control and rate:
        values["learning_rate"] = rate
    return Optimization(**values)


def trained_params(config: Config, model: ModelConfig) -> int:
    """How many numbers self-play trains: all parameters, or those of the adapters."""
    c = config.train
    return lora.count(model, c.lora_rank, c.lora_targets) if c.lora_rank else cost.all_params(model)


def _optimization_keys(section: Config) -> dict[str, Any]:
    return {field.name: section[field.name] for field in dataclasses.fields(Optimization)}


def sampling(config: Config) -> Sampling:
    """How the next token of an answer is drawn."""
    c = config.sampling
    return Sampling(c.max_new_tokens, c.temperature, c.top_k, c.top_p)


def job(config: Config, model: Model, shape: RowShape, pairs: Sequence[Pair], hosts: int = 1, slices: int = 1) -> Job:
    """The run as arithmetic sees it; `pairs` are some whose mean lengths are about those of `lengths.expected`."""
    iterations = range(config.selfplay.start, config.selfplay.iterations)
    return Job(
        config,
        model,
        shape,
        pairs,
        tensor=sampling_tensor(config, model),
        slots=slots(config, model),
        trained=trained_params(config, model.config),
        references={t: len(reference_weights(config, t)) for t in iterations},
        judge=judge_architecture(config, model),
        hosts=hosts,
        slices=slices,
    )


# --- meshes --------------------------------------------------------------------------------------


def mesh_sizes(config: Config, model: ModelConfig, devices: int, slices: int = 1) -> dict[str, int]:
    """The size of each axis of the mesh for a model on this many devices.

    Raises:
        ValueError: the sizes in the config do not fit the number of devices.
    """
    data, fsdp, context, tensor = (config.mesh[axis] for axis in sharding.AXES)
    if tensor is None:
        # Two pairs for each part of the batch, where heads allow it: a row of one pair is half empty.
        widest = math.gcd(model.num_key_value_heads, max(devices // slices // context, 1))
        fitting = [n for n in range(1, widest + 1) if widest % n == 0]
        few = [n for n in fitting if 2 * devices // context // n <= config.train.batch_size]
        tensor = 1 if fsdp != -1 else few[0] if few else widest
    return sharding.mesh_sizes(data, fsdp, context, tensor, devices, slices)


def placed(config: Config, model: Model) -> Model:
    """A model without weights, with the mesh of training and scoring, over all devices."""
    devices = jax.devices()
    sizes = mesh_sizes(config, model.config, len(devices), sharding.slices_of(devices))
    return dataclasses.replace(model, mesh=sharding.make_mesh(**sizes, devices=devices))


def sampling_tensor(config: Config, model: Model) -> int:
    """How many devices share one copy of the sampler's weights: sampling.tensor, or as few as have room."""
    c, judge = config.sampling, judge_architecture(config, model)
    beside = model.dtype.itemsize * cost.all_params(judge) if judge else 0.0
    return c.tensor or placement.devices_per_copy(model, c.batch_size, longest(config), beside)


def judge_architecture(config: Config, model: Model) -> ModelConfig | None:
    """The architecture of the reward model; of one on the hub, whose files may not be here, that of the model."""
    scorer = config.selfplay.scorer
    if not scorer or ":" in scorer:
        return None
    return loading.architecture(scorer) if os.path.isdir(scorer) else model.config


def sampling_mesh(config: Config, model: Model) -> jax.sharding.Mesh:
    """The sampler's mesh: the model's devices, of which `sampling_tensor` share a copy of the weights."""
    return placement.sampling_mesh(model, sampling_tensor(config, model))


def slots(config: Config, model: Model) -> int:
    """Answers in progress at a time on all devices together."""
    return config.sampling.batch_size * (model.mesh.size // sampling_tensor(config, model))


def longest(config: Config) -> int:
    """Tokens of the longest prompt together with its answer."""
    return min(config.lengths.max_prompt + config.sampling.max_new_tokens, config.lengths.max_length)


def check_mesh(config: Config, model: Model) -> None:
    """Raises ValueError where the model cannot be split over the mesh."""
    sampling, heads = sampling_tensor(config, model), model.config.num_key_value_heads
    sharding.check_heads("mesh.tensor", sharding.tensor_shards(model.mesh), heads)
    sharding.check_heads("sampling.tensor", sampling, heads)
    if model.mesh.size % sampling:
        raise ValueError(f"sampling.tensor={sampling} does not divide {model.mesh.size} devices")


# --- shapes --------------------------------------------------------------------------------------


def expected_pairs(config: Any, vocab_size: int, count: int) -> list[Pair]:
    """Pairs of random ids; each length lies between half of `lengths.expected` and one and a half of it.

    `benchmark` and `plan` use them where there are no data.
    """
    rng = np.random.default_rng(0)
    lengths = np.stack([rng.integers(n // 2, n + n // 2 + 1, count) for n in config.lengths.expected], axis=1)
    lengths = np.maximum(lengths, 1)
    lengths[:, 0] = np.minimum(lengths[:, 0], min(config.lengths.max_prompt, config.lengths.max_length - 1))
    room = config.lengths.max_length - lengths[:, 0]
    lengths[:, 1] = np.minimum(lengths[:, 1], room)
    lengths[:, 2] = np.minimum(lengths[:, 2], np.minimum(room, config.sampling.max_new_tokens))
    ids = [[rng.integers(3, vocab_size, n).astype(np.int32) for n in row] for row in lengths]
    return [Pair(number, 0, [], [], *row, truncated=False, start=row[-1]) for number, row in enumerate(ids)]


def pair_shape_of_lengths(
    config: Config, model: Model, lengths: np.ndarray, given: Mapping[int, Sequence[Pair]]
) -> RowShape:
    """The shape of micro-batches that every pair of the run fits, so that one program serves all iterations.

    It depends on the examples alone, unless given pairs are longer than sampled ones can be. An iteration on the pairs
    of another run then equals that run's iteration to the bit.

    Args:
        lengths: int [N, 2], the tokens of each example's prompt and human answer.
        given: the pairs that are trained on in place of sampled ones, by iteration.
    """
    prompts, real = lengths.T
    new, limit = config.sampling.max_new_tokens, config.lengths.max_length
    roles = custom_loss.roles(config.loss)
    # Other pairings put a sampled answer in the place of the human one, and perhaps the human one in that of the other.
    mixed = not config.selfplay.pairing.startswith("human/")

    def of(prompts: Any, real: Any, sampled: Any, start: Any) -> np.ndarray:
        longer = np.maximum(real, sampled) if mixed else real
        lengths = {"real": longer, "generated": longer if mixed and "real" not in roles else sampled, "start": start}
        return sizes(prompts, *(lengths[role] for role in roles))

    # Answers are expected to be as long as the human ones; at most they are as long as they may be.
    likely, most = np.minimum(real, new), np.clip(limit - prompts, 1, new)
    expected = of(prompts, real, likely, likely)
    parts = (slice(start, start + 2**18) for start in range(0, len(prompts), 2**18))  # they take less memory
    largest = np.max([of(prompts[p], real[p], most[p], most[p]).max(axis=0) for p in parts], axis=0)
    for pairs in given.values():  # the answers of the start may belong to any iteration
        prompt, human, own = ([len(getattr(p, name)) for p in pairs] for name in ("prompt", "real", "generated"))
        longest = [max(own)] * len(pairs)
        measured = of(prompt, human, longest if mixed else own, longest)
        largest = np.maximum(largest, measured.max(axis=0))
    if config.official:  # it tokenizes answers a second time, and they can grow
        largest = np.maximum(largest, sizes([0], *[[limit]] * len(roles))[0])
    return row_shape(config.train, config, model, expected, largest)


def example_shape_of_lengths(config: Config, model: Model, lengths: np.ndarray) -> RowShape:
    """The shape of micro-batches of examples, whose prompts and human answers have these lengths, int [N, 2]."""
    expected = sizes(*lengths.T)
    return row_shape(config.sft, config, model, expected, expected.max(axis=0))


def row_shape(section: Config, config: Config, model: Model, expected: np.ndarray, largest: np.ndarray) -> RowShape:
    """The micro-batches of a section, `train` or `sft`, for groups of these sizes."""
    options = {key: section[key] for key in ("batch_size", "tokens_per_device", "row_length")}
    return batch_shape.row_shape(model, expected, largest, kernel=kernel(config, model), **options)
