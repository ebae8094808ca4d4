"""Where numbers go: metrics.jsonl always, TensorBoard and W&B on request, and the progress bar."""

import json
import math
import sys
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from typing import Any

from etils import epath
from tqdm import tqdm

from spin_jax import files, hosts

Row = dict[str, Any]
_REWRITE_S = 30  # an object store cannot append: it is sent the whole file, so often and at each summary


class Metrics:
    """Writes one row a line to metrics.jsonl: `phase`, `iteration`, `step` and values; process 0 does.

    Curves in TensorBoard and W&B go on from one iteration to the next: their step counts a phase's rows.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        tensorboard: bool = False,
        wandb_project: str | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        self.path = epath.Path(workdir) / "metrics.jsonl"
        self._file = self._tensorboard = self._wandb = None
        self._speaks = hosts.first()
        if not self._speaks:
            return
        self._remote = "://" in str(workdir)
        self._written = time.monotonic()
        self._lines = self.path.read_text().splitlines() if self.path.exists() else []
        if self._lines and not _whole(self._lines[-1]):  # cut off in the middle of a write
            self._lines.pop()
            self._rewrite()
        self._rows_of_phase = Counter(json.loads(line)["phase"] for line in self._lines)
        self._file = self._open()
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(str(epath.Path(workdir) / "tensorboard"))
        if wandb_project:
            import wandb

            stored = epath.Path(workdir) / "wandb_id"  # the same run when this one goes on
            if not stored.exists():
                files.write_here(stored, uuid.uuid4().hex.encode())
            self._wandb = wandb.init(
                project=wandb_project,
                name=epath.Path(workdir).name,
                id=stored.read_text(),
                resume="allow",
                config=dict(config or {}),
            )

    def write(self, phase: str, iteration: int, step: int, values: Mapping[str, float]) -> None:
        """Appends a row; a value that is not finite is written as null."""
        if not self._speaks:
            return
        numbers = {k: v if math.isfinite(v) else None for k, v in values.items()}
        line = json.dumps({"phase": phase, "iteration": iteration, "step": step, **numbers})
        self._lines.append(line)
        if self._file:
            self._file.write(line + "\n")
            self._file.flush()
        elif time.monotonic() - self._written > _REWRITE_S:
            self._rewrite()
        count = self._rows_of_phase[phase]
        self._rows_of_phase[phase] += 1
        finite = {f"{phase}/{k}": v for k, v in numbers.items() if v is not None}
        if self._tensorboard:
            for name, value in finite.items():
                self._tensorboard.add_scalar(name, value, count)
        if self._wandb:
            self._wandb.log({**finite, f"{phase}/step": count, f"{phase}/iteration": iteration})

    def rewind(self, phase: str, iteration: int, step: int = 0) -> None:
        """Drops the rows from `step` on: an interrupted run wrote them, and they are to come again."""
        if not self._speaks:
            return

        def stays(row: Row) -> bool:
            return (row["phase"], row["iteration"]) != (phase, iteration) or row["step"] < step

        kept = [line for line in self._lines if stays(json.loads(line))]
        if len(kept) == len(self._lines):
            return
        self._lines = kept
        self._rows_of_phase = Counter(json.loads(line)["phase"] for line in kept)
        if self._file:
            self._file.close()
        self._rewrite()
        self._file = self._open()

    def flush(self) -> None:
        if self._speaks and self._remote:
            self._rewrite()
        if self._tensorboard:
            self._tensorboard.flush()

    def close(self) -> None:
        self.flush()
        if self._file:
            self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()

    def _open(self) -> Any:
        return None if self._remote else self.path.open("a")

    def _rewrite(self) -> None:
        files.write_here(self.path, "".join(line + "\n" for line in self._lines).encode())
        self._written = time.monotonic()


def _whole(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def progress(description: str, total: int, done: int = 0, unit: str = "step") -> tqdm:
    """A progress bar with rate and ETA; where no terminal looks on, a line every half minute."""
    live = sys.stderr.isatty()
    return tqdm(
        desc=f"{description:<22}",
        total=total,
        initial=done,
        unit=unit,
        dynamic_ncols=live,
        ncols=None if live else 120,
        mininterval=0.2 if live else 30,
        leave=True,
        disable=not hosts.first(),
    )


def compact(number: float) -> str:
    """12345 → 12.3k, for the console."""
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.3g}"
