"""The embedded default: a small Mistral learns sums of three numbers by SFT, then by self-play.

    python -m spin_jax.main --config=configs/tiny.py --workdir=/tmp/spin_tiny

Nothing is downloaded. `configs/tiny.py:smoke` is the same run in miniature, for tests.
"""

from typing import Any

from ml_collections import ConfigDict

from spin_jax import config


def get_config(variant: str = "") -> Any:
    c = config.default()
    c.seed = 0
    c.model.dtype = "float32"
    c.model.tokenizer = "spin_jax.tiny:tokenizer"
    c.model.architecture = ConfigDict(
        dict(
            model_type="mistral",
            vocab_size=272,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=64,
            sliding_window=64,
            rms_norm_eps=1e-5,
            initializer_range=0.06,
        )
    )
    c.data.path = "spin_jax.tiny:problems"
    c.lengths.max_prompt = 12
    c.lengths.max_length = 16

    c.sft.epochs = 12
    c.sft.batch_size = 128
    c.sft.learning_rate = 2e-3
    c.sft.control = True

    c.selfplay.iterations = 3
    c.sampling.max_new_tokens = 4
    c.sampling.batch_size = 512
    c.sampling.shard_size = 2048

    c.loss.beta = (1.0,)
    c.train.optimizer = "adamw"
    c.train.decay = 0.999
    c.train.learning_rate = (3e-5,)
    c.train.batch_size = 256
    c.train.remat = False

    c.eval.verifier = "exact"
    c.eval.samples = 8

    if variant == "smoke":
        c.data.limit = 200
        c.sft.epochs = 2
        c.selfplay.iterations = 2
        c.sampling.batch_size = 64
        c.train.batch_size = 64
        c.eval.samples = 1
    elif variant:
        raise ValueError(f"configs/tiny.py has the variant smoke, not {variant!r}")
    return c
