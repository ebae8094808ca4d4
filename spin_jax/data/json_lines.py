"""Reads the rows of JSON files, of which it keeps positions only; a row is parsed when it is needed."""

import codecs
import hashlib
import json
import os
import re
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa


class JsonLines:
    """The rows of JSON files.

    A file has one JSON object on each line (blank lines are skipped), or it is one document: a list of objects, such
    a list under a single key, or objects over several lines. It may be compressed by gzip or zstd, and be in UTF-16
    or UTF-32 if it begins with a byte-order mark. A row's number is that of its line, or its place in the document.
    """

    def __init__(self, files: Sequence[str], places: np.ndarray, shared: dict[Any, BinaryIO] | None = None):
        self.cache_files = files  # under the name that tables of `datasets` have for theirs
        self._opened: tuple[int, Any] = -1, None  # the file that was read last
        self._shared = {} if shared is None else shared  # one for all selections: that file, opened, by its `stamp`
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
                path = self.cache_files[file]
                if (key := stamp(path)) not in self._shared:
                    self._shared.clear()
                    self._shared[key] = _open(path)
                self._opened = file, self._shared[key]
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
        return f"{self.cache_files[file]}, row {number}"

    def select(self, indices: Iterable[int]) -> "JsonLines":
        return JsonLines(self.cache_files, self._places[np.fromiter(indices, np.int64)], self._shared)

    @property
    def _fingerprint(self) -> str:
        """As tables of `datasets` have one: a digest of the rows' places."""
        return hashlib.sha256(self._places.data).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_opened": (-1, None), "_shared": None}  # another process opens the file itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _shared=_received)


_received: dict[Any, BinaryIO] = {}  # the opened file of the rows that this process got from another one
_DEEPEST = 100  # levels of JSON; recursive code can walk a row of this depth
_BOM = b"\xef\xbb\xbf"


def stamp(file: str) -> tuple[str, int, int]:
    """The path, size and time of a file, which tell when it is another."""
    return os.path.abspath(file), os.stat(file).st_size, os.stat(file).st_mtime_ns


def _row_places(file: str) -> Iterator[tuple[int, int, int]]:
    """(number, first byte, bytes) of each row of a file."""
    with _open(file) as lines:
        start = len(_BOM) if lines.read(len(_BOM)) == _BOM else 0
        lines.seek(start)
        first = next((line for line in lines if not line.isspace()), b"")
        if first and _is_document(first, any(not line.isspace() for line in lines)):
            lines.seek(0)
            yield from _document_places(file, lines.read())
            return
        lines.seek(start)
        for number, line in enumerate(lines, 1):
            if not line.isspace():
                yield number, start, len(line)
            start += len(line)


_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}  # by a file's first bytes
_ENCODINGS = {  # by a text's first bytes; those of UTF-32 begin with those of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def _named(begin: bytes, names: dict[bytes, str]) -> str | None:
    return next((name for mark, name in names.items() if begin.startswith(mark)), None)


def _open(file: str) -> BinaryIO:
    """The file; if it is compressed or not in UTF-8, a temporary file with its text in UTF-8.

    Raises:
        ValueError: the file cannot be unpacked; the message names it.
    """
    opened = open(file, "rb")  # noqa: SIM115
    begin = opened.read(4)
    compression = _named(begin, _COMPRESSIONS)
    if not compression and not _named(begin, _ENCODINGS):
        opened.seek(0)
        return opened
    opened.close()
    copy = tempfile.TemporaryFile()  # noqa: SIM115
    try:
        with pa.input_stream(file, compression=compression) as unpacked:
            chunk = unpacked.read(4)
            encoding = _named(chunk, _ENCODINGS)
            decode = codecs.getincrementaldecoder(encoding)().decode if encoding else None
            while chunk:
                copy.write(decode(chunk).encode() if decode else chunk)
                chunk = unpacked.read(2**20)
            if decode:
                decode(b"", True)  # raises where the last character is cut
    except (OSError, UnicodeError, pa.ArrowException) as error:
        raise ValueError(f"{file} cannot be unpacked: {error}") from error
    copy.seek(0)
    return copy


def _is_document(line: bytes, more: bool) -> bool:
    """Whether a file is one JSON document, and not JSON Lines.

    `line` is the file's first line that is not blank, and `more` says whether there is another one.
    """
    if line.lstrip().startswith(b"["):
        return True
    try:
        row = json.loads(line.decode())
    except json.JSONDecodeError as error:
        return error.pos >= len(error.doc.rstrip())  # the object goes on in the next line
    except (ValueError, RecursionError):
        return False
    return not more and _is_wrapped(row)


def _is_wrapped(value: Any) -> bool:
    """Whether a value is a list of rows under one key. The turns of a conversation are no rows."""
    inner = next(iter(value.values())) if isinstance(value, dict) and len(value) == 1 else None
    return isinstance(inner, list) and all(isinstance(r, dict) and not r.keys() & {"role", "from"} for r in inner)


def _document_places(file: str, content: bytes) -> Iterator[tuple[int, int, int]]:
    """(number, first byte, bytes) of each row of a JSON document."""
    text = content.decode("latin-1")  # one character for each byte: positions are those in the file
    decoder, space = json.JSONDecoder(), re.compile(r"[\s\xef\xbb\xbf]*")  # a BOM counts as space

    def after_space(at: int) -> int:
        return space.match(text, at).end()  # pyright: ignore[reportOptionalMemberAccess]

    def parse(at: int, number: int) -> tuple[Any, int]:
        try:
            return decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}, row {number}: {error}") from error

    at, number = after_space(0), 1
    wrapped = text[at] != "["
    if wrapped:
        value, end = parse(at, 1)
        if not _is_wrapped(value) or after_space(end) < len(text):  # objects, one after the other
            while at < len(text):
                _, end = parse(at, number)
                yield number, at, end - at
                at, number = after_space(end), number + 1
            return
        _, end = parse(after_space(at + 1), 1)  # the key
        at = after_space(text.index(":", end) + 1)
    at, number = after_space(at + 1), 0
    ends = text[at : at + 1] == "]"
    while not ends:
        number += 1
        _, end = parse(at, number)
        yield number, at, end - at
        at = after_space(end)
        ends = text[at : at + 1] == "]"
        if not ends and text[at : at + 1] != ",":
            raise ValueError(f"{file}, row {number}: neither a comma nor the list's end follows it")
        at = at if ends else after_space(at + 1)
    if not wrapped and text[at + 1 :].strip():
        raise ValueError(f"{file}: something follows the list's end")


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        inner = [item for item in level if isinstance(item, dict | list)]
        level = [child for item in inner for child in (item.values() if isinstance(item, dict) else item)]
    return depth
