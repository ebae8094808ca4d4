"""A small model on GSM8K-like problems, for one GPU or a Colab.

    python -m spin_jax.main --config=configs/small_gsm8k.py --workdir=DIR \
        --config.model.path=MODEL --config.data.path=train.jsonl

MODEL is any Mistral or Llama directory of Hugging Face's, or a hub id; the data any file of question
and answer rows. `--config.sft.epochs=2` fine-tunes the model first, where it is not an SFT model yet.
Expected: on held-out problems the margin grows within each iteration; `summary.json` has the share of
right numbers, greedy and at temperature 1, before and after.
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
