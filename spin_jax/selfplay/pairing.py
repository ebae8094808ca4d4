"""Which answers to a prompt make a row (selfplay.pairing), and why some prompts have none."""

import dataclasses
import functools
import operator
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath

from spin_jax.config import Config
from spin_jax.data.records import HUMAN, Ids, Pair
from spin_jax.errors import JudgeFailed, MissingInput
from spin_jax.runtime import processes
from spin_jax.runtime.user_code import import_function
from spin_jax.selfplay.variants import by_prompt, question_of

TIE = "the scores are equal"


class Pairing:
    """Which answers to a prompt make a row (selfplay.pairing).

    selfplay.rows is no pairing: it keeps or drops each row of a human and a sampled answer by itself.
    """

    def __init__(self, config: Config, judged: Sequence[str]):
        """`judged` are the fields of a Pair that hold what the judge says."""
        self.name, self._rows, self._judged = config.selfplay.pairing, config.selfplay.rows, judged
        self._function = import_function(self.name) if ":" in self.name else None

    @property
    def chooses(self) -> bool:
        """Whether answers to a prompt are compared; in SPIN each sampled one makes a row with the human one."""
        return self.name != "human/own"

    def pairs_of(self, pairs: Sequence[Pair], file: epath.Path) -> tuple[list[Pair], Counter[str]]:
        """The pairs to train on that are made of the answers in a file, and what came of its prompts.

        A chosen answer takes the place of the human one (`real`), and a rejected one that of the generated one. Pairs
        of selfplay.add_pairs have both already; held-out pairs are human and sampled answers. The counts are those of
        the pairs, of the prompts, and of prompts without a pair by the reason; there are none where nothing is chosen.

        Raises:
            MissingInput: the answers were judged for another pairing.
            JudgeFailed: the user's function raised an error or returned no pairs; the message names the prompt.
        """
        counts = Counter[str]()
        if not file.name.startswith("train"):
            return list(pairs), counts
        if not self.chooses:
            return [p for p in pairs if self._rows in ("all", "right" if (p.score or 0) > 0.5 else "wrong")], counts
        if absent := [name for name in self._judged if any(getattr(pair, name) is None for pair in pairs)]:
            raise MissingInput(f"{file} has no {absent[0]}, for another selfplay.pairing wrote it: remove it")
        groups = list(by_prompt(pairs).values())
        found = self._chosen_and_rejected(groups)
        chosen = [(group, rows) for group, rows in zip(groups, found, strict=True) if not isinstance(rows, str)]
        result = [_row(group, *places) for group, rows in chosen for places in rows]
        counts.update(reason for reason in found if isinstance(reason, str))
        counts.update(pairs=len(result), prompts=len(groups))
        return result, counts

    def note(self, counts: Counter[str]) -> str:
        """What was made of answers, in words; "" where nothing was chosen."""
        if not counts:
            return ""
        without = ", ".join(f"{n} where {why}" for why, n in counts.items() if why not in ("pairs", "prompts"))
        made = f"{counts['pairs']} pairs of the answers to {counts['prompts']} prompts"
        return f"selfplay.pairing={self.name} makes {made}" + (f"; no pair of {without}" if without else "")

    def nothing(self, counts: Counter[str]) -> str:
        """Why there is no pair at all, and what to do."""
        if self.chooses:
            way = "More selfplay.samples, a higher sampling.temperature, or another scorer, verifier or pairing"
            return f"{self.note(counts)}. {way} may find some, in a new --workdir"
        why = f"no answer is {self._rows}, and selfplay.rows asks for those"
        return f"{why}; more selfplay.samples or another eval.verifier may find some, in a new --workdir"

    def _chosen_and_rejected(self, groups: Sequence[Sequence[Pair]]) -> Sequence[Sequence[Sequence[int]] | str]:
        """For each prompt the places of the chosen and the rejected answer of each row, or why it has no row."""
        if self._function is None:
            return [_named_pairs(self.name, group) for group in groups]
        ask = functools.partial(_function_pairs, self.name, self._function)
        # Process 0 alone asks the user's function, so that all processes have the same pairs.
        return processes.exchanged(processes.together(lambda: list(map(ask, groups)) if processes.first() else []))[0]


def statistics(pairs: Sequence[Pair]) -> dict[str, float]:
    """What metrics.jsonl says of sampled pairs."""
    count, judged = len(pairs), {name: [getattr(pair, name) for pair in pairs] for name in ("score", "right")}
    return {
        "prompts": count,
        "response_tokens": sum(len(pair.generated) for pair in pairs) / count,
        "truncated": sum(pair.truncated for pair in pairs) / count,
        "identical": sum(pair.identical for pair in pairs) / count,
        **{name: sum(values) / count for name, values in judged.items() if None not in values},
    }


def metrics(counts: Counter[str]) -> dict[str, int]:
    """The numbers of a file in metrics.jsonl; none where nothing was chosen."""
    without = counts.total() - counts["pairs"] - counts["prompts"]
    return {"prompts": counts["prompts"], "ties": counts[TIE], "without_pair": without} if counts else {}


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
    messages, answers = question_of(group)
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
