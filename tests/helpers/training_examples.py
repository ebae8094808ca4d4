"""Pairs, groups and options that the tests of training share."""

import jax
import numpy as np

from spin_jax.data.records import Pair
from spin_jax.models.params import abstract_params
from spin_jax.runtime import sharding
from spin_jax.training.batches import stacked
from spin_jax.training.optimizer import Optimization
from spin_jax.training.packing import Group, RowShape, packed

SHAPE = RowShape(rows=2, length=40, groups=3)
MICROBATCHES = 4  # of a step of 8 pairs, which may need a row each

# Two layers, grouped heads and a window; a row of 48 tokens holds several pairs, and both answers share a prompt.
ARCHITECTURE = {
    "model_type": "mistral",
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 9,
    "initializer_range": 0.2,
    "max_position_embeddings": 64,
}

RMSPROP = Optimization(
    optimizer="rmsprop",
    learning_rate=1e-3,
    schedule="constant",
    warmup_ratio=0.0,
    weight_decay=0.0,
    momentum=0.9,
    decay=0.99,
    eps=1e-8,
    clip_norm=None,
    offload=False,
    batch_size=8,
    epochs=1,
    schedule_epochs=None,
)


def ids(*values):
    return np.array(values, np.int32)


def make_pair(number, prompt, real, generated):
    return Pair(number, 0, [], [], ids(*prompt), ids(*real), ids(*generated), truncated=False)


def random_groups(rng, count, answers=2, longest=9):
    """Groups whose tokens are all different from padding; answers can be empty, as in given token columns."""

    def some(least):
        return rng.integers(1, 1000, rng.integers(least, longest + 1)).astype(np.int32)

    return [Group(some(1), tuple(some(0) for _ in range(answers))) for _ in range(count)]


def random_pairs(count, seed=0, longest=6):
    rng = np.random.default_rng(seed)

    def ids():
        return rng.integers(6, 262, rng.integers(2, longest + 1)).astype(np.int32)

    return [Pair(i, 0, [], [], ids(), ids(), ids(), truncated=False) for i in range(count)]


def sft_step(pairs, shape=SHAPE, count=MICROBATCHES, earlier=None):
    """One step's batch of the pairs' human answers; `earlier` has the places in each prompt that count too."""
    groups = [Group(pair.prompt, (pair.real,)) for pair in pairs]
    if earlier is not None:
        groups = [group._replace(earlier=places) for group, places in zip(groups, earlier, strict=True)]
    return stacked(packed(groups, shape), count)


def random_params(config, mesh):
    """Without a compilation; the norms' scales are random too."""
    rng, abstract = np.random.default_rng(0), abstract_params(config)

    def weight(path, leaf):
        around = 1.0 if path[-1].key == "scale" else 0.0
        return rng.normal(around, config.initializer_range, leaf.shape).astype(np.float32)

    host = jax.tree_util.tree_map_with_path(weight, sharding.unboxed(abstract))
    return jax.device_put(host, sharding.parameter_shardings(mesh, abstract))
