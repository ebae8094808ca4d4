"""Loads examples: from the cache, or from the rows of a dataset, whose encoding all processes of a run share."""

import contextlib
import functools
import hashlib
import importlib.metadata
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from spin_jax.data import sources, store, tokenizing
from spin_jax.data.chat import Chat
from spin_jax.data.findings import Findings, merge_findings
from spin_jax.data.store import Examples
from spin_jax.runtime import processes
from spin_jax.runtime.console import progress


def load_examples(
    rows: Any,
    chat: Chat,
    *,
    path: str,
    limit: int | None = None,
    seed: int = 0,
    bad_rows: str = "error",
    max_bad: float = 0.1,
    **options: Any,
) -> tuple[Examples, Counter]:
    """Encodes `limit` rows that `seed` chooses, in the order of the rows. Several processes share the work.

    Examples that an earlier call encoded are taken from the cache. Rows with an empty answer are dropped. Where
    `bad_rows` is "drop", malformed rows are dropped too. Both together may be at most the share `max_bad` of the
    chosen rows.

    Args:
        options: `prompt_column`, `answer_column` and `all_turns` of `encode_rows`.

    Returns:
        the examples, and counts of what was dropped, cut or not used.

    Raises:
        ValueError: a row is bad, and the message names `path`, row and field; or no example is left.
    """
    whole = limit is None or limit >= len(rows)
    chosen = np.arange(len(rows)) if whole else np.sort(np.random.default_rng(seed).permutation(len(rows))[:limit])
    options = {**options, "path": path, "bad_rows": bad_rows}

    def look_up() -> tuple[str, Examples | None]:
        choice = len(rows), None if whole else (limit, seed), sorted(options.items())
        source = sources.identity(rows)
        name = store.name_of([_sources(), source, chat.identity(), choice]) if source else ""
        return name, store.find(name)

    name, found = processes.together(look_up)
    everywhere = all(processes.exchanged(found is not None))
    examples = found if found is not None and everywhere else _encode(rows, chosen, chat, options, name)
    counts = merge_findings([examples.record["findings"]]).final_counts(path, len(chosen), max_bad)
    _check_ids(examples, rows, path)
    if not len(examples):
        raise ValueError(f"{path}: none of {len(chosen)} rows is left ({dict(counts)})")
    return examples, counts


def _encode(rows: Any, chosen: np.ndarray, chat: Chat, options: dict[str, Any], name: str) -> Examples:
    """The examples of the chosen rows; stored with them are their findings and their digest."""
    findings, digest, path = Findings(options["bad_rows"]), hashlib.sha256(), options["path"]
    chunks = [chosen[start : start + tokenizing.CHUNK] for start in range(0, len(chosen), tokenizing.CHUNK)]
    mine = [chunk for turn, chunk in enumerate(chunks) if processes.turn(turn)]
    results = tokenizing.encode_chunks(rows, mine, chat, options)
    title, is_long = f"tokenize {os.path.basename(path)}", len(chosen) > tokenizing.MANY
    bar_or_none = progress(title, len(chosen), unit="row") if is_long else contextlib.nullcontext()

    def batches() -> Iterator[pa.RecordBatch]:
        nonlocal findings
        with contextlib.closing(results), bar_or_none as bar:
            # Each process has one chunk of every round, so that none holds more than a round.
            while any(parts := processes.exchanged(processes.together(lambda: next(results, None)))):
                findings = merge_findings([vars(findings), *(part[2] for part in parts if part)])
                if findings.problem:
                    raise ValueError(findings.problem[1])
                for batch, texts, _ in filter(None, parts):
                    digest.update(texts)
                    yield pa.ipc.read_record_batch(pa.py_buffer(batch), store.EXAMPLES)
                    if bar is not None:
                        bar.update(min(tokenizing.CHUNK, bar.total - bar.n))

    return store.write(name, batches(), lambda: {"findings": vars(findings), "digest": digest.hexdigest()[:16]})


@functools.cache
def _sources() -> str:
    """The code that makes examples of rows: our own, and the versions of libraries."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    code = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    libraries = ("datasets", "jinja2", "pyarrow", "tokenizers", "transformers")
    return f"{code} {[importlib.metadata.version(name) for name in libraries]}"


def _check_ids(examples: Examples, rows: Any, path: str) -> None:
    """Raises ValueError where two examples have one prompt_id; the message names both rows."""
    ids, numbers = examples.column("prompt_id"), examples.column("number")
    if (np.diff(ids) > 0).all():  # as where they are the numbers of the rows
        return
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    repeated = np.flatnonzero(first[inverse] != np.arange(len(ids)))
    if len(repeated):
        later, earlier = (int(numbers[place]) for place in (repeated[0], first[inverse[repeated[0]]]))
        raise ValueError(
            f"{sources.place(rows, later, path)}: prompt_id {ids[repeated[0]]} came before, in "
            f"{sources.place(rows, earlier, path)}; give each row its own, or leave the column out"
        )
