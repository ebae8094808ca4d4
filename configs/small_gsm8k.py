"""A small model on GSM8K-like problems, for one GPU or a Colab.

    python -m spin_jax.main --config=configs/small_gsm8k.py --workdir=DIR \
        --config.model.path=MODEL --config.data.path=train.jsonl

MODEL is a Hugging Face directory or hub id of any supported family; the data is any file with question
and answer rows. Add `--config.sft.epochs=2` if the model is not fine-tuned yet: it is then trained by SFT
first. Expected: the margin on held-out problems grows within each iteration. `summary.json` has the share
of right answers, greedy and at temperature 1, before and after.
"""

from typing import Any

from spin_jax import config


def get_config() -> Any:
    c = config.default()
    c.lengths.max_prompt = 256
    c.lengths.max_length = 512

    c.sft.batch_size = 32
    c.selfplay.iterations = 2
    c.sampling.batch_size = 32
    c.sampling.shard_size = 256

    c.train.batch_size = 32

    c.eval.verifier = "gsm8k"
    return c
