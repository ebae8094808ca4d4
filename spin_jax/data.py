"""From datasets to token rows, in NumPy: nothing here touches a device.

    rows of a dataset ─ conversations ─ Example (prompt and human answer as ids)
                                            └ + a generated answer = Pair ─ PairBatch (fixed shapes)

Token ids are the truth. A conversation is rendered by the chat template and tokenized once; the
response is cut out of those ids. Axes: B sequences or pairs, T tokens.
"""

import dataclasses
import functools
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spin_jax.config import import_function

Message = dict[str, str]
Ids = np.ndarray  # int32 [n]

PROMPT_ANSWER_COLUMNS = (
    ("question", "answer"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "answer"),
)


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt and its human answer."""

    prompt_id: int  # the row's number in its dataset
    messages: list[Message]  # ends with the answer
    prompt: Ids
    real: Ids


@dataclasses.dataclass(frozen=True)
class Pair:
    """A prompt, the human answer and the opponent's."""

    prompt_id: int
    sample_id: int
    real_messages: list[Message]
    generated_messages: list[Message]
    prompt: Ids
    real: Ids
    generated: Ids
    truncated: bool  # the generated answer met no stop token

    @property
    def identical(self) -> bool:
        return np.array_equal(self.real, self.generated)


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Limits in tokens. An answer is cut to what its prompt leaves of `max_length`."""

    max_prompt: int
    max_length: int


UNLIMITED = Lengths(max_prompt=2**31 - 1, max_length=2**31 - 1)


# --- datasets ------------------------------------------------------------------------------------


def load_rows(path: str, split: str = "train", revision: str | None = None) -> Any:
    """Opens a dataset: something with a length, column names and rows as dicts.

    Args:
        path: a hub id; a .jsonl, .json or .parquet file; a directory of .jsonl or .parquet files or
            one that `save_to_disk` wrote; or `module:function`, which returns a list of dicts.
        split: in the syntax of `datasets` (`train`, `train[:1000]`); of a local file all is `train`.
        revision: of a hub dataset.

    Raises:
        ValueError, FileNotFoundError: naming the path, and the row where that can be told.
    """
    import datasets

    if re.fullmatch(r"[\w.]+:\w+", path):
        return datasets.Dataset.from_list(list(import_function(path)()))
    try:
        if os.path.isdir(path) and any(
            os.path.exists(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json")
        ):
            rows = datasets.load_from_disk(path)
            if isinstance(rows, datasets.DatasetDict):
                rows = rows[split]
        elif files := _data_files(path):
            kind = "parquet" if files[0].endswith(".parquet") else "json"
            if empty := [file for file in files if os.path.getsize(file) == 0]:
                raise ValueError(f"{empty[0]} is empty: 0 rows")
            rows = datasets.load_dataset(kind, data_files=files, split=split)
        elif ".." in path or path.startswith(("/", ".")) or path.count("/") > 1:
            raise FileNotFoundError(f"data.path={path!r}: no such file or directory")
        else:
            rows = datasets.load_dataset(path, split=split, revision=revision)
    except (datasets.exceptions.DatasetGenerationError, KeyError) as error:
        raise ValueError(_explain(path, error)) from error
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"data.path={path!r} is no file or directory here, and the hub did not give it: {error}"
        ) from error
    if len(rows) == 0:
        raise ValueError(f"{path}: 0 rows")
    return rows


def _data_files(path: str) -> list[str]:
    suffixes = (".jsonl", ".json", ".parquet")
    if os.path.isfile(path):
        if not path.endswith(suffixes):
            raise ValueError(f"{path}: expected a file that ends in {', '.join(suffixes)}")
        return [path]
    if not os.path.isdir(path):
        return []
    names = sorted(name for name in os.listdir(path) if not name.startswith("."))
    for suffix in (".parquet", ".jsonl"):
        if chosen := [os.path.join(path, name) for name in names if name.endswith(suffix)]:
            return chosen
    raise ValueError(f"{path} holds no .parquet or .jsonl file")


def _explain(path: str, error: Exception) -> str:
    """Names the first row of a JSONL file that does not parse; else the library's own reason."""
    for file in _data_files(path) if os.path.exists(path) else []:
        if not file.endswith(".jsonl"):
            continue
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    if line.strip() and not isinstance(json.loads(line.decode()), dict):
                        return f"{file}, row {number}: not a JSON object"
                except ValueError as reason:
                    return f"{file}, row {number}: {reason}"
    return f"{path} cannot be read: {error.__cause__ or error}"


class BadRow(ValueError):
    """A row that makes no conversation; the message says why, the caller adds where."""


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
        return _checked(row["real"], "real")
    elif row.get("messages") is not None:
        return _checked(row["messages"], "messages")
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
    return _checked(messages, " / ".join(columns))


def _checked(messages: Any, field: str) -> list[Message]:
    if not isinstance(messages, list | tuple) or not messages:
        raise BadRow(f"{field}: expected a list of messages")
    result = []
    for number, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "user", "assistant"):
            raise BadRow(f"{field}[{number}].role is {role!r}: expected system, user or assistant")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and role == "assistant"):
            raise BadRow(f"{field}[{number}].content is {type(content).__name__}: expected text")
        result.append({"role": role, "content": content or ""})
    while result and result[-1]["role"] != "assistant":
        result.pop()
    if len(result) < 2:
        raise BadRow(f"{field}: no assistant turn with a prompt before it")
    if any(a["role"] == b["role"] == "assistant" for a, b in zip(result, result[1:], strict=False)):
        raise BadRow(f"{field}: two assistant turns in a row")
    return result


# --- tokens --------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    prompt: Ids
    response: Ids
    straddled: bool  # a token stood across the boundary; it went to the response


class _Tokenized(NamedTuple):
    text: str
    ids: Ids
    starts: np.ndarray  # each token's first character in text
    ends: np.ndarray  # and the one after its last, never decreasing


class Chat:
    """A tokenizer and its chat template: conversations to ids and back, examples and pairs.

    Control tokens that the template writes become ids; the same strings inside a message stay text.
    """

    unattended: int | None = None  # a token id that attention shall not see (`official` only)

    def __init__(
        self,
        tokenizer: Any,
        stop_tokens: Sequence[int],
        *,
        lengths: Lengths = UNLIMITED,
        system_message: str | None = None,
    ):
        if tokenizer.chat_template is None:
            raise ValueError(
                "the tokenizer has no chat template: give one with --config.data.chat_template=FILE "
                "(Jinja text or a file of it)"
            )
        if not stop_tokens:
            raise ValueError("neither generation_config.json nor the tokenizer names an EOS token")
        self.tokenizer = tokenizer
        self.stop_tokens = tuple(stop_tokens)
        self.lengths = lengths
        self.system_message = system_message
        special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        ordered = sorted(special, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, ordered))) if ordered else None

    # conversations

    def with_system(self, messages: list[Message]) -> list[Message]:
        """The conversation with the configured system message in front, where it has none."""
        if self.system_message is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.system_message}, *messages]

    def render(self, messages: list[Message], *, prompt: bool) -> str:
        """The template's text; with `prompt`, it ends in the generation prompt."""
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)

    def encode(self, messages: list[Message]) -> Encoded:
        """Ids of a conversation that ends with an answer, cut at the answer.

        The response ends with its first stop token; what the template writes after is left out.

        Raises:
            BadRow: the template's text for the prompt does not begin the text for the whole.
        """
        messages = self.with_system(messages)
        guard = self._needs_guard(messages)
        whole = self._tokenize(messages, prompt=False, guard=guard)
        before = self._text(messages[:-1], prompt=True, guard=guard)
        if not whole.text.startswith(before):
            raise BadRow(
                "the chat template renders the prompt otherwise when the answer follows it: "
                f"…{before[-60:]!r} does not begin {whole.text[:200]!r}"
            )
        boundary = len(before)
        cut = int(np.searchsorted(whole.ends, boundary, side="right"))
        straddled = cut < len(whole.ids) and whole.starts[cut] < boundary
        return Encoded(whole.ids[:cut], self._until_stop(whole.ids[cut:]), bool(straddled))

    def encode_checked(self, messages: list[Message], number: int) -> tuple[Ids, Ids]:
        """(prompt, response) of a user's conversation; ValueError says what is wrong with it."""
        try:
            prompt, response, _ = self.encode(_checked(messages, "messages"))
        except BadRow as error:
            raise ValueError(f"conversation {number}: {error}") from error
        return prompt, response

    def encode_prompt(self, messages: list[Message]) -> Ids:
        """Ids of a conversation that waits for an answer."""
        messages = self.with_system(messages)
        return self._tokenize(messages, prompt=True, guard=self._needs_guard(messages)).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode(list(map(int, ids)), skip_special_tokens=True)

    def stopped(self, response: Ids) -> bool:
        """Whether a response ends in a stop token: the model finished it."""
        return len(response) > 0 and int(response[-1]) in self.stop_tokens

    def _until_stop(self, ids: Ids) -> Ids:
        stops = np.flatnonzero(np.isin(ids, self.stop_tokens))
        return ids[: stops[0] + 1] if len(stops) else ids

    def _needs_guard(self, messages: list[Message]) -> bool:
        """Whether a message contains the string of a control token."""
        return self._control is not None and any(self._control.search(m["content"]) for m in messages)

    def _text(self, messages: list[Message], *, prompt: bool, guard: bool) -> str:
        """The rendering; guarded, the template's control tokens stand in it under private names.

        Such strings in messages are broken before rendering, so that all whole ones after it are the
        template's. Those are renamed, and the broken ones mended: plain text to the twin tokenizer.
        """
        if not guard:
            return self.render(messages, prompt=prompt)
        assert self._control is not None
        mend = chr(0xFFFFD)  # a private character, at the end of its plane

        def broken(match: re.Match) -> str:
            return match[0][0] + mend + match[0][1:]

        safe = [{**m, "content": self._control.sub(broken, m["content"])} for m in messages]
        text = self._control.sub(lambda match: _private(match[0]), self.render(safe, prompt=prompt))
        return text.replace(mend, "")

    def _tokenize(self, messages: list[Message], *, prompt: bool, guard: bool) -> _Tokenized:
        text = self._text(messages, prompt=prompt, guard=guard)
        backend = self._twin if guard else self.tokenizer.backend_tokenizer
        encoding = backend.encode(text, add_special_tokens=False)
        starts, ends = np.asarray(encoding.offsets, np.int64).reshape(-1, 2).T
        return _Tokenized(text, np.asarray(encoding.ids, np.int32), starts, np.maximum.accumulate(ends))

    @functools.cached_property
    def _twin(self) -> Any:
        """The same tokenizer, its control tokens under names that nobody types."""
        from tokenizers import Tokenizer

        described = json.loads(self.tokenizer.backend_tokenizer.to_str())
        control = {token["content"] for token in described["added_tokens"] if token["special"]}

        def renamed(piece: str) -> str:
            return _private(piece) if piece in control else piece

        for token in described["added_tokens"]:
            token["content"] = renamed(token["content"])
        model = described["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {renamed(piece): id for piece, id in model["vocab"].items()}
        else:  # unigram models list [piece, score]
            model["vocab"] = [[renamed(piece), score] for piece, score in model["vocab"]]
        if model.get("unk_token"):
            model["unk_token"] = renamed(model["unk_token"])
        described["post_processor"] = None
        return Tokenizer.from_str(json.dumps(described))

    # examples and pairs

    def example(self, prompt_id: int, messages: list[Message], counts: Counter) -> Example | None:
        """Encodes one conversation; None when it is dropped, and `counts` says why."""
        if not messages[-1]["content"].strip():
            counts["dropped: empty answer"] += 1
            return None
        encoded = self.encode(messages)
        room = self.lengths.max_length - len(encoded.prompt)
        if len(encoded.prompt) > self.lengths.max_prompt or room < 1:
            counts["dropped: prompt too long"] += 1
            return None
        counts["tokens across the boundary"] += encoded.straddled
        counts["cut: answer too long"] += len(encoded.response) > room
        return Example(prompt_id, messages, encoded.prompt, encoded.response[:room])

    def sampling_prompt(self, example: Example) -> Ids:
        """What the opponent is asked."""
        return example.prompt

    def pair(self, example: Example, sample_id: int, generated: Ids) -> Pair:
        """The pair of an example and the sampler's ids for it."""
        answer = {"role": "assistant", "content": self.decode(generated)}
        return Pair(
            prompt_id=example.prompt_id,
            sample_id=sample_id,
            real_messages=example.messages,
            generated_messages=[*example.messages[:-1], answer],
            prompt=example.prompt,
            real=example.real,
            generated=generated,
            truncated=not self.stopped(generated),
        )

    def given_pair(
        self, prompt_id: int, sample_id: int, real: list[Message], generated: list[Message], counts: Counter
    ) -> Pair | None:
        """A pair that came as text; None when it is dropped.

        Where the two prompts tokenize differently at their end, the prompt is what they share.
        """
        first = self.example(prompt_id, real, counts)
        second = self.example(prompt_id, generated, Counter()) if first else None
        if first is None or second is None:
            counts["dropped: empty generated answer"] += first is not None
            return None
        shared = _common_prefix(first.prompt, second.prompt)
        return Pair(
            prompt_id=prompt_id,
            sample_id=sample_id,
            real_messages=real,
            generated_messages=generated,
            prompt=first.prompt[:shared],
            real=np.concatenate([first.prompt[shared:], first.real]),
            generated=np.concatenate([second.prompt[shared:], second.real]),
            truncated=not self.stopped(second.real),
        )


def _private(token: str) -> str:
    """A control token's string in the private plane 16, where no text is."""
    return "".join(chr(0x100000 + ord(character) % 0xFFFD) for character in token)


def _common_prefix(a: Ids, b: Ids) -> int:
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


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
    """Encodes a seeded choice of `limit` rows, in the rows' order.

    Returns:
        the examples, and counts of what was dropped or cut.

    Raises:
        ValueError: naming path, row and field; or saying that nothing is left.
    """
    chosen = np.random.default_rng(seed).permutation(len(rows))[:limit]
    counts: Counter = Counter()
    examples = []
    for number in sorted(map(int, chosen)):
        try:
            messages = conversation(rows[number], prompt_column, answer_column)
            example = chat.example(number, messages, counts)
        except BadRow as error:
            raise ValueError(f"{path}, row {number + 1}: {error}") from error
        if example is not None:
            examples.append(example)
    if not examples:
        raise ValueError(f"{path}: none of {len(chosen)} rows is left ({dict(counts)})")
    return examples, +counts


def split_held_out(ids: Sequence[int], *, fraction: float, limit: int, seed: int) -> set[int]:
    """The ids kept from training: a seeded choice of at most `fraction` of them and `limit`."""
    count = min(int(len(ids) * fraction), limit)
    order = np.random.default_rng([seed, 1]).permutation(len(ids))[:count]
    return {int(ids[i]) for i in order}


def load_pairs(rows: Any, chat: Chat, *, path: str) -> tuple[list[Pair], Counter]:
    """Pairs of a published SPIN dataset, or those of another run, whose token columns are kept.

    Raises:
        ValueError: naming path, row and field; or saying that nothing is left.
    """
    counts: Counter = Counter()
    pairs = []
    for number, row in enumerate(rows):
        try:
            pair = _load_pair(row, number, chat, counts)
        except BadRow as error:
            raise ValueError(f"{path}, row {number + 1}: {error}") from error
        if pair is not None:
            pairs.append(pair)
    if not pairs:
        raise ValueError(f"{path}: no pair is left ({dict(counts)})")
    return pairs, +counts


def _load_pair(row: dict[str, Any], number: int, chat: Chat, counts: Counter) -> Pair | None:
    if row.get("real") is None or row.get("generated") is None:
        raise BadRow(f"no fields real and generated among {', '.join(row)}")
    prompt_id = row["prompt_id"] if isinstance(row.get("prompt_id"), int) else number
    sample_id = row["sample_id"] if isinstance(row.get("sample_id"), int) else 0
    real, generated = _checked(row["real"], "real"), _checked(row["generated"], "generated")
    if row.get("generated_tokens") is None:
        return chat.given_pair(prompt_id, sample_id, real, generated, counts)
    columns = ("prompt_tokens", "real_tokens", "generated_tokens")
    ids = [np.asarray(row[name], np.int32) for name in columns]
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


# --- batches -------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Sequences of one padded length; the model's arguments and which tokens are a response."""

    tokens: np.ndarray  # int32 [B, T]
    positions: np.ndarray  # int32 [B, T]
    segments: np.ndarray  # int32 [B, T]: 1, padding 0, −1 seen by no other token
    response: np.ndarray  # bool [B, T]


class SFTBatch(NamedTuple):
    """B sequences; `weight` is 0 for those that only fill the last batch."""

    rows: Rows  # B sequences
    weight: np.ndarray  # float32 [B]


class PairBatch(NamedTuple):
    """B pairs; row 2i is the human answer of pair i, row 2i + 1 the generated one."""

    rows: Rows  # 2B sequences
    opponent: np.ndarray  # float32 [B, 2]: the opponent's log-probs of (real, generated)
    identical: np.ndarray  # float32 [B]: 1 where both answers are the same ids
    weight: np.ndarray  # float32 [B]


class ScoredPair(NamedTuple):
    pair: Pair
    opponent: tuple[float, float]


def bucket(length: int) -> int:
    """`length` rounded up to 16, 24, 32, 48, 64, 96, …: few shapes, at most half of one wasted."""
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def pad_rows(sequences: Sequence[tuple[Ids, Ids]], length: int, unattended: int | None = None) -> Rows:
    """(prompt, response) sequences, padded on the right to `length`.

    Raises:
        ValueError: a sequence is longer.
    """
    shape = (len(sequences), length)
    rows = Rows(*(np.zeros(shape, np.int32) for _ in range(3)), np.zeros(shape, bool))
    for i, (prompt, response) in enumerate(sequences):
        ids = np.concatenate([prompt, response])
        n = len(ids)
        if n > length:
            raise ValueError(f"a sequence of {n} tokens does not fit rows of {length}")
        rows.tokens[i, :n] = ids
        rows.positions[i, :n] = np.arange(n)
        rows.segments[i, :n] = 1
        if unattended is not None:
            hidden = np.flatnonzero(ids[: n - 1] == unattended)
            rows.segments[i, hidden] = -1
        rows.response[i, len(prompt) : n] = True
    return rows


def _fill(items: Sequence, size: int) -> tuple[list, np.ndarray]:
    """Repeats the first item up to `size`, with weight zero."""
    weight = np.zeros(size, np.float32)
    weight[: len(items)] = 1
    return [*items, *[items[0]] * (size - len(items))], weight


def sft_batch(
    examples: Sequence[Example], size: int, length: int, unattended: int | None = None
) -> SFTBatch:
    filled, weight = _fill(examples, size)
    return SFTBatch(pad_rows([(e.prompt, e.real) for e in filled], length, unattended), weight)


def pair_batch(
    scored: Sequence[ScoredPair], size: int, length: int, unattended: int | None = None
) -> PairBatch:
    filled, weight = _fill(scored, size)
    sequences = [
        (s.pair.prompt, answer) for s in filled for answer in (s.pair.real, s.pair.generated)
    ]
    return PairBatch(
        rows=pad_rows(sequences, length, unattended),
        opponent=np.array([s.opponent for s in filled], np.float32),
        identical=np.array([s.pair.identical for s in filled], np.float32),
        weight=weight,
    )


def microbatches(batch: Any, count: int) -> Any:
    """Splits the leading axis of every array into [count, n / count]: what gradients accumulate over."""
    if isinstance(batch, np.ndarray):
        return batch.reshape(count, -1, *batch.shape[1:])
    return type(batch)(*(microbatches(part, count) for part in batch))


def training_steps(examples: int, batch_size: int, epochs: int) -> int:
    """Optimizer steps of a run; the last batch of an epoch may be short."""
    return -(-examples // batch_size) * epochs


def batches(
    items: Sequence, collate: Callable[[Sequence], Any], batch_size: int, *, seed: int, epochs: int, start: int
) -> Iterator[Any]:
    """The batches of steps `start`, `start` + 1, …: a pure function of seed and step.

    Every epoch is a new permutation of all items; grain's threads collate ahead of the steps.
    """
    dataset = (
        grain.MapDataset.source(range(len(items)))
        .seed(seed)
        .shuffle()
        .batch(batch_size, batch_fn=lambda chosen: collate([items[i] for i in chosen]))
        .repeat(epochs)
    )
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    return iter(dataset[start:].to_iter_dataset(options))
