"""What a run has left in its workdir, read for people: as much of it as there is by now.

A run that is still going on, or that was made by an earlier version, lacks some of it: that is no error. What
is there and is not what a run writes is one, and is named by file, line and field. No JAX is asked for.
"""

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from spin_jax import config_values

Row = dict[str, Any]
START = -1  # the iteration number of the start


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Tokens of the answers of an iteration's pairs, int [pairs]."""

    real: np.ndarray
    generated: np.ndarray


@dataclasses.dataclass(frozen=True)
class Run:
    """A workdir's files by what they are."""

    workdir: str
    record: Mapping[str, Any]  # config.json
    rows: Sequence[Row]  # summary.json: the start and the iterations that are done
    steps: Mapping[str, Sequence[Row]]  # metrics.jsonl by phase, in order of iteration and step
    last: Row  # its newest row; {} where there is none
    samples: Mapping[int, Sequence[Row]]  # samples.jsonl by iteration, that of the start as −1
    lengths: Mapping[int, Lengths]  # by iteration
    margins: Mapping[int, np.ndarray]  # of held-out pairs, by iteration
    held_out: int  # prompts

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """{section.key: value}."""
        return config_values.flat(self.record["config"])

    @property
    def made(self) -> list[Row]:
        """The rows of iterations, without the start's."""
        return [row for row in self.rows if row["iteration"] > START]

    @property
    def final(self) -> Row:
        """The row of the final model, or of the newest while there is none; {} where nothing is made yet."""
        return next((row for row in self.rows if row.get("final")), (self.made or [{}])[-1])

    @property
    def start(self) -> Row:
        return next((row for row in self.rows if row["iteration"] == START), {})

    @functools.cached_property
    def begins(self) -> dict[int, int]:
        """{iteration: optimizer steps of those before it}."""
        taken: dict[int, int] = {row["iteration"]: int(row.get("steps") or 0) for row in self.made}
        for row in itertools.chain(self.steps.get("train", ()), self.steps.get("control", ())):
            taken[row["iteration"]] = max(taken.get(row["iteration"], 0), row["step"] + 1)
        ends = itertools.accumulate(count for _, count in sorted(taken.items()))
        return dict(zip(sorted(taken), [0, *ends], strict=False))

    def series(self, phase: str, key: str) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """{iteration: (optimizer steps since self-play began, values)} of a number of metrics.jsonl.

        The SFT stage comes before: its steps are negative. A value that is not finite is NaN.
        """
        result = {}
        rows = self.steps.get(phase, ())
        for t, of_iteration in itertools.groupby(rows, key=lambda row: row["iteration"]):
            part = list(of_iteration)
            steps = np.array([row["step"] for row in part])
            values = np.array([number(row, key) for row in part])
            first = -(part[-1]["step"] + 1) if t == START else self.begins.get(t, 0)
            result[t] = steps + first, values
        return result


def number(row: Mapping[str, Any], key: str) -> float:
    """A row's number of that name; NaN where it has none."""
    value = row.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def read(workdir: str) -> Run:
    """Reads what is there.

    Raises:
        FileNotFoundError: the workdir is no run's.
        ValueError: a file is damaged; the message names it, and line and field.
    """
    root = epath.Path(workdir)
    path = root / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: is {workdir} a run's?")
    record = _json(path)
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise ValueError(f"{path} is no run's of spin_jax: it has no config")
    rows = _summary(root / "summary.json")
    metrics = _metrics(root / "metrics.jsonl")
    ordered = sorted(metrics, key=lambda row: (row["phase"], row["iteration"], row["step"]))
    folders = {int(p.name[10:]): p for p in root.glob("iteration_*") if p.name[10:].isdecimal()}
    folders = dict(sorted(folders.items()))
    samples = {
        t: _samples(folder / "samples.jsonl") for t, folder in {START: root / "start", **folders}.items()
    }
    return Run(
        workdir=workdir,
        record=record,
        rows=rows,
        steps={phase: list(of) for phase, of in itertools.groupby(ordered, key=lambda row: row["phase"])},
        last=metrics[-1] if metrics else {},
        samples={t: found for t, found in samples.items() if found},
        lengths={t: found for t, folder in folders.items() if (found := _lengths(folder / "pairs"))},
        margins={t: found for t, folder in folders.items() if len(found := _margins(folder))},
        held_out=max((_held_out(folder / "pairs") for folder in folders.values()), default=0),
    )


# --- files of text -------------------------------------------------------------------------------


def _json(path: epath.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(f"{path} is damaged: no valid JSON ({error})") from error


def _lines(path: epath.Path) -> Iterator[tuple[str, Row]]:
    """(place, object) of a JSONL file, if it is there. A last line that is being written is left out."""
    if not path.exists():
        return
    try:
        lines = path.read_text().split("\n")
    except ValueError as error:
        raise ValueError(f"{path} is damaged: no UTF-8 ({error})") from error
    for count, line in enumerate(lines[:-1], 1):
        place = f"{path}, line {count}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{place} is damaged: no valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{place} is damaged: a JSON {type(row).__name__} in place of an object")
        yield place, row


def _need(place: str, row: Mapping[str, Any], **kinds: Any) -> None:
    """Raises ValueError where a field is missing or of another type."""
    for name, kind in kinds.items():
        if not isinstance(row.get(name), kind) or isinstance(row[name], bool):
            raise ValueError(f"{place} is damaged: {name} is {row.get(name)!r:.60}")


def _numbers(place: str, row: Mapping[str, Any], others: Sequence[str]) -> None:
    """Raises ValueError where a field but those is no number, nor null."""
    for name, value in row.items():
        if name not in others and not isinstance(value, int | float | None):
            raise ValueError(f"{place} is damaged: {name} is {value!r:.60}, and should be a number")


def _summary(path: epath.Path) -> list[Row]:
    rows = _json(path) if path.exists() else []
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} is damaged: no list of rows")
    for count, row in enumerate(rows):
        place = f"{path}, row {count}"
        _need(place, row, iteration=int)
        _numbers(place, row, ("control", "stopped"))
        if "control" in row:
            _need(place, row, control=dict)
            _numbers(f"{place}, control", row["control"], ())
    return sorted(rows, key=lambda row: row["iteration"])


def _metrics(path: epath.Path) -> list[Row]:
    rows = []
    for place, row in _lines(path):
        _need(place, row, phase=str, iteration=int, step=int)
        _numbers(place, row, ("phase",))
        rows.append(row)
    return rows


def _samples(path: epath.Path) -> list[Row]:
    rows = []
    for place, row in _lines(path):
        _need(place, row, prompt_id=int, prompt=list, real=str, generated=str)
        for message in row["prompt"]:
            _need(f"{place}, prompt", message if isinstance(message, dict) else {}, role=str, content=str)
        rows.append(row)
    return rows


# --- files of columns ----------------------------------------------------------------------------


def _columns(path: epath.Path, names: Sequence[str]) -> dict[str, Any]:
    """{name: Arrow column} of a parquet file, of those of the names that it has; nothing else is read."""
    import pyarrow.parquet as pq

    try:
        with path.open("rb") as opened:
            file = pq.ParquetFile(opened, page_checksum_verification=True)
            there = [name for name in names if name in file.schema_arrow.names]
            table = file.read(columns=there)
            return {name: table.column(name).combine_chunks() for name in there}
    except Exception as error:  # whatever Arrow makes of damaged bytes
        raise ValueError(f"{path} is damaged: {error}") from error


def _lengths(folder: epath.Path) -> Lengths | None:
    """Of training and held-out pairs, as far as they are there."""
    import pyarrow.compute as pc

    roles = ("real", "generated")
    parts: list[list[np.ndarray]] = []
    for path in sorted(folder.glob("*.parquet")) if folder.exists() else []:
        columns = _columns(path, [f"{role}_tokens" for role in roles])
        if len(columns) < len(roles):
            raise ValueError(f"{path} is damaged: no columns real_tokens and generated_tokens")
        lengths = [pc.list_value_length(column) for column in columns.values()]  # pyright: ignore
        parts.append([length.fill_null(0).to_numpy(zero_copy_only=False) for length in lengths])
    if not parts:
        return None
    return Lengths(*(np.concatenate(of_role) for of_role in zip(*parts, strict=True)))


def _held_out(folder: epath.Path) -> int:
    paths = sorted(folder.glob("test-*.parquet")) if folder.exists() else []
    found = [_columns(path, ["prompt_id"]) for path in paths]
    return len({prompt for columns in found for prompt in columns.get("prompt_id", np.empty(0)).tolist()})


def _margins(folder: epath.Path) -> np.ndarray:
    """Those of held-out pairs that are finite; none where the loss knows no margin, or no file is there."""
    path = folder / "held_out.parquet"
    columns = _columns(path, ["margin"]) if path.exists() else {}
    if "margin" not in columns:
        return np.empty(0)
    margins = np.asarray(columns["margin"].to_numpy(zero_copy_only=False), float)
    return margins[np.isfinite(margins)]
