"""What iterations are compared by: numbers of held-out answers, and which of them is best."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from spin_jax.data.chat import Chat
from spin_jax.data.records import Example, Ids
from spin_jax.models.architecture import Params
from spin_jax.models.decoder import Decoder
from spin_jax.runtime.user_code import import_function
from spin_jax.training.log_probs import score_groups
from spin_jax.training.packing import RowShape, example_group

Verifier = Callable[[str, str], bool]

# Numbers of summary.json that iterations are compared by, beside those of tasks: 1 where more is better, −1
# where less is. Length and KL are not among them: neither end of them is the better one.
BETTER = {
    "nll": -1,
    "loss": -1,
    "margin": 1,
    "accuracy": 1,
    "greedy_accuracy": 1,
    "sampled_accuracy": 1,
    "response_identical": 1,
}


def direction(name: str, tasks: Sequence[str], include_path: str | None = None) -> int:
    """1 where more of a number of summary.json is better, −1 where less is.

    Args:
        name: a key of BETTER, or task/metric: what is better of those, the task itself says.
        tasks: those of lm-evaluation-harness that are run; the one that is meant is read, with its data.

    Raises:
        ValueError: there is no number of that name.
    """
    if name in BETTER:
        return BETTER[name]
    if not tasks or "/" not in name:
        more = f" or a number of {', '.join(tasks)}: task/metric" if tasks else ""
        raise ValueError(f"checkpoint.best={name!r}: choose from {', '.join(BETTER)}{more}")
    known = _of_tasks([task for task in tasks if name.startswith(f"{task}/")] or tasks, include_path)
    for metric, higher in known.items():
        if name == metric or name.startswith(f"{metric}/"):  # the name of a filter may follow
            return 1 if higher is not False else -1
    raise ValueError(f"checkpoint.best={name!r}: the tasks have {', '.join(known)}")


def _of_tasks(tasks: Sequence[str], include_path: str | None) -> dict[str, bool | None]:
    """{task/metric: whether more is better} of tasks, of groups and of the tasks in those."""
    from spin_jax import harness  # it needs lm_eval, which is optional

    loaded = harness.load_tasks(tasks, include_path=include_path).loaded
    known = {
        f"{name}/{metric}": higher
        for name, task in loaded["tasks"].items()
        for metric, higher in task.higher_is_better().items()
    }
    for name, group in loaded["groups"].items():
        within = [task.higher_is_better() for task in group.get_all_tasks()]
        for metric in (part.metric for part in group.aggregate_metric_list or ()):
            known[f"{name}/{metric}"] = all(of.get(metric) is not False for of in within)
    return known


def best(rows: Sequence[Mapping[str, Any]], name: str, better: int) -> Any:
    """The row with the best number of that name, the first of equals; None where no row has one.

    `better` is what `direction` says.
    """
    known = [row for row in rows if isinstance(row.get(name), int | float) and math.isfinite(row[name])]
    return max(known, key=lambda row: better * row[name], default=None)


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


def responses(chat: Chat, examples: Sequence[Example], answers: Sequence[Ids]) -> dict[str, float]:
    """Of a model's own answers, which go round the examples: mean length in tokens, and two shares.

    `response_identical` are the human's, token for token; `response_truncated` reached max_new_tokens.
    """
    pairs = [(examples[i % len(examples)], answer) for i, answer in enumerate(answers)]
    return {
        "response_tokens": sum(len(answer) for _, answer in pairs) / len(pairs),
        "response_identical": sum(np.array_equal(e.real, answer) for e, answer in pairs) / len(pairs),
        "response_truncated": sum(not chat.stopped(answer) for _, answer in pairs) / len(pairs),
    }


def kl(own: Float[np.ndarray, " answers"], reference: Float[np.ndarray, " answers"]) -> float:
    """Estimated KL(model ‖ reference), in nats an answer, from the log-probs of the model's own answers.

    The mean of log p − log p_ref over answers drawn from p (at temperature 1, no top-k or top-p; cut at
    max_new_tokens, so the divergence is that of answers cut there): unbiased, and 0 for equal models. Near 0
    it can come out negative. The estimator that cannot, r − 1 − log r with r = p_ref/p ("k3" of Schulman,
    "Approximating KL divergence", 2020), is for tokens: over whole answers r is e to the power of many nats,
    and one answer that the reference likes better outweighs all the others.

    Args:
        own: Σ log p of each answer by the model that drew it.
        reference: the same by the other model.
    """
    return float(np.mean(own.astype(np.float64) - reference))
