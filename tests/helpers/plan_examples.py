"""Configs that the tests plan."""

from spin_jax import config
from spin_jax.forecast.job import Rates
from spin_jax.plan.answer import plan
from spin_jax.plan.planned_run import planned_run

# Mistral's shape, small enough to be compiled in half a minute, large enough that weights exceed a MiB.
SMALL = {
    "model_type": "mistral",
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
}


def zephyr(**changes):
    c = config.default()
    c.data.path = "planned"
    c.model.architecture = dict(
        SMALL,
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        sliding_window=4096,
    )
    for key, value in changes.items():
        section, name = key.split("__")
        c[section][name] = value
    return config.resolve(c)


def planned(c, topology, **assumed):
    """By arithmetic."""
    run = planned_run(c, topology, compiles=False)
    return plan(run, 50_000, Rates(**assumed))
