"""Verifiers: functions that decide whether an answer is correct, given the reference answer.

To add one, write a function of (reference, answer) and enter it in VERIFIERS. A config can also name a function in a
file of your own, as `module:function`.
"""

import itertools
import re
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool

from spin_jax.data.records import Example
from spin_jax.runtime import processes
from spin_jax.runtime.user_code import import_function

Verifier = Callable[[str, str], bool]  # (reference, answer)


def exact(reference: str, answer: str) -> bool:
    """The answer equals the reference; white space around them does not count."""
    return answer.strip() == reference.strip()


def gsm8k(reference: str, answer: str) -> bool:
    """Both texts end in the same number: the one after the last `####`, or else the last one in the text."""
    return _final_number(answer) is not None and _final_number(answer) == _final_number(reference)


def _final_number(text: str) -> float | None:
    marked = re.findall(r"####\s*(-?[\d,]*\.?\d+)", text)
    numbers = marked or re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(numbers[-1].replace(",", "")) if numbers else None


VERIFIERS: dict[str, Verifier] = {"exact": exact, "gsm8k": gsm8k}


def find_verifier(name: str) -> Verifier:
    """The verifier of that name, or the function that `module:function` names; ValueError where there is none."""
    if name in VERIFIERS:
        return VERIFIERS[name]
    if ":" not in name:
        raise ValueError(f"eval.verifier={name!r}: choose from {', '.join(VERIFIERS)}, or module:function")
    return import_function(name)


def verdicts(
    verifier: Verifier, examples: Sequence[Example], answers: Sequence[str]
) -> Bool[np.ndarray, "samples prompts"]:
    """Which answers the verifier accepts. Process 0 alone asks it, so that all processes have the same verdicts.

    Args:
        examples: each ends with the reference answer.
        answers: the first answer to every example in order, then the second answer to every example, …
    """
    references = itertools.cycle([example.messages[-1].get("content", "") for example in examples])
    asked = [*zip(references, answers, strict=False)] if processes.first() else []
    accepted = processes.together(lambda: [bool(verifier(reference, answer)) for reference, answer in asked])
    return np.array(processes.exchanged(accepted)[0]).reshape(-1, len(examples))
