"""Self-play fine-tuning: Algorithm 1 of arXiv 2401.01335, on disk.

    start ──▶ sample ──▶ score ──▶ train ──▶ θ_{t+1}, the next opponent ──▶ …

`run` is the whole of it. Each phase writes what it has done as it goes, and skips what it finds done:
running again with the same workdir continues. An iteration holds one set of weights at a time: the
opponent's log-probs are computed once, before training starts from its weights.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from spin_jax import (
    card,
    checkpoint,
    convert,
    files,
    heldout,
    hosts,
    hub,
    identity,
    interrupts,
    lora,
    programs,
    report,
)
from spin_jax import config as config_lib
from spin_jax.batches import (
    Group,
    PairBatch,
    Rows,
    RowShape,
    ScoredPair,
    as_npz,
    batches,
    example_group,
    packed,
    pair_batches,
    training_steps,
)
from spin_jax.chat import Example, Ids
from spin_jax.draw import Sampling
from spin_jax.metrics import Metrics, compact, progress
from spin_jax.model import Params, params_on
from spin_jax.opponent import BEFORE, Opponent
from spin_jax.prepare import Prepared, lengths, plan, prepare, take
from spin_jax.train import (
    SFT,
    SPIN,
    Loop,
    NotFinite,
    Objective,
    Optimization,
    TrainState,
    abstract_state,
    fit,
    init_state,
    make_step,
)
from spin_jax.train import evaluate as evaluate_objective

Row = dict[str, Any]
PHASES = ("sample", "score", "train")


def run(
    config: Mapping[str, Any] | ConfigDict,
    workdir: str,
    *,
    only: str | None = None,
    should_stop: Callable[[], int] | None = None,
) -> list[Row]:
    """Runs self-play, or continues it, and returns the rows of summary.json.

    Args:
        config: what `spin_jax.config.default` lists; missing keys keep their defaults.
        workdir: a directory or object store URL; one run, and what is already there is not redone.
        only: `sample`, `score` or `train`: just this phase of the next iteration.
        should_stop: asked between units of work: the number of a signal, or 0. None listens to Ctrl-C and
            SIGTERM. Of several processes, one that is to stop stops all.

    Raises:
        ValueError, FileNotFoundError: bad config or input, before anything is computed.
        Interrupted: stopped; the same call continues.
        NotFinite: losses or gradients that are not finite, step after step.
        OSError: the workdir cannot be written; files.NoRoom where the disk is too full for a checkpoint.
    """
    if only is not None and only not in PHASES:
        raise ValueError(f"only={only!r}: choose from {', '.join(PHASES)}")
    with contextlib.ExitStack() as stack:
        stop = should_stop or stack.enter_context(interrupts.listening())
        resolved = config_lib.resolve(config)
        hosts.say(f"{config_lib.tree(resolved)}\n")
        prepared = prepare(resolved, workdir)
        stack.enter_context(take(prepared))
        play = SelfPlay(prepared, lambda: hosts.most(stop()))
        stack.callback(play.metrics.close)
        hosts.say(plan(play.run, sum(map(play.finished, play.run.iterations))))

        params = play.start()
        play.push()  # what failed before
        for t in play.run.iterations:
            if play.finished(t):
                params = None
                continue
            if play.stops_early():
                break
            if only in (None, "sample"):
                params = play.sample(t, params)
            if only in (None, "score"):
                params = play.score(t, params)
            if only in (None, "train"):
                params = play.train(t, params)  # the next opponent
            if only is not None:
                break
        del params

        if play.stops_early() or all(map(play.finished, play.run.iterations)):
            play.control()
            play.keep_best()
            play.conclude()
            play.push()
            play.report()
        return play.summary


def check(config: Mapping[str, Any] | ConfigDict, workdir: str | None = None) -> None:
    """Reads and checks all that `run` would, and says what it found; nothing is trained or written.

    Raises:
        ValueError, FileNotFoundError: what `run` would.
    """
    resolved = config_lib.resolve(config)
    hosts.say(f"{config_lib.tree(resolved, everything=True)}\n")
    prepared = prepare(resolved, workdir)
    lines = plan(prepared, 0).splitlines()
    shown = [line for line in lines if workdir or not line.startswith(("workdir", "disk"))]
    hosts.say("\n".join([*shown, "", lengths(prepared), "", "everything that can be checked is in order"]))


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
        logging, summary = run.config.logging, run.workdir / "summary.json"
        self.run = run
        self.should_stop = should_stop
        self.summary: list[Row] = files.read_agreed(summary) or []
        self.metrics = hosts.together(
            lambda: Metrics(
                run.workdir,
                tensorboard=logging.tensorboard,
                wandb_project=logging.wandb_project,
                config=identity.recorded(run.config),
            )
        )
        self.opponent = Opponent(run, self.metrics, should_stop)

    def finished(self, t: int) -> bool:
        return bool(self._row(t))

    def _row(self, t: int) -> Row:
        """Iteration t's row of summary.json; {} where it has none yet."""
        return next((row for row in self.summary if row["iteration"] == t), {})

    # --- the start -------------------------------------------------------------------------------

    def start(self) -> Params | None:
        """Makes, exports and evaluates the start, where that is not done; then returns it."""
        if self.finished(BEFORE):
            return None
        params = self.before(self.run.config.selfplay.start)
        if self.makes_start:
            self._export(self.run.folder(BEFORE), params)
        numbers = self._alone(self.run.folder(BEFORE), params, self._draw(params))
        row: Row = {"iteration": BEFORE, **numbers}
        if self.makes_start:
            self._describe("start", self.run.folder(BEFORE), [row])
        self._add_row(row, step=0)
        return params

    @property
    def makes_start(self) -> bool:
        """Whether the start is made here: there is no model.path, or an SFT stage."""
        return not self.run.config.model.path or self.run.config.sft.epochs > 0

    def before(self, t: int) -> Params:
        """The weights that iteration t starts from: its opponent."""
        if t > self.run.config.selfplay.start:
            return self._made(self.run.folder(t - 1), lambda: self._again(t - 1))
        if self.makes_start:
            return self._made(self.run.folder(BEFORE), self._sft_start)
        return self.run.initial_params()

    def _again(self, t: int) -> Params:
        """Iteration t's parameters, from what is left of it."""
        params = self.score(t, self.sample(t, None))
        return self._fit(params, self._spin(t))

    def _sft_start(self) -> Params:
        run, options = self.run, self.run.sft_options()
        if not run.config.sft.epochs:
            return run.initial_params()
        steps = training_steps(len(run.examples), options.batch_size, options.epochs)
        schedule_steps = options.schedule_steps(steps)
        return self._fit(None, self._sft("sft", BEFORE, steps, schedule_steps, run.initial_params))

    def _made(self, folder: epath.Path, make: Callable[[], Params]) -> Params:
        """What a phase ends with: the parameters in its checkpoint; made, where there is no good one."""
        path, params = folder / "checkpoint", None
        like = params_on(self.run.mesh, self.run.model.config)
        if checkpoint.exists(path):
            try:
                params = checkpoint.restore(path, like)
            except files.Damaged as error:
                hosts.say(f"\nWARNING: {error}\nIt is made again, from the last good checkpoint before it.\n")
        if params is None:
            files.check_room(path, checkpoint.size(like), f"the checkpoint {path}")
            params = make()
            checkpoint.save(path, params)
        files.remove(folder / "train")  # step checkpoints have served
        return params

    # --- the opponent's part -----------------------------------------------------------------------

    def sample(self, t: int, params: Params | None) -> Params | None:
        """Makes the answers that are missing. `params` are the opponent's; None reads them if needed."""
        for source in self.opponent.sources(t)[:-1]:
            if not self.opponent.has_answers(source):
                given = source in self.run.given  # then nobody answers
                self.opponent.sample(source, {} if given else self.before(source))
        if not self.opponent.has_answers(t):
            params = self.before(t) if params is None else params
            self.opponent.sample(t, params)
        return params

    def score(self, t: int, params: Params | None) -> Params | None:
        """The same of scores."""
        if not self.opponent.has_scores(t):
            params = self.before(t) if params is None else params
            self.opponent.score(t, params)
        return params

    # --- training --------------------------------------------------------------------------------

    def train(self, t: int, params: Params | None) -> Params | None:
        """Iteration t from its scored pairs to its checkpoint, export, evaluation and samples.

        `params` are its opponent's; None reads them if they are needed. Returns the iteration's own, or None
        where the last of its evaluation has made room for others.
        """
        began, folder, training = time.perf_counter(), self.run.folder(t), self._spin(t)
        params = self._made(folder, lambda: self._fit(params, training))
        self._export(folder, params)
        beta, steps = training.scalars["beta"], training.steps
        skipped = self.metrics.count("train", t, lambda row: row.get("skipped"))
        row: Row = {"iteration": t, "beta": beta, "pairs": len(training.items), "steps": steps}
        row |= {"skipped": skipped, **self._held_out_pairs(t, params, beta)}
        self._write_samples(t, params)
        drawn = self._draw(params)
        row |= self._alone(folder, params, drawn)
        if self.run.config.eval.kl and drawn:
            row |= self._divergence(t, params, drawn)
            params = None
        row["minutes"] = round((time.perf_counter() - began) / 60, 3)
        self._describe("iteration", folder, [*self.summary, row])
        self._add_row(row, step=steps)
        self.keep_best()
        self.push()
        return params

    def _spin(self, t: int) -> Training:
        run, options = self.run, self.run.options(t)
        scored = self.opponent.scored_pairs(t, "train")
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
            scalars={"beta": float(config_lib.per_iteration(run.config.loss.beta, t))},
            begins_from=lambda: self.before(t),
        )

    @functools.cached_property
    def spin(self) -> SPIN:
        return programs.spin(self.run.config, self.run.model)

    def _pairs(self, scored: Sequence[ScoredPair]) -> list[PairBatch]:
        return pair_batches(scored, self.run.pair_shape, self.run.chat.unattended)

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
            items=run.examples,
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
        _free(frozen)
        return lora.merged(training.begins_from(), state.params, options.lora_scale)

    def _state(
        self, params: Params | None, training: Training, checkpoints: checkpoint.StepCheckpoints, start: int
    ) -> tuple[TrainState, Params | None]:
        """What training goes on with from step `start`; with LoRA, and the weights that stay as they are."""
        run, options = self.run, training.options
        like = params_on(run.mesh, run.model.config)
        if start and not options.lora_rank:
            _free(params)  # a resumed phase needs no more memory than a fresh one
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

    def _export(self, folder: epath.Path, params: Params) -> None:
        if not files.sealed(folder / "model"):
            model = dataclasses.replace(self.run.model, params=params)
            convert.save(model, folder / "model", dtype=model.dtype, on_tensor=self.opponent.stop_here)

    def _describe(self, kind: str, folder: epath.Path, rows: Sequence[Row]) -> None:
        """Puts a model card into an export, which is whole without: its numbers are known later."""
        run = self.run
        facts = card.Facts(
            kind=kind,
            iteration=rows[-1]["iteration"],
            config=identity.recorded(run.config),
            rows=rows,
            model_revision=run.model.revision,
            data_revision=run.data_revision,
            commit=identity.commit(),
            license=card.stated_license(hub.readme(run.config.model.path, run.model.revision)),
            **run.identity,
        )
        files.add(folder / "model", "README.md", card.card(facts).encode())

    def push(self) -> None:
        """Pushes the exports that the hub has not got yet, where a config names a place for them."""
        run, c = self.run, self.run.config
        if not c.export.push_to:
            return
        done = [row["iteration"] for row in self.summary if row["iteration"] >= 0]
        exports = {f"iteration_{t}": run.folder(t) / "model" for t in done}
        newest = list(exports.values())[-1:]
        if self.makes_start:
            exports["start"] = run.folder(BEFORE) / "model"
        exports["control"] = run.workdir / "control" / "model"
        for folder in (run.workdir / "best",) if c.checkpoint.best else newest:
            exports["main"] = folder
        whole = {branch: folder for branch, folder in exports.items() if files.sealed(folder)}
        hub.push(run.workdir, c.export.push_to, whole, private=c.export.private)

    # --- evaluation ------------------------------------------------------------------------------

    def _held_out_pairs(self, t: int, params: Params, beta: float) -> Row:
        """Loss, margin, accuracy … on held-out pairs, against the opponent of the iteration."""
        scored = self.opponent.scored_pairs(t, "test")
        if not scored:
            return {}
        held_out = self._pairs(scored)
        return evaluate_objective(
            self.spin, params, held_out, {"beta": beta}, self.run.mesh, self.opponent.stop_here
        )

    def _draw(self, params: Params) -> list[Ids]:
        """A model's own answers to the held-out prompts, at temperature 1: all prompts, again and again."""
        c = self.run.config
        return self._answer_held_out(params, Sampling(c.sampling.max_new_tokens), c.eval.samples)

    def _answer_held_out(self, params: Params, sampling: Sampling, samples: int) -> list[Ids]:
        if not self.run.held_out:
            return []
        weights = self.opponent.weights(params)
        return [
            answer
            for sample_id in range(samples)
            for answer in self.opponent.answer(
                weights, self.run.held_out, sampling, iteration=BEFORE, sample_id=sample_id
            )
        ]

    def _alone(self, folder: epath.Path, params: Params, drawn: Sequence[Ids]) -> Row:
        """What a model is measured by without another: held-out answers, human and its own, and tasks."""
        return {**self._answers(params, drawn), **self._tasks(folder, params)}

    def _answers(self, params: Params, drawn: Sequence[Ids]) -> Row:
        """NLL of held-out human answers; length of the `drawn` ones and, with a verifier, the share right."""
        run, c = self.run, self.run.config
        if not run.held_out:
            return {}
        row: Row = {
            "nll": heldout.nll(
                run.decoder,
                params,
                run.held_out,
                mesh=run.mesh,
                shape=run.example_shape,
                unattended=run.chat.unattended,
                on_batch=lambda scored: self.opponent.stop_here(),
            )
        }
        if c.eval.verifier:
            greedy = self._answer_held_out(params, run.sampling(temperature=0.0), 1)
            row["greedy_accuracy"] = self._share_right(greedy)
            row["sampled_accuracy"] = self._share_right(drawn)
        return row | heldout.responses(run.chat, run.held_out, drawn)

    def _share_right(self, answers: Sequence[Ids]) -> float:
        run = self.run
        verifier = heldout.find_verifier(run.config.eval.verifier)
        return heldout.share_right(verifier, run.held_out, [run.chat.decode(answer) for answer in answers])

    def _tasks(self, folder: epath.Path, params: Params) -> Row:
        """Numbers of lm-eval's tasks. Each is on disk when it is done: an interruption costs one of them."""
        c = self.run.config
        names = config_lib.task_names(c)
        if not names:
            return {}
        from spin_jax import harness  # it needs lm_eval, which is optional

        path, limit = folder / "tasks.json", c.eval.tasks_limit
        done = files.read_agreed(path)
        if done is None or done["limit"] != limit:
            done = {"limit": limit, "tasks": {}}
        self.opponent.release()
        model = dataclasses.replace(self.run.model, params=params)
        for name in names:
            if name not in done["tasks"]:
                done["tasks"][name] = harness.run_tasks(
                    model,
                    [name],
                    include_path=c.eval.include_path,
                    limit=limit,
                    seed=c.seed,
                    should_stop=self.opponent.stop_here,
                )
                files.write_json(path, done)
        return {metric: value for name in names for metric, value in done["tasks"][name].items()}

    def _divergence(self, t: int, params: Params, drawn: Sequence[Ids]) -> Row:
        """How far iteration t has moved from its opponent and from the start, by its own answers.

        One model's weights are held at a time: `params` are gone after this.
        """
        own = self._logps(params, drawn)
        self.opponent.release()
        _free(params)
        first = self.run.config.selfplay.start
        opponent = self._logps(self.before(t), drawn)
        start = opponent if t == first else self._logps(self.before(first), drawn)
        return {"kl_opponent": heldout.kl(own, opponent), "kl_start": heldout.kl(own, start)}

    def _logps(self, params: Params, drawn: Sequence[Ids]) -> np.ndarray:
        """A model's log-probs of answers to the held-out prompts, float32 [drawn].

        Beside the human ones, in the rows of training: no other program is compiled.
        """
        run, examples = self.run, self.run.held_out
        groups = []
        for number, answer in enumerate(drawn):
            example = examples[number % len(examples)]
            groups.append(Group(run.chat.sampling_prompt(example), (example.real, answer)))
        return self.opponent.score_groups(params, groups)[:, 1]

    def _write_samples(self, t: int, params: Params) -> None:
        """samples.jsonl: the human answer beside this iteration's greedy one, on fixed prompts."""
        run = self.run
        chosen = (run.held_out or run.examples)[: run.config.eval.fixed_prompts]
        if not chosen:
            return
        greedy = self.run.sampling(temperature=0.0)
        answers = self.opponent.answer(self.opponent.weights(params), chosen, greedy, iteration=t)
        rows = [
            {
                "prompt_id": example.prompt_id,
                "prompt": example.messages[:-1],
                "real": example.messages[-1]["content"],
                "generated": run.chat.decode(answer),
            }
            for example, answer in zip(chosen, answers, strict=True)
        ]
        files.write_jsonl(run.folder(t) / "samples.jsonl", rows)

    # --- control and report ----------------------------------------------------------------------

    def control(self) -> None:
        """The paper's control: the start trained on by SFT, for as many steps as each iteration took."""
        if not self.run.config.sft.control:
            return
        params, made = None, list(filter(self.finished, self.run.iterations))
        control = self.run.workdir / "control"
        for t in made:
            row = self._row(t)
            if "control" not in row:
                files.remove(control / "model")  # of fewer iterations
                params = self._control(t, params)
                row["control"] = self._alone(self._control_folder(t), params, self._draw(params))
                self._write_summary()
        if made and not files.sealed(control / "model"):
            self._export(control, self._control(made[-1], None) if params is None else params)
        if made:
            self._describe("control", control, self.summary)

    def _control(self, t: int, params: Params | None) -> Params:
        """The control after as many steps as iteration t took; `params` are those before, where in hand."""
        steps = self._row(t)["steps"]
        first = t == self.run.config.selfplay.start
        training = self._sft(
            "control", t, steps, steps, lambda: self.before(t) if first else self._control(t - 1, None)
        )
        return self._made(training.folder, lambda: self._fit(params, training))

    def _control_folder(self, t: int) -> epath.Path:
        return self.run.workdir / "control" / f"iteration_{t}"

    def report(self) -> None:
        """Prints the table; draws summary.png."""
        hosts.say(f"\n{report.table(self.summary)}\n")
        if self.run.config.logging.plot:
            files.write(self.run.workdir / "summary.png", report.plot(self.summary))
        hosts.say(f"models, metrics and pairs are in {self.run.workdir}")

    def best(self) -> Row | None:
        """The row of the best iteration so far, where a config says what is best.

        The start is none of them, better or not: what self-play hands on is a model that self-play made.
        """
        made = [row for row in self.summary if row["iteration"] >= 0]
        return heldout.best(made, self.run.config.checkpoint.best, self.run.better)

    def keep_best(self) -> None:
        """Copies the model of the best iteration so far to best/."""
        wanted, best = self.run.config.checkpoint.best, self.best()
        if best:
            files.copy(self.run.folder(best["iteration"]) / "model", self.run.workdir / "best")
            hosts.say(f"best by {wanted}: iteration {best['iteration']} ({best[wanted]:.4g}), in best/")

    def stops_early(self) -> str:
        """Why no iteration is begun that is not done yet; "" where there is nothing against it.

        The start sets the mark where it has the number: an iteration has to be better than what it came from.
        It is told from summary.json alone, so that a run that is started again comes to the same.
        """
        c, patience = self.run.config.checkpoint, self.run.config.selfplay.patience
        best = heldout.best(self.summary, c.best, self.run.better) if patience else None
        if best is None or all(map(self.finished, self.run.iterations)):
            return ""
        since = [row for row in self.summary if row["iteration"] > best["iteration"] and c.best in row]
        if len(since) < patience:
            return ""
        mark = "the start" if best["iteration"] < 0 else f"iteration {best['iteration']}"
        return (
            f"{c.best} has not improved on {mark}'s {best[c.best]:.4g} since (selfplay.patience={patience})"
        )

    def conclude(self) -> None:
        """Puts in summary.json which model is the final one, and why there are no more, and says so.

        Final is the best iteration's, where checkpoint.best says what is best, and else the last one's.
        """
        self._forget_conclusion()
        made = [row for row in self.summary if row["iteration"] >= 0]
        if not made:
            return
        if why := self.stops_early():
            made[-1]["stopped"] = why
            hosts.say(f"\nstopped after iteration {made[-1]['iteration']}: {why}; more patience goes on")
        best = self.best()
        final = best or made[-1]
        final["final"] = True
        self._write_summary()
        folder = self.run.workdir / "best" if best else self.run.folder(final["iteration"]) / "model"
        hosts.say(f"\nfinal model: iteration {final['iteration']}, in {folder}")

    def _forget_conclusion(self) -> None:
        for row in self.summary:
            for mark in ("final", "stopped"):
                row.pop(mark, None)

    def _add_row(self, row: Row, step: int) -> None:
        row, t = hosts.exchanged(row)[0], row["iteration"]  # what follows from it follows in every process
        self._forget_conclusion()
        values = {k: float(v) for k, v in row.items() if k != "iteration"}
        self.metrics.rewind("eval", t)
        self.metrics.write("eval", t, step, values)
        self.summary = sorted([*self.summary, row], key=lambda row: row["iteration"])
        self._write_summary()

    def _write_summary(self) -> None:
        files.write_json(self.run.workdir / "summary.json", self.summary)
        self.metrics.flush()


def _free(tree: Any) -> None:
    """Gives device memory back at once, whoever still holds a reference."""
    for leaf in jax.tree.leaves(tree):
        if not leaf.is_deleted():
            leaf.delete()


def _data_seed(seed: int, phase: str, t: int) -> int:
    """The seed of the data order of one phase of one iteration."""
    number = {"sft": 0, "train": 1, "control": 2}[phase]
    return int(np.random.SeedSequence([seed, number, t + 1]).generate_state(1)[0])
