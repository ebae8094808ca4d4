"""Self-play fine-tuning: Algorithm 1 of arXiv 2401.01335, on disk.

    start ──▶ sample ──▶ score ──▶ train ──▶ θ_{t+1}, the next opponent ──▶ …

`run` is the whole of it. Each phase writes what it has done as it goes, and skips what it finds done:
running again with the same workdir continues. An iteration holds one set of weights at a time: the
opponent's log-probs are computed once, before training starts from its weights.
"""

import contextlib
import dataclasses
import functools
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from spin_jax import checkpoint, convert, evaluate, files, hosts, programs, report
from spin_jax import config as config_lib
from spin_jax.batches import (
    PairBatch,
    Rows,
    RowShape,
    ScoredPair,
    batches,
    example_group,
    packed,
    pair_batches,
    training_steps,
)
from spin_jax.chat import Example
from spin_jax.draw import Sampling
from spin_jax.metrics import Metrics, compact, progress
from spin_jax.model import Params, params_on
from spin_jax.opponent import BEFORE, Opponent
from spin_jax.prepare import Prepared, plan, prepare
from spin_jax.train import SFT, SPIN, Loop, Objective, Optimization, fit, init_state, make_step
from spin_jax.train import evaluate as evaluate_objective

Row = dict[str, Any]
PHASES = ("sample", "score", "train")


def run(
    config: Mapping[str, Any] | ConfigDict,
    workdir: str,
    *,
    only: str | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> list[Row]:
    """Runs self-play, or continues it, and returns the rows of summary.json.

    Args:
        config: what `spin_jax.config.default` lists; missing keys keep their defaults.
        workdir: a directory or object store URL; one run, and what is already there is not redone.
        only: `sample`, `score` or `train`: just this phase of the next iteration.
        should_stop: asked between units of work; None listens to Ctrl-C and SIGTERM. Of several processes,
            one that is to stop stops all.

    Raises:
        ValueError, FileNotFoundError: bad config or input, before anything is computed.
        Interrupted: stopped; the same call continues.
    """
    if only is not None and only not in PHASES:
        raise ValueError(f"only={only!r}: choose from {', '.join(PHASES)}")
    with contextlib.ExitStack() as stack:
        stop = should_stop or stack.enter_context(_signals(hosts.first()))
        prepared = prepare(config_lib.resolve(config), workdir)
        play = SelfPlay(prepared, lambda: hosts.any_of(stop()))
        stack.callback(play.metrics.close)
        hosts.say(plan(play.run, sum(map(play.finished, play.run.iterations))))

        params = play.start()
        for t in play.run.iterations:
            if play.finished(t):
                params = None
                continue
            params = play.before(t) if params is None else params
            if only in (None, "sample"):
                play.opponent.sample(t, params)
            if only in (None, "score"):
                play.opponent.score(t, params)
            if only in (None, "train"):
                params = play.train(t, params)  # the next opponent
            if only is not None:
                break
        del params

        if all(map(play.finished, play.run.iterations)):
            play.control()
            play.report()
        return play.summary


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


class SelfPlay:
    """The phases of a run that make weights, and what is reported of them."""

    def __init__(self, run: Prepared, should_stop: Callable[[], bool]):
        logging, summary = run.config.logging, run.workdir / "summary.json"
        self.run = run
        self.should_stop = should_stop
        self.summary: list[Row] = files.read_agreed(summary) or []
        self.metrics = hosts.together(
            lambda: Metrics(
                run.workdir,
                tensorboard=logging.tensorboard,
                wandb_project=logging.wandb_project,
                config=run.config.to_dict(),
            )
        )
        self.opponent = Opponent(run, self.metrics, should_stop)

    def finished(self, t: int) -> bool:
        return any(row["iteration"] == t for row in self.summary)

    # --- the start -------------------------------------------------------------------------------

    def start(self) -> Params | None:
        """Makes and evaluates the SFT start, where that is not done; returns it if it was in hand."""
        run, params = self.run, None
        folder = run.folder(BEFORE)
        if self.makes_start and not checkpoint.exists(folder / "checkpoint"):
            params = run.initial_params()
            if run.config.sft.epochs:
                options = run.sft_options()
                steps = training_steps(len(run.examples), options.batch_size, options.epochs)
                schedule = options.schedule_steps(steps)
                params = self._fit(params, self._sft("sft", BEFORE, folder, steps, schedule))
            self._keep(folder, params)
        if not self.finished(BEFORE):
            params = self.before(run.config.selfplay.start) if params is None else params
            if self.makes_start:
                self._export(folder, params)
            self._add_row({"iteration": BEFORE, **self._answers(params)}, step=0)
        return params

    @property
    def makes_start(self) -> bool:
        """Whether the start is made here: there is no model.path, or an SFT stage."""
        return not self.run.config.model.path or self.run.config.sft.epochs > 0

    def before(self, t: int) -> Params:
        """The weights that iteration t starts from: its opponent."""
        if t > self.run.config.selfplay.start:
            return self._restore(self.run.folder(t - 1) / "checkpoint")
        if self.makes_start:
            return self._restore(self.run.folder(BEFORE) / "checkpoint")
        return self.run.initial_params()

    def _restore(self, path: epath.Path) -> Params:
        return checkpoint.restore(path, params_on(self.run.mesh, self.run.model.config))

    # --- training --------------------------------------------------------------------------------

    def train(self, t: int, params: Params) -> Params:
        """Iteration t from its scored pairs to its checkpoint, export, evaluation and samples."""
        run, began = self.run, time.perf_counter()
        folder, options = run.folder(t), run.options(t)
        beta = float(config_lib.per_iteration(run.config.loss.beta, t))
        scored = self.opponent.scored_pairs(t, "train")
        steps = training_steps(len(scored), options.batch_size, options.epochs)
        if checkpoint.exists(folder / "checkpoint"):
            _free(params)
            params = self._restore(folder / "checkpoint")
        else:
            training = Training(
                phase="train",
                iteration=t,
                folder=folder,
                objective=self.spin,
                options=options,
                items=scored,
                collate=self._pairs,
                shape=run.pair_shape,
                steps=steps,
                schedule_steps=options.schedule_steps(steps),
                scalars={"beta": beta},
            )
            params = self._fit(params, training)
            self._keep(folder, params)
        self._export(folder, params)
        row: Row = {"iteration": t, "beta": beta, "pairs": len(scored), "steps": steps}
        row |= self._held_out_pairs(t, params, beta) | self._answers(params)
        self._write_samples(t, params)
        row["minutes"] = round((time.perf_counter() - began) / 60, 3)
        self._add_row(row, step=steps)
        return params

    @functools.cached_property
    def spin(self) -> SPIN:
        return programs.spin(self.run.config, self.run.model)

    def _pairs(self, scored: Sequence[ScoredPair]) -> list[PairBatch]:
        return pair_batches(scored, self.run.pair_shape, self.run.chat.unattended)

    def _examples(self, chosen: Sequence[Example]) -> list[Rows]:
        groups = [example_group(example) for example in chosen]
        return packed(groups, self.run.example_shape, self.run.chat.unattended)

    def _sft(self, phase: str, t: int, folder: epath.Path, steps: int, schedule_steps: int) -> Training:
        run, options = self.run, self.run.sft_options(control=phase == "control")
        return Training(
            phase=phase,
            iteration=t,
            folder=folder,
            objective=SFT(run.decoder),
            options=options,
            items=run.examples,
            collate=self._examples,
            shape=run.example_shape,
            steps=steps,
            schedule_steps=schedule_steps,
            scalars={},
        )

    def _fit(self, params: Params, training: Training) -> Params:
        """Runs a training phase, from its newest step checkpoint where there is one."""
        run, options, phase, t = self.run, training.options, training.phase, training.iteration
        self.opponent.release()
        steps_per_epoch = training_steps(len(training.items), options.batch_size, 1)
        state = init_state(params, options, run.mesh)
        keep, every = run.config.checkpoint.keep, run.config.checkpoint.every_steps
        with checkpoint.StepCheckpoints.open(
            training.folder / "train", keep, self.metrics.flush
        ) as checkpoints:
            start = checkpoints.steps_done()
            if start:
                like = checkpoint.abstract(state)
                _free(state)  # a resumed phase needs no more memory than a fresh one
                state = checkpoints.restore(like)
            self.metrics.rewind(phase, t, start)
            title = phase if t == BEFORE else f"iteration {t}: {phase}"
            with progress(title, training.steps, start) as bar:

                def on_step(number: int, values: dict[str, float], waited: float) -> None:
                    self.metrics.write(phase, t, number, values)
                    shown = {k: f"{values[k]:.4g}" for k in ("loss", "margin") if k in values}
                    shown |= {"tok/s": compact(values["tokens_per_s"]), "input wait": f"{waited:.1%}"}
                    bar.set_postfix(shown, refresh=False)
                    bar.update()

                state = fit(
                    state,
                    batches(
                        training.items,
                        training.collate,
                        options.batch_size,
                        training.shape,
                        seed=_data_seed(run.config.seed, phase, t),
                        epochs=-(-training.steps // steps_per_epoch),
                        start=start,
                    ),
                    make_step(training.objective, options),
                    start=start,
                    learning_rates=options.learning_rates(training.schedule_steps),
                    scalars=training.scalars,
                    mesh=run.mesh,
                    checkpoints=checkpoints,
                    loop=Loop(training.steps, every, on_step, self.should_stop),
                )
        return state.params

    def _keep(self, folder: epath.Path, params: Params) -> None:
        """Saves a phase's parameters; its step checkpoints have then served."""
        checkpoint.save(folder / "checkpoint", params)
        files.remove(folder / "train")

    def _export(self, folder: epath.Path, params: Params) -> None:
        if not files.exists(folder / "model" / "config.json"):
            model = dataclasses.replace(self.run.model, params=params)
            convert.save(model, folder / "model", dtype=model.dtype)

    # --- evaluation ------------------------------------------------------------------------------

    def _held_out_pairs(self, t: int, params: Params, beta: float) -> Row:
        """Loss, margin, accuracy … on held-out pairs, against the opponent of the iteration."""
        scored = self.opponent.scored_pairs(t, "test")
        if not scored:
            return {}
        return evaluate_objective(self.spin, params, self._pairs(scored), {"beta": beta}, self.run.mesh)

    def _answers(self, params: Params) -> Row:
        """NLL of held-out human answers, and with a verifier the share of sampled ones that are right."""
        run, c = self.run, self.run.config
        if not run.held_out:
            return {}
        row: Row = {
            "nll": evaluate.nll(
                run.decoder,
                params,
                run.held_out,
                mesh=run.mesh,
                shape=run.example_shape,
                unattended=run.chat.unattended,
            )
        }
        if c.eval.verifier:
            weights = self.opponent.weights(params)
            row["greedy_accuracy"] = self._share_right(weights, self.run.sampling(temperature=0.0), 1)
            plain = Sampling(c.sampling.max_new_tokens)
            row["sampled_accuracy"] = self._share_right(weights, plain, c.eval.samples)
        return row

    def _share_right(self, weights: Params, sampling: Sampling, samples: int) -> float:
        run = self.run
        answers = [
            run.chat.decode(answer)
            for sample_id in range(samples)
            for answer in self.opponent.answer(
                weights, run.held_out, sampling, iteration=BEFORE, sample_id=sample_id
            )
        ]
        verifier = evaluate.find_verifier(run.config.eval.verifier)
        return evaluate.share_right(verifier, run.held_out, answers)

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
        control, params = self.run.workdir / "control", None
        for t in self.run.iterations:
            row = next(row for row in self.summary if row["iteration"] == t)
            if "control" in row:
                continue
            if params is None:
                first = t == self.run.config.selfplay.start
                last = control / f"iteration_{t - 1}" / "checkpoint"
                params = self.before(t) if first else self._restore(last)
            folder = control / f"iteration_{t}"
            if checkpoint.exists(folder / "checkpoint"):
                _free(params)
                params = self._restore(folder / "checkpoint")
            else:
                params = self._fit(params, self._sft("control", t, folder, row["steps"], row["steps"]))
                self._keep(folder, params)
            row["control"] = self._answers(params)
            self._write_summary()
        if params is not None:
            self._export(control, params)

    def report(self) -> None:
        """Prints the table; draws summary.png."""
        hosts.say(f"\n{report.table(self.summary)}\n")
        if self.run.config.logging.plot:
            files.write(self.run.workdir / "summary.png", report.plot(self.summary))
        hosts.say(f"models, metrics and pairs are in {self.run.workdir}")

    def _add_row(self, row: Row, step: int) -> None:
        t = row["iteration"]
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


@contextlib.contextmanager
def _signals(speaks: bool) -> Iterator[Callable[[], bool]]:
    """A question whether to stop: yes after Ctrl-C or SIGTERM. A second Ctrl-C stops at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop.is_set
        return

    def handle(number: int, frame: Any) -> None:
        del frame
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()
        if speaks:  # known before: a handler must not ask JAX, which may be starting
            print("\nstopping after this step or batch; what is done is kept", flush=True)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
