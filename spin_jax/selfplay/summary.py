"""summary.json: a row for the start and each iteration, which of them is best, and when to go no further."""

from typing import Any

from spin_jax.report import charts, drawing, numbers
from spin_jax.runtime import processes
from spin_jax.selfplay.best import best_row
from spin_jax.selfplay.prepared import Prepared
from spin_jax.storage import files
from spin_jax.storage.metrics import Metrics

Row = dict[str, Any]


class Summary:
    """The rows of a run, the same in every process."""

    def __init__(self, run: Prepared, metrics: Metrics):
        self._run = run
        self._metrics = metrics
        self.rows: list[Row] = files.read_agreed(run.workdir / "summary.json") or []

    def row(self, t: int) -> Row:
        """Iteration t's; {} where it has none yet."""
        return next((row for row in self.rows if row["iteration"] == t), {})

    @property
    def made(self) -> list[Row]:
        """Those of iterations, without the start's."""
        return [row for row in self.rows if row["iteration"] >= 0]

    def add(self, row: Row, step: int) -> None:
        row, t = (
            processes.exchanged(row)[0],
            row["iteration"],
        )  # what follows from it follows in every process
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
        """The row of the best iteration so far, where a config says what is best.

        The start is none of them, better or not: what self-play hands on is a model that self-play made.
        """
        return best_row(self.made, self._run.config.checkpoint.best, self._run.better)

    def stops_early(self) -> str:
        """Why no iteration is begun that is not done yet; "" where there is nothing against it.

        The start sets the mark where it has the number: an iteration has to be better than what it came from.
        It is told from summary.json alone, so that a run that is started again comes to the same.
        """
        c, patience = self._run.config.checkpoint, self._run.config.selfplay.patience
        best = best_row(self.rows, c.best, self._run.better) if patience else None
        if best is None or all(map(self.row, self._run.iterations)):
            return ""
        since = [row for row in self.rows if row["iteration"] > best["iteration"] and c.best in row]
        if len(since) < patience:
            return ""
        mark = "the start" if best["iteration"] < 0 else f"iteration {best['iteration']}"
        return (
            f"{c.best} has not improved on {mark}'s {best[c.best]:.4g} since (selfplay.patience={patience})"
        )

    def conclude(self, spent: str = "") -> None:
        """Puts in summary.json which model is the final one, and why there are no more, and says so.

        `spent` says why no more could be made, if that is so.

        Final is the best iteration's, where checkpoint.best says what is best, and else the last one's.
        """
        self._forget_conclusion()
        made = self.made
        if not made:
            return
        if why := spent or self.stops_early():
            made[-1]["stopped"] = why
            more = "" if spent else "; more patience goes on"
            processes.say(f"\nstopped after iteration {made[-1]['iteration']}: {why}{more}")
        best = self.best()
        final = best or made[-1]
        final["final"] = True
        self.write()
        folder = self._run.workdir / "best" if best else self._run.folder(final["iteration"]) / "model"
        processes.say(f"\nfinal model: iteration {final['iteration']}, in {folder}")

    def _forget_conclusion(self) -> None:
        for row in self.rows:
            for mark in ("final", "stopped"):
                row.pop(mark, None)

    def report(self) -> None:
        """Prints the table; draws summary.png."""
        processes.say(f"\n{numbers.summary_table(self.rows)}\n")
        if self._run.config.logging.plot:
            picture = drawing.png_grid(charts.over_iterations(self.rows))
            files.write(self._run.workdir / "summary.png", picture)
        processes.say(f"models, metrics and pairs are in {self._run.workdir}")
