"""Turns the rows of a dataset into conversations, and these into examples: a prompt and its human answer.

To read another form of row, edit `conversation` and `_columns_to_read`.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from spin_jax.data import sources
from spin_jax.data.chat import Chat
from spin_jax.data.findings import Findings, merge_findings
from spin_jax.data.records import Example, Message, check_messages, check_text, list_names, read_integer
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

    It reads the first of these that the row has: the two columns that the config names; `real` (SPIN pairs);
    `messages`; one of PROMPT_ANSWER_COLUMNS. Alpaca's `input` is appended to its instruction. It raises
    BadRow, which names the field, for a malformed row.
    """
    columns = _columns_to_read(row, prompt_column, answer_column)
    if not columns or not row.keys() >= set(columns[:2]):
        wanted = f" {' and '.join(columns)}" if columns else " real, messages, or a prompt and an answer"
        raise BadRow(f"no field{wanted} among {list_names(row)}: set config.data.prompt_column and .answer_column")
    if len(columns) == 1:
        return check_messages(row[columns[0]], columns[0])
    prompt = check_text(row[columns[0]], columns[0])
    answer = "" if row[columns[1]] is None else check_text(row[columns[1]], columns[1])
    if columns[2:] and row.get(columns[2]):
        prompt = f"{prompt}\n\n{check_text(row[columns[2]], columns[2])}"
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _columns_to_read(row: dict[str, Any], prompt_column: str | None, answer_column: str | None) -> tuple[str, ...]:
    """The columns that `conversation` reads: one of messages; prompt, answer and perhaps input; or none."""
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
    """Encodes `limit` rows that `seed` chooses, in the order of the rows. Several processes share the work.

    Rows with an empty answer are dropped. Where `bad_rows` is "drop", malformed rows are dropped too. Both
    together may be at most the share `max_bad` of the chosen rows.

    Returns:
        the examples, and counts of what was dropped, cut or not used.

    Raises:
        ValueError: a row is bad, and the message names `path`, row and field; or no example is left.
    """
    chosen = np.sort(np.random.default_rng(seed).permutation(len(rows))[:limit])

    def encode_share() -> list[Any]:
        """[examples as [row number, *fields], the fields of the findings], up to this process's first problem."""
        encoded: list[list[Any]] = []
        findings = Findings(bad_rows)
        for number in (n for turn, n in enumerate(chosen.tolist()) if processes.turn(turn)):
            with findings.reading(number, sources.place(rows, number, path)):
                row = rows[number]
                messages = conversation(row, prompt_column, answer_column)
                findings.note_unused_columns(row, _columns_to_read(row, prompt_column, answer_column))
                prompt_id = read_integer(row, "prompt_id", number, 2**63)
                if example := chat.example(prompt_id, messages, findings.counts):
                    encoded.append([number, *vars(example).values()])
            if findings.problem:
                break
        return [encoded, vars(findings)]

    shares = processes.exchanged(processes.together(encode_share))
    counts = merge_findings([fields for _, fields in shares]).final_counts(path, len(chosen), max_bad)
    examples, by_id = [], {}
    for number, *fields in sorted((row for encoded, _ in shares for row in encoded), key=lambda row: row[0]):
        example = Example(*fields)
        earlier = by_id.setdefault(example.prompt_id, number)
        if earlier != number:
            raise ValueError(
                f"{sources.place(rows, number, path)}: prompt_id {example.prompt_id} came before, in "
                f"{sources.place(rows, earlier, path)}; give each row its own, or leave the column out"
            )
        examples.append(example)
    if not examples:
        raise ValueError(f"{path}: none of {len(chosen)} rows is left ({dict(counts)})")
    return examples, counts


def split_held_out(ids: Sequence[int], *, fraction: float, limit: int, seed: int) -> set[int]:
    """The ids of the examples kept from training: a random choice, at most `limit` and a share `fraction`."""
    count = min(int(len(ids) * fraction), limit)
    order = np.random.default_rng([seed, 1]).permutation(len(ids))[:count]
    return {int(ids[i]) for i in order}
