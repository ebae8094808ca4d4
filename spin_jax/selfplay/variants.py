"""What only some algorithms need, apart from plain SPIN.

ReST-EM, RFT    a verifier says which answers are right, and `selfplay.rows` picks those
SPPO            a scorer gives each answer a number, which the loss reads as `score`
DNO, iter. DPO  `selfplay.pairing` says which two answers to a prompt make a row
α-SPIN, DPO     the start's log-probs count as well as the opponent's, or instead (`loss.reference_alpha`); those of
                earlier opponents may count, too (`loss.reference_decay`)
T-SPIN          a row also holds what the start answered (role `start`)
"""

import dataclasses
import functools
import itertools
import math
import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from spin_jax.config import Config
from spin_jax.data.records import HUMAN, Ids, Message, Pair
from spin_jax.errors import JudgeFailed, MissingInput
from spin_jax.evaluate import verifiers
from spin_jax.evaluate.reward_model import RewardModel
from spin_jax.runtime import processes
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

    def free(self) -> None:
        """Frees the memory of a reward model until it is asked again."""
        if isinstance(self.scorer, RewardModel):
            self.scorer.free()


def find_judge(config: Config, mesh: jax.sharding.Mesh | None = None) -> Judge:
    """What judges answers: selfplay.scorer; eval.verifier where selfplay.rows or selfplay.pairing needs it.

    A reward model is split over `mesh`.
    """
    play, scorer, verifier = config.selfplay, None, None
    if play.scorer and ":" in play.scorer:
        scorer = import_function(play.scorer)
    elif play.scorer:
        try:
            tokens = config.train.tokens_per_device
            scorer = RewardModel(play.scorer, mesh=mesh, dtype=config.model.dtype, tokens_per_device=tokens)
        except (ValueError, FileNotFoundError) as error:
            message = f"selfplay.scorer={play.scorer!r} is no module:function and no reward model: {error}"
            raise ValueError(message) from error
    if play.rows != "all":
        scorer = functools.partial(_verdicts, verifiers.find_verifier(config.eval.verifier))
    if play.pairing == "right/wrong":
        verifier = verifiers.find_verifier(config.eval.verifier)
    # Where the human answer is chosen by name, nobody asks how good it is.
    of_human = ":" in play.pairing or ("human" in play.pairing and not play.pairing.startswith("human/"))
    return Judge(scorer, of_human, verifier, play.length_penalty, custom_loss.takes_score(config.loss))


def _verdicts(verifier: verifiers.Verifier, messages: list[Message], answers: list[str]) -> list[float]:
    return [float(bool(verifier(messages[-1].get("content", ""), answer))) for answer in answers]


def with_scores(pairs: Sequence[Pair], judge: Judge) -> list[Pair]:
    """The pairs with what the judge says. Prompts whose pairs have all scores already keep them.

    Pairs of selfplay.add_pairs, whose ids are negative, are judged only for a loss that reads the score.

    Raises:
        JudgeFailed: the judge raised an error or gave no number; the message names the prompt.
    """
    if not judge.of_added and any(pair.prompt_id < 0 for pair in pairs):
        own = iter(with_scores([pair for pair in pairs if pair.prompt_id >= 0], judge))
        return [pair if pair.prompt_id < 0 else next(own) for pair in pairs]
    # What is compared comes from one source: the judge, if one answer to a prompt lacks its number.
    kinds = [[name for name in judge.fields if name != "right"], [name for name in judge.fields if name == "right"]]
    lacking = {
        (prompt_id, name)
        for prompt_id, group in by_prompt(pairs).items()
        for kind in kinds
        if any(getattr(pair, name) is None for pair in group for name in kind)
        for name in kind
    }
    if not lacking:
        return list(pairs)
    if isinstance(judge.scorer, RewardModel):
        judge = judge._replace(scorer=_scored(pairs, judge.scorer, judge.of_human))
    said = processes.exchanged(processes.together(lambda: _judged(pairs, judge) if processes.first() else []))[0]
    return [
        dataclasses.replace(pair, **{name: value for name, value in one.items() if (pair.prompt_id, name) in lacking})
        for pair, one in zip(pairs, said, strict=True)
    ]


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


def in_files(items: Sequence[Any], size: int, grouped: bool) -> list[list[Any]]:
    """Examples or pairs, `size` for each file; or `grouped`, all pairs of `size` prompts."""
    groups = list(by_prompt(items).values()) if grouped else [[item] for item in items]
    return [list(itertools.chain(*groups[i : i + size])) for i in range(0, len(groups), size)]


def _asked(group: Sequence[Pair]) -> tuple[list[Message], list[str]]:
    """What a function is asked about: messages that end with the human answer, and all answers, the human one last."""
    messages = [dict(message) for message in group[0].real_messages]  # the function may change them
    return messages, [*(p.generated_messages[-1]["content"] for p in group), messages[-1].get("content", "")]


def _judged(pairs: Sequence[Pair], judge: Judge) -> list[dict[str, Any]]:
    assert not isinstance(judge.scorer, RewardModel)  # its numbers stand in its place
    said: dict[tuple[int, int], dict[str, Any]] = {}
    for prompt_id, group in by_prompt(pairs).items():
        messages, answers = _asked(group)
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


# --- which answers make a row ------------------------------------------------------------------------

TIE = "the scores are equal"


class Pairing:
    """Which answers to a prompt make a row (selfplay.pairing), and why some prompts have none.

    selfplay.rows is no pairing: it keeps or drops each row of a human and a sampled answer by itself.
    """

    def __init__(self, config: Config, judged: Sequence[str]):
        """`judged` are the fields of a Pair that hold what the judge says."""
        self.name, self._rows, self._judged = config.selfplay.pairing, config.selfplay.rows, judged
        self._function = import_function(self.name) if ":" in self.name else None
        self.counts: dict[epath.Path, Counter[str]] = {}  # of each file: pairs, prompts, and prompts without a pair

    @property
    def chooses(self) -> bool:
        """Whether answers to a prompt are compared; in SPIN each sampled one makes a row with the human one."""
        return self.name != "human/own"

    def pairs_of(self, pairs: Sequence[Pair], file: epath.Path) -> list[Pair]:
        """The pairs to train on that are made of the answers in a file; held-out pairs are human and sampled answers.

        A chosen answer takes the place of the human one (`real`), and a rejected one that of the generated one. Pairs
        of selfplay.add_pairs have both already.

        Raises:
            MissingInput: the answers were judged for another pairing.
            JudgeFailed: the user's function raised an error or returned no pairs; the message names the prompt.
        """
        if self._rows != "all" and not file.name.startswith("added"):
            return [pair for pair in pairs if ((pair.score or 0.0) > 0.5) == (self._rows == "right")]
        if not (self.chooses and file.name.startswith("train")):
            return list(pairs)
        if absent := [name for name in self._judged if any(getattr(pair, name) is None for pair in pairs)]:
            raise MissingInput(f"{file} has no {absent[0]}, for another selfplay.pairing wrote it: remove it")
        groups = list(by_prompt(pairs).values())
        found = self._chosen_and_rejected(groups)
        chosen = [(group, rows) for group, rows in zip(groups, found, strict=True) if not isinstance(rows, str)]
        result = [_row(group, *places) for group, rows in chosen for places in rows]
        self.counts[file] = Counter(pairs=len(result), prompts=len(groups))
        self.counts[file].update(reason for reason in found if isinstance(reason, str))
        return result

    def metrics(self, file: epath.Path) -> dict[str, int]:
        """The numbers of a file in metrics.jsonl; none where there was no choice."""
        if file not in self.counts:
            return {}
        counts = self.counts[file]
        without = counts.total() - counts["pairs"] - counts["prompts"]
        return {"prompts": counts["prompts"], "ties": counts[TIE], "without_pair": without}

    def say(self, title: str, files: Iterable[epath.Path]) -> None:
        """Prints what was made of these files, where there was a choice."""
        if note := self._note(files):
            processes.say(f"{title}: {note}")

    def _note(self, files: Iterable[epath.Path]) -> str:
        counts = sum((self.counts[file] for file in files if file in self.counts), Counter[str]())
        without = ", ".join(f"{n} where {why}" for why, n in counts.items() if why not in ("pairs", "prompts"))
        said = (
            f"selfplay.pairing={self.name} makes {counts['pairs']} pairs of the answers to {counts['prompts']} prompts"
        )
        return said + (f"; no pair of {without}" if without else "") if counts else ""

    def nothing(self, folders: Collection[epath.Path]) -> str:
        """Why there is no pair at all in these folders of pairs, and what to do."""
        if self.chooses:
            note = self._note(file for file in self.counts if file.parent in folders)
            way = "More selfplay.samples, a higher sampling.temperature, or another scorer, verifier or pairing"
            return f"{note}. {way} may find some, in a new --workdir"
        why = f"no answer is {self._rows}, and selfplay.rows asks for those"
        return f"{why}; more selfplay.samples or another eval.verifier may find some, in a new --workdir"

    def _chosen_and_rejected(self, groups: Sequence[Sequence[Pair]]) -> Sequence[Sequence[Sequence[int]] | str]:
        """For each prompt the places of the chosen and the rejected answer of each row, or why it has no row."""
        if self._function is None:
            return [_named_pairs(self.name, group) for group in groups]
        ask = functools.partial(_function_pairs, self.name, self._function)
        # Process 0 alone asks the user's function, so that all processes have the same pairs.
        return processes.exchanged(processes.together(lambda: list(map(ask, groups)) if processes.first() else []))[0]


def _row(group: Sequence[Pair], chosen: int, rejected: int) -> Pair:
    if chosen == HUMAN:
        return group[rejected]
    first, second = group[chosen], group[rejected]
    # A pair that was given as text may have a shorter prompt, which ends where its two answers differ.
    shared = min(len(first.prompt), len(second.prompt))

    def ids(pair: Pair, answer: Ids) -> Ids:
        return np.concatenate([pair.prompt[shared:], answer])

    row = dataclasses.replace(
        second,
        chosen_id=first.sample_id,
        real_messages=first.generated_messages,
        prompt=first.prompt[:shared],
        real=ids(first, first.generated),
        generated=ids(second, second.generated),
    )
    if rejected != HUMAN:
        return row
    human = {"generated_messages": second.real_messages, "generated": ids(second, second.real), "truncated": False}
    return dataclasses.replace(row, sample_id=HUMAN, score=second.real_score, **human)


def _named_pairs(name: str, group: Sequence[Pair]) -> list[tuple[int, int]] | str:
    """The rows of one prompt by a pairing such as best/worst. Of equal answers the first one counts."""
    chosen, _, rejected = name.partition("/")
    own = range(len(group))
    among = {
        "human": [HUMAN],
        "best_with_human": [HUMAN, *own],
        "right": [n for n in own if group[n].right],
        "wrong": [n for n in own if not group[n].right],
    }
    scores = [*(pair.score or 0.0 for pair in group), group[0].real_score or 0.0]  # scores[HUMAN] is the last one

    def place(word: str) -> int | None:
        extreme = min if word in ("worst", "wrong") else max
        return extreme(among.get(word, own), key=scores.__getitem__, default=None)

    first, *others = [place(word) for word in (chosen, *rejected.split("+"))]
    if first is None or None in others:
        return f"no answer is {chosen if first is None else rejected}"
    compared = {"human": others, "right": []}.get(chosen, [first, *others])  # human and right win without a score
    if len(compared) > 1 and scores[compared[0]] <= scores[compared[1]]:
        if len(group) == 1 and HUMAN not in compared:
            return "there is only one answer"
        return TIE if scores[compared[0]] == scores[compared[1]] else "the human answer has the highest score"
    return [(first, other) for other in others if other is not None]


def _function_pairs(name: str, function: Callable, group: Sequence[Pair]) -> list[list[int]] | str:
    where = f"prompt_id {group[0].prompt_id}: selfplay.pairing={name}"
    messages, answers = _asked(group)
    scores = None if group[0].score is None else [*(pair.score for pair in group), group[0].real_score]
    try:
        found = [[operator.index(place) for place in pair] for pair in function(messages, list(answers), scores)]
    except Exception as error:  # a user's function can raise anything
        raise JudgeFailed(
            f"{where} failed: {type(error).__name__}: {error}. It returns a list of (chosen, rejected), each the place "
            "of an answer in `answers`"
        ) from error
    last = len(group)  # the place of the human answer, which is −1 as well
    pairs = [[HUMAN if place == last else place for place in pair] for pair in found]
    for number, pair in enumerate(pairs):
        is_pair = len(pair) == 2 and pair[0] != pair[1] and all(HUMAN <= place < last for place in pair)
        if not is_pair or pair in pairs[:number]:
            fault = "comes twice" if is_pair else "is not the places of two different answers"
            raise JudgeFailed(
                f"{where} returned {found!r:.80}, where {found[number]} {fault}: the answers are 0 to {last}, of which "
                "the last one, or −1, is the human answer"
            )
    return pairs or "the function returned no pair"


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
