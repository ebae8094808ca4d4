"""The recipe of zephyr.py on a model of Llama-2-70B's shape: Tulu-2-70B, which is an SFT model.

    python -m spin_jax.plan --config=configs/llama2_70b.py --topology=v5p:4x4x4
    python -m spin_jax.main --config=configs/llama2_70b.py --workdir=gs://BUCKET/FOLDER

One iteration. Expected: nothing is published for this size; summary.json has held-out margin and NLL.
"""

from typing import Any

from ml_collections import ConfigDict

from spin_jax import config


def get_config() -> Any:
    c = config.default()
    c.model.path = "allenai/tulu-2-70b"
    c.model.architecture = ConfigDict(
        dict(
            model_type="llama",
            vocab_size=32000,
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
            rms_norm_eps=1e-5,
            max_position_embeddings=8192,
        )
    )

    c.data.path = "HuggingFaceH4/ultrachat_200k"
    c.data.split = "train_sft"
    c.data.limit = 50_292
    c.lengths.max_prompt = 512
    c.lengths.max_length = 1024

    # On 64 chips of v5p: 16 parts of each layer's weights travel, not 64, and half as many bytes.
    c.mesh.tensor = 4

    c.selfplay.iterations = 1
    c.sampling.temperature = 0.0
    c.sampling.batch_size = 64

    c.train.optimizer = "rmsprop"
    c.train.learning_rate = (5e-7,)
    c.train.batch_size = 64
    c.train.epochs = (2,)
    c.train.schedule_epochs = 6
    return c
