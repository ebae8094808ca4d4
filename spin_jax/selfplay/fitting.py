"""The phases of a run that make weights, and what is reported of them."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from spin_jax import config_values, errors
from spin_jax.data.records import Example
from spin_jax.errors import NotFinite, NothingToTrainOn
from spin_jax.models import lora
from spin_jax.models.architecture import Params
from spin_jax.models.params import params_on
from spin_jax.runtime import processes, sharding
from spin_jax.runtime.console import compact, progress
from spin_jax.selfplay import fingerprints, from_config
from spin_jax.selfplay.exports import Exports
from spin_jax.selfplay.held_out import Evaluation
from spin_jax.selfplay.opponent import BEFORE, OPPONENT, START, Opponent
from spin_jax.selfplay.prepared import Prepared
from spin_jax.selfplay.summary import Summary
from spin_jax.storage import checkpoints as checkpoint
from spin_jax.storage import files, seals
from spin_jax.storage.metrics import Metrics
from spin_jax.training.batches import PairBatch, ScoredPair, as_npz, batches, pair_batches, training_steps
from spin_jax.training.loop import Loop, fit
from spin_jax.training.optimizer import Optimization
from spin_jax.training.packing import Rows, RowShape, example_group, packed
from spin_jax.training.step import SFT, Objective, TrainState, abstract_state, init_state, make_step

Row = dict[str, Any]


@dataclasses.dataclass
class Training:
    """One phase of training: what is fitted to what, and for how long."""

    phase: str
    iteration: int
    folder: epath.Path  # step checkpoints go to its train/
    objective: Objective
    options: Optimization
    items: Sequence  # examples or scored pairs
    collate: Callable[[Sequence], Sequence[Any]]  # items → micro-batches
    shape: RowShape  # of those
    steps: int
    schedule_steps: int
    scalars: dict[str, float]
    begins_from: Callable[[], Params]


class SelfPlay:
    """The phases of a run that make weights, and what is reported of them."""

    def __init__(self, run: Prepared, should_stop: Callable[[], Any]):
        logging = run.config.logging
        self.run = run
        self.should_stop = should_stop
        self.metrics = processes.together(
            lambda: Metrics(
                run.workdir,
                tensorboard=logging.tensorboard,
                wandb_project=logging.wandb_project,
                config=fingerprints.recorded(run.config),
            )
        )
        self.summary = Summary(run, self.metrics)
        self.opponent = Opponent(run, self.metrics, should_stop)
        self.spin = from_config.spin(run.config, run.model)
        self.evaluation = Evaluation(run, self.opponent, self.spin)
        self.exports = Exports(run, self.opponent.stop_here)

    def finished(self, t: int) -> bool:
        return bool(self.summary.row(t))

    # --- the start -------------------------------------------------------------------------------

    def start(self) -> Params | None:
        """Makes, exports and evaluates the start, where that is not done; then returns it."""
        if self.finished(BEFORE):
            return None
        params = self.before(self.run.config.selfplay.start)
        folder = self.run.folder(BEFORE)
        if self.run.makes_start:
            self.exports.save(folder, params)
        self.evaluation.write_samples(BEFORE, params)
        drawn = self.evaluation.draw(params)
        row: Row = {"iteration": BEFORE, **self.evaluation.alone(folder, params, drawn)}
        if self.run.makes_start:
            self.exports.describe("start", folder, [row])
        self.summary.add(row, step=0)
        return params

    def before(self, t: int) -> Params:
        """The weights that iteration t starts from: its opponent."""
        if t > self.run.config.selfplay.start:
            return self._made(self.run.folder(t - 1), lambda: self._again(t - 1))
        if self.run.makes_start:
            return self._made(self.run.folder(BEFORE), self._sft_start)
        return self.run.initial_params()

    def _again(self, t: int) -> Params:
        """Iteration t's parameters, from what is left of it."""
        params = self.score(t, self.sample(t, None))
        return self._fit(self._begun(t, params), self._spin(t))

    def _sft_start(self) -> Params:
        run, options = self.run, self.run.sft_options()
        if not run.config.sft.epochs:
            return run.initial_params()
        steps = training_steps(len(run.examples(BEFORE)), options.batch_size, options.epochs)
        schedule_steps = options.schedule_steps(steps)
        return self._fit(None, self._sft("sft", BEFORE, steps, schedule_steps, run.initial_params))

    def _made(self, folder: epath.Path, make: Callable[[], Params]) -> Params:
        """What a phase ends with: the parameters in its checkpoint; made, where there is no good one."""
        path, params = folder / "checkpoint", None
        like = params_on(self.run.mesh, self.run.model.config)
        if checkpoint.exists(path):
            try:
                params = checkpoint.restore(path, like)
            except errors.Damaged as error:
                processes.say(
                    f"\nWARNING: {error}\nIt is made again, from the last good checkpoint before it.\n"
                )
        if params is None:
            files.check_room(path, checkpoint.size(like), f"the checkpoint {path}")
            params = make()
            checkpoint.save(path, params)
        files.remove(folder / "train")  # step checkpoints have served
        return params

    # --- the opponent's part -----------------------------------------------------------------------

    def sample(self, t: int, params: Params | None) -> Params | None:
        """Makes the answers that are missing. `params` are the opponent's; None reads them if needed."""
        for source in self.opponent.needed(t)[:-1]:
            if not self.opponent.has_answers(source):
                given = source in self.run.given  # then nobody answers
                self.opponent.sample(source, {} if given else self.before(source))
        if not self.opponent.has_answers(t):
            params = self.before(t) if params is None else params
            self.opponent.sample(t, params)
        return params

    def score(self, t: int, params: Params | None) -> Params | None:
        """The same of scores; None is left of the opponent's parameters where the start scores, too."""
        if not self.opponent.has_scores(t, OPPONENT):
            params = self.before(t) if params is None else params
            self.opponent.score(t, params)
        if not self.opponent.has_scores(t, START):
            self._free(params)
            self.opponent.score(t, self.before(self.run.config.selfplay.start), START)
            params = None
        return params

    # --- training --------------------------------------------------------------------------------

    def train(self, t: int, params: Params | None) -> Params | None:
        """Iteration t from its scored pairs to its checkpoint, export, evaluation and samples.

        `params` are its opponent's; None reads them if they are needed. Returns the iteration's own, or None
        where the last of its evaluation has made room for others.
        """
        began, folder, training = time.perf_counter(), self.run.folder(t), self._spin(t)
        params = self._made(folder, lambda: self._fit(self._begun(t, params), training))
        self.exports.save(folder, params)
        beta, steps = training.scalars["beta"], training.steps
        skipped = self.metrics.count("train", t, lambda row: row.get("skipped"))
        row: Row = {"iteration": t, "beta": beta, "pairs": len(training.items), "steps": steps}
        row |= {"skipped": skipped, **self.evaluation.pairs(t, params, beta)}
        self.evaluation.write_samples(t, params)
        drawn = self.evaluation.draw(params)
        row |= self.evaluation.alone(folder, params, drawn)
        if self.run.config.eval.kl and drawn:
            row |= self.evaluation.divergence(t, params, drawn, self.before)
            params = None
        row["minutes"] = round((time.perf_counter() - began) / 60, 3)
        self.exports.describe("iteration", folder, [*self.summary.rows, row])
        self.summary.add(row, step=steps)
        self.hand_out()
        return params

    def hand_out(self) -> None:
        """Puts the best model so far in its place, and on the hub what is not there yet."""
        self.exports.keep_best(self.summary.best())
        self.exports.push([row["iteration"] for row in self.summary.made])

    def _origin(self, t: int) -> int:
        """The iteration whose opponent's weights iteration t trains."""
        return self.run.config.selfplay.start if self.run.config.selfplay.restart else t

    def _begun(self, t: int, params: Params | None) -> Params | None:
        """The opponent's parameters, where it is those that are trained."""
        if self._origin(t) == t:
            return params
        self._free(params)
        return None

    def _free(self, params: Params | None) -> None:
        self.opponent.release()
        sharding.free(params)

    def _spin(self, t: int) -> Training:
        run, options = self.run, self.run.options(t)
        scored = self.opponent.scored_pairs(t, "train")
        if not scored:
            raise NothingToTrainOn(
                f"iteration {t}: no answer is {run.config.selfplay.rows}, and selfplay.rows asks for those; "
                "more selfplay.samples or another eval.verifier may find some, in a new --workdir"
            )
        steps = training_steps(len(scored), options.batch_size, options.epochs)
        return Training(
            phase="train",
            iteration=t,
            folder=run.folder(t),
            objective=self.spin,
            options=options,
            items=scored,
            collate=self._pairs,
            shape=run.pair_shape,
            steps=steps,
            schedule_steps=options.schedule_steps(steps),
            scalars={"beta": float(config_values.per_iteration(run.config.loss.beta, t))},
            begins_from=lambda: self.before(self._origin(t)),
        )

    def _pairs(self, scored: Sequence[ScoredPair]) -> list[PairBatch]:
        return pair_batches(scored, self.run.pair_shape, self.run.chat.unattended, self.run.roles)

    def _examples(self, chosen: Sequence[Example]) -> list[Rows]:
        groups = [example_group(example) for example in chosen]
        return packed(groups, self.run.example_shape, self.run.chat.unattended)

    def _sft(
        self, phase: str, t: int, steps: int, schedule_steps: int, begins_from: Callable[[], Params]
    ) -> Training:
        run = self.run
        return Training(
            phase=phase,
            iteration=t,
            folder=run.folder(t) if phase == "sft" else self._control_folder(t),
            objective=SFT(run.decoder),
            options=run.sft_options(control=phase == "control"),
            items=run.examples(t),
            collate=self._examples,
            shape=run.example_shape,
            steps=steps,
            schedule_steps=schedule_steps,
            scalars={},
            begins_from=begins_from,
        )

    def _fit(self, params: Params | None, training: Training) -> Params:
        """Runs a training phase, from its newest good step checkpoint where there is one.

        `params` are what it begins from; None makes them if they are needed.
        """
        run, options, phase, t = self.run, training.options, training.phase, training.iteration
        self.opponent.release()
        c, most_skipped = run.config.checkpoint, run.config.train.most_skipped
        checkpoints = checkpoint.StepCheckpoints(training.folder / "train", c.keep, self.metrics.flush)
        start = checkpoints.steps_done()
        state, frozen = self._state(params, training, checkpoints, start)
        self.metrics.rewind(phase, t, lambda step: step >= start)
        title = phase if t == BEFORE else f"iteration {t}: {phase}"
        with progress(title, training.steps, start) as bar:

            def on_step(number: int, values: dict[str, float], waited: float) -> None:
                self.metrics.write(phase, t, number, values)
                shown = {k: f"{values[k]:.4g}" for k in ("loss", "margin") if k in values}
                shown |= {"tok/s": compact(values["tokens_per_s"]), "input wait": f"{waited:.1%}"}
                shown |= {"skipped": f"{values['skipped']:.0f}"} if values["skipped"] else {}
                bar.set_postfix(shown, refresh=False)
                bar.update()

            try:
                state = fit(
                    state,
                    self._batches(training, start),
                    make_step(training.objective, options),
                    start=start,
                    learning_rates=options.learning_rates(training.schedule_steps),
                    scalars=training.scalars,
                    frozen=frozen,
                    mesh=run.mesh,
                    checkpoints=checkpoints,
                    loop=Loop(
                        training.steps,
                        c.every_steps,
                        most_skipped,
                        on_step,
                        self.should_stop,
                    ),
                )
            except NotFinite as error:
                self._explain(error, training)
                raise
        if frozen is None:
            return state.params
        sharding.free(frozen)
        return lora.merged(training.begins_from(), state.params, options.lora_scale)

    def _state(
        self, params: Params | None, training: Training, checkpoints: checkpoint.StepCheckpoints, start: int
    ) -> tuple[TrainState, Params | None]:
        """What training goes on with from step `start`; with LoRA, and the weights that stay as they are."""
        run, options = self.run, training.options
        like = params_on(run.mesh, run.model.config)
        if start and not options.lora_rank:
            sharding.free(params)  # a resumed phase needs no more memory than a fresh one
            return checkpoints.restore(start, abstract_state(like, options, run.mesh)), None
        params = training.begins_from() if params is None else params
        if not options.lora_rank:
            return init_state(params, options, run.mesh), None
        like = lora.adapters_on(like, options.lora_rank, options.lora_targets)
        frozen = lora.freeze(params, run.model.dtype)
        if start:
            return checkpoints.restore(start, abstract_state(like, options, run.mesh)), frozen
        seed = _data_seed(run.config.seed, training.phase, training.iteration)
        return init_state(lora.init(like, jax.random.key(seed)), options, run.mesh), frozen

    def _batches(self, training: Training, start: int) -> Iterator[Any]:
        steps_per_epoch = training_steps(len(training.items), training.options.batch_size, 1)
        return batches(
            training.items,
            training.collate,
            training.options.batch_size,
            training.shape,
            seed=_data_seed(self.run.config.seed, training.phase, training.iteration),
            epochs=-(-training.steps // steps_per_epoch),
            start=start,
        )

    def _explain(self, error: NotFinite, training: Training) -> None:
        """Writes the batch that was the last straw, for whoever has to find out why."""
        path = training.folder / f"not_finite_{training.phase}_step_{error.step}.npz"
        files.write(path, as_npz(error.batch, self.run.model.tokenizer.batch_decode))
        error.args = (
            f"{training.phase}, iteration {training.iteration}: {error}. Those steps changed nothing; "
            f"what the last one was given is in {path} (numpy.load). A lower learning rate, clip_norm "
            "or model.dtype=float32 may help; --config.resume_anyway=True goes on from the last checkpoint",
        )

    # --- the control -----------------------------------------------------------------------------

    def control(self) -> None:
        """The paper's control: the start trained on by SFT, for as many steps as each iteration took."""
        if not self.run.config.sft.control:
            return
        params, made = None, list(filter(self.finished, self.run.iterations))
        control = self.run.workdir / "control"
        for t in made:
            row = self.summary.row(t)
            if "control" not in row:
                files.remove(control / "model")  # of fewer iterations
                params = self._control(t, params)
                drawn = self.evaluation.draw(params)
                row["control"] = self.evaluation.alone(self._control_folder(t), params, drawn)
                self.summary.write()
        if made and not seals.sealed(control / "model"):
            self.exports.save(control, self._control(made[-1], None) if params is None else params)
        if made:
            self.exports.describe("control", control, self.summary.rows)

    def _control(self, t: int, params: Params | None) -> Params:
        """The control after as many steps as iteration t took; `params` are those before, where in hand."""
        steps = self.summary.row(t)["steps"]
        first = t == self.run.config.selfplay.start
        training = self._sft(
            "control", t, steps, steps, lambda: self.before(t) if first else self._control(t - 1, None)
        )
        return self._made(training.folder, lambda: self._fit(params, training))

    def _control_folder(self, t: int) -> epath.Path:
        return self.run.workdir / "control" / f"iteration_{t}"


def _data_seed(seed: int, phase: str, t: int) -> int:
    """The seed of the data order of one phase of one iteration."""
    number = {"sft": 0, "train": 1, "control": 2}[phase]
    return int(np.random.SeedSequence([seed, number, t + 1]).generate_state(1)[0])
