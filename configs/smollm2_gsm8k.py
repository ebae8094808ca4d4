"""SmolLM2-135M-Instruct plays against itself on GSM8K: a real model on real text, on a CPU or on one GPU.

    python tests/helpers/real_model.py MODEL     # without a hub; with one, MODEL is HuggingFaceTB/SmolLM2-135M-Instruct
    python -m spin_jax.main --config=configs/smollm2_gsm8k.py:cpu --workdir=DIR \
        --config.model.path=MODEL --config.data.path=train.jsonl --config.eval.path=test.jsonl

SFT runs until the NLL of held-out answers no longer falls; then self-play begins, and beside it the SFT control. The
data are GSM8K's two files of question and answer rows. Without eval.path a tenth of the rows is held out.

Variants:

    smollm2_gsm8k.py:gpu      all 7,473 problems in bfloat16, for one GPU; the default
    smollm2_gsm8k.py:cpu      192 short problems in float32, for two CPU cores
    smollm2_gsm8k.py:smoke    24 short problems and answers, which shows that everything works

The short problems are the lines of fewer than 350 characters, 1,062 of the one file and 176 of the other:

    awk 'length < 350' train.jsonl > short_train.jsonl

Other algorithms: --config=configs/algorithms.py:spin_nll/smollm2_gsm8k:cpu. configs/README.md has the results.
"""

from typing import Any

from spin_jax import config


def settings_for(algorithm: str) -> dict[str, Any]:
    """The keys that configs/algorithms.py changes when it runs `algorithm` on this task."""
    of_algorithm = {"spin": {"sft.control": True}, "dpo": {"train.epochs": (3,)}}
    return {"sft.control": False, **of_algorithm.get(algorithm, {})}


def get_config(variant: str = "gpu") -> Any:
    c = config.default()
    c.seed = 0
    c.model.dtype = "bfloat16"
    c.lengths.max_prompt = 192
    c.lengths.max_length = 384
    c.lengths.expected = (110, 125, 125)

    c.sft.epochs = 3
    c.sft.batch_size = 16
    c.sft.learning_rate = 5e-5
    c.sft.control = True
    c.sft.control_learning_rate = 1e-5

    c.selfplay.iterations = 3
    c.selfplay.mix_previous = 0
    c.sampling.max_new_tokens = 192
    c.sampling.batch_size = 128

    c.loss.beta = (0.1,)
    c.train.learning_rate = (1e-6,)
    c.train.batch_size = 32
    c.train.tokens_per_device = 16384
    c.train.remat = "none"

    c.eval.verifier = "gsm8k"
    c.eval.limit = 500
    c.eval.samples = 4

    if variant in ("cpu", "smoke"):
        c.model.dtype = "float32"
        c.data.limit = 192
        c.lengths.max_prompt = 112
        c.lengths.max_length = 224
        c.lengths.expected = (68, 68, 70)
        c.sampling.max_new_tokens = 112
        c.sampling.batch_size = 32
        c.sampling.shard_size = 128
        c.sft.tokens_per_device = c.train.tokens_per_device = 2688
        c.eval.limit = 128
        c.eval.samples = 1
    if variant == "smoke":
        c.data.limit = 24
        c.sft.epochs = 1
        c.sft.control = False
        c.selfplay.iterations = 1
        c.sampling.max_new_tokens = 32
        c.train.batch_size = 8
        c.eval.limit = 8
    elif variant not in ("cpu", "gpu"):
        raise ValueError(f"configs/smollm2_gsm8k.py has the variants gpu, cpu and smoke, not {variant!r}")
    return c
