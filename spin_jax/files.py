"""The one seam between this package and a file system: local disks and object stores alike.

Everything that the loop writes for itself goes through here, so that a reader never sees half a file: on a
disk the bytes are written beside the target, synced and renamed; an object store shows an object only when
it is whole. Of several processes one writes, and none goes on before the file is there.
"""

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from spin_jax import hosts


def exists(path: epath.PathLike) -> bool:
    """Whether it is there, as process 0 sees it: all processes go on alike."""
    return existing([path])[0]


def existing(paths: Sequence[epath.PathLike]) -> list[bool]:
    """`exists` of many."""
    here = hosts.together(lambda: [hosts.first() and epath.Path(path).exists() for path in paths])
    return hosts.agreed(np.array(here, bool)).tolist()


def read_agreed(path: epath.PathLike) -> Any:
    """What process 0 reads of a JSON file, in every process; None where there is no file."""
    read = hosts.together(lambda: read_json(path) if hosts.first() and epath.Path(path).exists() else None)
    return hosts.exchanged(read)[0]


def write(path: epath.PathLike, data: bytes) -> None:
    """`write_here` by process 0; every process calls this, and comes back when the file is there."""
    hosts.by_first(lambda: write_here(path, data))


def remove(folder: epath.PathLike) -> None:
    """Removes a folder with all that is in it, if it is there; as `write` does."""
    hosts.by_first(lambda: epath.Path(folder).rmtree() if epath.Path(folder).exists() else None)


def write_here(path: epath.PathLike, data: bytes) -> None:
    """Writes `data` to `path` atomically, making its folder.

    Args:
        path: a local path or a URL that etils.epath knows (`gs://…`).
        data: the whole content.
    """
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if "://" in str(path):
        path.write_bytes(data)
        return
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    write(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: epath.PathLike) -> Any:
    """Reads a JSON file; ValueError names the file when it does not parse."""
    try:
        return json.loads(epath.Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def write_jsonl(path: epath.PathLike, rows: Sequence[Any]) -> None:
    """Writes one JSON value a line, atomically."""
    write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
