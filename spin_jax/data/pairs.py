"""Given pairs: rows of a published SPIN dataset, of preferences, of another run or of another sampler."""

import dataclasses
import math
from collections import Counter
from typing import Any

import numpy as np

from spin_jax.data import sources
from spin_jax.data.chat import Chat
from spin_jax.data.records import Example, Message, Pair, asked, checked, integer_of, listed, prompt_id_of
from spin_jax.data.tally import Tally
from spin_jax.errors import BadRow


def load_pairs(
    rows: Any,
    chat: Chat,
    *,
    path: str,
    vocab_size: int,
    bad_rows: str = "error",
    max_bad: float = 0.1,
    scored: bool = False,
) -> tuple[list[Pair], Counter]:
    """Pairs of a published SPIN dataset, or those of another run or sampler, whose token columns count.

    The ids of a prompt and of its human answer must be those that this chat makes of the text; with ids, a
    row needs no text of the generated answer.

    What is dropped, and how much of it may be, is as in `load_examples`.

    Args:
        scored: reads the column `score`, where there is one.

    Raises:
        ValueError: naming path, row and field; or saying that nothing is left.
    """
    tally = Tally(bad_rows)
    answers: Counter = Counter()  # by prompt_id
    pairs: dict[tuple[int, int], Pair] = {}
    for number in range(len(rows)):
        with tally.row(number, sources.place(rows, number, path)):
            row = _preference(rows[number])
            score = _score(row) if scored else None
            pair = _load_pair(row, number, chat, vocab_size, tally.counts, answers)
            pair = pair and dataclasses.replace(pair, score=score)
            tally.see_unused(row, ("real", "score") if scored else ("real",))
            if pair is not None and (pair.prompt_id, pair.sample_id) in pairs:
                raise BadRow(f"prompt_id {pair.prompt_id}, sample_id {pair.sample_id} came before")
            if pair is not None:
                pairs[pair.prompt_id, pair.sample_id] = pair
        if tally.problem:
            break
    counts = tally.settled(path, len(rows), max_bad)
    if not pairs:
        raise ValueError(f"{path}: no pair is left ({dict(counts)})")
    return list(pairs.values()), counts


def _load_pair(
    row: dict[str, Any], number: int, chat: Chat, vocab_size: int, counts: Counter, answers: Counter
) -> Pair | None:
    by_ids = row.get("generated_tokens") is not None
    if row.get("real") is None or (row.get("generated") is None and not by_ids):
        raise BadRow(f"no fields real and generated among {listed(row)}")
    prompt_id = prompt_id_of(row, number)
    sample_id = integer_of(row, "sample_id", answers[prompt_id], 2**31)  # the answers of a prompt in turn
    answers[prompt_id] += 1
    real = checked(row["real"], "real")
    generated = None if row.get("generated") is None else checked(row["generated"], "generated")
    if generated is not None and not by_ids:
        return chat.given_pair(prompt_id, sample_id, real, generated, counts)
    if generated is not None and asked(generated) != asked(real):
        raise BadRow("real and generated do not answer the same prompt")
    ids = [_token_ids(row, name, vocab_size) for name in ("prompt_tokens", "real_tokens", "generated_tokens")]
    if not len(ids[0]):
        raise BadRow("prompt_tokens is empty: an answer needs a token before it")
    if not len(ids[2]):
        raise BadRow("generated_tokens is empty: a stop token alone is an answer, and nothing is none")
    example = chat.example(prompt_id, real, counts)
    room = chat.lengths.max_length - len(ids[0])
    if example is None or room < 1:
        counts["dropped: prompt too long"] += example is not None
        return None
    if np.array_equal(ids[0], chat.sampling_prompt(example)):
        pair = chat.pair(example, sample_id, ids[2][:room])
    else:
        pair = _as_given(chat, example, sample_id, generated, ids[0], ids[2][:room])
    same = min(len(ids[1]), len(pair.real))  # either may be cut
    if not np.array_equal(ids[1][:same], pair.real[:same]):
        raise BadRow("real_tokens: not the ids of the answer in real, by this tokenizer and chat template")
    return pair


def _preference(row: dict[str, Any]) -> dict[str, Any]:
    """A row of preferences, as TRL and others have them, in the names of pairs: chosen is real.

    `chosen` and `rejected` are whole conversations, or the last turn (a message or text) after `prompt`.
    """
    if row.get("real") is not None or row.get("chosen") is None or row.get("rejected") is None:
        return row
    rest = {name: value for name, value in row.items() if name not in ("prompt", "chosen", "rejected")}
    prompt = row.get("prompt")
    head = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
    if not isinstance(head, list):
        raise BadRow(f"prompt is {type(prompt).__name__}: expected text or a list of messages")

    def whole(field: str) -> Any:
        turns = row[field]
        if isinstance(turns, str):
            if not head:
                raise BadRow(f"{field} is text, and there is no field prompt that it answers")
            turns = [{"role": "assistant", "content": turns}]
        return [*head, *turns] if isinstance(turns, list) and len(turns) == 1 else turns

    return {**rest, "real": whole("chosen"), "generated": whole("rejected")}


def _score(row: dict[str, Any]) -> float | None:
    """What somebody made of the generated answer: a number, where the row has one."""
    value = row.get("score")
    if value is None:
        return None
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRow(f"score is {value!r:.40}: a finite number is wanted")
    return float(value)


def _as_given(
    chat: Chat,
    example: Example,
    sample_id: int,
    generated: list[Message] | None,
    prompt: np.ndarray,
    answer: np.ndarray,
) -> Pair:
    """A pair whose prompt is not what would be sampled from, but what `Chat.given_pair` makes of both texts.

    Raises:
        BadRow: nor is it that.
    """
    pair = None
    if generated is not None:
        pair = chat.given_pair(example.prompt_id, sample_id, example.messages, generated, Counter())
    if pair is None or not np.array_equal(prompt, pair.prompt):
        raise BadRow(
            "prompt_tokens: not the ids of the prompt in real, by this tokenizer and chat template; without "
            "the token columns the text is tokenized"
        )
    return dataclasses.replace(pair, generated=answer, truncated=not chat.stopped(answer))


def _token_ids(row: dict[str, Any], name: str, vocab_size: int) -> np.ndarray:
    value = row.get(name)
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise BadRow(f"{name}: expected a list of token ids")
    if min(value, default=0) < 0:
        raise BadRow(f"{name}: a token id is negative")
    if max(value, default=0) >= vocab_size:
        raise BadRow(
            f"{name}: a token id lies beyond the model's vocabulary of {vocab_size}: another tokenizer made "
            "the token columns; without them the text is tokenized"
        )
    return np.asarray(value, np.int32)
