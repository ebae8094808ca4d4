"""Writes numbers to metrics.jsonl and, on request, to TensorBoard and W&B."""

import itertools
import json
import os
import pathlib
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from spin_jax.runtime import processes
from spin_jax.storage import files

Row = dict[str, Any]
_REWRITE_S = 30  # an object store cannot append, so the whole file is sent this often and at each flush


class Metrics:
    """Process 0 writes one row a line to metrics.jsonl: `phase`, `iteration`, `step` and values.

    Curves in TensorBoard and W&B continue from one iteration to the next: their step counts the rows of a
    phase. After an interruption they continue in the same run without duplicates: TensorBoard is asked to
    drop the steps that are repeated, and W&B, where a step is a row of the file, gets no row a second time.

    With each row of phase `eval` W&B gets a table of the samples.jsonl of this iteration and of those before it.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        tensorboard: bool = False,
        wandb_project: str | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        self._workdir = workdir = epath.Path(workdir)
        self.path = workdir / "metrics.jsonl"
        self.on_flush: Callable[[], None] = lambda: None  # process 0 calls it with each flush
        self._writes = processes.first()
        if not self._writes:
            return
        self._remote = "://" in str(workdir)
        self._copy = tempfile.NamedTemporaryFile(suffix=".jsonl") if self._remote else None  # noqa: SIM115
        self._local = pathlib.Path(self._copy.name if self._copy else self.path)  # rows are appended there
        if self._copy and self.path.exists():
            self._local.write_bytes(self.path.read_bytes())
        self._local.parent.mkdir(parents=True, exist_ok=True)
        self._file, self._written = self._local.open("a"), time.monotonic()
        whole = sum(map(len, self._lines()))
        if whole < self._local.stat().st_size:  # a kill cuts off in the middle of a line
            os.truncate(self._local, whole)
        self._counts = Counter((row["phase"], row["iteration"]) for row in self._rows())
        self._curves: dict[str, _Curves] = {}  # by phase
        self._tensorboard = workdir / "tensorboard" if tensorboard else None
        self._wandb = _wandb_run(workdir, wandb_project, config or {}) if wandb_project else None
        of_phase: Counter[str] = Counter()
        for number, row in enumerate(self._rows() if self._wandb else ()):  # sends the rows that W&B does not have yet
            self._to_wandb(number, of_phase[row["phase"]], row)
            of_phase[row["phase"]] += 1

    def _lines(self) -> Iterator[bytes]:
        """The lines of the file that are whole; a run may have millions, and memory holds one of them."""
        with self._local.open("rb") as file:
            yield from (line for line in file if line.endswith(b"\n"))

    def _rows(self) -> Iterator[Row]:
        return map(json.loads, self._lines())

    def write(self, phase: str, iteration: int, step: int, values: Mapping[str, float]) -> None:
        """Appends a row; a value that is not finite is written as null."""
        if not self._writes:
            return
        row = files.without_nan({"phase": phase, "iteration": iteration, "step": step, **values})
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        if self._remote and time.monotonic() - self._written > _REWRITE_S:
            self._send()
        number, count = self._counts.total(), sum(n for (other, _), n in self._counts.items() if other == phase)
        self._counts[phase, iteration] += 1
        if self._tensorboard is not None:
            if phase not in self._curves:  # these steps replace older ones
                self._curves[phase] = _Curves(self._tensorboard / phase, count)
            self._curves[phase].write(count, _curve_values(row))
        self._to_wandb(number, count, row)

    def rewind(self, phase: str, iteration: int, repeated: Callable[[int], bool] = lambda step: True) -> None:
        """Drops the rows of an interrupted run whose steps will be repeated."""

        def stays(row: Row) -> bool:
            return (row["phase"], row["iteration"]) != (phase, iteration) or not repeated(row["step"])

        if not self._writes or not self._counts[phase, iteration] or all(map(stays, self._rows())):
            return
        if phase in self._curves:
            self._curves.pop(phase).close()
        self._file.close()
        files.write_here(self._local, (line for line in self._lines() if stays(json.loads(line))))
        self._file = self._local.open("a")
        self._counts = Counter((row["phase"], row["iteration"]) for row in self._rows())
        if self._remote:
            self._send()

    def flush(self) -> None:
        """Puts all rows on the disk, so that later files may rely on them."""
        if not self._writes:
            return
        self.on_flush()
        if self._remote:
            self._send()
        else:
            os.fsync(self._file.fileno())
        for curves in self._curves.values():
            curves.flush()

    def close(self) -> None:
        if not self._writes:
            return
        self.flush()
        self._file.close()
        if self._copy:
            self._copy.close()
        for curves in self._curves.values():
            curves.close()
        if self._wandb:
            self._wandb.finish()

    def count(self, phase: str, iteration: int, counted: Callable[[Row], object]) -> int:
        """How many rows of a phase `counted` accepts; the same number in every process."""
        rows = self._rows() if self._writes else iter(())
        of_phase = (row for row in rows if (row["phase"], row["iteration"]) == (phase, iteration))
        return processes.exchanged(sum(1 for row in of_phase if counted(row)))[0]

    def _to_wandb(self, number: int, count: int, row: Row) -> None:
        """Logs the number-th row of the file, the count-th of its phase, unless W&B has it."""
        if self._wandb and number >= self._wandb.step:
            own = {f"{row['phase']}/step": count, f"{row['phase']}/iteration": row["iteration"]}
            samples = self._samples_table(number) if row["phase"] == "eval" else {}
            self._wandb.log({**_curve_values(row), **own, **samples}, step=number)

    def _samples_table(self, number: int) -> dict[str, Any]:
        """{name: table} of the samples that exist up to the number-th row of the file; {} where there are none.

        W&B shows the table that was logged last, and so the last one holds all iterations.
        """
        import wandb

        rows = itertools.islice(self._rows(), number + 1)
        iterations = [row["iteration"] for row in rows if row["phase"] == "eval"]
        lines = []
        for t in sorted(set(iterations)):
            path = self._workdir / ("start" if t < 0 else f"iteration_{t}") / "samples.jsonl"
            for sample in map(json.loads, path.read_text().split("\n")[:-1] if path.exists() else ()):
                prompt = "\n".join(f"{turn['role']}: {turn.get('content') or ''}" for turn in sample["prompt"])
                lines.append([t, prompt, sample["real"], sample["generated"]])
        columns = ["iteration", "prompt", "human answer", "answer"]
        return {"eval/samples": wandb.Table(columns=columns, data=lines)} if lines else {}

    def _send(self) -> None:
        files.write_here(self.path, self._local.read_bytes())
        self._written = time.monotonic()


class _Curves:
    """TensorBoard's event file for one phase.

    It is written in the calling thread: tensorboardX's SummaryWriter writes in a thread of its own, and hangs
    once that thread has died because the disk was full.
    """

    def __init__(self, folder: epath.Path, first: int):
        """TensorBoard drops the steps from `first` on in older files of the folder."""
        from tensorboardX.event_file_writer import EventsWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._file = EventsWriter(str(folder / "events"), f".{os.getpid()}.{first}")
        self._event(first, session_log={"status": "START"})
        self._flushed = time.monotonic()

    def write(self, step: int, values: Row) -> None:
        self._event(step, summary={"value": [{"tag": name, "simple_value": x} for name, x in values.items()]})
        if time.monotonic() - self._flushed > _REWRITE_S:
            self.flush()

    def _event(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

        self._file.write_event(Event(wall_time=time.time(), step=step, **content))

    def flush(self) -> None:
        self._file.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._file.close()


def _wandb_run(workdir: epath.Path, project: str, config: Mapping[str, Any]) -> Any:
    """The W&B run of a workdir; a run that is continued keeps its W&B run."""
    import wandb

    stored = workdir / "wandb_id"
    if not stored.exists():
        files.write_here(stored, uuid.uuid4().hex.encode())
    return wandb.init(project=project, name=workdir.name, id=stored.read_text(), resume="allow", config=dict(config))


def _curve_values(row: Row) -> Row:
    """The finite numbers of a row, under the names of their curves."""
    names = [name for name in row if name not in ("phase", "iteration", "step") and row[name] is not None]
    return {f"{row['phase']}/{name}": row[name] for name in names}
