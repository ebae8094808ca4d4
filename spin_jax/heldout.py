"""Held-out evaluation: how likely the human answers are, and how many sampled answers are right."""

import re
from collections.abc import Callable, Sequence

import jax
import numpy as np

from spin_jax.batches import RowShape, example_group
from spin_jax.chat import Example
from spin_jax.config import import_function
from spin_jax.model import Decoder, Params
from spin_jax.scoring import score_groups

Verifier = Callable[[str, str], bool]

# Numbers of summary.json that iterations are compared by: 1 where more is better, −1 where less is.
BETTER = {"nll": -1, "loss": -1, "margin": 1, "accuracy": 1, "greedy_accuracy": 1, "sampled_accuracy": 1}


def exact(reference: str, answer: str) -> bool:
    """The answer is the reference, but for white space around it."""
    return answer.strip() == reference.strip()


def gsm8k(reference: str, answer: str) -> bool:
    """The number after `####`, or else the last number, is the reference's."""
    return _number(answer) is not None and _number(answer) == _number(reference)


def _number(text: str) -> float | None:
    marked = re.findall(r"####\s*(-?[\d,]*\.?\d+)", text)
    found = marked or re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(found[-1].replace(",", "")) if found else None


VERIFIERS: dict[str, Verifier] = {"exact": exact, "gsm8k": gsm8k}


def find_verifier(name: str) -> Verifier:
    """The verifier of that name, or of `module:function`; ValueError when there is none."""
    if name in VERIFIERS:
        return VERIFIERS[name]
    if ":" not in name:
        raise ValueError(f"eval.verifier={name!r}: choose from {', '.join(VERIFIERS)}, or module:function")
    return import_function(name)


def share_right(verifier: Verifier, examples: Sequence[Example], answers: Sequence[str]) -> float:
    """The share of answers that the verifier takes; `answers` go round the examples."""
    references = [example.messages[-1]["content"] for example in examples]
    right = [verifier(references[i % len(examples)], answer) for i, answer in enumerate(answers)]
    return sum(right) / len(right)


def nll(
    decoder: Decoder,
    params: Params,
    examples: Sequence[Example],
    *,
    mesh: jax.sharding.Mesh,
    shape: RowShape,
    unattended: int | None = None,
    on_batch: Callable[[int], None] = lambda groups: None,
) -> float:
    """Mean −log p of a human answer's token, in nats; `on_batch` as in `score_groups`."""
    groups = [example_group(example) for example in examples]
    logps = score_groups(decoder, params, groups, shape, mesh, unattended=unattended, on_batch=on_batch)
    return -float(logps.sum(dtype=np.float64)) / sum(len(example.real) for example in examples)
