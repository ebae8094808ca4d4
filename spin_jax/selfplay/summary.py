"""summary.json: a row for the start and for each iteration, which one is best, and when a run stops early."""

from collections import Counter

import jax
import numpy as np

from spin_jax.evaluate.best import best_row
from spin_jax.forecast import times
from spin_jax.forecast.job import Rates
from spin_jax.forecast.record import Record, comparison
from spin_jax.report import charts, drawing, numbers
from spin_jax.runtime import chips, processes, sharding
from spin_jax.selfplay import from_config
from spin_jax.selfplay.announce import typical_pairs, work
from spin_jax.selfplay.prepare import Prepared
from spin_jax.storage import files
from spin_jax.storage.metrics import Metrics, Row


class Summary:
    """The rows of summary.json. They are the same in every process."""

    def __init__(self, run: Prepared, metrics: Metrics):
        self._run = run
        self._metrics = metrics
        self.record = Record(run.workdir / "times.json")
        metrics.on_flush = self.record.flush
        self.rows: list[Row] = files.read_agreed(run.workdir / "summary.json") or []

    def row(self, t: int) -> Row:
        """The row of iteration t; {} where it has none yet."""
        return next((row for row in self.rows if row["iteration"] == t), {})

    @property
    def iteration_rows(self) -> list[Row]:
        """The rows of iterations, without the start's."""
        return [row for row in self.rows if row["iteration"] >= 0]

    def add(self, row: Row, step: int) -> None:
        """Adds a row and writes the file; `step` is the step of the row in metrics.jsonl."""
        t = row["iteration"]
        row = row if t == numbers.START else row | {"minutes": self.record.minutes(t)}
        row = processes.exchanged(row)[0]  # all processes decide by the same numbers
        self._forget_conclusion()
        values = {k: float(v) for k, v in row.items() if k != "iteration"}
        self._metrics.rewind("eval", t)
        self._metrics.write("eval", t, step, values)
        self.rows = sorted([*self.rows, row], key=lambda row: row["iteration"])
        self.write()

    def write(self) -> None:
        files.write_json(self._run.workdir / "summary.json", self.rows)
        self._metrics.flush()

    def best(self) -> Row | None:
        """The row of the best iteration so far, where checkpoint.best is set; the start does not compete."""
        return best_row(self.iteration_rows, self._run.config.checkpoint.best, self._run.best_direction)

    def stops_early(self) -> str:
        """Why the run begins no further iteration; "" where it goes on.

        An iteration has to be better than the start, too, where the start has the number. Only summary.json is read,
        so that a run that is started again decides alike.
        """
        c, patience = self._run.config.checkpoint, self._run.config.selfplay.patience
        best = best_row(self.rows, c.best, self._run.best_direction) if patience else None
        if best is None or all(map(self.row, self._run.iterations)):
            return ""
        since = [row for row in self.rows if row["iteration"] > best["iteration"] and c.best in row]
        if len(since) < patience:
            return ""
        mark = "the start" if best["iteration"] < 0 else f"iteration {best['iteration']}"
        return f"{c.best} has not improved on {mark}'s {best[c.best]:.4g} since (selfplay.patience={patience})"

    def conclude(self, spent: str = "") -> None:
        """Marks the final model in summary.json, and why there is no further one; prints both.

        The final model is the best iteration's where checkpoint.best is set, else the last one's. `spent` says why no
        further iteration is possible, or is "".
        """
        self._forget_conclusion()
        rows = self.iteration_rows
        if not rows:
            return
        if why := spent or self.stops_early():
            rows[-1]["stopped"] = why
            more = "" if spent else "; more patience would go on"
            processes.say(f"\nstopped after iteration {rows[-1]['iteration']}: {why}{more}")
        best = self.best()
        final = best or rows[-1]
        final["final"] = True
        self.write()
        folder = self._run.workdir / "best" if best else self._run.folder(final["iteration"]) / "model"
        processes.say(f"\nfinal model: iteration {final['iteration']}, in {folder}")

    def _forget_conclusion(self) -> None:
        for row in self.rows:
            row.pop("final", None)
            row.pop("stopped", None)

    def report(self) -> None:
        """Prints the table and writes summary.png."""
        processes.say(f"\n{numbers.summary_table(self.rows)}\n\n{self._times()}\n")
        if self._run.config.logging.plot:
            files.write(self._run.workdir / "summary.png", drawing.png_grid(charts.over_iterations(self.rows)))
        processes.say(f"models, metrics and pairs are in {self._run.workdir}")

    def _times(self) -> str:
        """What the phases of the run took, beside what `plan` expects on this machine."""
        try:
            run, machine = self._run, chips.chip_of(jax.local_devices())
            slices = sharding.slices_of(jax.devices())
            sampled = [row["response_tokens"] for row in self.rows if row.get("response_tokens")]
            pairs = typical_pairs(run, sum(sampled) / len(sampled) if sampled else None)
            means = [
                np.mean([len(ids) for ids in column])
                for column in zip(*((p.prompt, p.real, p.generated) for p in pairs), strict=True)
            ]
            config = run.config.changed({"lengths.expected": tuple(max(round(mean), 1) for mean in means)})
            job = from_config.job(config, run.model, run.pair_shape, pairs, jax.process_count(), slices)
            expected = times.phase_seconds(job, work(run), machine, Rates(), times.speeds(job, machine, Rates()))
        except Exception as error:  # the run is whole without an expectation
            return f"there is no expectation of the times: {type(error).__name__}: {error}"
        # Of iterations that an earlier version of this code ran nothing is known.
        done = [t for t, taken in self.record.seconds.items() if "evaluation" in taken and t in expected]
        done = [t for t in done if self.row(t)]
        return comparison(sum((Counter(expected[t]) for t in done), Counter()), self.record.total(done)) if done else ""
