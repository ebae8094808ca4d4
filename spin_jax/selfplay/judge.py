"""What sampled answers are worth: a verifier's verdicts, or a scorer's numbers, beside them on disk."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from spin_jax.data.records import Message, Pair
from spin_jax.errors import JudgeFailed
from spin_jax.evaluate import verifiers
from spin_jax.runtime import processes
from spin_jax.runtime.user_code import import_function

Judge = Callable[[list[Message], list[str]], Sequence[float]]  # of one prompt's answers


def judge(config: Any) -> Judge | None:
    """What judges answers: eval.verifier where selfplay.rows asks for it, selfplay.scorer, or nothing.

    Raises:
        ValueError: there is no such function.
    """
    if config.selfplay.scorer:
        if ":" not in config.selfplay.scorer:
            raise ValueError(f"selfplay.scorer={config.selfplay.scorer!r}: module:function")
        return import_function(config.selfplay.scorer)
    if config.selfplay.rows == "all":
        return None
    verifier = verifiers.find_verifier(config.eval.verifier)

    def verdicts(messages: list[Message], answers: list[str]) -> list[float]:
        return [float(bool(verifier(messages[-1]["content"], answer))) for answer in answers]

    return verdicts


def judged(pairs: Sequence[Pair], by: Judge | None) -> list[Pair]:
    """The pairs with their scores; those that have one keep it.

    Process 0 asks the judge, which may be slow, cost money, or give another number each time.

    Raises:
        JudgeFailed: naming the prompt.
    """
    if by is None or all(pair.score is not None for pair in pairs):
        return list(pairs)
    scores = processes.exchanged(processes.together(lambda: _scores(pairs, by) if processes.first() else []))[
        0
    ]
    return [
        pair if pair.score is not None else dataclasses.replace(pair, score=score)
        for pair, score in zip(pairs, scores, strict=True)
    ]


def _scores(pairs: Sequence[Pair], by: Judge) -> list[float]:
    by_prompt: dict[int, list[Pair]] = {}
    for pair in pairs:
        by_prompt.setdefault(pair.prompt_id, []).append(pair)
    scores: dict[tuple[int, int], float] = {}
    for prompt_id, of_prompt in by_prompt.items():
        answers = [pair.generated_messages[-1]["content"] for pair in of_prompt]
        try:
            messages = [dict(message) for message in of_prompt[0].real_messages]  # its own, to change
            given = [float(score) for score in by(messages, answers)]
        except Exception as error:  # a stranger's function can raise anything
            raise JudgeFailed(
                f"prompt_id {prompt_id}: the verifier or scorer failed: {type(error).__name__}: {error}"
            ) from error
        if len(given) != len(answers) or not all(map(math.isfinite, given)):
            raise JudgeFailed(
                f"prompt_id {prompt_id}: the scorer gave {given!r:.80} for {len(answers)} answers: a finite "
                "number for each is wanted"
            )
        scores |= {(prompt_id, p.sample_id): score for p, score in zip(of_prompt, given, strict=True)}
    return [scores[pair.prompt_id, pair.sample_id] for pair in pairs]


def chosen(pairs: Sequence[Pair], rows: str) -> list[Pair]:
    """The pairs to train on, as selfplay.rows has it: all, those judged right, or wrong."""
    if rows == "all":
        return list(pairs)
    return [pair for pair in pairs if ((pair.score or 0.0) > 0.5) == (rows == "right")]
