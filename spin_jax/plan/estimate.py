"""What a run takes of a machine by arithmetic alone: memory by phase, and what devices send each other.

In seconds, and for any machine; suggestions are made of it. How near it is to what compilers say stands at
each number that they taught.
"""

import math
from typing import NamedTuple

from spin_jax.models import cost
from spin_jax.plan import collectives as traffic
from spin_jax.plan.compiled import Phase, Work
from spin_jax.runtime import sharding
from spin_jax.sampling.continuous import cache_columns, prefill_rows
from spin_jax.selfplay import from_config
from spin_jax.training.optimizer import OPTIMIZERS


def _per_device(work: Work) -> float:
    """Parameters that each device keeps in training."""
    shape = work.model.mesh.shape
    return cost.all_params(work.model.config) / (shape["fsdp"] * shape["tensor"])


def estimated_phases(work: Work) -> dict[str, Phase]:
    """Memory and traffic by arithmetic."""
    return {"train": _training(work), "score": _scoring(work), "sample": _sampling(work)}


class _Layer(NamedTuple):
    """Of a micro-batch on a device."""

    tokens: int
    wide: float  # numbers of a token's inner MLP layer, or of those of the experts it goes through
    heads: float  # numbers of a token's queries, keys, values and attended values
    weights: float  # bytes of a layer, gathered
    working: float  # bytes that a layer works on
    logits: float  # bytes of a chunk's, and of their softmax


def _layer(work: Work) -> _Layer:
    m, shape, item = work.model.config, work.shape, work.model.dtype.itemsize
    tensor = work.model.mesh.shape["tensor"]
    tokens = shape.rows // sharding.batch_shards(work.model.mesh) * shape.length
    heads = 2 * (m.num_attention_heads + m.num_key_value_heads) * m.head_dim / tensor
    wide = max(1, m.experts_per_token) * m.intermediate_size / tensor
    return _Layer(
        tokens,
        wide,
        heads,
        weights=item * cost.layer_params(m, m.num_experts) / tensor,
        working=item * tokens * (3 * wide + 6 * m.hidden_size + 2 * heads),
        logits=2 * 4 * min(2**25, tokens * m.vocab_size / 4) / tensor,  # scoring's chunks: a quarter at most
    )


def _training(work: Work) -> Phase:
    c, m, layer, item = work.config, work.model.config, _layer(work), work.model.dtype.itemsize
    whole = _per_device(work)
    share = from_config.trained_params(c, m) / cost.all_params(m)
    weights, mine = item * whole if c.train.lora_rank else 4 * whole, 4 * share * whole
    tensor, D = work.model.mesh.shape["tensor"], m.hidden_size
    kept = {  # numbers of a token and layer, beside the layer's input
        "full": 0,
        "attention": layer.heads,
        "attention+mlp": layer.heads + D + 2 * layer.wide,
        # JAX then keeps float32 copies of norms, rotations and gates as well: of a 7B, twice the obvious.
        "none": 3 * layer.heads + 14 * D + 7 * layer.wide,
    }[c.train.remat]
    moments = OPTIMIZERS[c.train.optimizer].moments * mine
    # The sums, which micro-batches are added to in place, and a step's copies of the weights in the compute
    # dtype. Adapters' gradients stand beside their sums; frozen weights have that dtype.
    gradients = 2 * mine if c.train.lora_rank else mine + (item * whole if item < 4 else 0.0)
    # The head in both dtypes, the embedding, and their gradients; a layer's weights, the next one's as they
    # arrive, and a gradient. Frozen ones have none.
    tables, layers = (8, 2) if c.train.lora_rank else (14, 3)
    if work.model.mesh.shape["fsdp"] * tensor == 1:  # nothing arrives: what is used is there, or a copy of it
        tables, layers = (4, 1) if c.train.lora_rank else (6, 2)
    gathered = tables * m.vocab_size * D / tensor + layers * layer.weights
    activations = m.num_hidden_layers * layer.tokens * (item * kept + 4 * D)  # a layer's input is float32
    temporary = gradients + gathered + activations + layer.working + layer.logits
    if c.train.offload and not work.on_gpu:  # for GPUs the state comes and goes a piece at a time
        temporary += moments
    return Phase(
        {
            "weights": weights,
            "optimizer": (mine if c.train.lora_rank else 0.0) + (0.0 if c.train.offload else moments),
            "temporary": temporary,
        },
        _estimated_traffic(work, layer.tokens, passes=3, gradients=share),
        "step",
        offloaded=moments if c.train.offload else 0.0,
    )


def _scoring(work: Work) -> Phase:
    m, layer, item = work.model.config, _layer(work), work.model.dtype.itemsize
    table = item * m.vocab_size * m.hidden_size / work.model.mesh.shape["tensor"]
    temporary = layer.weights + layer.working + table + layer.logits
    return Phase(
        {"weights": 4 * _per_device(work), "optimizer": 0.0, "temporary": temporary},
        _estimated_traffic(work, layer.tokens, passes=1),
        "micro-batch",
    )


def _sampling(work: Work) -> Phase:
    c, m, item = work.config, work.model.config, work.model.dtype.itemsize
    share = from_config.sampling_tensor(c, work.model)
    copies = work.model.mesh.size // share
    columns, prompt = cache_columns(m, from_config.longest(c)), c.lengths.max_prompt
    kernel = from_config.kernel(c, work.model)
    rows = prefill_rows(from_config.slots(c, work.model), prompt, copies, kernel) // copies
    scores = 4 * m.num_attention_heads * prompt * prompt / share / 8  # of a block of queries
    scores = 0 if kernel == "flash" else scores
    states = item * prompt * (4 * m.hidden_size + 3 * m.intermediate_size / share)
    read = rows * (scores + states + item * cost.cached_numbers(m, prompt) / share)
    return Phase(
        {
            "weights": 4 * _per_device(work),
            "copy": item * cost.all_params(m) / share,
            "cache": item * cost.cached_numbers(m, columns) * c.sampling.batch_size / share,
            "temporary": 4 * c.sampling.batch_size * m.vocab_size + read,
        },
        {},
        "token",
    )


def _estimated_traffic(work: Work, tokens: float, passes: int, gradients: float = 1.0) -> dict[str, float]:
    """A micro-batch's bytes: FSDP gathers for each pass over the weights, and scatters their gradients.

    `gradients` is the share of the weights that have some.
    """
    m, shape, item = work.model.config, work.model.mesh.shape, work.model.dtype.itemsize
    weights = item * cost.all_params(m) / shape["tensor"]
    result = {}
    if shape["fsdp"] > 1:
        result["all-gather"] = weights * min(passes, 2)
    if passes > 1 and sharding.batch_shards(work.model.mesh) > 1:
        result["reduce-scatter"] = gradients * weights
    replicas = math.gcd(shape["data"], work.topology.slices)
    between = 2 * (1 - 1 / replicas) * gradients * weights / shape["fsdp"] if passes > 1 else 0.0
    if parts := work.topology.slices // replicas - 1:  # fsdp spans slices: each gets what the others hold
        mine = work.model.mesh.size / work.topology.slices
        between += (min(passes, 2) + (passes > 2) * gradients) * weights * parts / (parts + 1) / mine
    if between:
        result[traffic.BETWEEN_SLICES] = between
    if shape["tensor"] > 1:
        result["all-reduce"] = 2 * passes * m.num_hidden_layers * tokens * m.hidden_size * item
    return result
