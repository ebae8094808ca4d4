"""Opens files, directories, hub ids and functions as rows, which have a length and are dicts found by number."""

import glob
import itertools
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spin_jax.data import folders
from spin_jax.data.json_lines import JsonLines, stamp
from spin_jax.data.records import without_nulls
from spin_jax.runtime.user_code import called


def load_rows(
    path: str,
    split: str = "train",
    *,
    name: str | None = None,
    revision: str | None = None,
    all_files: bool = False,
    notes: list[str] | None = None,
) -> Any:
    """Opens a dataset.

    Args:
        path: a hub id; a file of rows; a directory of such files, such as a clone of a hub dataset, or one that
            `save_to_disk` wrote; or `module:function`, which returns a list of dicts.
        split: in the syntax of `datasets` (`train`, `train[:1000]`, `train+test`). `folders.split_files` says which
            files of a directory have it. A single file is one split.
        name: the configuration of a dataset of the hub or of a clone; `revision` is the revision on the hub.
        all_files: whether to read every file of a directory, whatever the split.
        notes: gets a sentence on the files that were chosen in a directory.

    Raises:
        ValueError, FileNotFoundError: the dataset cannot be read; the message names the path and, if known, the row.
    """
    base = split.partition("[")[0]
    try:
        if re.fullmatch(r"[\w.]+:\w+", path):
            rows = _function_rows(path)
        elif any(os.path.exists(os.path.join(path, known)) for known in ("state.json", "dataset_dict.json")):
            rows = _saved_rows(path, base)
        elif files := _data_files(path, None if all_files else base, name, [] if notes is None else notes):
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


def _function_rows(path: str) -> Any:
    import datasets

    made = list(called(path))
    for number, row in enumerate(made, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number}: not a dict but {type(row).__name__}")
    names = dict.fromkeys(itertools.chain.from_iterable(made))  # `from_list` reads the columns of the first row alone
    try:
        return datasets.Dataset.from_list([{name: row.get(name) for name in names} for row in made])
    except (ValueError, TypeError, OverflowError) as error:  # Arrow's too
        raise ValueError(f"{path}: its rows make no table: {error}") from error


def _saved_rows(path: str, split: str) -> Any:
    import datasets

    try:
        rows = datasets.load_from_disk(path, keep_in_memory=False)  # so that `identity` sees its files
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
        return datasets.Dataset.from_parquet(list(map(glob.escape, files)))  # unlike load_dataset, it asks no server
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
    ranges = [range(part.from_, part.to) for part in chosen]
    return rows.select(ranges[0] if len(ranges) == 1 else list(itertools.chain(*ranges)))


def _data_files(path: str, split: str | None, name: str | None, notes: list[str]) -> list[str]:
    """The file itself, or a directory's files of this split or of all; [] if nothing has this path."""
    if os.path.isfile(path):
        if not folders.file_format(path):
            raise ValueError(f"{path}: expected a file that ends in {folders.FORMATS}")
        files = [path]
    elif os.path.isdir(path):
        chosen = [] if split else folders.all_files(path)
        for one in split.split("+") if split else ():
            found, left = folders.split_files(path, one, name)
            notes.append(f"{path}: the split {one} is {folders.shown(found)}")
            notes += [f"{path}: datasets counts {file} to {one} too; it is not read" for file in left]
            chosen += found
        files = [os.path.join(path, file) for file in chosen]
        if len({folders.file_format(file) for file in files}) > 1:
            raise ValueError(f"{path}: files of several formats: {folders.shown(chosen)}")
    else:
        return []
    if empty := [file for file in files if os.path.getsize(file) == 0]:
        raise ValueError(f"{empty[0]} is empty: 0 rows")
    return files


def row(rows: Any, number: int) -> dict[str, Any]:
    """A row by its number."""
    features = getattr(rows, "features", {})  # those of an Arrow table
    return {name: without_nulls(value, features.get(name)) for name, value in rows[number].items()}


def place(rows: Any, index: int, path: str, number: int | None = None) -> str:
    """The name of the row at `index` in error messages; `number` is its number in the dataset, if that is another."""
    if isinstance(rows, JsonLines):
        return rows.place(index)
    return f"{path}, row {1 + (index if number is None else number)}"


def part(rows: Any, numbers: np.ndarray) -> Any:
    """The rows with these numbers, which another process can get."""
    return rows.select(numbers) if hasattr(rows, "select") else [rows[number] for number in numbers]


def identity(rows: Any) -> object:
    """What tells these rows from others; None for a list, where only reading all of it would tell."""
    fingerprint = getattr(rows, "_fingerprint", None)  # tables of `save_to_disk` with other content may have the same
    files = (file["filename"] if isinstance(file, dict) else file for file in getattr(rows, "cache_files", ()))
    return fingerprint and (fingerprint, [stamp(file) for file in files])


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
