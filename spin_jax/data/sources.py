"""Opens files, directories, hub ids and functions as rows, which have a length and are dicts found by number."""

import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spin_jax.runtime.user_code import called


def load_rows(
    path: str, split: str = "train", *, name: str | None = None, revision: str | None = None, all_files: bool = False
) -> Any:
    """Opens a dataset.

    Args:
        path: a hub id; a .jsonl, .json or .parquet file; a directory of .jsonl or .parquet files or
            one that `save_to_disk` wrote; or `module:function`, which returns a list of dicts.
        split: in the syntax of `datasets` (`train`, `train[:1000]`). In a directory it selects the files whose
            names begin with it; if none begins with `train`, this split has all files. A single file is one split.
        name: the configuration of a hub dataset, as `revision` is its revision.
        all_files: whether to read every file of a directory, whatever the split.

    Raises:
        ValueError, FileNotFoundError: the dataset cannot be read; the message names the path and, if known, the row.
    """
    base = split.partition("[")[0]
    try:
        if re.fullmatch(r"[\w.]+:\w+", path):
            rows = _function_rows(path)
        elif any(os.path.exists(os.path.join(path, known)) for known in ("state.json", "dataset_dict.json")):
            rows = _saved_rows(path, base)
        elif files := _data_files(path, "" if all_files else base):
            rows = _parquet_rows(files) if files[0].endswith(".parquet") else JsonLines.of(files)
        elif ".." in path or path.startswith(("/", ".")) or path.count("/") > 1:
            raise FileNotFoundError(f"{path}: no such file or directory")
        else:
            rows, split = _hub_rows(path, name, split, revision), base
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    rows = _slice(rows, split, path)
    if len(rows) == 0:
        raise ValueError(f"{path}: 0 rows")
    return rows


class JsonLines:
    """The rows of JSON files. Only the position of each row is kept; a row is parsed when it is needed.

    A file has one JSON object on each line (blank lines are skipped). A .json file may also be one
    list of objects. A row's number is the number of its line in its file, or its number in the list.
    """

    def __init__(self, files: Sequence[str], places: np.ndarray):
        self._files = files
        self._opened: tuple[int, Any] = -1, None  # the file that was read last
        self._places = places  # int64 [rows, (file, number, first byte, bytes)]

    @classmethod
    def of(cls, files: Sequence[str]) -> "JsonLines":
        """All rows of the files. ValueError names a file without rows, or with a list that does not parse."""
        places = array("q")
        for index, file in enumerate(files):
            count = len(places)
            for number, start, size in _row_places(file):
                places.extend((index, number, start, size))
            if len(places) == count:
                raise ValueError(f"{file} is empty: 0 rows")
        return cls(files, np.frombuffer(places, np.int64).reshape(-1, 4))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The row; ValueError, which names the place, if it is no JSON object."""
        file, _, start, size = map(int, self._places[index])
        try:
            if self._opened[0] != file:
                self._opened = file, open(self._files[file], "rb")  # noqa: SIM115
            line = os.pread(self._opened[1].fileno(), size, start)
            if len(line) < size:
                raise ValueError("the file has become shorter")
            row = json.loads(line.rstrip().decode())
            if not isinstance(row, dict):
                raise ValueError(f"not a JSON object but {type(row).__name__}")
            if line.count(b"[") + line.count(b"{") > _DEEPEST and _depth(row) > _DEEPEST:
                raise RecursionError
        except json.JSONDecodeError as error:
            where = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno} of it"
            raise ValueError(f"{self.place(index)}: {error.msg}: {where}") from error
        except RecursionError:
            raise ValueError(f"{self.place(index)}: nested more than {_DEEPEST} levels deep") from None
        except (ValueError, OSError) as error:
            raise ValueError(f"{self.place(index)}: {error}") from error
        return row

    def place(self, index: int) -> str:
        file, number, *_ = self._places[index]
        return f"{self._files[file]}, row {number}"

    def select(self, indices: Iterable[int]) -> "JsonLines":
        return JsonLines(self._files, self._places[np.fromiter(indices, np.int64)])


_DEEPEST = 100  # levels of JSON; recursive code can walk a row of this depth
_BOM = b"\xef\xbb\xbf"


def _row_places(file: str) -> Iterator[tuple[int, int, int]]:
    """(number, first byte, bytes) of each row of a file."""
    with open(file, "rb") as lines:
        begin = lines.read(4096)
        first = begin.removeprefix(_BOM)
        if file.endswith(".json") and first.lstrip()[:1] == b"[":
            yield from _item_places(file, begin + lines.read())
            return
        start = len(begin) - len(first)
        lines.seek(start)
        for number, line in enumerate(lines, 1):
            if not line.isspace():
                yield number, start, len(line)
            start += len(line)


def _item_places(file: str, content: bytes) -> Iterator[tuple[int, int, int]]:
    """(number, first byte, bytes) of each item of a JSON list."""
    text = content.decode("latin-1")  # one character for each byte: positions are those in the file
    decoder, space = json.JSONDecoder(), re.compile(r"[\s\xef\xbb\xbf]*")  # a BOM counts as space

    def after_space(at: int) -> int:
        return space.match(text, at).end()  # pyright: ignore[reportOptionalMemberAccess]

    at, number = after_space(after_space(0) + 1), 0
    ends = text[at : at + 1] == "]"
    while not ends:
        number += 1
        try:
            _, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}, row {number}: {error}") from error
        yield number, at, end - at
        at = after_space(end)
        ends = text[at : at + 1] == "]"
        if not ends and text[at : at + 1] != ",":
            raise ValueError(f"{file}, row {number}: neither a comma nor the list's end follows it")
        at = at if ends else after_space(at + 1)
    if text[at + 1 :].strip():
        raise ValueError(f"{file}: something follows the list's end")


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        inner = [item for item in level if isinstance(item, dict | list)]
        level = [child for item in inner for child in (item.values() if isinstance(item, dict) else item)]
    return depth


def _function_rows(path: str) -> Any:
    import datasets

    made = list(called(path))
    for number, row in enumerate(made, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number}: not a dict but {type(row).__name__}")
    try:
        return datasets.Dataset.from_list(made)
    except (ValueError, TypeError, OverflowError) as error:  # Arrow's too
        raise ValueError(f"{path}: its rows make no table: {error}") from error


def _saved_rows(path: str, split: str) -> Any:
    import datasets

    try:
        rows = datasets.load_from_disk(path)
    except Exception as error:  # the error depends on which part is damaged
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(rows, datasets.DatasetDict):
        return rows
    if split not in rows:
        raise ValueError(f"{path} has no split {split!r}; it has {', '.join(map(str, rows))}")
    return rows[split]


def _parquet_rows(files: Sequence[str]) -> Any:
    import datasets.exceptions

    for file in files:
        _check_parquet(file, whole=False)
    try:
        return datasets.load_dataset("parquet", data_files=list(files), split="train")
    except datasets.exceptions.DatasetGenerationError as error:
        for file in files:
            _check_parquet(file, whole=True)
        reason = error.__cause__ or error
        raise ValueError(f"{files[0]} cannot be read, or not together with others: {reason}") from error


def _check_parquet(file: str, *, whole: bool) -> None:
    """Raises ValueError, naming the file, where it has no row or cannot be read."""
    try:
        with pq.ParquetFile(file) as opened:
            rows = opened.metadata.num_rows
            for group in range(opened.num_row_groups if whole else 0):
                opened.read_row_group(group)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{file} is no whole parquet file: {error}") from error
    if not rows:
        raise ValueError(f"{file}: 0 rows")


def _hub_rows(path: str, name: str | None, split: str, revision: str | None) -> Any:
    import datasets.exceptions

    try:
        return datasets.load_dataset(path, name, split=split, revision=revision)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f"{path} is no file or directory here, and the hub did not give it: {error}") from error


def _slice(rows: Any, split: str, path: str) -> Any:
    """The slice of a split such as `train[10:20]`, where `rows` are the whole split."""
    base, bracket, _ = split.partition("[")
    if not bracket:
        return rows
    from datasets import ReadInstruction

    try:
        chosen = ReadInstruction.from_spec(split).to_absolute({base: len(rows)})
    except (ValueError, AssertionError, KeyError) as error:
        raise ValueError(f"{path}: the split {split!r} of {len(rows)} rows: {error}") from error
    return rows.select([number for part in chosen for number in range(part.from_, part.to)])


def _data_files(path: str, split: str) -> list[str]:
    """The file itself, or a directory's files of this split; [] if nothing has this path."""
    suffixes = (".jsonl", ".json", ".parquet")
    if os.path.isfile(path):
        if not path.endswith(suffixes):
            raise ValueError(f"{path}: expected a file that ends in {', '.join(suffixes)}")
        files = [path]
    elif os.path.isdir(path):
        names = sorted(name for name in os.listdir(path) if not name.startswith("."))
        names = [n for n in names if n.endswith(".parquet")] or [n for n in names if n.endswith(".jsonl")]
        if not names:
            raise ValueError(f"{path} holds no .parquet or .jsonl file")
        chosen = [name for name in names if name.startswith(split)]
        if not chosen and split != "train":
            raise ValueError(f"{path} has no file of a split {split!r}; it has {', '.join(names[:9])}")
        files = [os.path.join(path, name) for name in chosen or names]
    else:
        return []
    if strange := [file for file in files if not os.path.isfile(file)]:
        raise ValueError(f"{strange[0]} is not a regular file, or is a link to a missing one")
    if empty := [file for file in files if os.path.getsize(file) == 0]:
        raise ValueError(f"{empty[0]} is empty: 0 rows")
    return files


def place(rows: Any, number: int, path: str) -> str:
    """The name of a row in error messages."""
    return rows.place(number) if isinstance(rows, JsonLines) else f"{path}, row {number + 1}"


def pinned(path: str, revision: str | None) -> str | None:
    """The commit that a hub dataset's revision stands for now; None for a dataset that is not on the hub.

    Where the hub cannot be reached it is the revision itself, which still shows that the dataset is from the hub.
    """
    if ":" in path or os.path.exists(path) or path.startswith(("/", ".")) or ".." in path:
        return None
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return HfApi().dataset_info(path, revision=revision).sha
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError):
        return revision or "main"  # load_rows reads it from the cache, or explains why it cannot
