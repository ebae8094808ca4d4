"""The one seam between this package and a file system: local disks and object stores alike.

Everything that the loop writes for itself goes through here, so that a reader never sees half a file: on a
disk the bytes are written beside the target, synced and renamed; an object store shows an object only when
it is whole. Of several processes one writes, and none goes on before the file is there.

A folder of several files is whole once it is sealed: SHA256SUMS, written last, holds the digest of each.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import re
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from etils import epath

from spin_jax.runtime import processes

SUMS = "SHA256SUMS"


class Damaged(ValueError):
    """Files are not what was written; the message names each."""


class NoRoom(OSError):
    """The disk has no room for what is to be written; the message has the numbers."""

    def __str__(self) -> str:
        return str(self.strerror)


def exists(path: epath.PathLike) -> bool:
    """Whether it is there, as process 0 sees it: all processes go on alike."""
    return existing([path])[0]


def existing(paths: Sequence[epath.PathLike]) -> list[bool]:
    """`exists` of many."""
    here = processes.together(lambda: [processes.first() and epath.Path(path).exists() for path in paths])
    return processes.agreed(np.array(here, bool)).tolist()


def read_agreed(path: epath.PathLike) -> Any:
    """What process 0 reads of a JSON file, in every process; None where there is no file."""
    read = processes.together(
        lambda: read_json(path) if processes.first() and epath.Path(path).exists() else None
    )
    return processes.exchanged(read)[0]


def write(path: epath.PathLike, data: bytes) -> None:
    """`write_here` by process 0; every process calls this, and comes back when the file is there."""
    processes.by_first(lambda: write_here(path, data))


def remove(folder: epath.PathLike) -> None:
    """Removes a folder with all that is in it, if it is there; as `write` does."""

    processes.by_first(lambda: remove_here(folder))


def remove_here(folder: epath.PathLike) -> None:
    """`remove`, by this process."""
    (epath.Path(folder) / SUMS).unlink(missing_ok=True)  # first: what is left of it is not whole
    if epath.Path(folder).exists():
        epath.Path(folder).rmtree()


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
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # on a full disk it would stand in the way
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    with contextlib.suppress(OSError):  # network file systems may refuse
        os.fsync(folder)  # the name, too, survives a power cut
    os.close(folder)


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    write(path, as_json(value))


def as_json(value: Any) -> bytes:
    """`value` as `write_json` writes it."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


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
    """Writes one JSON value a line, atomically."""
    write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


# --- whole folders -------------------------------------------------------------------------------


def seal(folder: epath.PathLike) -> None:
    """Writes SHA256SUMS of all files in a folder, as `sha256sum --check` reads it; every process calls this.

    Its first line holds the digest of the others. The processes share the reading.
    """
    folder = epath.Path(folder)
    names = processes.exchanged(processes.together(lambda: _names(folder) if processes.first() else None))[0]
    digests = _digests(folder, names)
    if unread := [name for name, digest in digests.items() if digest is None]:
        raise OSError(errno.EIO, "written, and cannot be read", str(folder / unread[0]))
    write(folder / SUMS, _sealing(digests))


def add(folder: epath.PathLike, name: str, content: bytes) -> None:
    """Writes one more file into a sealed folder, or another content of it; every process calls this.

    The folder passes its seal at every moment: that names the file only while it is there as it says.
    """
    folder = epath.Path(folder)

    def added() -> None:
        recorded = _recorded(folder, _sums(folder))
        digest = hashlib.sha256(content).hexdigest()
        if recorded.get(name) == digest:
            return
        if recorded.pop(name, None):
            write_here(folder / SUMS, _sealing(recorded))
        write_here(folder / name, content)
        write_here(folder / SUMS, _sealing(dict(sorted({**recorded, name: digest}.items()))))

    processes.by_first(added)


def _sealing(digests: Mapping[str, str | None]) -> bytes:
    """What a SHA256SUMS of these files holds."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    return f"# {hashlib.sha256(lines.encode()).hexdigest()}\n{lines}".encode()


def sealed(folder: epath.PathLike) -> bool:
    """Whether a folder has been written to its end."""
    return exists(epath.Path(folder) / SUMS)


def check_seal(folder: epath.PathLike) -> None:
    """Compares a sealed folder's files with its SHA256SUMS; every process calls this.

    Raises:
        Damaged: naming each file that is missing or is not as it was written.
    """
    folder = epath.Path(folder)
    text = processes.exchanged(processes.together(lambda: _sums(folder) if processes.first() else ""))[0]
    recorded = _recorded(folder, text)
    _compare(folder, recorded, _digests(folder, sorted(recorded)))


def check_seal_here(folder: epath.PathLike) -> None:
    """`check_seal` of a folder that may be this process's own; one that `seal` has not written passes."""
    folder = epath.Path(folder)
    if (folder / SUMS).exists() and _sums(folder).startswith("# "):
        recorded = _recorded(folder, _sums(folder))
        _compare(folder, recorded, _digests_of(folder, sorted(recorded)))


def _sums(folder: epath.Path) -> str:
    return (folder / SUMS).read_bytes().decode(errors="replace")


def _recorded(folder: epath.Path, text: str) -> dict[str, str]:
    """{file: digest} of a SHA256SUMS."""
    head, _, lines = text.partition("\n")
    if head != f"# {hashlib.sha256(lines.encode()).hexdigest()}":
        raise Damaged(f"{folder / SUMS} is damaged: its first line is not the digest of the others")
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines.splitlines())}


def _compare(folder: epath.Path, recorded: dict[str, str], found: dict[str, str | None]) -> None:
    if bad := [name for name, digest in recorded.items() if found[name] != digest]:
        how = ", ".join(
            f"{name} {'is not what was written' if found[name] else 'is missing'}" for name in bad
        )
        raise Damaged(f"{folder} is damaged: {how} (by its {SUMS}; remove that if the change was meant)")


def _names(folder: epath.Path) -> list[str]:
    def below(parent: epath.Path) -> Iterator[epath.Path]:
        for path in parent.iterdir():
            if path.is_dir():
                yield from below(path)
            elif path.name != SUMS:
                yield path

    return sorted(str(path.relative_to(folder)) for path in below(folder))


def _digests(folder: epath.Path, names: Sequence[str]) -> dict[str, str | None]:
    """`_digests_of`, each process reading its share."""
    share = _digests_of(folder, [name for number, name in enumerate(names) if processes.turn(number)])
    return {name: found for part in processes.exchanged(share) for name, found in part.items()}


def _digests_of(folder: epath.Path, names: Sequence[str]) -> dict[str, str | None]:
    """Each file's SHA-256, None where it cannot be read."""

    def digest(name: str) -> str | None:
        try:
            with (folder / name).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]
        except OSError:
            return None

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def copy(source: epath.PathLike, target: epath.PathLike) -> None:
    """Copies a sealed folder, seal last; one that is there already is left alone."""
    processes.by_first(lambda: copy_here(source, target))


def copy_here(source: epath.PathLike, target: epath.PathLike) -> None:
    """`copy`, by this process."""
    source, target = epath.Path(source), epath.Path(target)
    if (target / SUMS).exists() and _sums(source) == _sums(target):
        return
    names = [*_names(source), SUMS]
    before = sum((target / name).stat().length for name in _names(target)) if target.exists() else 0
    size = sum((source / name).stat().length for name in names)
    _check_room_here(target, size - before, f"the copy {target}")
    remove_here(target)
    try:
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).copy(target / name)
    except OSError:
        remove_here(target)  # half a copy is of no use, and takes room
        raise


# --- a workdir -----------------------------------------------------------------------------------


def check_room(folder: epath.PathLike, size: float, what: str) -> None:
    """Raises NoRoom where a disk has less than `size` bytes free; of an object store nothing is known."""
    processes.by_first(lambda: _check_room_here(folder, size, what))


def _check_room_here(folder: epath.PathLike, size: float, what: str) -> None:
    room = free(folder)
    if room is not None and room < size:
        raise NoRoom(
            errno.ENOSPC,
            f"{what} takes {size / 2**30:.3g} GiB, and {room / 2**30:.3g} GiB are free: make room",
        )


def free(folder: epath.PathLike) -> int | None:
    """Bytes free on the disk where a folder is, or will be; None of an object store."""
    if "://" in str(folder):
        return None
    path = epath.Path(folder)
    return shutil.disk_usage(next(path for path in (path, *path.parents) if path.exists())).free


@contextlib.contextmanager
def held(workdir: epath.PathLike) -> Iterator[None]:
    """Keeps other runs out of a workdir on a disk; the system lets go of it whenever a process ends.

    Raises:
        ValueError: another run holds it.
    """
    taken: list[int] = []
    try:
        processes.by_first(
            lambda: taken.append(_lock(epath.Path(workdir))) if "://" not in str(workdir) else None
        )
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
    with contextlib.suppress(OSError):  # on a full disk it stays nameless
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor


def sweep(folder: epath.PathLike) -> None:
    """Removes what processes left behind that were killed while they wrote; process 0 does."""

    def sweep() -> None:
        if "://" not in str(folder):
            for path in pathlib.Path(folder).rglob(".*.tmp"):
                if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
                    path.unlink(missing_ok=True)

    processes.by_first(sweep)
