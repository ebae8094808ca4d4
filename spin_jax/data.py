"""Datasets: rows to conversations, examples and pairs, and pairs to files and back.

rows of a dataset ─ conversation ─ Example (prompt and human answer) ─┬─ Pair ─ parquet
                                      an opponent's answer ───────────┘
"""

import contextlib
import dataclasses
import hashlib
import io
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgpack
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from spin_jax import sources
from spin_jax.chat import BadRow, Chat, EmptyAnswer, Example, Message, Pair, asked, checked, checked_text
from spin_jax.losses import PAIR
from spin_jax.runtime import processes
from spin_jax.storage import files

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
            f"no field{wanted} among {_listed(row)}: set config.data.prompt_column and .answer_column"
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


def _listed(names: Iterable[str]) -> str:
    """Names for an error or a note, whatever they are made of."""
    shown = [name if name.isprintable() and len(name) <= 40 else ascii(name[:40]) for name in map(str, names)]
    return ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "")


@dataclasses.dataclass
class _Tally:
    """What was found in rows, and what is done about it."""

    bad_rows: str  # "error" or "drop"
    counts: Counter = dataclasses.field(default_factory=Counter)
    unused: Counter = dataclasses.field(default_factory=Counter)  # columns that nothing reads
    with_unused: int = 0  # rows
    bad: int = 0  # rows dropped for what they are
    first_bad: list[Any] | None = None  # its number, and an error
    problem: list[Any] | None = None  # the same, of a row that ends it all

    @contextlib.contextmanager
    def row(self, number: int, place: str) -> Iterator[None]:
        """Around all that is done with a row: a bad one is counted where it may be dropped."""
        try:
            yield
        except ValueError as error:
            reason = str(error) if str(error).startswith(place) else f"{place}: {error}"
            empty = isinstance(error, EmptyAnswer)
            if empty or (isinstance(error, BadRow) and self.bad_rows == "drop"):
                self.counts["dropped: empty answer" if empty else "dropped: bad row"] += 1
                self.bad += 1
                self.first_bad = self.first_bad or [number, reason]
            else:
                self.problem = [number, reason]

    def see_unused(self, row: dict[str, Any], used: Iterable[str]) -> None:
        """Notes the columns that nothing reads. Those of pairs belong together."""
        used = {*used, "prompt_id"}
        if "real" in used:
            used.update(_PAIR_SCHEMA.names)
        unused = [name for name, value in row.items() if name not in used and value is not None]
        self.unused.update(unused)
        self.with_unused += bool(unused)

    def settled(self, path: str, total: int, max_bad: float) -> Counter:
        """The counts, of `total` rows.

        Raises:
            ValueError: a row was to end it all, or too many were bad.
        """
        if self.problem:
            raise ValueError(self.problem[1])
        if self.first_bad and self.bad > max_bad * total:
            raise ValueError(
                f"{path}: {self.bad} of {total} rows are bad or have an empty answer, and data.max_bad="
                f"{max_bad:g} of them may be; the first is {self.first_bad[1]}"
            )
        if self.unused:
            self.counts[f"not used: columns {_listed(sorted(self.unused))}; rows with them"] = (
                self.with_unused
            )
        return +self.counts


def _merged(found: Sequence[dict[str, Any]]) -> _Tally:
    """What the tallies of several processes found, as one that had seen all rows would have it."""
    return _Tally(
        found[0]["bad_rows"],
        sum((Counter(tally["counts"]) for tally in found), Counter()),
        sum((Counter(tally["unused"]) for tally in found), Counter()),
        sum(tally["with_unused"] for tally in found),
        sum(tally["bad"] for tally in found),
        min((tally["first_bad"] for tally in found if tally["first_bad"]), default=None),
        min((tally["problem"] for tally in found if tally["problem"]), default=None),
    )


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
        tally = _Tally(bad_rows)
        for number in (int(n) for place, n in enumerate(chosen) if processes.turn(place)):
            with tally.row(number, sources.place(rows, number, path)):
                row = rows[number]
                messages = conversation(row, prompt_column, answer_column)
                tally.see_unused(row, _columns(row, prompt_column, answer_column))
                if example := chat.example(_prompt_id(row, number), messages, tally.counts):
                    encoded.append([number, *vars(example).values()])
            if tally.problem:
                break
        return [encoded, {**vars(tally), "counts": dict(tally.counts), "unused": dict(tally.unused)}]

    shares = processes.exchanged(processes.together(share))
    counts = _merged([tally for _, tally in shares]).settled(path, len(chosen), max_bad)
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
    tally = _Tally(bad_rows)
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


def _prompt_id(row: dict[str, Any], number: int) -> int:
    """The row's own where it is an integer (some datasets have texts there), else its number."""
    return _integer(row, "prompt_id", number, 2**63)


def _integer(row: dict[str, Any], name: str, default: int, end: int) -> int:
    value = row.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        return default
    if not 0 <= value < end:
        raise BadRow(f"{name} is {value}: expected 0 to {end - 1}")
    return value


def _load_pair(
    row: dict[str, Any], number: int, chat: Chat, vocab_size: int, counts: Counter, answers: Counter
) -> Pair | None:
    by_ids = row.get("generated_tokens") is not None
    if row.get("real") is None or (row.get("generated") is None and not by_ids):
        raise BadRow(f"no fields real and generated among {_listed(row)}")
    prompt_id = _prompt_id(row, number)
    sample_id = _integer(row, "sample_id", answers[prompt_id], 2**31)  # the answers of a prompt in turn
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
    """A parquet file of pairs: the published SPIN columns, the ids and, where they have one, the score."""
    scored = any(pair.score is not None for pair in pairs)
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
            **({"score": pair.score} if scored else {}),
        }
        for pair in pairs
    ]
    schema = _PAIR_SCHEMA.append(pa.field("score", pa.float64())) if scored else _PAIR_SCHEMA
    return _parquet(pa.Table.from_pylist(rows, schema=schema))


def pairs_from_parquet(content: bytes, path: epath.PathLike | None = None) -> list[Pair]:
    """What `pairs_to_parquet` wrote; ValueError, naming `path`, where it is no longer that."""
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
            row.get("score"),
        )
        for row in _rows_of(content, path or "a file of pairs")
    ]


def scores_to_parquet(
    source_iteration: int, pairs: Sequence[Pair], logps: np.ndarray, roles: Sequence[str] = PAIR
) -> bytes:
    """A parquet file of the opponent's log-probs, float32 [pairs, roles]."""
    columns = {
        "source_iteration": np.full(len(pairs), source_iteration, np.int32),
        "prompt_id": np.array([pair.prompt_id for pair in pairs], np.int64),
        "sample_id": np.array([pair.sample_id for pair in pairs], np.int32),
        **{f"{role}_logp": np.asarray(logps[:, n], np.float32) for n, role in enumerate(roles)},
    }
    return _parquet(pa.table(columns))


def scores_from_parquet(
    content: bytes, path: epath.PathLike | None = None, roles: Sequence[str] = PAIR
) -> dict[tuple[int, int, int], tuple[float, ...]]:
    """Log-probs of the roles' answers, by (source_iteration, prompt_id, sample_id).

    Raises:
        ValueError: naming `path`, where `content` is not what `scores_to_parquet` wrote.
    """
    return {
        (row["source_iteration"], row["prompt_id"], row["sample_id"]): tuple(row[f"{r}_logp"] for r in roles)
        for row in _rows_of(content, path or "a file of scores")
    }


def held_out_to_parquet(pairs: Sequence[Pair], columns: Mapping[str, np.ndarray]) -> bytes:
    """A parquet file of what a model makes of held-out pairs: a column a number, float32 [pairs]."""
    ids = {
        "prompt_id": np.array([pair.prompt_id for pair in pairs], np.int64),
        "sample_id": np.array([pair.sample_id for pair in pairs], np.int32),
    }
    return _parquet(pa.table({**ids, **{name: np.asarray(x, np.float32) for name, x in columns.items()}}))


# Parquet's own checksums are of pages: a flipped bit in a header or in the schema shows in our digest only.
_DIGEST = b"spin_jax.sha256"


def _parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    table = table.replace_schema_metadata({_DIGEST: _digest(table.to_pylist())})
    pq.write_table(table, buffer, write_page_checksum=True)
    return buffer.getvalue()


def _rows_of(content: bytes, path: epath.PathLike) -> list[dict[str, Any]]:
    try:
        table = pq.read_table(io.BytesIO(content), page_checksum_verification=True)
        rows = table.to_pylist()
        if (table.schema.metadata or {}).get(_DIGEST) != _digest(rows):
            raise ValueError("its digest is another's")
    except Exception as error:  # whatever Arrow makes of damaged bytes
        raise files.Damaged(
            f"{path} is damaged: remove it, and the same command makes it again ({error})"
        ) from error
    return rows


def _digest(rows: list[dict[str, Any]]) -> bytes:
    return hashlib.sha256(msgpack.packb(rows)).hexdigest().encode()  # pyright: ignore[reportArgumentType]
