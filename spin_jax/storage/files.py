"""Reads and writes files, on local disks and in object stores; nothing else in the package does.

Everything that a run writes for itself goes through this file, so that a reader never sees half a file. On a
disk the bytes are written to a temporary file, synced, and renamed. An object store shows an object only when
it is complete. Of several processes only process 0 writes, and all wait until the file is there.
"""

import contextlib
import errno
import fcntl
import json
import math
import os
import pathlib
import re
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from spin_jax.errors import NoRoom
from spin_jax.runtime import processes

SUMS = "SHA256SUMS"  # the seal of a folder: seals.py


def exists(path: epath.PathLike) -> bool:
    """Whether the path exists for process 0; every process gets the same answer."""
    return existing([path])[0]


def existing(paths: Sequence[epath.PathLike]) -> list[bool]:
    """Calls `exists` for several paths at once."""
    here = processes.together(lambda: [processes.first() and epath.Path(path).exists() for path in paths])
    return processes.exchanged(here)[0]


def read_agreed(path: epath.PathLike) -> Any:
    """The content of a JSON file as process 0 reads it, in every process; None where there is no file."""
    read = processes.together(lambda: read_json(path) if processes.first() and epath.Path(path).exists() else None)
    return processes.exchanged(read)[0]


def write(path: epath.PathLike, data: bytes) -> None:
    """Process 0 calls `write_here`; every process calls this function and returns once the file is there."""
    processes.by_first(lambda: write_here(path, data))


def write_if_changed(path: epath.PathLike, data: bytes) -> None:
    """`write`, unless the file has this content already."""

    def is_current() -> bool:
        return epath.Path(path).exists() and epath.Path(path).read_bytes() == data

    processes.by_first(lambda: None if is_current() else write_here(path, data))


def remove(folder: epath.PathLike) -> None:
    """Process 0 calls `remove_here`; every process calls this."""
    processes.by_first(lambda: remove_here(folder))


def remove_here(folder: epath.PathLike) -> None:
    """Removes a folder and its content, if it exists. The seal goes first: half a folder is never sealed."""
    folder = epath.Path(folder)
    (folder / SUMS).unlink(missing_ok=True)
    if folder.exists():
        folder.rmtree()


def write_here(path: epath.PathLike, data: bytes | Iterable[bytes]) -> None:
    """Writes a whole file atomically, and makes its folder; `path` is local, or a URL that etils.epath knows."""
    parts = [data] if isinstance(data, bytes) else data
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if "://" in str(path):
        path.write_bytes(b"".join(parts))
        return
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # on a full disk it would only take up room
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    with contextlib.suppress(OSError):  # network file systems may refuse
        os.fsync(folder)  # so that the new name survives a power cut, too
    os.close(folder)


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes `as_json`, atomically."""
    write(path, as_json(value))


def as_json(value: Any) -> bytes:
    """`value` as indented JSON; a number that is not finite becomes null."""
    text = json.dumps(without_nan(value), indent=2, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode()


def without_nan(value: Any) -> Any:
    """`value` with None in place of each NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return value


def read_json(path: epath.PathLike) -> Any:
    """Reads a JSON file; ValueError names the file when it does not parse."""
    try:
        return json.loads(epath.Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def read_object(path: epath.PathLike) -> dict[str, Any]:
    """A JSON file of one object; ValueError names a file that is something else."""
    try:
        content = read_json(path)
    except (ValueError, OSError, RecursionError) as error:
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if file.read(8) == b"version ":
                raise ValueError(f"{path} is a git-lfs pointer: run `git lfs pull`") from error
        if isinstance(error, ValueError):
            raise
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, and should hold an object")
    return content


def write_jsonl(path: epath.PathLike, rows: Sequence[Any]) -> None:
    """Writes one JSON value a line, atomically; a number that is not finite becomes null."""
    lines = (json.dumps(without_nan(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    write(path, "".join(lines).encode())


def check_room(folder: epath.PathLike, size: float, what: str) -> None:
    """Raises NoRoom where a disk has less than `size` bytes free; an object store is not checked."""
    processes.by_first(lambda: check_room_here(folder, size, what))


def check_room_here(folder: epath.PathLike, size: float, what: str) -> None:
    room = free(folder)
    if room is not None and room < size:
        said = f"{what} takes {size / 2**30:.3g} GiB, and {room / 2**30:.3g} GiB are free: make room"
        raise NoRoom(errno.ENOSPC, said)


def free(folder: epath.PathLike) -> int | None:
    """Free bytes on the disk where a folder is or will be; None for an object store."""
    if "://" in str(folder):
        return None
    path = epath.Path(folder)
    return shutil.disk_usage(next(path for path in (path, *path.parents) if path.exists())).free


@contextlib.contextmanager
def held(workdir: epath.PathLike) -> Iterator[None]:
    """Locks a workdir on a disk until the block or the process ends; ValueError where another run holds the lock."""
    taken: list[int] = []
    try:
        processes.by_first(lambda: taken.append(_lock(epath.Path(workdir))) if "://" not in str(workdir) else None)
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)


def _lock(workdir: epath.Path) -> int:
    workdir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(workdir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 200).decode(errors="replace").strip()
        os.close(descriptor)
        raise ValueError(f"{workdir} is in use by another run ({holder}): wait for it, or stop it") from None
    except OSError:
        pass  # a file system without locks
    with contextlib.suppress(OSError):  # a full disk: the lock holds, but the file names no holder
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor


def sweep(folder: epath.PathLike) -> None:
    """Process 0 removes the temporary files of processes that were killed while they wrote."""

    def sweep() -> None:
        if "://" not in str(folder):
            for path in pathlib.Path(folder).rglob(".*.tmp"):
                if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
                    path.unlink(missing_ok=True)

    processes.by_first(sweep)
