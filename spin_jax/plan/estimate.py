"""Memory and traffic of each phase by arithmetic alone.

This takes a moment and works for any machine, so suggestions are found by it. Some of the numbers below were learned
from the compilers' answers; a comment says where.
"""

import math
from typing import NamedTuple

from spin_jax.kernels import quantized
from spin_jax.models import cost
from spin_jax.plan.collectives import BETWEEN_SLICES
from spin_jax.plan.planned_run import PhaseCost, PlannedRun
from spin_jax.runtime import sharding
from spin_jax.sampling.continuous import cache_columns, prefill_rows
from spin_jax.selfplay import from_config
from spin_jax.training.optimizer import OPTIMIZERS


def _per_device(run: PlannedRun) -> float:
    """The number of parameters that each device keeps in training."""
    return cost.all_params(run.model.config) / sharding.weight_shards(run.model.mesh)


def _frozen(run: PlannedRun) -> float:
    """The bytes of each device's frozen weights."""
    m, dtype, item = run.model.config, run.config.train.frozen_dtype, run.model.dtype.itemsize
    if not dtype:
        return item * _per_device(run)
    heads, mlp = 2 * (m.num_attention_heads + m.num_key_value_heads) * m.head_dim, (2 + m.gated) * m.intermediate_size
    axes = (heads, m.head_dim), (mlp, m.intermediate_size // sharding.tensor_shards(run.model.mesh))
    each = [n * (item - quantized.BYTES[dtype] - 4 / quantized.block(size)) for n, size in axes]  # a scale is float32
    saved = m.num_hidden_layers * m.hidden_size * sum(each) / sharding.weight_shards(run.model.mesh)
    return item * _per_device(run) - saved


def estimated_phases(run: PlannedRun) -> dict[str, PhaseCost]:
    """{train, score, sample: memory and traffic of the phase}."""
    return {"train": _training(run), "score": _scoring(run), "sample": _sampling(run)}


class _Layer(NamedTuple):
    """What one layer takes of a device for one micro-batch."""

    tokens: int
    wide: float  # the inner width of the MLP, of all experts that a token goes through
    heads: float  # how many numbers a token's queries, keys, values and attended values are
    weights: float  # bytes of a layer's weights, gathered
    working: float  # bytes of the arrays that a layer computes
    logits: float  # bytes of the logits of a chunk and of their softmax


def _layer(run: PlannedRun) -> _Layer:
    m, shape, item = run.model.config, run.shape, run.model.dtype.itemsize
    tensor = sharding.tensor_shards(run.model.mesh)
    tokens = shape.rows // sharding.batch_shards(run.model.mesh) * shape.length
    heads = 2 * (m.num_attention_heads + m.num_key_value_heads) * m.head_dim / tensor
    wide = max(1, m.experts_per_token) * m.intermediate_size / tensor
    return _Layer(
        tokens,
        wide,
        heads,
        weights=item * cost.layer_params(m, m.num_experts) / tensor,
        working=item * tokens * (3 * wide + 6 * m.hidden_size + 2 * heads),
        logits=2 * 4 * min(2**25, tokens * m.vocab_size / 4) / tensor,  # a chunk is a quarter at most
    )


def _training(run: PlannedRun) -> PhaseCost:
    c, m, layer, item = run.config, run.model.config, _layer(run), run.model.dtype.itemsize
    whole = _per_device(run)
    share = from_config.trained_params(c, m) / cost.all_params(m)
    adapters, offload = bool(c.train.lora_rank), c.train.offload
    weights, mine = _frozen(run) if adapters else 4 * whole, 4 * share * whole
    tensor, D = sharding.tensor_shards(run.model.mesh), m.hidden_size
    kept = {  # how many numbers are kept of a token in a layer, beside the layer's input
        "full": 0,
        "attention": layer.heads,
        "attention+mlp": layer.heads + D + 2 * layer.wide,
        # JAX then also keeps float32 copies of norms, rotations and gates: twice as much, for a 7B.
        "none": 3 * layer.heads + 14 * D + 7 * layer.wide,
    }[c.train.remat]
    moments = OPTIMIZERS[c.train.optimizer].moments * mine
    # The sum of the gradients, to which micro-batches are added in place, and the step's copies of the weights in the
    # dtype of the computation. With adapters there are gradients beside their sums, and the frozen weights have that
    # dtype already.
    gradients = 2 * mine if adapters else mine + (item * whole if item < 4 else 0.0)
    # Tables: the head in both dtypes, the embedding, and their gradients. Layers: the weights of one layer, of the next
    # one while they arrive, and a gradient. Frozen weights have no gradients.
    tables, layers = (8, 2) if adapters else (14, 3)
    if sharding.weight_shards(run.model.mesh) == 1:  # no weights arrive from elsewhere
        tables, layers = (4, 1) if adapters else (6, 2)
    gathered = tables * m.vocab_size * D / tensor + layers * layer.weights
    activations = m.num_hidden_layers * layer.tokens * (item * kept + 4 * D)  # a layer's input is float32
    temporary = gradients + gathered + activations + layer.working + layer.logits
    if offload and not run.on_gpu:  # on GPUs the state arrives and leaves piece by piece
        temporary += moments
    optimizer = (mine if adapters else 0.0) + (0.0 if offload else moments)
    parts = {"weights": weights, "optimizer": optimizer, "temporary": temporary}
    traffic = _estimated_traffic(run, layer.tokens, passes=3, gradients=share)
    return PhaseCost(parts, traffic, "step", offloaded=moments if offload else 0.0)


def _scoring(run: PlannedRun) -> PhaseCost:
    m, layer, item = run.model.config, _layer(run), run.model.dtype.itemsize
    table = item * m.vocab_size * m.hidden_size / sharding.tensor_shards(run.model.mesh)
    temporary = layer.weights + layer.working + table + layer.logits
    weights = 4 * _per_device(run) + (_frozen(run) if run.config.train.frozen_dtype else 0.0)  # which score as well
    parts = {"weights": weights, "optimizer": 0.0, "temporary": temporary}
    return PhaseCost(parts, _estimated_traffic(run, layer.tokens, passes=1), "micro-batch")


def _sampling(run: PlannedRun) -> PhaseCost:
    c, m, item = run.config, run.model.config, run.model.dtype.itemsize
    share = from_config.sampling_tensor(c, run.model)
    copies = run.model.mesh.size // share
    columns, prompt = cache_columns(m, from_config.longest(c)), c.lengths.max_prompt
    kernel = from_config.kernel(c, run.model)
    rows = prefill_rows(from_config.slots(c, run.model), prompt, copies, kernel) // copies
    # Of attention's scores there is one block of queries, and none in a kernel.
    scores = 0 if kernel == "flash" else 4 * m.num_attention_heads * prompt * prompt / share / 8
    states = item * prompt * (4 * m.hidden_size + 3 * m.intermediate_size / share)
    prompts = rows * item * cost.cached_numbers(m, prompt) / share
    temporary = 4 * c.sampling.batch_size * m.vocab_size + rows * (scores + states)
    parts = {
        "weights": 4 * _per_device(run),
        "copy": item * cost.all_params(m) / share,
        "cache": item * cost.cached_numbers(m, columns) * c.sampling.batch_size / share,
        "temporary": temporary,
    }
    # The cache of prompts with several answers is kept while answers are decoded, that of others while they are read.
    part = "prompts" if c.selfplay.samples > 1 else "temporary"
    parts[part] = parts.get(part, 0.0) + prompts
    return PhaseCost(parts, {}, "token")


def _estimated_traffic(run: PlannedRun, tokens: float, passes: int, gradients: float = 1.0) -> dict[str, float]:
    """The bytes of a micro-batch. FSDP gathers weights in each pass over them, and scatters their gradients.

    `passes` is 1 for a forward pass, 3 for a forward and a backward pass; `gradients` is the share of the weights that
    have gradients.
    """
    m, mesh, item = run.model.config, run.model.mesh, run.model.dtype.itemsize
    data, fsdp, tensor = (mesh.shape[axis] for axis in sharding.AXES)
    weights = item * cost.all_params(m) / tensor
    result = {}
    if fsdp > 1:
        result["all-gather"] = weights * min(passes, 2)
    if passes > 1 and sharding.batch_shards(mesh) > 1:
        result["reduce-scatter"] = gradients * weights
    replicas = math.gcd(data, run.topology.slices)
    between = 2 * (1 - 1 / replicas) * gradients * weights / fsdp if passes > 1 else 0.0
    if parts := run.topology.slices // replicas - 1:  # fsdp spans slices: each slice gets the parts of the others
        mine = mesh.size / run.topology.slices
        between += (min(passes, 2) + (passes > 2) * gradients) * weights * parts / (parts + 1) / mine
    if between:
        result[BETWEEN_SLICES] = between
    if tensor > 1:
        result["all-reduce"] = 2 * passes * m.num_hidden_layers * tokens * m.hidden_size * item
    return result
