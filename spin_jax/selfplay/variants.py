"""What only some algorithms need, apart from plain SPIN.

ReST-EM, RFT    a verifier says which answers are right, and `selfplay.rows` picks those
SPPO, DNO, …    a scorer gives each answer a number; the loss reads it as `score`, or pairing.py compares it
α-SPIN, DPO     the start's log-probs count as well as the opponent's, or instead (`loss.reference_alpha`); those of
                earlier opponents may count, too (`loss.reference_decay`)
T-SPIN          a row also holds what the start answered (role `start`)
"""

import dataclasses
import datetime
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from spin_jax.config import Config
from spin_jax.data.records import HUMAN, Ids, Message, Pair
from spin_jax.errors import ConfigError, JudgeFailed, MissingInput
from spin_jax.evaluate import verifiers
from spin_jax.evaluate.reward_model import RewardModel
from spin_jax.runtime import processes, stopwatch
from spin_jax.runtime.user_code import import_function
from spin_jax.training import custom_loss

# --- judges: a scorer and a verifier; what they say is stored with the pairs -------------------------

# (messages that end with the human answer, the answers to one prompt) → a number for each answer
Scorer = Callable[[list[Message], list[str]], Sequence[float]]


class Judge(NamedTuple):
    """What judges answers.

    Process 0 alone asks functions, which may be slow, cost money, or give another number each time. A reward model is
    run by all processes together.
    """

    scorer: Scorer | RewardModel | None  # selfplay.scorer, or for selfplay.rows the verifier as scores of 1 and 0
    of_human: bool  # whether the scorer is asked about the human answer, too
    verifier: verifiers.Verifier | None  # eval.verifier, for the pairing right/wrong
    length_penalty: float = 0.0  # what each token of an answer takes from its score
    of_added: bool = True  # whether it is asked about pairs of selfplay.add_pairs

    @property
    def fields(self) -> list[str]:
        """The fields of a Pair that hold what the judge says."""
        scores = ["score", "real_score"][: 1 + self.of_human] if self.scorer else []
        return [*scores, *(["right"] if self.verifier else [])]

    @property
    def digests(self) -> dict[str, str]:
        """The fingerprint of a reward model."""
        return {"reward model": self.scorer.digest} if isinstance(self.scorer, RewardModel) else {}

    def notes(self, max_length: int) -> list[str]:
        """A note on a reward model that reads fewer tokens than a conversation of the run may have."""
        most = self.scorer.positions if isinstance(self.scorer, RewardModel) else max_length
        said = f"lengths.max_length={max_length}, and selfplay.scorer reads {most} tokens: a longer text ends the run"
        return [said] if most < max_length else []

    def free(self) -> None:
        """Frees the memory of a reward model until it is asked again."""
        if isinstance(self.scorer, RewardModel):
            self.scorer.free()


def find_judge(config: Config, mesh: jax.sharding.Mesh | None = None, today: datetime.date | None = None) -> Judge:
    """What judges answers: selfplay.scorer; eval.verifier where selfplay.rows or selfplay.pairing needs it.

    A reward model is split over `mesh`, and its chat template sees the date `today`.
    """
    play, scorer, verifier = config.selfplay, None, None
    if play.scorer and ":" in play.scorer:
        scorer = import_function(play.scorer)
    elif play.scorer:
        try:
            options = {"dtype": config.model.dtype, "tokens_per_device": config.train.tokens_per_device}
            scorer = RewardModel(play.scorer, mesh=mesh, today=today, **options)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"selfplay.scorer={play.scorer!r}, as a reward model: {error}") from error
    if play.rows != "all":
        scorer = functools.partial(_verdicts, verifiers.find_verifier(config.eval.verifier))
    if play.pairing == "right/wrong":
        verifier = verifiers.find_verifier(config.eval.verifier)
    # Where the human answer is chosen by name, nobody asks how good it is.
    of_human = ":" in play.pairing or ("human" in play.pairing and not play.pairing.startswith("human/"))
    return Judge(scorer, of_human, verifier, play.length_penalty, custom_loss.takes_score(config.loss))


def _verdicts(verifier: verifiers.Verifier, messages: list[Message], answers: list[str]) -> list[float]:
    return [float(bool(verifier(messages[-1].get("content", ""), answer))) for answer in answers]


def try_judge(config: Config, judge: Judge, copies: Sequence[Pair], given: Mapping[int, Sequence[Pair]]) -> None:
    """Asks functions about copies of a human answer, so that none fails only after hours of sampling.

    Nobody is asked if all pairs are given with what the judge would say. ConfigError tells what is wrong.
    """
    own = judge._replace(scorer=None) if isinstance(judge.scorer, RewardModel) else judge
    sampled = any(t not in given for t in range(config.selfplay.start, config.selfplay.iterations))
    if not sampled and not any(any(_lacking(pairs, own).values()) for pairs in given.values()):
        return

    def ask() -> None:
        try:
            _judged(copies, own)
        except JudgeFailed as error:
            raise ConfigError(f"a first try, with copies of a human answer as the answers: {error}") from error

    processes.by_first(ask)


def judged_files(shards: Sequence[list], done: Sequence[bool], judge: Judge) -> Iterator[tuple[int, list[Pair]]]:
    """The number of each file that is not done, and its pairs with what the judge says, as soon as it is known.

    A scorer may compare the answers to a prompt, and files part them: all are judged with the first file that has one.
    A run that continues asks about the same portions, so that a reward model gives the same numbers to the bit.
    """
    if all(done):  # as in each start of a run that continues
        return
    first: dict[int, int] = {}
    portions: dict[int, list[Pair]] = {}
    for number, pair in ((number, pair) for number, pairs in enumerate(shards) for pair in pairs):
        portions.setdefault(first.setdefault(pair.prompt_id, number), []).append(pair)
    found: dict[tuple[int, int], Pair] = {}
    for number in np.flatnonzero(np.logical_not(done)).tolist():
        for portion in sorted({first[pair.prompt_id] for pair in shards[number]} & portions.keys()):
            found |= {(p.prompt_id, p.sample_id): p for p in with_scores(portions.pop(portion), judge)}
        yield number, [found[pair.prompt_id, pair.sample_id] for pair in shards[number]]


@stopwatch.phase("judge")
def with_scores(pairs: Sequence[Pair], judge: Judge) -> list[Pair]:
    """The pairs with what the judge says. Prompts whose pairs have all scores already keep them.

    Raises:
        JudgeFailed: the judge raised an error or gave no number; the message names the prompt.
    """
    if not judge.fields:
        return list(pairs)
    lacking = _lacking(pairs, judge)
    asked = [pair for pair in pairs if lacking.get(pair.prompt_id)]
    if isinstance(judge.scorer, RewardModel):
        judge = judge._replace(scorer=_scored(asked, judge.scorer, judge.of_human))
    said = processes.exchanged(processes.together(lambda: _judged(asked, judge) if processes.first() else []))[0]
    found = {(pair.prompt_id, pair.sample_id): one for pair, one in zip(asked, said, strict=True)}
    names = ((pair, lacking.get(pair.prompt_id, ())) for pair in pairs)
    return [dataclasses.replace(p, **{n: found[p.prompt_id, p.sample_id][n] for n in lack}) for p, lack in names]


def _lacking(pairs: Sequence[Pair], judge: Judge) -> dict[int, list[str]]:
    """The fields that the judge has to fill in, by prompt_id.

    Pairs of selfplay.add_pairs, whose ids are negative, are judged only for a loss that reads the score.
    """
    # What is compared comes from one source: the judge, if one answer to a prompt lacks its number.
    kinds = [[name for name in judge.fields if name != "right"], [name for name in judge.fields if name == "right"]]
    return {
        prompt_id: [n for kind in kinds if any(getattr(p, n) is None for p in group for n in kind) for n in kind]
        for prompt_id, group in by_prompt(pairs).items()
        if judge.of_added or prompt_id >= 0
    }


def _scored(pairs: Sequence[Pair], model: RewardModel, of_human: bool) -> Scorer:
    """The numbers of a reward model, as a scorer for `_judged`, which asks about the prompts in this order."""
    conversations = []
    for prompt_id, group in by_prompt(pairs).items():
        human = [group[0].real_messages] if of_human else []
        try:
            conversations += [model.tokens(each) for each in [*(pair.generated_messages for pair in group), *human]]
        except ValueError as error:
            raise JudgeFailed(f"prompt_id {prompt_id}: selfplay.scorer: {error}") from error
    numbers = iter(model.scores(conversations).tolist())
    return lambda messages, answers: list(itertools.islice(numbers, len(answers)))


def by_prompt(pairs: Sequence[Any]) -> dict[int, list[Any]]:
    """The pairs of each prompt_id, in order."""
    result: dict[int, list[Any]] = {}
    for pair in pairs:
        result.setdefault(pair.prompt_id, []).append(pair)
    return result


def in_files(items: Sequence[Any], size: int, grouped: bool) -> list[Sequence[Any]]:
    """Examples or pairs, `size` for each file; or `grouped`, all pairs of `size` prompts."""
    if not grouped:
        return [items[first : first + size] for first in range(0, len(items), size)]
    groups = list(by_prompt(items).values())
    return [list(itertools.chain(*groups[i : i + size])) for i in range(0, len(groups), size)]


def question_of(group: Sequence[Pair]) -> tuple[list[Message], list[str]]:
    """What a function is asked about: messages that end with the human answer, and all answers, the human one last."""
    messages = [dict(message) for message in group[0].real_messages]  # the function may change them
    return messages, [*(p.generated_messages[-1].get("content", "") for p in group), messages[-1].get("content", "")]


def _judged(pairs: Sequence[Pair], judge: Judge) -> list[dict[str, Any]]:
    assert not isinstance(judge.scorer, RewardModel)  # its numbers stand in its place
    said: dict[tuple[int, int], dict[str, Any]] = {}
    for prompt_id, group in by_prompt(pairs).items():
        messages, answers = question_of(group)
        to_score = answers if judge.of_human else answers[:-1]
        scores, right = [], []
        try:
            if judge.scorer:
                scores = [float(score) for score in judge.scorer(messages, list(to_score))]
            if judge.verifier:
                right = [verdict == 1 for verdict in _verdicts(judge.verifier, group[0].real_messages, answers[:-1])]
        except Exception as error:  # a user's function can raise anything
            raise JudgeFailed(
                f"prompt_id {prompt_id}: the verifier or scorer failed: {type(error).__name__}: {error}"
            ) from error
        if judge.scorer and (len(scores) != len(to_score) or not all(map(math.isfinite, scores))):
            raise JudgeFailed(
                f"prompt_id {prompt_id}: the scorer gave {scores!r:.80} for {len(to_score)} answers: a finite number "
                "for each is wanted"
            )
        tokens = [*(len(pair.generated) for pair in group), len(group[0].real)]
        scores = [score - judge.length_penalty * count for score, count in zip(scores, tokens, strict=False)]
        columns = {"score": scores, "real_score": scores[-1:] * len(group), "right": right}
        for number, pair in enumerate(group):
            said[prompt_id, pair.sample_id] = {name: columns[name][number] for name in judge.fields}
    return [said[pair.prompt_id, pair.sample_id] for pair in pairs]


# --- the start and earlier opponents as references -------------------------------------------------


def reference_weights(config: Config, t: int) -> dict[int, float]:
    """The weight of the log-probs of each reference θ_k in iteration t's loss, by k; zeros are left out."""
    alpha, decay, first = config.loss.reference_alpha, config.loss.reference_decay, config.selfplay.start
    if t == first:  # there the opponent is the start
        return {t: 1.0}
    opponents = {k: decay ** (t - k) for k in range(t, first - 1, -1)}
    weights = {k: alpha * weight / sum(opponents.values()) for k, weight in opponents.items()}
    weights[first] += 1 - alpha
    return {k: weight for k, weight in weights.items() if weight}


def mixed_logps(
    weights: Mapping[int, float], scores: Mapping[int, Mapping[Any, Sequence[float]]], source: int, pair: Pair
) -> tuple[float, ...]:
    """Σ w_k log p_k of the answers of a pair of iteration `source`, not normalized (α-SPIN, arXiv 2404.04291).

    `scores` has what `parquet.scores_from_parquet` reads, of each reference.

    Raises:
        MissingInput: another pair was scored.
    """
    key = source, pair.prompt_id, pair.sample_id, pair.chosen_id
    if any(key not in scores[by] for by in weights):
        raise MissingInput(
            f"iteration {source}: prompt_id {pair.prompt_id} has no log-probs of answer {pair.chosen_id} as chosen and "
            f"{pair.sample_id} as rejected. selfplay.pairing has to make the same pairs each time: remove the folder "
            "scores of the iteration that is trained, and the same command scores again"
        )
    by_role = zip(*(scores[by][key] for by in weights), strict=True)
    return tuple(sum(weight * logp for weight, logp in zip(weights.values(), logps, strict=True)) for logps in by_role)


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
    return pair.prompt.tobytes(), pair.chosen_id if pair.sample_id == HUMAN else pair.sample_id
