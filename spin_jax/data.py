"""Datasets: rows to conversations, examples and pairs, and pairs to files and back.

rows of a dataset ─ conversation ─ Example (prompt and human answer) ─┬─ Pair ─ parquet
                                      an opponent's answer ───────────┘
"""

import io
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spin_jax import hosts
from spin_jax.chat import BadRow, Chat, Example, Message, Pair, checked
from spin_jax.config import import_function

PROMPT_ANSWER_COLUMNS = (
    ("question", "answer"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "answer"),
)


def load_rows(
    path: str,
    split: str = "train",
    *,
    name: str | None = None,
    revision: str | None = None,
    all_files: bool = False,
) -> Any:
    """Opens a dataset: something with a length, column names and rows as dicts.

    Args:
        path: a hub id; a .jsonl, .json or .parquet file; a directory of .jsonl or .parquet files or
            one that `save_to_disk` wrote; or `module:function`, which returns a list of dicts.
        split: in the syntax of `datasets` (`train`, `train[:1000]`). Of a directory of files it is
            those whose names begin with it, or for `train` all where none does; of one file, all.
        name: of a hub dataset's configuration.
        revision: of a hub dataset.
        all_files: read every file of a directory, whatever the split.

    Raises:
        ValueError, FileNotFoundError: naming the path, and the row where that can be told.
    """
    import datasets
    from datasets import exceptions

    base, part = re.fullmatch(r"([^\[]*)(.*)", split, re.DOTALL).groups()  # pyright: ignore
    if re.fullmatch(r"[\w.]+:\w+", path):
        rows = _sliced(datasets.Dataset.from_list(list(import_function(path)())), split)
    elif any(os.path.exists(os.path.join(path, known)) for known in ("state.json", "dataset_dict.json")):
        rows = datasets.load_from_disk(path)
        if isinstance(rows, datasets.DatasetDict):
            if base not in rows:
                raise ValueError(f"{path} has no split {base!r}; it has {', '.join(map(str, rows))}")
            rows = rows[base]
        rows = _sliced(rows, split)
    elif files := _data_files(path, "" if all_files else base):
        kind = "parquet" if files[0].endswith(".parquet") else "json"
        try:
            rows = datasets.load_dataset(kind, data_files=files, split=f"train{part}")
        except exceptions.DatasetGenerationError as error:
            raise ValueError(_explain(files, error)) from error
    elif ".." in path or path.startswith(("/", ".")) or path.count("/") > 1:
        raise FileNotFoundError(f"{path}: no such file or directory")
    else:
        try:
            rows = datasets.load_dataset(path, name, split=split, revision=revision)
        except (exceptions.DatasetNotFoundError, ConnectionError) as error:
            raise FileNotFoundError(
                f"{path} is no file or directory here, and the hub did not give it: {error}"
            ) from error
    if len(rows) == 0:
        raise ValueError(f"{path}: 0 rows")
    return rows


def _sliced(rows: Any, split: str) -> Any:
    """`train[10:20]` of rows that are all of a split."""
    from datasets import ReadInstruction

    if "[" not in split:
        return rows
    base = split.partition("[")[0]
    chosen = ReadInstruction.from_spec(split).to_absolute({base: len(rows)})
    return rows.select([i for part in chosen for i in range(part.from_ or 0, part.to or len(rows))])


def _data_files(path: str, split: str) -> list[str]:
    """The files of a path: one, or those of a directory that the split names; [] where there is none."""
    suffixes = (".jsonl", ".json", ".parquet")
    if os.path.isfile(path):
        if not path.endswith(suffixes):
            raise ValueError(f"{path}: expected a file that ends in {', '.join(suffixes)}")
        files = [path]
    elif os.path.isdir(path):
        names = sorted(name for name in os.listdir(path) if not name.startswith("."))
        kinds = [[n for n in names if n.endswith(suffix)] for suffix in (".parquet", ".jsonl")]
        names = kinds[0] or kinds[1]
        if not names:
            raise ValueError(f"{path} holds no .parquet or .jsonl file")
        chosen = [name for name in names if name.startswith(split)]
        if not chosen and split != "train":
            raise ValueError(f"{path} has no file of a split {split!r}; it has {', '.join(names[:9])}")
        files = [os.path.join(path, name) for name in chosen or names]
    else:
        return []
    if empty := [file for file in files if os.path.getsize(file) == 0]:
        raise ValueError(f"{empty[0]} is empty: 0 rows")
    return files


def _explain(files: Sequence[str], error: Exception) -> str:
    """Names the first row of JSONL that does not parse; else the library's own reason."""
    for file in files:
        if not file.endswith(".jsonl"):
            continue
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    if line.strip() and not isinstance(json.loads(line.decode()), dict):
                        return f"{file}, row {number}: not a JSON object"
                except ValueError as reason:
                    return f"{file}, row {number}: {reason}"
    return f"{files[0]} cannot be read: {error.__cause__ or error}"


def conversation(row: dict[str, Any], prompt_column: str | None, answer_column: str | None) -> list[Message]:
    """One row as messages that end with the assistant's last turn.

    Reads, in this order: the columns named; `real` (SPIN pairs); `messages`; the well-known pairs of
    column names. Alpaca's `input` is appended to its instruction.

    Raises:
        BadRow: naming the field.
    """
    if prompt_column and answer_column:
        columns = (prompt_column, answer_column)
    elif row.get("real") is not None:
        return checked(row["real"], "real")
    elif row.get("messages") is not None:
        return checked(row["messages"], "messages")
    else:
        columns = next((c for c in PROMPT_ANSWER_COLUMNS if c[0] in row and c[1] in row), None)
    if columns is None or not set(columns) <= row.keys():
        wanted = f" {' and '.join(columns)}" if columns else " real, messages, or a prompt and an answer"
        raise BadRow(
            f"no field{wanted} among {', '.join(row)}: set config.data.prompt_column and .answer_column"
        )
    prompt = row[columns[0]]
    if columns[0] == "instruction" and row.get("input"):
        prompt = f"{prompt}\n\n{row['input']}"
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": row[columns[1]]}]
    return checked(messages, " / ".join(columns))


def load_examples(
    rows: Any,
    chat: Chat,
    *,
    path: str,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> tuple[list[Example], Counter]:
    """Encodes a seeded choice of `limit` rows, in the rows' order; of several processes each its share.

    Returns:
        the examples, and counts of what was dropped or cut.

    Raises:
        ValueError: naming path, row and field; or saying that nothing is left.
    """
    chosen = np.sort(np.random.default_rng(seed).permutation(len(rows))[:limit])

    def share() -> tuple[dict[int, Example | None], Counter, tuple[int, str] | None]:
        """This process's examples by row number, what it counted, and the bad row that stopped it."""
        encoded: dict[int, Example | None] = {}
        counts: Counter = Counter()
        for number in (int(n) for place, n in enumerate(chosen) if hosts.turn(place)):
            try:
                row = rows[number]
                messages = conversation(row, prompt_column, answer_column)
                encoded[number] = chat.example(_integer(row.get("prompt_id"), number), messages, counts)
            except BadRow as error:
                return encoded, counts, (number, str(error))
        return encoded, counts, None

    shares = hosts.exchanged(hosts.together(share))
    if problems := [problem for *_, problem in shares if problem]:
        number, error = min(problems)
        raise ValueError(f"{path}, row {number + 1}: {error}")
    everything = {number: example for encoded, *_ in shares for number, example in encoded.items()}
    counts = sum((counts for _, counts, _ in shares), Counter())
    examples = [example for number in sorted(everything) if (example := everything[number]) is not None]
    if not examples:
        raise ValueError(f"{path}: none of {len(chosen)} rows is left ({dict(counts)})")
    return examples, +counts


def split_held_out(ids: Sequence[int], *, fraction: float, limit: int, seed: int) -> set[int]:
    """The ids kept from training: a seeded choice of at most `fraction` of them and `limit`."""
    count = min(int(len(ids) * fraction), limit)
    order = np.random.default_rng([seed, 1]).permutation(len(ids))[:count]
    return {int(ids[i]) for i in order}


def load_pairs(rows: Any, chat: Chat, *, path: str, vocab_size: int) -> tuple[list[Pair], Counter]:
    """Pairs of a published SPIN dataset, or those of another run, whose token columns are kept.

    Raises:
        ValueError: naming path, row and field; or saying that nothing is left.
    """
    counts: Counter = Counter()
    answers: Counter = Counter()  # by prompt_id
    pairs: dict[tuple[int, int], Pair] = {}
    for number, row in enumerate(rows):
        try:
            pair = _load_pair(row, number, chat, vocab_size, counts, answers)
            if pair is not None and (pair.prompt_id, pair.sample_id) in pairs:
                raise BadRow(f"prompt_id {pair.prompt_id}, sample_id {pair.sample_id} came before")
        except BadRow as error:
            raise ValueError(f"{path}, row {number + 1}: {error}") from error
        if pair is not None:
            pairs[pair.prompt_id, pair.sample_id] = pair
    if not pairs:
        raise ValueError(f"{path}: no pair is left ({dict(counts)})")
    return list(pairs.values()), +counts


def _integer(value: Any, default: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else default


def _load_pair(
    row: dict[str, Any], number: int, chat: Chat, vocab_size: int, counts: Counter, answers: Counter
) -> Pair | None:
    if row.get("real") is None or row.get("generated") is None:
        raise BadRow(f"no fields real and generated among {', '.join(row)}")
    prompt_id = _integer(row.get("prompt_id"), number)
    sample_id = _integer(row.get("sample_id"), answers[prompt_id])  # the answers of a prompt in turn
    answers[prompt_id] += 1
    real, generated = checked(row["real"], "real"), checked(row["generated"], "generated")
    if row.get("generated_tokens") is None:
        return chat.given_pair(prompt_id, sample_id, real, generated, counts)
    columns = ("prompt_tokens", "real_tokens", "generated_tokens")
    ids = [np.asarray(row[name], np.int32) for name in columns]
    if not len(ids[0]):
        raise BadRow("prompt_tokens is empty: an answer needs a token before it")
    if min(int(x.min(initial=0)) for x in ids) < 0:
        raise BadRow("a token id is negative")
    if max(int(x.max(initial=0)) for x in ids) >= vocab_size:
        raise BadRow(
            f"a token id lies beyond the model's vocabulary of {vocab_size}: another tokenizer made "
            "the token columns; without them the text is tokenized"
        )
    room = chat.lengths.max_length - len(ids[0])
    if room < 1:
        counts["dropped: prompt too long"] += 1
        return None
    prompt, real_ids, generated_ids = ids[0], ids[1][:room], ids[2][:room]
    truncated = not chat.stopped(generated_ids)
    return Pair(prompt_id, sample_id, real, generated, prompt, real_ids, generated_ids, truncated)


_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_PAIR_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.int64()),
        ("sample_id", pa.int32()),
        ("real", _MESSAGES),
        ("generated", _MESSAGES),
        ("prompt_tokens", pa.list_(pa.int32())),
        ("real_tokens", pa.list_(pa.int32())),
        ("generated_tokens", pa.list_(pa.int32())),
        ("truncated", pa.bool_()),
    ]
)


def pairs_to_parquet(pairs: Sequence[Pair]) -> bytes:
    """A parquet file of pairs: the published SPIN columns, and the ids."""
    rows = [
        {
            "prompt_id": pair.prompt_id,
            "sample_id": pair.sample_id,
            "real": pair.real_messages,
            "generated": pair.generated_messages,
            "prompt_tokens": pair.prompt,
            "real_tokens": pair.real,
            "generated_tokens": pair.generated,
            "truncated": pair.truncated,
        }
        for pair in pairs
    ]
    return _parquet(pa.Table.from_pylist(rows, schema=_PAIR_SCHEMA))


def pairs_from_parquet(content: bytes) -> list[Pair]:
    return [
        Pair(
            row["prompt_id"],
            row["sample_id"],
            row["real"],
            row["generated"],
            np.asarray(row["prompt_tokens"], np.int32),
            np.asarray(row["real_tokens"], np.int32),
            np.asarray(row["generated_tokens"], np.int32),
            row["truncated"],
        )
        for row in pq.read_table(io.BytesIO(content)).to_pylist()
    ]


_SCORE_SCHEMA = pa.schema(
    [
        ("source_iteration", pa.int32()),
        ("prompt_id", pa.int64()),
        ("sample_id", pa.int32()),
        ("real_logp", pa.float32()),
        ("generated_logp", pa.float32()),
    ]
)


def scores_to_parquet(source_iteration: int, pairs: Sequence[Pair], logps: np.ndarray) -> bytes:
    """A parquet file of the opponent's log-probs, float32 [pairs, (real, generated)]."""
    columns = [
        np.full(len(pairs), source_iteration, np.int32),
        np.array([pair.prompt_id for pair in pairs], np.int64),
        np.array([pair.sample_id for pair in pairs], np.int32),
        np.asarray(logps[:, 0], np.float32),
        np.asarray(logps[:, 1], np.float32),
    ]
    return _parquet(pa.table(columns, schema=_SCORE_SCHEMA))


def scores_from_parquet(content: bytes) -> dict[tuple[int, int, int], tuple[float, float]]:
    """Log-probs of (real, generated), by (source_iteration, prompt_id, sample_id)."""
    rows = pq.read_table(io.BytesIO(content)).to_pylist()
    return {
        (row["source_iteration"], row["prompt_id"], row["sample_id"]): (
            row["real_logp"],
            row["generated_logp"],
        )
        for row in rows
    }


def _parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()
