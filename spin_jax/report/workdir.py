"""Reads what a run has written to its workdir so far.

A run that is still going on, or that an earlier version made, lacks some of the files, which is no error. A damaged
file is an error, which names the file, the line and the field. Nothing here needs JAX.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from spin_jax import config_values
from spin_jax.report.numbers import START, Row, finite


@dataclasses.dataclass(frozen=True)
class Run:
    """The content of a workdir's files."""

    record: Mapping[str, Any]  # config.json
    rows: Sequence[Row]  # summary.json: the start and the iterations that are done
    steps: Mapping[str, Sequence[Row]]  # metrics.jsonl by phase, in order of iteration and step
    newest_step: Row  # the last row of metrics.jsonl; {} where there is none
    samples: Mapping[int, Sequence[Row]]  # samples.jsonl by iteration, of the start too
    lengths: Mapping[int, Sequence[np.ndarray]]  # by iteration: tokens of human and of generated answers, int [pairs]
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
        counts = {row["iteration"]: int(row.get("steps") or 0) for row in self.iterations}
        for row in itertools.chain(self.steps.get("train", ()), self.steps.get("control", ())):
            counts[row["iteration"]] = max(counts.get(row["iteration"], 0), row["step"] + 1)
        return {t: sum(count for earlier, count in counts.items() if earlier < t) for t in sorted(counts)}

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
    """Reads what is there. FileNotFoundError: no run is there; ValueError: a file is damaged."""
    root = epath.Path(workdir)
    path = root / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: is {workdir} a run's?")
    record = _parsed(path, path.read_bytes())
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise ValueError(f"{path} was not written by spin_jax: it has no config")
    read = {"loss", "selfplay", "eval"} & record["config"].keys()
    _check(f"{path}, config", record["config"], **dict.fromkeys(read, dict))
    metrics = _lines(root / "metrics.jsonl", _NUMBER, phase=str, iteration=int, step=int)
    ordered = sorted(metrics, key=lambda row: (row["phase"], row["iteration"], row["step"]))
    folders = dict(sorted((int(p.name[10:]), p) for p in root.glob("iteration_*") if p.name[10:].isdecimal()))
    samples = {t: _samples(folder / "samples.jsonl") for t, folder in {START: root / "start", **folders}.items()}
    lengths = {t: _lengths(folder / "pairs") for t, folder in folders.items()}
    margins = {t: _margins(folder) for t, folder in folders.items()}
    held_out = (_columns(folder / "pairs", "test-*.parquet", ["prompt_id"]) for folder in folders.values())
    return Run(
        record=record,
        rows=_summary(root / "summary.json"),
        steps={p: list(group) for p, group in itertools.groupby(ordered, key=lambda row: row["phase"])},
        newest_step=metrics[-1] if metrics else {},
        samples={t: rows for t, rows in samples.items() if rows},
        lengths={t: both for t, both in lengths.items() if both},
        margins={t: values for t, values in margins.items() if len(values)},
        held_out_prompts=max((len(columns["prompt_id"].unique()) for columns in held_out if columns), default=0),
    )


_NUMBER = int | float | None  # JSON has null where a number is not finite


def _parsed(place: object, text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(f"{place} is damaged: no valid JSON ({error})") from error


def _check(place: str, row: Any, others: Any = object, **kinds: Any) -> None:
    """Raises ValueError where a field is missing or of another type; `others` is the type of the unnamed fields."""
    if not isinstance(row, dict):
        raise ValueError(f"{place} is damaged: a JSON {type(row).__name__} in place of an object")
    for name in [*kinds, *row]:
        kind, value = kinds.get(name, others), row.get(name)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(f"{place} is damaged: {name} is {value!r:.60}")


def _lines(path: epath.Path, others: Any = object, **kinds: Any) -> list[Row]:
    """The objects of a JSONL file, if it is there, without a last line that is still being written."""
    rows = []
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for count, line in enumerate(lines, 1):
        place = f"{path}, line {count}"
        rows.append(_parsed(place, line))
        _check(place, rows[-1], others, **kinds)
    return rows


def _summary(path: epath.Path) -> list[Row]:
    rows = _parsed(path, path.read_bytes()) if path.exists() else []
    if not isinstance(rows, list):
        raise ValueError(f"{path} is damaged: no list of rows")
    for count, row in enumerate(rows):
        _check(f"{path}, row {count}", row, _NUMBER, iteration=int, control=dict | None, stopped=object)
        _check(f"{path}, row {count}, control", row.get("control") or {}, _NUMBER)
    return sorted(rows, key=lambda row: row["iteration"])


def _samples(path: epath.Path) -> list[Row]:
    rows = _lines(path, prompt_id=int, prompt=list, real=str, generated=str)
    for count, row in enumerate(rows, 1):
        for message in row["prompt"]:
            calls = isinstance(message, dict) and message.get("tool_calls")  # such a turn may have no content
            _check(f"{path}, line {count}, prompt", message, role=str, content=str | None if calls else str)
    return rows


def _columns(folder: epath.Path, files: str, names: Sequence[str]) -> Mapping[str, Any] | None:
    """{name: Arrow column} of a folder's parquet files, for those names that they have; None without files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = []
    for path in sorted(folder.glob(files)):
        try:
            with path.open("rb") as opened:
                tables.append(pq.ParquetFile(opened, page_checksum_verification=True).read(columns=list(names)))
        except Exception as error:  # whatever Arrow makes of damaged bytes
            raise ValueError(f"{path} is damaged: {error}") from error
    if not tables:
        return None
    table = pa.concat_tables(tables)
    return dict(zip(table.column_names, table.columns, strict=True))


def _lengths(folder: epath.Path) -> list[np.ndarray]:
    """The tokens of human and of generated answers, of training and held-out pairs; [] if there are no pairs yet."""
    import pyarrow.compute as pc

    columns = _columns(folder, "*.parquet", ("real_tokens", "generated_tokens"))
    if columns is None:
        return []
    if len(columns) < 2:
        raise ValueError(f"{folder} is damaged: no columns real_tokens and generated_tokens")
    lengths = (pc.list_value_length(column) for column in columns.values())  # pyright: ignore
    return [length.fill_null(0).to_numpy() for length in lengths]


def _margins(folder: epath.Path) -> np.ndarray:
    """The finite margins of held-out pairs; none where the loss has no margin, or there is no file."""
    columns = _columns(folder, "held_out.parquet", ["margin"])
    margins = np.asarray(columns["margin"].to_numpy() if columns else [], float)
    return margins[np.isfinite(margins)]
