"""The authors' recipe (arXiv 2401.01335): Zephyr-7B-SFT on 50k UltraChat prompts, four iterations.

    python -m spin_jax.main --config=configs/zephyr.py --workdir=DIR

Expected: in the paper's table the Open LLM Leaderboard average is 58.14 for the SFT model and 60.80, 62.12,
62.97 and 63.16 after iterations 0 to 3. configs/README.md tells how to reproduce it, step by step.

Variants:

    zephyr.py:official   reproduces the quirks of the released code
    zephyr.py:MACHINE    sets memory keys to suit one of MACHINES below; the algorithm stays the same

`--config.selfplay.pairs=UCLA-AGI/SPIN_iter0,UCLA-AGI/SPIN_iter1,…` trains on the published pairs instead of
sampling. Memory and time on a machine: `python -m spin_jax.plan --config=configs/zephyr.py --topology=…`.
"""

from typing import Any

from ml_collections import ConfigDict

from spin_jax import config

# By the topology that `plan` takes, with - instead of the colon: TPU pods of 8, 16 and 64 chips, one GPU and
# eight GPUs. Where memory allows, the backward pass computes less a second time.
MACHINES: dict[str, dict[str, Any]] = {
    "v5p-2x2x2": {"train.remat": "attention+mlp"},
    "v6e-2x4": {"train.remat": "full"},
    "v5e-4x4": {"train.remat": "full"},
    "v6e-4x4": {"train.remat": "attention+mlp"},
    "v5e-8x8": {"train.remat": "attention+mlp"},
    "h200-1": {"train.remat": "attention+mlp", "sampling.batch_size": 256},
    "h100-8": {"train.remat": "attention+mlp"},
}


def get_config(variant: str = "") -> Any:
    if variant not in ("", "official", *MACHINES):
        raise ValueError(f"configs/zephyr.py has no variant {variant!r}: official, {', '.join(MACHINES)}")
    c = config.default()
    c.seed = 42
    c.official = variant == "official"

    c.model.path = "alignment-handbook/zephyr-7b-sft-full"
    c.model.dtype = "bfloat16"
    c.model.architecture = ConfigDict(
        dict(
            model_type="mistral",
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            rms_norm_eps=1e-5,
            max_position_embeddings=32768,
            sliding_window=4096,
        )
    )

    c.data.path = "HuggingFaceH4/ultrachat_200k"
    c.data.split = "train_sft"
    c.data.limit = 50_292  # 49,792 to train on and 500 held out; prompts that are too long are dropped
    c.data.system_message = ""  # the recipe's empty system message
    c.lengths.max_prompt = 512
    c.lengths.max_length = 1024

    c.selfplay.iterations = 4
    c.selfplay.mix_previous = 1
    c.sampling.max_new_tokens = 256
    c.sampling.temperature = 0.0  # the authors sampled greedily
    c.sampling.batch_size = 128

    c.loss.name = "logistic"
    c.loss.beta = (0.1, 0.1, 0.1, 5.0)
    c.train.optimizer = "rmsprop"
    c.train.learning_rate = (5e-7, 5e-7, 1e-7, 1e-7)
    c.train.schedule = "linear"
    c.train.warmup_ratio = 0.1
    c.train.batch_size = 64
    c.train.epochs = (2,)  # the learning rate follows a schedule of six epochs, as in the authors' scripts
    c.train.schedule_epochs = 6

    c.update_from_flattened_dict(MACHINES.get(variant, {}))
    return c
