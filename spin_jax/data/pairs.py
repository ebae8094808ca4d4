"""Reads given pairs: rows of a published SPIN dataset, of preferences, of another run or another sampler."""

import dataclasses
import math
from collections import Counter
from typing import Any

import numpy as np

from spin_jax.data import sources
from spin_jax.data.chat import Chat
from spin_jax.data.findings import Findings
from spin_jax.data.records import Message, Pair, check_messages, list_names, prompt_turns, read_integer
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
    """Turns rows into pairs. Where a row has token columns, these count, and not the text.

    The token ids of a prompt and of its human answer must be the ids that this chat makes of the text. A row
    with token columns needs no text of the generated answer. Bad rows are dropped as in `load_examples`. With
    `scored` the columns `score` and `real_score` are read too, where there are any.

    Returns:
        the pairs, and counts of what was dropped, cut or not used.

    Raises:
        ValueError: a row is bad, and the message names `path`, row and field; or no pair is left.
    """
    findings = Findings(bad_rows)
    answers: Counter = Counter()  # how many each prompt_id has so far
    pairs: dict[tuple[int, int], Pair] = {}
    for number in range(len(rows)):
        with findings.reading(number, sources.place(rows, number, path)):
            row = _preference_as_pair(sources.row(rows, number))
            scores = {name: _score(row, name) for name in ("score", "real_score") if scored}
            others: set[str] = set()  # fields of its messages that the template does not name
            pair = _load_pair(row, number, chat, vocab_size, findings.counts, answers, others)
            findings.note_unused_columns(row, ("real", *scores), others)
            if pair is not None:
                if (pair.prompt_id, pair.sample_id) in pairs:
                    raise BadRow(f"prompt_id {pair.prompt_id}, sample_id {pair.sample_id} came before")
                pairs[pair.prompt_id, pair.sample_id] = dataclasses.replace(pair, **scores)
        if findings.problem:
            break
    counts = findings.final_counts(path, len(rows), max_bad)
    if not pairs:
        raise ValueError(f"{path}: no pair is left ({dict(counts)})")
    return list(pairs.values()), counts


def _load_pair(
    row: dict[str, Any],
    number: int,
    chat: Chat,
    vocab_size: int,
    counts: Counter,
    answers: Counter,
    others: set[str],
) -> Pair | None:
    """The pair of one row, or None when it is dropped as too long, and `counts` says so."""
    has_ids = row.get("generated_tokens") is not None
    if row.get("real") is None or (row.get("generated") is None and not has_ids):
        raise BadRow(f"no fields real and generated among {list_names(row)}")
    prompt_id = read_integer(row, "prompt_id", number, 2**63)
    sample_id = read_integer(row, "sample_id", answers[prompt_id], 2**31)
    answers[prompt_id] += 1
    real, unread = chat.with_fields(check_messages(row["real"], "real"), row)
    others |= unread
    generated = None
    if row.get("generated") is not None:
        generated, unread = chat.with_fields(check_messages(row["generated"], "generated"), row)
        others |= unread
    if generated is not None and not has_ids:
        return chat.given_pair(prompt_id, sample_id, real, generated, counts)
    if generated is not None and prompt_turns(generated) != prompt_turns(real):
        raise BadRow("real and generated do not answer the same prompt")
    columns = ("prompt_tokens", "real_tokens", "generated_tokens")
    prompt_ids, real_ids, generated_ids = (_token_ids(row, name, vocab_size) for name in columns)
    if not len(prompt_ids):
        raise BadRow("prompt_tokens is empty: an answer needs a token before it")
    if not len(generated_ids):
        raise BadRow("generated_tokens is empty: an answer has at least a stop token")
    example = chat.example(prompt_id, real, counts)
    room = chat.lengths.max_length - len(prompt_ids)
    if example is None or room < 1:
        counts["dropped: prompt too long"] += example is not None
        return None
    answer = generated_ids[:room]
    if np.array_equal(prompt_ids, chat.sampling_prompt(example)):
        pair = chat.pair(example, sample_id, answer)
    else:  # where the prompts of the two answers tokenize differently at their end, `given_pair` has other ids
        pair = None
        if generated is not None:
            pair = chat.given_pair(prompt_id, sample_id, example.messages, generated, Counter())
        if pair is None or not np.array_equal(prompt_ids, pair.prompt):
            raise BadRow(
                "prompt_tokens: not the ids of the prompt in real, by this tokenizer and chat template; without "
                "the token columns the text is tokenized"
            )
        pair = dataclasses.replace(pair, generated=answer, truncated=not chat.stopped(answer))
    common = min(len(real_ids), len(pair.real))  # either answer may have been cut
    if not np.array_equal(real_ids[:common], pair.real[:common]):
        raise BadRow("real_tokens: not the ids of the answer in real, by this tokenizer and chat template")
    return pair


def _preference_as_pair(row: dict[str, Any]) -> dict[str, Any]:
    """A row of preferences, as TRL and others write them, with the columns of a pair: chosen becomes real."""
    if row.get("real") is not None or row.get("chosen") is None or row.get("rejected") is None:
        return row
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list | None):
        raise BadRow(f"prompt is {type(prompt).__name__}: expected text or a list of messages")
    rest = {name: value for name, value in row.items() if name not in ("prompt", "chosen", "rejected")}
    real, generated = (_preference_conversation(row, field, prompt or []) for field in ("chosen", "rejected"))
    return {**rest, "real": real, "generated": generated}


def _preference_conversation(row: dict[str, Any], field: str, prompt: list[Any]) -> list[Message]:
    """The whole conversation of `chosen` or `rejected`.

    The field holds the conversation with its prompt, or only what follows `prompt`: text, or some turns.
    A prompt that came as text may also repeat any user's turn of the whole conversation. It raises BadRow
    where the turns neither contain the prompt nor can follow it.
    """
    turns = row[field]
    if isinstance(turns, str):
        if not prompt:
            raise BadRow(f"{field} is text, and there is no field prompt that it answers")
        turns = [{"role": "assistant", "content": turns}]
    if not prompt or not isinstance(turns, list) or not turns:
        return check_messages(turns, field)
    system, rest = _split_system(turns)
    prompt_system, question = _split_system(prompt)
    same_system = not (system and prompt_system) or _same_turns(system, prompt_system)
    if same_system and _same_turns(rest[: len(question)], question):
        return check_messages([*(system or prompt_system), *rest], field)
    blank = not any(_role_and_text(turn)[1] for turn in prompt)
    repeated = isinstance(row["prompt"], str) and any(_same_turns([turn], prompt) for turn in rest)
    if (blank or repeated) and _role_and_text(turns[0])[0] != "assistant":
        return check_messages(turns, field)
    next_role = "user" if _role_and_text(prompt[-1])[0] == "assistant" else "assistant"
    role, text = _role_and_text(turns[0])
    if role in ("system", "user") and role != next_role:
        raise BadRow(
            f"{field} begins with another {role} turn than prompt ({text!r:.60}): give the whole "
            "conversation in it, or only the turns that follow prompt"
        )
    return check_messages([*prompt, *turns], f"prompt + {field}")


def _split_system(turns: list[Any]) -> tuple[list[Any], list[Any]]:
    """A leading system message, if there is one, and the other turns."""
    count = int(bool(turns) and _role_and_text(turns[0])[0] == "system")
    return turns[:count], turns[count:]


def _same_turns(a: list[Any], b: list[Any]) -> bool:
    """Whether two lists of turns have equal roles and texts; white space around a text does not count."""
    return list(map(_role_and_text, a)) == list(map(_role_and_text, b))


def _role_and_text(turn: Any) -> tuple[Any, Any]:
    """A turn's role and content; `check_messages` has not yet seen whether they are text."""
    role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, turn)
    return role, content.strip() if isinstance(content, str) else content


def _score(row: dict[str, Any], name: str) -> float | None:
    """The score that the row gives an answer in the column `name`, or None."""
    value = row.get(name)
    if value is None:
        return None
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRow(f"{name} is {value!r:.40}: expected a finite number")
    return float(value)


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
