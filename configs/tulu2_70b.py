"""One iteration of the recipe of zephyr.py on Tulu-2-70B, an SFT model of Llama-2-70B's shape.

    python -m spin_jax.plan --config=configs/tulu2_70b.py --topology=v5p:4x4x4
    python -m spin_jax.main --config=configs/tulu2_70b.py --workdir=gs://BUCKET/FOLDER

Expected: nothing is published for this size. Held-out margin and NLL are in summary.json.
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

    # Chosen for 64 chips of v5p: weights are split over 16 chips instead of 64, and the devices send half
    # as many bytes.
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
