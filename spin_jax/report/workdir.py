"""Reads what a run has written to its workdir so far.

A run that is still going on, or that an earlier version made, lacks some of the files, which is no error. A
damaged file is an error, which names the file, the line and the field. Nothing here needs JAX.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from spin_jax import config_values
from spin_jax.report.numbers import START, Row, finite


class Lengths(NamedTuple):
    """The number of tokens of each answer in an iteration's pairs, int [pairs]."""

    real: np.ndarray
    generated: np.ndarray


@dataclasses.dataclass(frozen=True)
class Run:
    """The content of a workdir's files."""

    workdir: str
    record: Mapping[str, Any]  # config.json
    rows: Sequence[Row]  # summary.json: the start and the iterations that are done
    steps: Mapping[str, Sequence[Row]]  # metrics.jsonl by phase, in order of iteration and step
    newest_step: Row  # the last row of metrics.jsonl; {} where there is none
    samples: Mapping[int, Sequence[Row]]  # samples.jsonl by iteration, of the start too
    lengths: Mapping[int, Lengths]  # by iteration
    margins: Mapping[int, np.ndarray]  # of held-out pairs, by iteration
    held_out_prompts: int

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """{section.key: value}."""
        return config_values.flat(self.record["config"])

    @property
    def iterations(self) -> list[Row]:
        """The rows of the iterations, without that of the start."""
        return [row for row in self.rows if row["iteration"] > START]

    @property
    def final(self) -> Row:
        """The row of the final model, or of the newest one while there is none; {} before the first."""
        return next((row for row in self.rows if row.get("final")), (self.iterations or [{}])[-1])

    @property
    def start(self) -> Row:
        return next((row for row in self.rows if row["iteration"] == START), {})

    @property
    def stopped(self) -> str:
        """Why the run stopped early; "" where it did not."""
        return next((row["stopped"] for row in self.iterations if row.get("stopped")), "")

    @functools.cached_property
    def first_steps(self) -> dict[int, int]:
        """{iteration: the optimizer steps of all iterations before it}."""
        counts: dict[int, int] = {row["iteration"]: int(row.get("steps") or 0) for row in self.iterations}
        for row in itertools.chain(self.steps.get("train", ()), self.steps.get("control", ())):
            counts[row["iteration"]] = max(counts.get(row["iteration"], 0), row["step"] + 1)
        ends = itertools.accumulate(count for _, count in sorted(counts.items()))
        return dict(zip(sorted(counts), [0, *ends], strict=False))

    def series(self, phase: str, key: str) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """{iteration: (optimizer steps since self-play began, values)} of a number of metrics.jsonl.

        The steps of the SFT stage, which comes before, are negative. A value that is not finite is NaN.
        """
        result = {}
        for t, group in itertools.groupby(self.steps.get(phase, ()), key=lambda row: row["iteration"]):
            rows = list(group)
            steps = np.array([row["step"] for row in rows])
            first = -(rows[-1]["step"] + 1) if t == START else self.first_steps.get(t, 0)
            result[t] = steps + first, np.array([finite(row, key) for row in rows])
        return result


def read(workdir: str) -> Run:
    """Reads what is there.

    Raises:
        FileNotFoundError: there is no run in the workdir.
        ValueError: a file is damaged; the message names it, with line and field.
    """
    root = epath.Path(workdir)
    path = root / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: is {workdir} a run's?")
    record = _json(path)
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise ValueError(f"{path} was not written by spin_jax: it has no config")
    rows = _summary(root / "summary.json")
    metrics = _metrics(root / "metrics.jsonl")
    ordered = sorted(metrics, key=lambda row: (row["phase"], row["iteration"], row["step"]))
    folders = {int(p.name[10:]): p for p in root.glob("iteration_*") if p.name[10:].isdecimal()}
    folders = dict(sorted(folders.items()))
    samples = {t: _samples(folder / "samples.jsonl") for t, folder in {START: root / "start", **folders}.items()}
    return Run(
        workdir=workdir,
        record=record,
        rows=rows,
        steps={p: list(group) for p, group in itertools.groupby(ordered, key=lambda row: row["phase"])},
        newest_step=metrics[-1] if metrics else {},
        samples={t: found for t, found in samples.items() if found},
        lengths={t: found for t, folder in folders.items() if (found := _lengths(folder / "pairs"))},
        margins={t: found for t, folder in folders.items() if len(found := _margins(folder))},
        held_out_prompts=max((_held_out_prompts(folder / "pairs") for folder in folders.values()), default=0),
    )


# --- files of text -------------------------------------------------------------------------------


def _json(path: epath.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(f"{path} is damaged: no valid JSON ({error})") from error


def _lines(path: epath.Path) -> Iterator[tuple[str, Row]]:
    """(place, object) of a JSONL file, if it is there, without a last line that is still being written."""
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


def _check_types(place: str, row: Mapping[str, Any], **kinds: Any) -> None:
    """Raises ValueError where a field is missing or of another type."""
    for name, kind in kinds.items():
        if not isinstance(row.get(name), kind) or isinstance(row[name], bool):
            raise ValueError(f"{place} is damaged: {name} is {row.get(name)!r:.60}")


def _check_numbers(place: str, row: Mapping[str, Any], others: Sequence[str]) -> None:
    """Raises ValueError where a field, other than those, is neither a number nor null."""
    for name, value in row.items():
        if name not in others and not isinstance(value, int | float | None):
            raise ValueError(f"{place} is damaged: {name} is {value!r:.60}, and should be a number")


def _summary(path: epath.Path) -> list[Row]:
    rows = _json(path) if path.exists() else []
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} is damaged: no list of rows")
    for count, row in enumerate(rows):
        place = f"{path}, row {count}"
        _check_types(place, row, iteration=int)
        _check_numbers(place, row, ("control", "stopped"))
        if "control" in row:
            _check_types(place, row, control=dict)
            _check_numbers(f"{place}, control", row["control"], ())
    return sorted(rows, key=lambda row: row["iteration"])


def _metrics(path: epath.Path) -> list[Row]:
    rows = []
    for place, row in _lines(path):
        _check_types(place, row, phase=str, iteration=int, step=int)
        _check_numbers(place, row, ("phase",))
        rows.append(row)
    return rows


def _samples(path: epath.Path) -> list[Row]:
    rows = []
    for place, row in _lines(path):
        _check_types(place, row, prompt_id=int, prompt=list, real=str, generated=str)
        for message in row["prompt"]:
            _check_types(f"{place}, prompt", message if isinstance(message, dict) else {}, role=str, content=str)
        rows.append(row)
    return rows


# --- files of columns ----------------------------------------------------------------------------


def _columns(paths: Sequence[epath.Path], names: Sequence[str]) -> Mapping[str, Any]:
    """{name: Arrow column} of parquet files one after another, for those names that they have."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = []
    for path in paths:
        try:
            with path.open("rb") as opened:
                file = pq.ParquetFile(opened, page_checksum_verification=True)
                tables.append(file.read(columns=[n for n in names if n in file.schema_arrow.names]))
        except Exception as error:  # whatever Arrow makes of damaged bytes
            raise ValueError(f"{path} is damaged: {error}") from error
    table = pa.concat_tables(tables) if tables else pa.table({})
    return {name: table.column(name) for name in table.column_names}


def _lengths(folder: epath.Path) -> Lengths | None:
    """The lengths of training and held-out pairs together; None if there are no pairs yet."""
    import pyarrow.compute as pc

    paths = sorted(folder.glob("*.parquet")) if folder.exists() else []
    if not paths:
        return None
    columns = _columns(paths, ("real_tokens", "generated_tokens"))
    if len(columns) < 2:
        raise ValueError(f"{folder} is damaged: no columns real_tokens and generated_tokens")
    lengths = (pc.list_value_length(column) for column in columns.values())  # pyright: ignore
    return Lengths(*(length.fill_null(0).to_numpy() for length in lengths))


def _held_out_prompts(folder: epath.Path) -> int:
    paths = sorted(folder.glob("test-*.parquet")) if folder.exists() else []
    columns = _columns(paths, ["prompt_id"])
    return len(set(columns["prompt_id"].to_pylist())) if columns else 0


def _margins(folder: epath.Path) -> np.ndarray:
    """The finite margins of held-out pairs; none where the loss has no margin, or there is no file."""
    path = folder / "held_out.parquet"
    columns = _columns([path] if path.exists() else [], ["margin"])
    margins = np.asarray(columns["margin"].to_numpy() if columns else [], float)
    return margins[np.isfinite(margins)]
