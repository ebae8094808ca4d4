"""Finds the files of a split in a local folder, by the rules of `datasets`: the dataset card's, or the files' names."""

import contextlib
import glob
import os
import re
import tempfile
from collections.abc import Iterable, Sequence

FORMATS = ".jsonl or .json, perhaps with .gz or .zst after it, or .parquet"


def file_format(name: str) -> str | None:
    """jsonl, json or parquet, by the end of a file's name; None if it has another end."""
    found = re.search(r"\.(?:(jsonl|json)(?:\.gz|\.zst)?|(parquet))$", name)
    return found and (found[1] or found[2])


def split_files(folder: str, split: str, name: str | None = None) -> tuple[list[str], list[str]]:
    """The files of a split, sorted, and the files that `datasets` would add to it; names within the folder.

    A split is what the card says (`configs:` in README.md), of which `name` chooses a configuration. Without a card the
    names of files and folders say it. `datasets` takes train_sft and train_gen both for train. Here they are splits of
    these names, and train is a split only if one name alone stands for it, or if it is the whole name.

    Raises:
        ValueError: there is no such split, or it would mix several splits or formats; the message says what there is.
    """
    splits, everything = _card_splits(folder, name), _listed(folder)
    if not everything:
        raise ValueError(f"{folder} holds no file that ends in {FORMATS}")
    if splits is not None:
        chosen = same = splits.get(split, [])
    else:
        splits = _named_splits(folder)
        parts: dict[str, list[str]] = {}
        for file in splits.get(split, everything):
            parts.setdefault(_part(file, split), []).append(file)
        whole = [part for part in parts if os.path.basename(part) == split]
        found = whole or (list(parts) if split in splits else [])
        if len(found) > 1:
            raise ValueError(
                f"{folder}: the split {split!r} would mix {', '.join(found)}. Choose one as the split, or give its "
                "file or folder as the path, or list the files of each split in README.md (`configs:`)"
            )
        chosen = parts[found[0]] if found else []
        same = [file for file in everything if found and _part(file, split) == found[0]]
    if not chosen:
        has = [f"{other} ({shown(files)})" for other, files in splits.items()]
        if rest := sorted(set(everything).difference(*splits.values())):
            has.append(f"{shown(rest)} in no split")
        raise ValueError(
            f"{folder} has no split {split!r}; it has {'; '.join(has)}. Choose one of these, or give a file as the path"
        )
    if strange := [path for path in (os.path.join(folder, file) for file in same) if not os.path.isfile(path)]:
        raise ValueError(f"{strange[0]} is not a regular file, or is a link to a missing one")
    if len({file_format(file) for file in same}) > 1:
        raise ValueError(f"{folder}: the split {split!r} mixes formats: {shown(same)}. Give one file as the path")
    return chosen, [file for file in splits.get(split, ()) if file not in chosen]


def all_files(folder: str) -> list[str]:
    """The data files of a folder itself, whatever their split, sorted; names within the folder."""
    return _matching(folder, ["*"])


def shown(files: Sequence[str]) -> str:
    """The names of files for a message; of many, the first ones."""
    return ", ".join(files[:4]) + (f" and {len(files) - 4} more" if len(files) > 4 else "")


def _card_splits(folder: str, name: str | None) -> dict[str, list[str]] | None:
    """The files of each split as README.md lists them; None where it does not."""
    import datasets
    import huggingface_hub

    card = os.path.join(folder, "README.md")
    try:
        if not os.path.isfile(card) or not (huggingface_hub.metadata_load(card) or {}).get("configs"):
            return None
        with tempfile.TemporaryDirectory() as cache:  # the builder would leave a lock file there
            builder = datasets.load_dataset_builder(os.path.abspath(folder), name, cache_dir=cache)
    except Exception as error:  # the error depends on what is wrong with the card
        raise ValueError(f"{card}: its configs cannot be followed, of which data.name chooses one: {error}") from error
    root = os.path.realpath(folder)
    splits = (builder.config.data_files or {}).items()
    return {str(split): sorted(os.path.relpath(file, root) for file in files) for split, files in splits}


def _named_splits(folder: str) -> dict[str, list[str]]:
    """The files of each split as `datasets` finds them by their names, as far as their format can be read here."""
    from datasets.data_files import EmptyDatasetError, get_data_patterns

    try:
        patterns = get_data_patterns(glob.escape(os.path.abspath(folder)))
    except EmptyDatasetError:
        return {}
    splits = {str(split): _matching(folder, found) for split, found in patterns.items()}
    return {split: files for split, files in splits.items() if files}


def _listed(folder: str) -> list[str]:
    """What has the name of a data file, be it a regular file or not, sorted; names within the folder."""
    from datasets.data_files import FILES_TO_IGNORE

    found = []
    for parent, inner, names in os.walk(folder):
        inner[:] = [name for name in inner if not name.startswith((".", "__"))]
        candidates = [name for name in (*names, *inner) if file_format(name) and name not in FILES_TO_IGNORE]
        found += [os.path.relpath(os.path.join(parent, n), folder) for n in candidates if not n.startswith(".")]
    return sorted(found)


def _matching(folder: str, patterns: Iterable[str]) -> list[str]:
    """The data files that match any of the patterns, sorted; names within the folder."""
    from datasets.data_files import resolve_pattern

    root, found = os.path.abspath(folder), set()
    for pattern in patterns:
        with contextlib.suppress(FileNotFoundError):  # nothing matches
            found.update(resolve_pattern(pattern, glob.escape(root)))
    return sorted(os.path.relpath(file, root) for file in found if file_format(file))


def _part(file: str, split: str) -> str:
    """The path up to the folder or name that says the split, without the number of a part; "" if nothing says it."""
    from datasets.data_files import SPLIT_KEYWORDS

    words = {str(known): words for known, words in SPLIT_KEYWORDS.items()}.get(split, [split])
    keyword = re.compile(rf"(^|[-._ 0-9])({'|'.join(map(re.escape, words))})([-._ 0-9]|$)")
    names = file.split("/")
    depth = next((depth for depth, name in enumerate(names) if keyword.search(name)), None)
    if depth is None:
        return ""
    own = re.sub(r"(\.(jsonl|json|parquet))?(\.(gz|zst))?$", "", names[depth])
    return "/".join([*names[:depth], re.sub(r"[-._ ]*\d+(-of-\d+.*)?$", "", own)])
