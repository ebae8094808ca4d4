"""Examples on disk: an Arrow file that is mapped into memory, so that a row is read when it is needed.

Memory holds numbers of rows, and what is asked for as an array. Files of examples lie in the user's cache directory,
under a name that stands for all that they are made from.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from spin_jax.data.chat import Chat
from spin_jax.data.examples import group_by_prompt, prompt_keys
from spin_jax.data.records import Example, has_more_fields

_IDS = pa.list_(pa.int32())
EXAMPLES = pa.schema(
    [
        ("number", pa.int64()),  # of the row in its dataset
        ("prompt_id", pa.int64()),
        ("messages", pa.binary()),  # JSON
        ("prompt", _IDS),
        ("real", _IDS),
        ("earlier", _IDS),
        ("stopped", pa.bool_()),  # whether the answer ends in a stop token
        ("more_fields", pa.bool_()),  # whether a message has more than role and content
        ("keys", pa.binary(32)),  # the first two `prompt_keys`
        ("earlier_keys", pa.list_(pa.binary(16))),  # the others, if there is `earlier`
    ]
)


def batch_of(examples: Sequence[tuple[int, Example]], chat: Chat) -> pa.RecordBatch:
    """Examples, each with the number of its row, as a part of a file of examples."""
    numbers, read = zip(*examples, strict=True) if examples else ((), ())
    keys = [prompt_keys(e.messages, e.prompt) for e in read]
    texts = (json.dumps(e.messages, ensure_ascii=False, default=str) for e in read)
    columns = (
        numbers,
        [e.prompt_id for e in read],
        [text.encode("utf-8", "surrogatepass") for text in texts],
        *([getattr(e, name) for e in read] for name in ("prompt", "real", "earlier")),
        [chat.stopped(e.real) for e in read],
        [has_more_fields([e.messages]) for e in read],
        [b"".join(own[:2]) for own in keys],
        [None if e.earlier is None else own[2:] for e, own in zip(read, keys, strict=True)],
    )
    arrays = [pa.array(values, field.type) for values, field in zip(columns, EXAMPLES, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=EXAMPLES)


def ids_at(table: pa.Table, name: str, place: int) -> Any:
    """The token ids in a column of a table, int32 [n], or None. They are not copied, and cannot be changed."""
    values = table[name][place].values
    return None if values is None else values.to_numpy()


def canonical(example: Example) -> bytes:
    """The prompt_id and the messages as JSON, of which a run's fingerprint of its data is made."""
    return json.dumps([example.prompt_id, example.messages], sort_keys=True, default=str).encode()


class Examples(Sequence[Example]):
    """Rows of a table of examples. Every selection of them shares the table, which lies on disk."""

    def __init__(
        self, table: pa.Table, rows: np.ndarray | None = None, name: str = "", record: Mapping[str, Any] | None = None
    ):
        """`rows` are places in the table, int [N]; None for all. `name` is the cache's for the table, if it has one.

        `record` is what `write` stored with the table.
        """
        self._table, self._rows, self._name = table, rows, name
        self.record = record or {}

    @classmethod
    def of(cls, examples: Iterable[Example], chat: Chat) -> "Examples":
        """Examples that are in memory already, and stay there."""
        return cls(pa.Table.from_batches([batch_of(list(enumerate(examples)), chat)]))

    def __len__(self) -> int:
        return len(self._table) if self._rows is None else len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        """An example, or for a slice several."""
        if isinstance(index, slice):
            return self.select(np.arange(*index.indices(len(self))))
        place = range(len(self))[index]
        place = place if self._rows is None else int(self._rows[place])
        prompt_id, messages = (self._table[name][place].as_py() for name in ("prompt_id", "messages"))
        prompt, real, earlier = (ids_at(self._table, name, place) for name in ("prompt", "real", "earlier"))
        return Example(prompt_id, json.loads(messages), prompt, real, earlier)

    def select(self, places: np.ndarray) -> "Examples":
        """The examples at these places, int [N], or where this is True, bool [len(self)]."""
        places = np.flatnonzero(places) if places.dtype == bool else places
        return Examples(self._table, places if self._rows is None else self._rows[places])

    def shifted(self, by: int) -> "Examples":
        """The same examples, with prompt_ids that are larger by this number."""
        if not by:
            return self
        larger = pc.add(self._table["prompt_id"], by)  # pyright: ignore
        table = self._table.set_column(EXAMPLES.get_field_index("prompt_id"), "prompt_id", larger)
        return Examples(table, self._rows, self._name and name_of([self._name, by]))

    @classmethod
    def joined(cls, parts: Sequence["Examples"]) -> "Examples":
        """The examples of all parts, one after the other. No part is a selection."""
        names = [part._name for part in parts]
        return cls(pa.concat_tables(part._table for part in parts), name=name_of(names) if all(names) else "")

    def _chosen(self, values: np.ndarray) -> np.ndarray:
        return values if self._rows is None else values[self._rows]

    def column(self, name: str) -> np.ndarray:
        """A column of numbers, [N]: number, prompt_id, stopped or more_fields."""
        return self._chosen(self._table[name].to_numpy())

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """The tokens of each prompt and human answer, int32 [N, 2]."""
        columns = (pc.list_value_length(self._table[name]).to_numpy() for name in ("prompt", "real"))  # pyright: ignore
        return self._chosen(np.stack(list(columns), axis=1))

    @functools.cached_property
    def groups(self) -> np.ndarray:
        """`group_by_prompt`, int64 [N]."""
        return group_by_prompt(self.keys)

    @property
    def keys(self) -> np.ndarray:
        """The first two `prompt_keys` of each example, S16 [N, 2]."""
        chunks = self._table["keys"].combine_chunks().buffers()
        return self._chosen(np.frombuffer(chunks[1] or b"", "S16").reshape(-1, 2))

    def has_prompt_of(self, keys: np.ndarray) -> np.ndarray:
        """Whether one of the first two `prompt_keys` of each example is among these, bool [N]."""
        parts = np.array_split(self.keys, len(self) // 2**18 + 1)  # `isin` sorts copies, which take much memory
        return np.concatenate([np.isin(part, keys).any(axis=1) for part in parts])

    def answered_earlier(self, keys: np.ndarray) -> np.ndarray:
        """Where an example has `earlier`, and an answer to a prompt with one of these keys is among them, bool [N]."""
        column, result = self._table["earlier_keys"], np.zeros(len(self._table), bool)
        if column.null_count < len(column):
            wanted = {key.ljust(16, b"\0") for key in keys.ravel().tolist()}  # NumPy takes zeros off the end
            result[:] = [not wanted.isdisjoint(own.as_py() or ()) for own in column]
        return self._chosen(result)

    @functools.cached_property
    def digest(self) -> str:
        """The digest of all examples, in order. It reads them all, unless the cache knows it."""
        name = self._name if self._rows is None else ""
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            return _read_record(name)["digest"]
        digest = hashlib.sha256()
        for example in self:
            digest.update(canonical(example))
        _keep(name, {"digest": digest.hexdigest()[:16]})
        return digest.hexdigest()[:16]


# --- files -----------------------------------------------------------------------------------------

_BATCH = 2**25  # bytes of a file's batches: each column of one lies together, and is read without the others


def _cache() -> str:
    """The folder that SPIN_JAX_CACHE names, or one in the user's cache directory; it is made if that can be."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.path.join(os.environ.get("SPIN_JAX_CACHE") or os.path.join(home, "spin_jax"), "examples")
    with contextlib.suppress(OSError):
        os.makedirs(folder, exist_ok=True)
    return folder


def name_of(parts: Iterable[object]) -> str:
    """A name for what is made from these parts, which are told apart by their `repr`."""
    return hashlib.sha256("\0".join(map(repr, parts)).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def find(name: str) -> Examples | None:
    """The examples in the cache under this name; None where they are not there, or are damaged."""
    with (
        contextlib.suppress(OSError, ValueError, LookupError, TypeError),
        open(os.path.join(_cache(), f"{name}.arrow"), "rb") as file,
    ):
        record = _read_record(name)
        if record["sha256"] == hashlib.file_digest(file, "sha256").hexdigest():
            return Examples(_mapped(file), name=name, record=record)


def write(name: str, batches: Iterable[pa.RecordBatch], make_record: Callable[[], dict[str, Any]]) -> Examples:
    """Writes examples into the cache under this name, where it can be written, and returns them.

    Args:
        name: "" for examples that no later start can find.
        batches: the examples; memory holds few batches at a time.
        make_record: returns, after the last batch, what to store with them; their `digest` is in it.
    """
    with _spool(batches, EXAMPLES) as file:
        record = make_record()
        examples = find(name)  # a whole file stays, as other processes may have mapped it
        if examples is None:
            _keep(name, record, file)
            examples = find(name)
        if examples is None:
            examples = Examples(_mapped(file), record=record)
    examples.digest = record["digest"]
    return examples


def spooled(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> pa.Table:
    """The batches as a table in a temporary file, which goes when the table does."""
    with _spool(batches, schema) as file:
        return _mapped(file)


@contextlib.contextmanager
def _spool(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Iterator[Any]:
    """A temporary file with the batches."""
    folder = _cache() if os.access(_cache(), os.W_OK) else None  # /tmp may be in memory
    with tempfile.TemporaryFile(dir=folder) as file:
        with pa.ipc.new_file(file, schema) as writer:
            waiting, size = [], 0
            for batch in itertools.chain(batches, [None]):
                if batch is None or size > _BATCH:
                    writer.write_table(pa.Table.from_batches(waiting, schema).combine_chunks())
                    waiting, size = [], 0
                if batch is not None:
                    waiting.append(batch)
                    size += batch.nbytes
        file.flush()
        yield file


def _mapped(file: Any) -> pa.Table:
    """The table in a file, of which memory holds what is read."""
    return pa.ipc.open_file(pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))).read_all()


def _read_record(name: str) -> dict[str, Any]:
    with open(os.path.join(_cache(), f"{name}.json")) as file:
        return json.load(file)


def _keep(name: str, record: Mapping[str, Any], table: Any = None) -> None:
    """Writes a record into the cache, if that can be, and before it the file of a table, with its digest."""
    if not name:
        return
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory(dir=_cache()) as folder:
        own = [os.path.join(folder, f"{name}.{kind}") for kind in (("json",) if table is None else ("arrow", "json"))]
        if table is not None:
            table.seek(0)
            with open(own[0], "w+b") as copy:  # a copy by Arrow would have all pages of the file in memory
                shutil.copyfileobj(table, copy, 2**20)
                copy.seek(0)
                record = {**record, "sha256": hashlib.file_digest(copy, "sha256").hexdigest()}
        with open(own[-1], "w") as file:
            json.dump(record, file)
        for path in own:
            os.replace(path, os.path.join(_cache(), os.path.basename(path)))
