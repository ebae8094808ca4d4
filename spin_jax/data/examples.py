"""Rows of a dataset to conversations, and those to examples: a prompt and its human answer."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from spin_jax.data import sources
from spin_jax.data.chat import Chat
from spin_jax.data.records import Example, Message, checked, checked_text, listed, prompt_id_of
from spin_jax.data.tally import Tally, merged
from spin_jax.errors import BadRow
from spin_jax.runtime import processes

PROMPT_ANSWER_COLUMNS = (
    ("question", "answer"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "answer"),
)


def conversation(row: dict[str, Any], prompt_column: str | None, answer_column: str | None) -> list[Message]:
    """One row as messages that end with the assistant's last turn, which may be empty.

    Reads, in this order: the columns named; `real` (SPIN pairs); `messages`; the well-known pairs of
    column names. Alpaca's `input` is appended to its instruction.

    Raises:
        BadRow: naming the field.
    """
    columns = _columns(row, prompt_column, answer_column)
    if not columns or not row.keys() >= set(columns[:2]):
        wanted = f" {' and '.join(columns)}" if columns else " real, messages, or a prompt and an answer"
        raise BadRow(
            f"no field{wanted} among {listed(row)}: set config.data.prompt_column and .answer_column"
        )
    if len(columns) == 1:
        return checked(row[columns[0]], columns[0])
    prompt = checked_text(row[columns[0]], columns[0])
    answer = "" if row[columns[1]] is None else checked_text(row[columns[1]], columns[1])
    if columns[2:] and row.get(columns[2]):
        prompt = f"{prompt}\n\n{checked_text(row[columns[2]], columns[2])}"
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _columns(row: dict[str, Any], prompt_column: str | None, answer_column: str | None) -> tuple[str, ...]:
    """What `conversation` reads: messages; or prompt, answer and maybe an addition to the prompt; or ()."""
    if prompt_column and answer_column:
        columns = (prompt_column, answer_column)
    elif whole := [name for name in ("real", "messages") if row.get(name) is not None]:
        return (whole[0],)
    else:
        columns = next((c for c in PROMPT_ANSWER_COLUMNS if c[0] in row and c[1] in row), ())
    return (*columns, "input") if columns[:1] == ("instruction",) else columns


def load_examples(
    rows: Any,
    chat: Chat,
    *,
    path: str,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    bad_rows: str = "error",
    max_bad: float = 0.1,
) -> tuple[list[Example], Counter]:
    """Encodes a seeded choice of `limit` rows, in the rows' order; of several processes each its share.

    Rows with an empty answer are dropped, and so are those that make no conversation where `bad_rows` is
    "drop", up to the share `max_bad` of all.

    Returns:
        the examples, and counts of what was dropped, cut or not used.

    Raises:
        ValueError: naming path, row and field; or saying that nothing is left.
    """
    chosen = np.sort(np.random.default_rng(seed).permutation(len(rows))[:limit])

    def share() -> list[Any]:
        """This process's [[row number, fields of an example], …], up to a problem, and its tally."""
        encoded: list[list[Any]] = []
        tally = Tally(bad_rows)
        for number in (int(n) for place, n in enumerate(chosen) if processes.turn(place)):
            with tally.row(number, sources.place(rows, number, path)):
                row = rows[number]
                messages = conversation(row, prompt_column, answer_column)
                tally.see_unused(row, _columns(row, prompt_column, answer_column))
                if example := chat.example(prompt_id_of(row, number), messages, tally.counts):
                    encoded.append([number, *vars(example).values()])
            if tally.problem:
                break
        return [encoded, {**vars(tally), "counts": dict(tally.counts), "unused": dict(tally.unused)}]

    shares = processes.exchanged(processes.together(share))
    counts = merged([tally for _, tally in shares]).settled(path, len(chosen), max_bad)
    examples, by_id = [], {}
    for number, *fields in sorted((row for encoded, _ in shares for row in encoded), key=lambda row: row[0]):
        example = Example(*fields)
        before = by_id.setdefault(example.prompt_id, number)
        if before != number:
            raise ValueError(
                f"{sources.place(rows, number, path)}: prompt_id {example.prompt_id} came before, in "
                f"{sources.place(rows, before, path)}; give each row its own, or leave the column out"
            )
        examples.append(example)
    if not examples:
        raise ValueError(f"{path}: none of {len(chosen)} rows is left ({dict(counts)})")
    return examples, counts


def split_held_out(ids: Sequence[int], *, fraction: float, limit: int, seed: int) -> set[int]:
    """The ids kept from training: a seeded choice of at most `fraction` of them and `limit`."""
    count = min(int(len(ids) * fraction), limit)
    order = np.random.default_rng([seed, 1]).permutation(len(ids))[:count]
    return {int(ids[i]) for i in order}
