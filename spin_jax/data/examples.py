"""Turns the rows of a dataset into conversations, and these into examples: a prompt and its human answer.

To read another form of row, edit `conversation` and `_form`.
"""

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from spin_jax.data import sources
from spin_jax.data.chat import Chat
from spin_jax.data.findings import Findings
from spin_jax.data.records import (
    Example,
    Ids,
    Message,
    check_messages,
    check_text,
    list_names,
    prompt_turns,
    read_integer,
)
from spin_jax.errors import BadRow

CONVERSATION_COLUMNS = ("conversations", "conversation", "dialog", "dialogue")  # besides `real` and `messages`
PROMPT_ANSWER_COLUMNS = (
    ("question", "answer"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "answer"),
)
MORE_COLUMNS = {  # that belong to a form, by its first column
    "instruction": ("input", "context", "history", "system"),  # Alpaca, Dolly, LLaMA-Factory
    "question": ("system_prompt",),  # OpenOrca
    **dict.fromkeys(CONVERSATION_COLUMNS, ("system",)),  # ShareGPT
}
SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "function_response"), "tool"),
    "system": "system",
}


def conversation(row: dict[str, Any], prompt_column: str | None, answer_column: str | None) -> list[Message]:
    """One row as messages that end with the assistant's last turn, which may be empty.

    It reads the first of these that the row has: the two columns that the config names; `real` (SPIN pairs);
    `messages`; one of PROMPT_ANSWER_COLUMNS, each text or a list of turns; one of CONVERSATION_COLUMNS. `input` and
    `context` are appended to the instruction; `history` and the system message stand before the other turns. It raises
    BadRow, which names the field, for a malformed row.
    """
    columns = _form(row, prompt_column, answer_column)
    if not columns or not row.keys() >= set(columns):
        if row.keys() >= {"chosen", "rejected"} and not prompt_column:
            raise BadRow("a row of preferences (chosen, rejected): give it as config.selfplay.pairs, not as data.path")
        wanted = f" {' and '.join(columns)}" if columns else " real, messages, or a prompt and an answer"
        raise BadRow(
            f"no field{wanted} among {list_names(row)}: set config.data.prompt_column and .answer_column, or write one "
            "of the forms that configs/README.md lists under Data"
        )
    if columns == ("prompt", "completion") and row.get("label") is False and not prompt_column:
        raise BadRow(
            "label is false, so the completion is a bad example: take such rows out, or set config.data.prompt_column "
            "and .answer_column if the label says something else"
        )
    more = {name: row[name] for name in MORE_COLUMNS.get(columns[0], ()) if row.get(name)}
    if len(columns) == 1:
        messages = check_messages(_sharegpt_as_messages(row[columns[0]], columns[0]), columns[0])
        return _with_system(messages, more)
    prompt = _turns(row[columns[0]], columns[0], "user")
    answer = _turns("" if row[columns[1]] is None else row[columns[1]], columns[1], "assistant")
    for name in (name for name in ("input", "context") if name in more):
        if not isinstance(row[columns[0]], str):
            raise BadRow(f"{name} would follow {columns[0]}, and that is no text but a list of turns")
        prompt[0]["content"] += f"\n\n{check_text(more[name], name)}"
    history = more.get("history", [])
    if not isinstance(history, list) or not all(isinstance(each, list) and len(each) == 2 for each in history):
        raise BadRow("history: expected a list of pairs of an instruction and its answer")
    said = zip(itertools.cycle(("user", "assistant")), itertools.chain(*history), strict=False)
    prompt = [*({"role": role, "content": check_text(text, "history")} for role, text in said), *prompt]
    if not any(turn.get("role") == "assistant" for turn in answer):
        raise BadRow(f"{columns[1]}: no assistant turn in it")
    return _with_system(check_messages([*prompt, *answer], " + ".join(columns)), more)


def _with_system(messages: list[Message], more: dict[str, Any]) -> list[Message]:
    """The messages, with a system message of another column of the row in front if they have none."""
    name = next((name for name in more if name.startswith("system")), None)
    if name is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": check_text(more[name], name)}, *messages]


def _form(row: dict[str, Any], prompt_column: str | None, answer_column: str | None) -> tuple[str, ...]:
    """The columns that `conversation` reads first: one of turns; prompt and answer; or none."""
    if prompt_column and answer_column:
        return prompt_column, answer_column
    forms = [("real",), ("messages",), *PROMPT_ANSWER_COLUMNS, *((name,) for name in CONVERSATION_COLUMNS)]
    forms.append(("question", "response"))
    has = {name for name, value in row.items() if value is not None}
    return next((c for c in forms if (has if len(c) == 1 else row.keys()) >= set(c)), ())


def _columns_to_read(row: dict[str, Any], prompt_column: str | None, answer_column: str | None) -> tuple[str, ...]:
    """All columns that `conversation` reads."""
    columns = _form(row, prompt_column, answer_column)
    return (*columns, *MORE_COLUMNS.get(columns[0], ())) if columns else ()


def _turns(value: Any, field: str, role: str) -> list[dict[str, Any]]:
    """The turns of a prompt or an answer: a list of them as it is, text as one turn of this role."""
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        return _sharegpt_as_messages(value, field)
    return [{"role": role, "content": check_text(value, field)}]


def _sharegpt_as_messages(turns: Any, field: str) -> Any:
    """Turns of `from` and `value` with `role` and `content` in their place; anything else as it is."""
    if not isinstance(turns, list | tuple) or not any(isinstance(turn, dict) and turn.get("from") for turn in turns):
        return turns
    messages = []
    for number, turn in enumerate(turns):
        name = f"{field}[{number}]"
        if not isinstance(turn, dict) or not turn.keys() >= {"from", "value"}:
            raise BadRow(f"{name}: expected from and value, as in the turns beside it")
        role = SHAREGPT_ROLES.get(str(turn["from"]).lower())
        if role is None:
            raise BadRow(f"{name}.from is {turn['from']!r:.40}: expected one of {', '.join(SHAREGPT_ROLES)}")
        no_answer = role == "assistant" and turn["value"] is None
        content = "" if no_answer else check_text(turn["value"], f"{name}.value")
        rest = {key: value for key, value in turn.items() if key not in ("from", "value") and value is not None}
        messages.append({**rest, "role": role, "content": content})
    return messages


def encode_rows(
    rows: Any,
    numbers: Sequence[int],
    chat: Chat,
    *,
    path: str,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    bad_rows: str = "error",
    all_turns: bool = False,
) -> tuple[list[tuple[int, Example]], Findings]:
    """The examples of rows that have these numbers in their dataset, and what was found, up to the first problem.

    `rows` are those rows alone, as `sources.part` makes them. It asks for no device, and needs no other process.
    """
    encoded: list[tuple[int, Example]] = []
    findings = Findings(bad_rows)
    for index, number in enumerate(numbers):
        with findings.reading(number, sources.place(rows, index, path, number)):
            row = sources.row(rows, index)
            messages, others = chat.with_fields(conversation(row, prompt_column, answer_column), row)
            findings.note_unused_columns(row, _columns_to_read(row, prompt_column, answer_column), others)
            prompt_id = read_integer(row, "prompt_id", number, 2**63)
            if example := chat.example(prompt_id, messages, findings.counts):
                encoded.append((number, chat.with_earlier_answers(example) if all_turns else example))
        if findings.problem:
            break
    return encoded, findings


def mixed_rows(sizes: Mapping[str, int], shares: Mapping[str, Fraction], limit: int | None) -> dict[str, int]:
    """How many rows of each dataset a mixture has: as many as the shares and `limit` allow without a row twice.

    `sizes` are the rows of each dataset. The counts are its share of the total, rounded up or down.

    Raises:
        ValueError: a dataset would have no row.
    """
    total = int(min([limit or math.inf, *(sizes[path] / share for path, share in shares.items())]))
    ends = [int(total * share) for share in itertools.accumulate(shares.values(), initial=Fraction(0))]
    counts = {path: end - start for path, (start, end) in zip(shares, itertools.pairwise(ends), strict=True)}
    if none := [path for path, count in counts.items() if count == 0]:
        raise ValueError(
            f"data.path: of the {total} rows that the mixture has by its weights, data.limit and the sizes of its "
            f"datasets, none is of {none[0]}: give it a larger weight, or leave it out"
        )
    return counts


def prompt_keys(messages: Sequence[Message], prompt: Ids) -> list[bytes]:
    """Digests of 16 bytes: of the prompt's token ids, of the turns before the answer, and of each beginning of these.

    Two conversations with equal prompts share one of the first two.
    """
    turns, digest = [], hashlib.blake2b(digest_size=16)
    for turn in prompt_turns(messages):  # JSON texts, which hold no zero byte
        digest.update(turn.encode() + b"\0")
        turns.append(digest.digest())
    return [hashlib.blake2b(prompt.tobytes(), digest_size=16).digest(), *reversed(turns or [digest.digest()])]


def group_by_prompt(keys: np.ndarray) -> np.ndarray:
    """For each example, the place of the first one with an equal prompt, so that equal prompts have equal numbers.

    Args:
        keys: the first two `prompt_keys` of each example, S16 [N, 2].

    Returns:
        int64 [N]. Prompts that are equal to the same prompt count as equal, too.
    """
    places, before = np.arange(len(keys)), np.zeros(0)
    same = [_first_places(column) for column in keys.T]
    while not np.array_equal(places, before):
        before = places
        for first in same:
            lowest = places.copy()
            np.minimum.at(lowest, first, places)
            places = lowest[first]
    return places


def _first_places(keys: np.ndarray) -> np.ndarray:
    """The place of the first key that equals each one, int64 [N]. To sort a 16th at a time takes little memory."""
    result, parts = np.empty(len(keys), np.int64), np.ascontiguousarray(keys).view(np.uint8)[::16] % 16
    for part in range(16):
        places = np.flatnonzero(parts == part)
        _, first, inverse = np.unique(keys[places], return_index=True, return_inverse=True)
        result[places] = places[first[inverse]]
    return result


def split_held_out(prompts: Sequence[int] | np.ndarray, *, fraction: float, limit: int, seed: int) -> set[int]:
    """The prompts kept from training; `prompts` has the number of each example's prompt.

    They are a random choice. Their examples are at most `limit` and a share `fraction` of all; where no prompt has so
    few examples, they are those of the prompt that has the fewest.
    """
    names, first, sizes = np.unique(prompts, return_index=True, return_counts=True)
    room = most = min(int(len(prompts) * fraction), limit)
    # The seed permutes the prompts in the order of their first examples.
    order = np.argsort(first)[np.random.default_rng([seed, 1]).permutation(len(names))]
    chosen: set[int] = set()
    for place in order:
        if sizes[place] <= room:
            chosen.add(int(names[place]))
            room -= sizes[place]
        if not room:
            break
    smallest = order[np.argmin(sizes[order])]
    if most and not chosen and len(order) > 1 and sizes[smallest] <= limit:
        chosen.add(int(names[smallest]))
    return chosen
