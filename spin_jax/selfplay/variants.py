"""What only some algorithms need, apart from plain SPIN.

ReST-EM, RFT    a verifier says which answers are right, and `selfplay.rows` picks those
SPPO            a scorer gives each answer a number, which the loss reads as `score`
α-SPIN, DPO     the start's log-probs count as well as the opponent's, or instead (`loss.reference_alpha`)
T-SPIN          a row also holds what the start answered (role `start`)
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from spin_jax.config import Config
from spin_jax.data.records import Ids, Message, Pair
from spin_jax.errors import JudgeFailed, MissingInput
from spin_jax.evaluate import verifiers
from spin_jax.runtime import processes
from spin_jax.runtime.user_code import import_function

# --- judges: a scorer, or a verifier as scores of 1 and 0; scores are stored with the pairs ----------

# (messages that end with the human answer, the answers to one prompt) → a number for each answer
Judge = Callable[[list[Message], list[str]], Sequence[float]]


def find_judge(config: Config) -> Judge | None:
    """What judges answers: selfplay.scorer; or eval.verifier where selfplay.rows needs it; or None."""
    if config.selfplay.scorer:
        if ":" not in config.selfplay.scorer:
            raise ValueError(f"selfplay.scorer={config.selfplay.scorer!r}: module:function")
        return import_function(config.selfplay.scorer)
    if config.selfplay.rows == "all":
        return None
    verifier = verifiers.find_verifier(config.eval.verifier)

    def verdicts(messages: list[Message], answers: list[str]) -> list[float]:
        return [float(bool(verifier(messages[-1].get("content", ""), answer))) for answer in answers]

    return verdicts


def with_scores(pairs: Sequence[Pair], judge: Judge | None) -> list[Pair]:
    """The pairs with the judge's numbers; pairs that have a score already keep it.

    Process 0 alone asks the judge, which may be slow, cost money, or give another number each time.

    Raises:
        JudgeFailed: the judge raised an error or gave no number; the message names the prompt.
    """
    if judge is None or all(pair.score is not None for pair in pairs):
        return list(pairs)
    scores = processes.exchanged(processes.together(lambda: _scores(pairs, judge) if processes.first() else []))[0]
    return [
        pair if pair.score is not None else dataclasses.replace(pair, score=score)
        for pair, score in zip(pairs, scores, strict=True)
    ]


def _scores(pairs: Sequence[Pair], judge: Judge) -> list[float]:
    by_prompt: dict[int, list[Pair]] = {}
    for pair in pairs:
        by_prompt.setdefault(pair.prompt_id, []).append(pair)
    scores: dict[tuple[int, int], float] = {}
    for prompt_id, same_prompt in by_prompt.items():
        answers = [pair.generated_messages[-1]["content"] for pair in same_prompt]
        try:
            messages = [dict(message) for message in same_prompt[0].real_messages]  # the judge may change it
            numbers = [float(score) for score in judge(messages, answers)]
        except Exception as error:  # a user's function can raise anything
            raise JudgeFailed(
                f"prompt_id {prompt_id}: the verifier or scorer failed: {type(error).__name__}: {error}"
            ) from error
        if len(numbers) != len(answers) or not all(map(math.isfinite, numbers)):
            raise JudgeFailed(
                f"prompt_id {prompt_id}: the scorer gave {numbers!r:.80} for {len(answers)} answers: a finite number "
                "for each is wanted"
            )
        scores |= {(prompt_id, p.sample_id): score for p, score in zip(same_prompt, numbers, strict=True)}
    return [scores[pair.prompt_id, pair.sample_id] for pair in pairs]


def pairs_to_train_on(pairs: Sequence[Pair], rows: str) -> list[Pair]:
    """All pairs, or those that were judged right or wrong, as `selfplay.rows` says."""
    if rows == "all":
        return list(pairs)
    return [pair for pair in pairs if ((pair.score or 0.0) > 0.5) == (rows == "right")]


# --- the start as a second reference ---------------------------------------------------------------

BY_OPPONENT, BY_START = "opponent", "start"  # whose log-probs a file of scores holds


def reference_weights(config: Config, t: int) -> dict[str, float]:
    """The weight of each reference model's log-probs in iteration t's loss; zeros are left out."""
    alpha = config.loss.reference_alpha
    if t == config.selfplay.start:  # there the opponent is the start
        return {BY_OPPONENT: 1.0}
    weights = {BY_OPPONENT: alpha, BY_START: 1 - alpha}
    return {by: weight for by, weight in weights.items() if weight}


def mixed_logps(weighted: Sequence[tuple[float, Sequence[float]]]) -> tuple[float, ...]:
    """log p_t^α p_0^(1 − α) of a row's answers, not normalized (α-SPIN, arXiv 2404.04291).

    `weighted` has (weight, the log-probs of the row's answers) of each reference.
    """
    roles = range(len(weighted[0][1]))
    return tuple(sum(weight * logps[n] for weight, logps in weighted) for n in roles)


# --- answers of the start --------------------------------------------------------------------------


def answers_by_prompt(pairs: Iterable[Pair]) -> dict[tuple[bytes, int], Ids]:
    """The generated answer to each prompt and sample_id.

    The prompt itself is the key: the prompt_id of a given pair may belong to another dataset.
    """
    return {_prompt_key(pair): pair.generated for pair in pairs}


def with_start_answers(
    pairs: Sequence[Pair], answers: Mapping[tuple[bytes, int], Ids], file: object, iteration: int
) -> list[Pair]:
    """The pairs with what the start answered, from `answers_by_prompt` of that iteration's pairs.

    Raises:
        MissingInput: the start did not answer one of the prompts in the file.
    """
    for pair in pairs:
        if _prompt_key(pair) not in answers:
            raise MissingInput(
                f"{file}: prompt_id {pair.prompt_id}, sample_id {pair.sample_id} has no answer of the start "
                f"among the pairs of iteration {iteration}, and the loss asks for one"
            )
    return [dataclasses.replace(pair, start=answers[_prompt_key(pair)]) for pair in pairs]


def _prompt_key(pair: Pair) -> tuple[bytes, int]:
    return pair.prompt.tobytes(), pair.sample_id
