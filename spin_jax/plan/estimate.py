"""Memory and traffic of each phase by arithmetic alone.

This takes a moment and works for any machine, so suggestions are found by it. Some of the numbers below were learned
from the compilers' answers; a comment says where.
"""

from typing import NamedTuple

from spin_jax.forecast import times
from spin_jax.models import cost
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
    return cost.frozen_bytes(run.model.config, run.model.mesh, run.model.dtype.itemsize, run.config.train.frozen_dtype)


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
    context = sharding.context_shards(run.model.mesh)
    tokens = shape.rows // sharding.batch_shards(run.model.mesh) * shape.length // context
    heads = 2 * (m.num_attention_heads + m.num_key_value_heads) * m.head_dim / tensor
    gathered = context * times.shared_numbers(run.job)
    wide = max(1, m.experts_per_token) * m.intermediate_size / tensor
    return _Layer(
        tokens,
        wide,
        heads,
        weights=item * cost.layer_params(m, m.num_experts) / tensor,
        working=item * tokens * (3 * wide + 6 * m.hidden_size + 2 * heads + 2 * gathered),
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
    return PhaseCost(parts, times.estimated_traffic(run.job)["train"], "step", offloaded=moments if offload else 0.0)


def _scoring(run: PlannedRun) -> PhaseCost:
    m, layer, item = run.model.config, _layer(run), run.model.dtype.itemsize
    table = item * m.vocab_size * m.hidden_size / sharding.tensor_shards(run.model.mesh)
    temporary = layer.weights + layer.working + table + layer.logits
    weights = 4 * _per_device(run) + (_frozen(run) if run.config.train.frozen_dtype else 0.0)  # which score as well
    parts = {"weights": weights, "optimizer": 0.0, "temporary": temporary}
    return PhaseCost(parts, times.estimated_traffic(run.job)["score"], "micro-batch")


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
    if judge := run.job.judge:  # it answers between two rounds, when no prompts are read
        tokens = max(c.train.tokens_per_device, c.lengths.max_length)
        temporary = max(temporary, item * tokens * (3 * judge.intermediate_size + 6 * judge.hidden_size))
    parts = {
        "weights": 4 * _per_device(run),
        "copy": item * cost.all_params(m) / share,
        "cache": item * cost.cached_numbers(m, columns) * c.sampling.batch_size / share,
        "temporary": temporary,
    }
    if judge:
        parts["reward model"] = item * cost.all_params(judge) / sharding.weight_shards(run.model.mesh)
    # The cache of prompts with several answers is kept while answers are decoded, that of others while they are read.
    part = "prompts" if c.selfplay.samples > 1 else "temporary"
    parts[part] = parts.get(part, 0.0) + prompts
    return PhaseCost(parts, {}, "token")
