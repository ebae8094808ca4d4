"""Seals folders, so that a reader knows whether a folder is complete and undamaged.

A sealed folder holds SHA256SUMS, which is written last and has the digest of each file, in the format of
`sha256sum --check`. Several processes share the reading.
"""

import errno
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from spin_jax.errors import Damaged
from spin_jax.runtime import processes
from spin_jax.storage.files import SUMS, check_room_here, exists, remove_here, write, write_here


def seal(folder: epath.PathLike) -> None:
    """Writes SHA256SUMS for all files of a folder; every process calls this."""
    folder = epath.Path(folder)
    names = processes.exchanged(processes.together(lambda: _names(folder) if processes.first() else None))[0]
    digests = _digests(folder, names)
    if unread := [name for name, digest in digests.items() if digest is None]:
        raise OSError(errno.EIO, "the file was written but cannot be read", str(folder / unread[0]))
    write(folder / SUMS, _seal_content(digests))


def add(folder: epath.PathLike, name: str, content: bytes) -> None:
    """Adds a file to a sealed folder, or replaces one; every process calls this.

    The folder agrees with its seal at every moment: the file is not in the seal while it is being written.
    """
    folder = epath.Path(folder)

    def add_here() -> None:
        recorded = _recorded(folder, _sums(folder))
        digest = hashlib.sha256(content).hexdigest()
        if recorded.get(name) == digest:
            return
        if recorded.pop(name, None):
            write_here(folder / SUMS, _seal_content(recorded))
        write_here(folder / name, content)
        write_here(folder / SUMS, _seal_content(dict(sorted({**recorded, name: digest}.items()))))

    processes.by_first(add_here)


def _seal_content(digests: Mapping[str, str | None]) -> bytes:
    lines = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    return f"# {hashlib.sha256(lines.encode()).hexdigest()}\n{lines}".encode()


def sealed(folder: epath.PathLike) -> bool:
    """Whether a folder is completely written."""
    return exists(epath.Path(folder) / SUMS)


def check_seal(folder: epath.PathLike) -> None:
    """Compares a sealed folder's files with its SHA256SUMS; every process calls this.

    Damaged names each file that is missing or differs from what was written.
    """
    folder = epath.Path(folder)
    text = processes.exchanged(processes.together(lambda: _sums(folder) if processes.first() else ""))[0]
    _compare(folder, text, _digests)


def check_seal_here(folder: epath.PathLike) -> None:
    """Checks a folder in this process alone; a folder without a seal of `seal` passes."""
    folder = epath.Path(folder)
    if (folder / SUMS).exists() and (text := _sums(folder)).startswith("# "):
        _compare(folder, text, _digests_here)


def _sums(folder: epath.Path) -> str:
    return (folder / SUMS).read_bytes().decode(errors="replace")


def _recorded(folder: epath.Path, text: str) -> dict[str, str]:
    """{file: digest}, as the text of a SHA256SUMS has it."""
    head, _, lines = text.partition("\n")
    if head != f"# {hashlib.sha256(lines.encode()).hexdigest()}":
        raise Damaged(f"{folder / SUMS} is damaged: its first line is not the digest of the others")
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines.splitlines())}


def _compare(folder: epath.Path, text: str, digests: Callable[..., dict[str, str | None]]) -> None:
    recorded = _recorded(folder, text)
    found = digests(folder, sorted(recorded))
    if bad := [name for name, digest in recorded.items() if found[name] != digest]:
        how = ", ".join(f"{name} {'is not what was written' if found[name] else 'is missing'}" for name in bad)
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
    """Calls `_digests_here`, with a share of the files in each process."""
    share = _digests_here(folder, [name for number, name in enumerate(names) if processes.turn(number)])
    return {name: found for part in processes.exchanged(share) for name, found in part.items()}


def _digests_here(folder: epath.Path, names: Sequence[str]) -> dict[str, str | None]:
    """The SHA-256 of each file; None for a file that cannot be read."""

    def digest(name: str) -> str | None:
        try:
            with (folder / name).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]
        except OSError:
            return None

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def copy(source: epath.PathLike, target: epath.PathLike) -> None:
    """Copies a sealed folder, its seal last, unless the target has the same seal already."""
    processes.by_first(lambda: copy_here(source, target))


def copy_here(source: epath.PathLike, target: epath.PathLike) -> None:
    """Copies a sealed folder in this process."""
    source, target = epath.Path(source), epath.Path(target)
    if (target / SUMS).exists() and _sums(source) == _sums(target):
        return
    names = [*_names(source), SUMS]
    before = sum((target / name).stat().length for name in _names(target)) if target.exists() else 0
    size = sum((source / name).stat().length for name in names)
    check_room_here(target, size - before, f"the copy {target}")
    remove_here(target)
    try:
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).copy(target / name)
    except OSError:
        remove_here(target)  # half a copy has no use and takes room
        raise
