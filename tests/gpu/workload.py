"""The recipe that is measured, configs/zephyr.py on one H200, at its own size and at others."""

from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from configs import zephyr
from spin_jax import config as config_lib
from spin_jax.cli import set_up_jax
from spin_jax.data.records import Pair
from spin_jax.models import loading
from spin_jax.models.architecture import Model
from spin_jax.selfplay import from_config
from spin_jax.training.packing import RowShape

SMALL = dict(  # kernels want heads of 64 numbers or more
    model_type="mistral",
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    rms_norm_eps=1e-5,
    max_position_embeddings=4096,
    sliding_window=4096,
)
_ONE_BILLION = dict(  # TinyLlama's
    model_type="llama",
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    rms_norm_eps=1e-5,
    max_position_embeddings=4096,
)


def recipe(arch: str, dry: bool, layers: int | None = None, overrides: dict[str, Any] | None = None) -> Any:
    """The resolved config.

    Args:
        arch: "7b", the recipe's own model, or "1b". A dry run takes a small one in place of both.
        layers: of the model, in place of its own number.
        overrides: values of config keys, as section.key.
    """
    c = zephyr.get_config("h200-1")
    if dry:
        c.model.architecture = ConfigDict(SMALL)
        c.lengths.max_prompt, c.lengths.max_length, c.lengths.expected = 64, 128, (24, 40, 32)
        c.sampling.max_new_tokens, c.train.batch_size, c.train.tokens_per_device = 64, 8, 512
        c.model.attention = "flash"  # as on a GPU, interpreted
    elif arch == "1b":
        c.model.architecture = ConfigDict(_ONE_BILLION)
    if layers and not dry:
        c.model.architecture.num_hidden_layers = layers
    with c.unlocked():
        del c.model.path  # the weights are random: nothing is read
    c.data.path = "random"
    c.update_from_flattened_dict(overrides or {})
    return config_lib.resolve(c)


def set_up(config: Any) -> None:
    """Compiler flags and share of the memory, as a run has them; before anything asks for a device."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # none is given
    set_up_jax(config)


def prepared(config: Any) -> tuple[Model, list[Pair], RowShape]:
    """(the model without weights on this machine's device, random pairs, the run's shape of rows)."""
    model = loading.new_model(config.model.architecture.to_dict(), None, dtype=config.model.dtype)
    model = from_config.placed(config, model)
    pairs = from_config.expected_pairs(config, model.config.vocab_size, 4 * config.train.batch_size)
    lengths = [(len(pair.prompt), len(pair.real)) for pair in pairs]
    longest = min(config.lengths.max_prompt, config.lengths.max_length - 1)
    lengths.append((longest, config.lengths.max_length - longest))
    shape = from_config.pair_shape_of_lengths(config, model, np.array(lengths), {})
    return model, pairs, shape
