"""Self-play fine-tuning: Algorithm 1 of arXiv 2401.01335, on disk.

    for t = 0 … T − 1:
        sample    y' ~ p_θt(· | x) for each prompt x                                      opponent.py
        score     log p_θt(y | x) and log p_θt(y' | x) of the human and the generated answer
        train     θ_{t+1} = argmin_θ Σ ℓ(β log p_θ(y|x)/p_θt(y|x) − β log p_θ(y'|x)/p_θt(y'|x))    fitting.py

`run` is the whole of it. Each phase writes its results as it goes, and skips what exists already, so that running again
with the same workdir continues. Plain SPIN holds one set of weights at a time: the opponent's log-probs are computed
before training starts from its weights. β is the paper's λ.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

from spin_jax import config as config_lib
from spin_jax.errors import NothingToTrainOn
from spin_jax.models.architecture import Params
from spin_jax.models.params import mixed
from spin_jax.report.numbers import START
from spin_jax.runtime import interrupts, processes
from spin_jax.selfplay import announce, fingerprints, from_config
from spin_jax.selfplay.engine import Engine
from spin_jax.selfplay.exports import Exports
from spin_jax.selfplay.fitting import Fitting, TrainingPhase
from spin_jax.selfplay.held_out import Evaluation
from spin_jax.selfplay.opponent import Opponent
from spin_jax.selfplay.prepare import Prepared, locked, prepare
from spin_jax.selfplay.summary import Summary
from spin_jax.storage import files, seals
from spin_jax.storage.metrics import Metrics, Row

PHASES = ("sample", "score", "train")


def run(
    config: Mapping[str, Any], workdir: str, *, only: str | None = None, should_stop: Callable[[], int] | None = None
) -> list[Row]:
    """Runs self-play, or continues it, and returns the rows of summary.json.

    Args:
        config: a ConfigDict or nested dict of the keys in `spin_jax.config`; absent keys keep their defaults.
        workdir: a directory or object store URL. It holds one run, and nothing in it is made twice.
        only: `sample`, `score` or `train` runs just this phase of the next iteration.
        should_stop: returns the number of the signal that asks the run to stop, or 0; it is called between units of
            work. None listens to Ctrl-C and SIGTERM. Where one of several processes is to stop, all do.

    Raises:
        ValueError, FileNotFoundError: bad config or input, before anything is computed.
        Interrupted: the run was stopped; the same call continues it.
        NotFinite: losses or gradients were not finite for several steps in a row.
        OSError: the workdir cannot be written; NoRoom where the disk is too full for a checkpoint.
    """
    if only is not None and only not in PHASES:
        raise ValueError(f"only={only!r}: choose from {', '.join(PHASES)}")
    with contextlib.ExitStack() as stack:
        stop = should_stop or stack.enter_context(interrupts.listening())
        resolved = config_lib.resolve(config)
        processes.say(f"{announce.config_tree(resolved)}\n")
        prepared = prepare(resolved, workdir)
        stack.enter_context(locked(prepared))
        play = SelfPlay(prepared, lambda: processes.most(stop()))
        stack.callback(play.metrics.close)
        stack.enter_context(play.summary.record)
        processes.say(announce.run_overview(prepared, sum(map(play.finished, prepared.iterations))))
        play.iterate(only)
        return play.summary.rows


def check(config: Mapping[str, Any], workdir: str | None = None) -> None:
    """Reads and checks everything that `run` would, and prints what it found; trains and writes nothing."""
    resolved = config_lib.resolve(config)
    processes.say(f"{announce.config_tree(resolved, everything=True)}\n")
    prepared = prepare(resolved, workdir)
    lines = announce.run_overview(prepared, 0).splitlines()
    shown = [line for line in lines if workdir or not line.startswith(("workdir", "disk"))]
    rows, lengths = announce.example_rows(prepared), announce.length_table(prepared)
    processes.say("\n".join([*shown, "", rows, "", lengths, "", "everything that can be checked is in order"]))


class SelfPlay:
    """The parts of a run, and the loop over its iterations."""

    def __init__(self, run: Prepared, should_stop: Callable[[], Any]):
        c, recorded = run.config.logging, fingerprints.recorded(run.config)
        options = {"tensorboard": c.tensorboard, "wandb_project": c.wandb_project, "config": recorded}
        self.run = run
        self.metrics = processes.together(lambda: Metrics(run.workdir, **options))
        self.summary = Summary(run, self.metrics)
        self.objective = from_config.spin(run.config, run.model)
        self.engine = Engine(run, should_stop)
        self.opponent = Opponent(run, self.engine, self.metrics, self.weights)
        self.fitting = Fitting(run, self.engine, self.metrics)
        self.evaluation = Evaluation(run, self.engine, self.opponent, self.objective)
        self.exports = Exports(run, self.engine.stop_if_asked)

    def finished(self, t: int) -> bool:
        return bool(self.summary.row(t))

    def iterate(self, only: str | None = None) -> None:
        """Runs the start and every iteration that is not finished; with `only`, one phase of the next one."""
        params, spent = self.start(), ""
        self.hand_out()  # an earlier attempt may have failed
        for t in self.summary.record.each(self.run.iterations):
            if self.finished(t):
                params = None
                continue
            if self.summary.stops_early():
                break
            if only in (None, "sample"):
                params = self.opponent.sample(t, params)
            if only in (None, "score"):
                params = self.opponent.score(t, params)
            if only in (None, "train"):
                try:
                    params = self.train(t, params)  # the next opponent
                except NothingToTrainOn as error:
                    if t == self.run.config.selfplay.start:
                        raise
                    spent = str(error)
            if only is not None or spent:
                break
        del params  # the control needs their memory
        self.engine.release()

        if spent or self.summary.stops_early() or all(map(self.finished, self.run.iterations)):
            self.control()
            self.summary.conclude(spent)
            self.hand_out()
            self.summary.report()

    # --- weights ---------------------------------------------------------------------------------

    def weights(self, t: int) -> Params:
        """The opponent of iteration t: θ_t, or with selfplay.opponent_decay a moving average of θ_start … θ_t."""
        first, decay = self.run.config.selfplay.start, self.run.config.selfplay.opponent_decay
        if not decay:
            return self.trained(t)
        average = self.trained(first)
        for k in range(first + 1, t + 1):  # from the files, so that a run that continues has the same to the bit
            average = mixed(average, self.trained(k), decay)
        return average

    def trained(self, t: int) -> Params:
        """θ_t: the weights of the start, or those that iteration t − 1 ended with."""
        run = self.run
        if t > run.config.selfplay.start:
            return self.fitting.checkpointed(run.folder(t - 1), lambda: self._retrained(t - 1))
        if not run.makes_start:
            return run.initial_params()
        phase = self.fitting.sft_phase(START, run.initial_params)
        make = functools.partial(self.fitting.fit, None, phase) if run.config.sft.epochs else run.initial_params
        return self.fitting.checkpointed(run.folder(START), make)

    def _retrained(self, t: int) -> Params:
        """The weights of iteration t, made again from the files that are left of it."""
        params = self.opponent.score(t, self.opponent.sample(t, None))
        return self._fitted(t, params, self._phase(t))

    # --- the start -------------------------------------------------------------------------------

    def start(self) -> Params | None:
        """Makes, exports and evaluates the start; returns its weights, or None where all that was done."""
        if self.finished(START):
            return None
        params = self.weights(self.run.config.selfplay.start)
        folder = self.run.folder(START)
        if self.run.makes_start:
            self.exports.save(folder, params)
        self.evaluation.write_samples(START, params)
        sampled = self.evaluation.sample(params)
        row: Row = {"iteration": START, **self.evaluation.measure_alone(folder, params, sampled)}
        if self.run.makes_start:
            self.exports.describe("start", folder, [row])
        self.summary.add(row, step=0)
        return params

    # --- training --------------------------------------------------------------------------------

    def train(self, t: int, params: Params | None) -> Params | None:
        """Iteration t from its scored pairs to its checkpoint, export and evaluation.

        `params` are the opponent's; None reads them where they are needed. Returns θ_{t+1}, or None where it is not the
        next opponent, or where the end of the evaluation needed its memory.
        """
        folder, phase = self.run.folder(t), self._phase(t)
        params = self.fitting.checkpointed(folder, lambda: self._fitted(t, params, phase))
        self.exports.save(folder, params)
        beta, steps = phase.scalars["beta"], phase.steps
        skipped = self.metrics.count("train", t, lambda row: row.get("skipped"))
        row: Row = {"iteration": t, "beta": beta, "pairs": len(phase.items), "steps": steps, "skipped": skipped}
        if self.run.config.selfplay.add_pairs:
            row["added_pairs"] = sum(each.pair.prompt_id < 0 for each in phase.items)
        row |= self.evaluation.measure_pairs(t, params, beta)
        self.evaluation.write_samples(t, params)
        sampled = self.evaluation.sample(params)
        row |= self.evaluation.measure_alone(folder, params, sampled)
        if self.run.config.eval.kl and sampled:
            row |= self.evaluation.divergence(t, params, sampled)
            params = None
        elif self.run.config.selfplay.opponent_decay:
            self.engine.free(params)
            params = None
        self.exports.describe("iteration", folder, [*self.summary.rows, row])
        self.summary.add(row, step=steps)
        self.hand_out()
        return params

    def _phase(self, t: int) -> TrainingPhase:
        scored, play = self.opponent.scored_pairs(t, "train"), self.run.config.selfplay
        initial_params = functools.partial(self.trained, play.start if play.restart else t)
        return self.fitting.spin_phase(t, self.objective, *scored, initial_params)

    def _fitted(self, t: int, params: Params | None, phase: TrainingPhase) -> Params:
        """θ_{t+1}, trained from θ_t; with selfplay.restart from the start's weights. `params` are the opponent's."""
        play = self.run.config.selfplay
        if t > play.start and (play.restart or play.opponent_decay):  # the opponent is not what is trained
            self.engine.free(params)
            params = None
        return self.fitting.fit(params, phase)

    def hand_out(self) -> None:
        """Copies the best model so far to best/, and pushes to the hub what is not there yet."""
        self.exports.keep_best(self.summary.best())
        self.exports.push([row["iteration"] for row in self.summary.iteration_rows])

    # --- the SFT control -------------------------------------------------------------------------

    def control(self) -> None:
        """The paper's control: the start is trained on by SFT for as many steps as each iteration took."""
        params, done = None, list(filter(self.finished, self.run.iterations))
        if not done or not self.run.config.sft.control:
            return
        folder = self.run.workdir / "control"
        for t in done:
            row = self.summary.row(t)
            if "control" not in row:
                files.remove(folder / "model")  # an older export, made when fewer iterations were done
                params = self._control_weights(t, params)
                sampled = self.evaluation.sample(params)
                row["control"] = self.evaluation.measure_alone(folder / f"iteration_{t}", params, sampled)
                self.summary.write()
        if not seals.sealed(folder / "model"):
            params = self._control_weights(done[-1], None) if params is None else params
            self.exports.save(folder, params, folder / f"iteration_{done[-1]}" / "adapters")
        self.exports.describe("control", folder, self.summary.rows)

    def _control_weights(self, t: int, params: Params | None) -> Params:
        """The control beside iteration t; `params` are the weights of the control before it, or None."""
        before = functools.partial(self._control_weights, t - 1, None)
        initial_params = functools.partial(self.trained, t) if t == self.run.config.selfplay.start else before
        phase = self.fitting.sft_phase(t, initial_params, self.summary.row(t)["steps"])
        return self.fitting.checkpointed(phase.folder, lambda: self.fitting.fit(params, phase))
