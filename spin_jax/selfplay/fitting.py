"""The training phases of a run: what is fitted to what, step checkpoints, and the checkpoint at the end.

A phase goes on from its newest good step checkpoint, and a phase that has its final checkpoint is not trained again.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from spin_jax import config_values
from spin_jax.data.records import Example
from spin_jax.errors import ConfigError, Damaged, NotFinite, NothingToTrainOn
from spin_jax.models import lora
from spin_jax.models.architecture import Params
from spin_jax.models.params import params_on
from spin_jax.report.numbers import START
from spin_jax.runtime import processes, sharding, stopwatch
from spin_jax.runtime.console import compact, progress
from spin_jax.selfplay import from_config
from spin_jax.selfplay.engine import Engine
from spin_jax.selfplay.prepare import Prepared
from spin_jax.storage import checkpoints, files, seals
from spin_jax.storage.checkpoints import StepCheckpoints
from spin_jax.storage.metrics import Metrics
from spin_jax.training.batches import PairBatch, ScoredPair, as_npz, batches, pair_batches, training_steps
from spin_jax.training.loop import Loop, fit
from spin_jax.training.optimizer import Optimization
from spin_jax.training.packing import Rows, RowShape, packed, sft_group
from spin_jax.training.step import SFT, SPIN, Objective, TrainState, abstract_state, init_state, make_step
from spin_jax.training.trace import traced


@dataclasses.dataclass
class TrainingPhase:
    """One phase of training: its data, its objective, and for how long it runs."""

    name: str  # sft, train or control: the phase in metrics.jsonl
    iteration: int
    folder: epath.Path  # step checkpoints go to its train/, the final one to its checkpoint/
    objective: Objective
    options: Optimization
    items: Sequence  # examples or scored pairs
    collate: Callable[[Sequence], Sequence[Any]]  # items → micro-batches
    shape: RowShape  # of the micro-batches
    steps: int
    schedule_steps: int
    scalars: dict[str, float]  # β, for the objective
    initial_params: Callable[[], Params]  # reads or makes the weights that the phase starts from


class Fitting:
    """Trains weights by the phases of a run."""

    def __init__(self, run: Prepared, engine: Engine, metrics: Metrics):
        self._run = run
        self._engine = engine
        self._metrics = metrics

    # --- phases ----------------------------------------------------------------------------------

    def spin_phase(
        self,
        t: int,
        objective: SPIN,
        scored: Sequence[ScoredPair],
        counts: Counter[str],
        initial_params: Callable[[], Params],
    ) -> TrainingPhase:
        """Iteration t of self-play: the loss of policy and opponent on the scored pairs.

        Args:
            counts: what `Pairing.pairs_of` counted.

        Raises:
            NothingToTrainOn: there is no pair but those of selfplay.add_pairs, whose ids are negative.
        """
        run, options = self._run, from_config.optimization(self._run.config, t)
        if all(each.pair.prompt_id < 0 for each in scored):
            raise NothingToTrainOn(f"iteration {t}: {run.pairing.nothing(counts)}")

        def collate(chosen: Sequence[ScoredPair]) -> list[PairBatch]:
            return pair_batches(chosen, run.pair_shape, run.chat.unattended, run.roles)

        steps = training_steps(len(scored), options.batch_size, options.epochs)
        return TrainingPhase(
            name="train",
            iteration=t,
            folder=run.folder(t),
            objective=objective,
            options=options,
            items=scored,
            collate=collate,
            shape=run.pair_shape,
            steps=steps,
            schedule_steps=options.schedule_steps(steps),
            scalars={"beta": float(config_values.per_iteration(run.config.loss.beta, t))},
            initial_params=initial_params,
        )

    def sft_phase(self, t: int, initial_params: Callable[[], Params], steps: int = 0) -> TrainingPhase:
        """SFT that makes the start; or the control beside iteration t, for the `steps` that the iteration took."""
        run, is_control = self._run, t != START
        options, examples = from_config.sft_optimization(run.config, is_control), run.examples(t)

        def collate(chosen: Sequence[Example]) -> list[Rows]:
            return packed([sft_group(example) for example in chosen], run.example_shape, run.chat.unattended)

        steps = steps or training_steps(len(examples), options.batch_size, options.epochs)
        return TrainingPhase(
            name="control" if is_control else "sft",
            iteration=t,
            folder=run.workdir / "control" / f"iteration_{t}" if is_control else run.folder(START),
            objective=SFT(run.decoder),
            options=options,
            items=examples,
            collate=collate,
            shape=run.example_shape,
            steps=steps,
            schedule_steps=steps if is_control else options.schedule_steps(steps),
            scalars={},
            initial_params=initial_params,
        )

    # --- training --------------------------------------------------------------------------------

    def checkpointed(self, folder: epath.Path, make: Callable[[], Params]) -> Params:
        """The weights in the folder's final checkpoint; where there is no good one, `make` makes them."""
        path, params = folder / "checkpoint", None
        abstract = params_on(self._run.model.mesh, self._run.model.config)
        if seals.sealed(path):
            try:
                params = checkpoints.restore(path, abstract)
            except Damaged as error:
                processes.say(f"\nWARNING: {error}\nIt is made again, from the last good checkpoint before it.\n")
        if params is None:
            files.remove(path)  # what is no good takes the room of what replaces it
            files.check_room(path, checkpoints.size(abstract), f"the checkpoint {path}")
            params = make()
            checkpoints.save(path, params)
        files.remove(folder / "train")  # its step checkpoints are of no more use
        return params

    def fit(self, params: Params | None, phase: TrainingPhase) -> Params:
        """Runs a training phase, from its newest good step checkpoint where there is one.

        It starts from `params`, which are used up; None reads or makes them where they are needed.

        Raises:
            Interrupted: the run was asked to stop; the state is saved.
            NothingToTrainOn: an iteration after the first has the learning rate 0 in all steps.
            ConfigError: another phase has.
            NotFinite: too many steps in a row were not finite; the last batch is in a file of the folder.
        """
        run, options, t = self._run, phase.options, phase.iteration
        section = "train" if phase.name == "train" else "sft"
        try:
            options.check_schedule(section, phase.steps, phase.schedule_steps)
        except ConfigError as error:
            said = f"{error}; in this workdir with --config.resume_anyway=True"
            is_later = section == "train" and t > run.config.selfplay.start
            raise NothingToTrainOn(f"iteration {t}: {said}") if is_later else ConfigError(said) from error
        self._engine.release()
        c, most_skipped = run.config.checkpoint, run.config.train.most_skipped
        step_checkpoints = StepCheckpoints(phase.folder / "train", c.keep, self._metrics.flush)
        start = step_checkpoints.steps_done()
        state, frozen = self._state(params, phase, step_checkpoints, start)
        self._metrics.rewind(phase.name, t, lambda step: step >= start)
        items, size, seed = phase.items, options.batch_size, self._data_seed(phase)
        epochs = -(-phase.steps // training_steps(len(items), size, 1))
        title = phase.name if t == START else f"iteration {t}: {phase.name}"
        with (
            stopwatch.phase(phase.name),
            traced(make_step(phase.objective, options), *self._traced(phase, start)) as step,
            progress(title, phase.steps, start) as bar,
        ):

            def on_step(number: int, values: dict[str, float], waited: float) -> None:
                self._metrics.write(phase.name, t, number, values)
                shown = {k: f"{values[k]:.4g}" for k in ("loss", "margin") if k in values}
                shown |= {"tok/s": compact(values["tokens_per_s"]), "input wait": f"{waited:.1%}"}
                shown |= {"skipped": f"{values['skipped']:.0f}"} if values["skipped"] else {}
                bar.set_postfix(shown, refresh=False)
                bar.update()

            try:
                state = fit(
                    state,
                    batches(items, phase.collate, size, phase.shape, seed=seed, epochs=epochs, start=start),
                    step,
                    start=start,
                    learning_rates=options.learning_rates(phase.schedule_steps),
                    scalars=phase.scalars,
                    frozen=frozen,
                    mesh=run.model.mesh,
                    checkpoints=step_checkpoints,
                    loop=Loop(phase.steps, c.every_steps, most_skipped, on_step, self._engine.should_stop),
                )
            except NotFinite as error:
                self._explain(error, phase)
                raise
        if frozen is None:
            return state.params
        sharding.free(frozen)
        if run.config.export.adapters:
            self._export_adapters(phase, state.params)
        return lora.merged(phase.initial_params(), state.params, options.lora_scale)

    def _traced(self, phase: TrainingPhase, start: int) -> tuple[int, range, epath.Path, str]:
        """The arguments of `traced`: a workdir gets one trace, of the first iteration that takes those steps."""
        wanted, folder, steps = self._run.config.logging.profile_steps, self._run.workdir / "profile", range(0)
        if wanted and phase.name == "train" and not files.exists(folder):
            steps = range(max(start, wanted[0]), min(wanted[1] + 1, phase.steps))
        return start, steps, folder, f"iteration_{phase.iteration}"

    def _export_adapters(self, phase: TrainingPhase, adapters: Params) -> None:
        """Writes the adapters into the export to come, unless it is there already: it has its own then.

        Those of a control wait in its folder, because only the last control is exported. They stand on the start, and
        hold those of the control before as well.
        """
        run, t, options, under = self._run, phase.iteration, phase.options, None
        first, directory = run.config.selfplay.start, phase.folder / "model" / "adapters"
        if phase.name == "control":
            directory = phase.folder / "adapters"
            under = phase.folder.parent / f"iteration_{t - 1}" / "adapters" if t > first else None
            if under is not None and not seals.sealed(under):
                processes.say(f"\nWARNING: {under} is not there, and the control gets no adapters in PEFT's format\n")
                return
        elif seals.sealed(phase.folder / "model"):
            return
        from_start = phase.name == "control" or (phase.name == "train" and run.config.selfplay.restart)
        base, revision = run.base(first if from_start else t)
        place = {"base": base, "revision": revision, "under": under}
        lora.write_peft(directory, adapters, run.model.config, scale=options.lora_scale, **place)

    def _state(
        self, params: Params | None, phase: TrainingPhase, step_checkpoints: StepCheckpoints, start: int
    ) -> tuple[TrainState, Params | None]:
        """The training state before step `start`; and with LoRA the frozen weights, else None."""
        run, options = self._run, phase.options
        abstract = params_on(run.model.mesh, run.model.config)
        if start and not options.lora_rank:
            sharding.free(params)  # a resumed phase needs no more memory than a fresh one
            return step_checkpoints.restore(start, abstract_state(abstract, options, run.model.mesh)), None
        params = phase.initial_params() if params is None else params
        if not options.lora_rank:
            return init_state(params, options, run.model.mesh), None
        adapters = lora.adapters_on(abstract, options.lora_rank, options.lora_targets)
        frozen = lora.freeze(params, run.model.dtype, options.frozen_dtype)
        if start:
            return step_checkpoints.restore(start, abstract_state(adapters, options, run.model.mesh)), frozen
        key = jax.random.key(self._data_seed(phase))
        return init_state(lora.init(adapters, key), options, run.model.mesh), frozen

    def _data_seed(self, phase: TrainingPhase) -> int:
        """The seed of the data order and of new adapters; each phase of each iteration has its own."""
        entropy = [self._run.config.seed, ("sft", "train", "control").index(phase.name), phase.iteration + 1]
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

    def _explain(self, error: NotFinite, phase: TrainingPhase) -> None:
        """Writes the batch of the last skipped step to a file, and names that file in the error."""
        path = phase.folder / f"not_finite_{phase.name}_step_{error.step}.npz"
        files.write(path, as_npz(error.batch, self._run.model.tokenizer.batch_decode))
        error.args = (
            f"{phase.name}, iteration {phase.iteration}: {error}. Those steps changed nothing; the batch of the last "
            f"one is in {path} (numpy.load). A lower learning rate, clip_norm or model.dtype=float32 may help; "
            "--config.resume_anyway=True goes on from the last checkpoint",
        )
