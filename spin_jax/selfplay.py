"""Self-play fine-tuning: Algorithm 1 of arXiv 2401.01335, on disk.

    start ──▶ sample ──▶ score ──▶ train ──▶ θ_{t+1}, the next opponent ──▶ …

`run` is the whole of it. Each phase writes what it has done as it goes, and skips what it finds done:
running again with the same workdir continues. An iteration holds one set of weights at a time: the
opponent's log-probs are computed once, before training starts from its weights.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from spin_jax import checkpoint, convert, data, evaluate, files, losses, report, sharding
from spin_jax import config as config_lib
from spin_jax.data import Chat, Example, Pair, ScoredPair
from spin_jax.metrics import Metrics, compact, progress
from spin_jax.model import Decoder, Model, Params, abstract_params, count_params
from spin_jax.official import OfficialChat
from spin_jax.sample import Sampling, answer_prompts, prompt_keys, sampling_params
from spin_jax.score import score_rows
from spin_jax.train import SFT, SPIN, Interrupted, Loop, Optimization, fit, init_state, make_step
from spin_jax.train import evaluate as evaluate_objective

Row = dict[str, Any]
PHASES = ("sample", "score", "train")
BEFORE = -1  # the iteration number of the start


def run(
    config: Mapping[str, Any],
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
        should_stop: asked between units of work; None listens to Ctrl-C and SIGTERM.

    Raises:
        ValueError, FileNotFoundError: bad config or input, before anything is computed.
        Interrupted: stopped; the same call continues.
    """
    if only is not None and only not in PHASES:
        raise ValueError(f"only={only!r}: choose from {', '.join(PHASES)}")
    with contextlib.ExitStack() as stack:
        stop = should_stop or stack.enter_context(_signals())
        play = SelfPlay.set_up(config_lib.resolve(config), workdir, stop)
        stack.callback(play.metrics.close)
        play.print_plan()
        params = play.start()
        for t in play.iterations:
            if play.finished(t):
                continue
            params = play.before(t) if params is None else params
            if only in (None, "sample"):
                play.sample(t, params)
            if only in (None, "score"):
                play.score(t, params)
            if only in (None, "train"):
                params = play.train(t, params)
            if only is not None:
                break
        del params
        if all(map(play.finished, play.iterations)):
            play.control()
            play.report()
        return play.summary


@dataclasses.dataclass
class SelfPlay:
    """What the phases of a run share. Built by `set_up`, which checks everything it can."""

    config: ConfigDict
    workdir: epath.Path
    model: Model  # without weights, but for a model initialized here
    weights: epath.Path | None  # the checkpoint of model.path
    chat: Chat
    examples: list[Example]  # to train on
    held_out: list[Example]
    given: dict[int, list[Pair]]  # pairs from the config, by iteration
    length: int  # tokens of a training row, the same for all iterations
    metrics: Metrics
    should_stop: Callable[[], bool]
    summary: list[Row]
    notes: list[str]  # what was dropped, cut or guessed: printed once

    # --- set-up ----------------------------------------------------------------------------------

    @classmethod
    def set_up(cls, config: ConfigDict, workdir: str, should_stop: Callable[[], bool]) -> "SelfPlay":
        """Reads and checks config, model files and data; loads no weights, compiles nothing."""
        losses.find(config.loss.name)
        if config.eval.verifier:
            evaluate.find_verifier(config.eval.verifier)
        mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
        model, weights = _model(config, mesh)
        _check_mesh(config, model, mesh)
        notes: list[str] = []
        chat = _chat(config, model)
        given = _given(config, chat, notes)
        examples, fingerprint = _examples(config, chat, given, notes)
        held_out_ids = data.split_held_out(
            [e.prompt_id for e in examples],
            fraction=config.eval.fraction,
            limit=config.eval.limit,
            seed=config.seed,
        )
        if config.lengths.max_length > model.config.max_position_embeddings:
            notes.append(
                f"lengths.max_length={config.lengths.max_length} exceeds the "
                f"{model.config.max_position_embeddings} positions that the model was trained with"
            )
        root = epath.Path(workdir)
        root.mkdir(parents=True, exist_ok=True)
        _record(config, root, model, fingerprint)
        summary = root / "summary.json"
        return cls(
            config=config,
            workdir=root,
            model=model,
            weights=epath.Path(weights) if weights else None,
            chat=chat,
            examples=[e for e in examples if e.prompt_id not in held_out_ids],
            held_out=[e for e in examples if e.prompt_id in held_out_ids],
            given=given,
            length=_row_length(config, examples, given),
            metrics=Metrics(
                workdir,
                tensorboard=config.logging.tensorboard,
                wandb_project=config.logging.wandb_project,
                config=config.to_dict(),
            ),
            should_stop=should_stop,
            summary=files.read_json(summary) if summary.exists() else [],
            notes=notes,
        )

    @property
    def iterations(self) -> range:
        return range(self.config.selfplay.start, self.config.selfplay.iterations)

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return self.model.mesh

    @functools.cached_property
    def decoder(self) -> Decoder:
        return Decoder(self.model.config, self.model.dtype, remat=self.config.train.remat)

    @functools.cached_property
    def spin(self) -> SPIN:
        loss = losses.with_nll(losses.find(self.config.loss.name), self.config.loss.nll_weight)
        return SPIN(self.decoder, loss)

    def folder(self, t: int) -> epath.Path:
        return self.workdir / ("start" if t == BEFORE else f"iteration_{t}")

    def finished(self, t: int) -> bool:
        return any(row["iteration"] == t for row in self.summary)

    def options(self, t: int) -> Optimization:
        values = self.config.train.to_dict()
        del values["remat"]
        for key in ("learning_rate", "epochs"):
            values[key] = config_lib.per_iteration(values[key], t)
        return Optimization(**values)

    def sft_options(self) -> Optimization:
        values = self.config.sft.to_dict()
        del values["control"]
        return Optimization(**values)

    # --- the start -------------------------------------------------------------------------------

    def start(self) -> Params | None:
        """Makes and evaluates the SFT start, where that is not done; returns it if it was in hand."""
        params = None
        first = self.folder(BEFORE) / "checkpoint"
        if self.trains_start and not checkpoint.exists(first):
            params = self._sft(self.model.params or self._load_weights())
            checkpoint.save(first, params)
        self.model = dataclasses.replace(self.model, params={})
        if not self.finished(BEFORE):
            params = self.before(self.config.selfplay.start) if params is None else params
            if self.trains_start:
                self._export(self.folder(BEFORE), params)
            self._add_row({"iteration": BEFORE, **self._answers(params)})
            self.metrics.rewind("eval", BEFORE)
            self.metrics.write("eval", BEFORE, 0, _numbers(self.summary[0]))
        return params

    @property
    def trains_start(self) -> bool:
        return self.weights is None or self.config.sft.epochs > 0

    def before(self, t: int) -> Params:
        """The weights that iteration t starts from: its opponent."""
        if t > self.config.selfplay.start:
            return self._restore(self.folder(t - 1) / "checkpoint")
        if self.trains_start:
            return self._restore(self.folder(BEFORE) / "checkpoint")
        return self._load_weights()

    def _load_weights(self) -> Params:
        assert self.weights is not None
        return convert.load_params(self.weights, self.model.config, self.mesh, jnp.float32)

    def _restore(self, path: epath.Path) -> Params:
        abstract = abstract_params(self.model.config)
        layouts = sharding.parameter_shardings(self.mesh, abstract)
        like = jax.tree.map(
            lambda leaf, layout: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=layout),
            sharding.unboxed(abstract),
            layouts,
        )
        return checkpoint.restore(path, like)

    def _sft(self, params: Params) -> Params:
        options = self.sft_options()
        if not options.epochs:
            return params
        steps = data.training_steps(len(self.examples), options.batch_size, options.epochs)
        schedule = data.training_steps(
            len(self.examples), options.batch_size, options.schedule_epochs or options.epochs
        )
        return self._fit_sft("sft", BEFORE, self.folder(BEFORE), params, steps, schedule)

    def _fit_sft(
        self, phase: str, t: int, folder: epath.Path, params: Params, steps: int, schedule: int
    ) -> Params:
        options = self.sft_options()

        def collate(examples: Sequence[Example]) -> tuple[Any, int]:
            batch = data.sft_batch(examples, options.batch_size, self.length, self.chat.unattended)
            return batch, sum(len(e.prompt) + len(e.real) for e in examples)

        epochs = -(-steps // data.training_steps(len(self.examples), options.batch_size, 1))
        return self._fit(
            phase,
            t,
            folder,
            params,
            objective=SFT(self.decoder),
            options=options,
            items=self.examples,
            collate=collate,
            steps=steps,
            epochs=epochs,
            learning_rates=options.learning_rates(schedule),
            scalars={},
        )

    def _fit(
        self, phase: str, t: int, folder: epath.Path, params: Params, *, objective: Any,
        options: Optimization, items: Sequence, collate: Callable, steps: int, epochs: int,
        learning_rates: np.ndarray, scalars: dict[str, float],
    ) -> Params:  # fmt: skip
        """One training phase, from its newest step checkpoint if there is one."""
        keep, every = self.config.checkpoint.keep, self.config.checkpoint.every_steps
        state = init_state(params, options, self.mesh)
        with checkpoint.StepCheckpoints.open(folder / "train", keep) as checkpoints:
            found = checkpoints.latest(checkpoint.abstract(state))
            start, state = found if found else (0, state)
            self.metrics.rewind(phase, t, start)
            batches = data.batches(
                items,
                lambda chosen: _split(collate(chosen), options.accumulation),
                options.batch_size,
                seed=_fold(self.config.seed, phase, t),
                epochs=epochs,
                start=start,
            )
            title = phase if t == BEFORE else f"iteration {t}: {phase}"
            with progress(title, steps, start) as bar:

                def on_step(number: int, values: dict[str, float]) -> None:
                    self.metrics.write(phase, t, number, values)
                    shown = {k: f"{values[k]:.4g}" for k in ("loss", "margin") if k in values}
                    bar.set_postfix(shown | {"tok/s": compact(values["tokens_per_s"])}, refresh=False)
                    bar.update()

                state = fit(
                    state,
                    batches,
                    make_step(objective, options),
                    start=start,
                    learning_rates=learning_rates,
                    scalars=scalars,
                    mesh=self.mesh,
                    checkpoints=checkpoints,
                    loop=Loop(steps, every, on_step, self.should_stop),
                )
        return state.params

    # --- sample ----------------------------------------------------------------------------------

    def pair_files(self, t: int) -> list[tuple[epath.Path, list]]:
        """The files of iteration t's pairs and what each holds: examples, or the pairs given."""
        held_out = {example.prompt_id for example in self.held_out}
        if t in self.given:
            train = [p for p in self.given[t] if p.prompt_id not in held_out]
            test = [p for p in self.given[t] if p.prompt_id in held_out]
        else:
            train, test = self.examples, self.held_out
        size = self.config.sampling.shard_size
        result = []
        for split, items in (("train", train), ("test", test)):
            shards = [items[i : i + size] for i in range(0, len(items), size)]
            for number, shard in enumerate(shards):
                name = f"{split}-{number:05d}-of-{len(shards):05d}.parquet"
                result.append((self.folder(t) / "pairs" / name, shard))
        return result

    def sample(self, t: int, params: Params) -> None:
        """The opponent answers every prompt, held-out ones too; a file at a time."""
        shards = self.pair_files(t)
        missing = [(number, *shard) for number, shard in enumerate(shards) if not shard[0].exists()]
        if not missing:
            return
        if t in self.given:
            for _, path, pairs in missing:
                files.write(path, data.pairs_to_parquet(pairs))
            return
        weights = self._sampling_params(params)
        total = sum(len(examples) for _, examples in shards)
        done = total - sum(len(examples) for _, _, examples in missing)
        self.metrics.rewind("sample", t, missing[0][0])
        with progress(f"iteration {t}: sample", total, done, unit="prompt") as bar:
            for number, path, examples in missing:
                began = time.perf_counter()
                answers = self._answer(weights, examples, self._sampling(), t, 0, bar)
                pairs = [self.chat.pair(e, 0, a) for e, a in zip(examples, answers, strict=True)]
                files.write(path, data.pairs_to_parquet(pairs))
                tokens = sum(map(len, answers))
                self.metrics.write(
                    "sample",
                    t,
                    number,
                    {
                        "prompts": len(pairs),
                        "tokens": tokens,
                        "response_tokens": tokens / len(pairs),
                        "truncated": sum(p.truncated for p in pairs) / len(pairs),
                        "identical": sum(p.identical for p in pairs) / len(pairs),
                        "tokens_per_s": tokens / (time.perf_counter() - began),
                    },
                )
                self._stop_here()

    def _sampling(self, **changes: Any) -> Sampling:
        c = self.config.sampling
        return dataclasses.replace(
            Sampling(c.max_new_tokens, c.temperature, c.top_k, c.top_p), **changes
        )

    def _sampling_params(self, params: Params) -> Params:
        with jax.set_mesh(self.mesh):
            return sampling_params(params, self.model.dtype)

    def _answer(
        self, weights: Params, examples: Sequence[Example], sampling: Sampling, t: int,
        sample_id: int, bar: Any = None,
    ) -> list[data.Ids]:  # fmt: skip
        """Answers to examples' prompts, cut to the room that `lengths` leaves."""
        sampled, began = 0, time.perf_counter()

        def on_batch(prompts: int, tokens: int) -> None:
            nonlocal sampled
            sampled += tokens
            if bar is not None:
                rate = compact(sampled / (time.perf_counter() - began))
                bar.set_postfix({"tok/s": rate}, refresh=False)
                bar.update(prompts)
            self._stop_here()

        prompts = [self.chat.sampling_prompt(example) for example in examples]
        answers = answer_prompts(
            self.decoder,
            weights,
            prompts,
            prompt_keys(self.config.seed, t + 1, [e.prompt_id for e in examples], sample_id),
            mesh=self.mesh,
            sampling=sampling,
            stop_tokens=self.model.stop_tokens,
            batch_size=min(self.config.sampling.batch_size, len(self.examples) + len(self.held_out)),
            on_batch=on_batch,
        )
        limit = self.config.lengths.max_length
        return [a[: max(limit - len(p), 1)] for a, p in zip(answers, prompts, strict=True)]

    def _stop_here(self) -> None:
        if self.should_stop():
            raise Interrupted

    # --- score -----------------------------------------------------------------------------------

    def sources(self, t: int) -> list[int]:
        """The iterations whose pairs iteration t trains on: its own, and earlier ones mixed in."""
        earliest = max(0, t - self.config.selfplay.mix_previous)
        own = [s for s in range(earliest, t) if s >= self.config.selfplay.start or s in self.given]
        return [*own, t]

    def score_files(self, t: int) -> list[tuple[epath.Path, int, epath.Path]]:
        """(file of scores, source iteration, file of pairs); earlier held-out pairs are not needed."""
        result = []
        for source in self.sources(t):
            for path, _ in self.pair_files(source):
                if source == t or path.name.startswith("train"):
                    name = f"iteration_{source}-{path.name}"
                    result.append((self.folder(t) / "scores" / name, source, path))
        return result

    def score(self, t: int, params: Params) -> None:
        """The opponent's log-probs of both answers of every pair, once."""
        for source in self.sources(t)[:-1]:
            if source in self.given and source < self.config.selfplay.start:
                self.sample(source, params)  # writes the given pairs of an iteration before the start
        shards = self.score_files(t)
        missing = [(number, *shard) for number, shard in enumerate(shards) if not shard[0].exists()]
        if not missing:
            return
        self._need([pairs for _, _, pairs in shards], f"iteration {t} has no pairs yet", "sample")
        self.metrics.rewind("score", t, missing[0][0])
        chunk = self.options(t).microbatch_size or self.options(t).batch_size
        with progress(f"iteration {t}: score", len(shards), len(shards) - len(missing), "file") as bar:
            for number, path, source, pair_path in missing:
                began = time.perf_counter()
                pairs = data.pairs_from_parquet(pair_path.read_bytes())
                logps = np.concatenate(
                    [self._score(params, pairs[i : i + chunk], chunk) for i in range(0, len(pairs), chunk)]
                )
                files.write(path, data.scores_to_parquet(source, pairs, logps))
                tokens = sum(2 * len(p.prompt) + len(p.real) + len(p.generated) for p in pairs)
                rate = tokens / (time.perf_counter() - began)
                values = {
                    "source_iteration": source,
                    "pairs": len(pairs),
                    "real_logp": float(logps[:, 0].mean()),
                    "generated_logp": float(logps[:, 1].mean()),
                    "tokens_per_s": rate,
                }
                self.metrics.write("score", t, number, values)
                bar.set_postfix({"tok/s": compact(rate)}, refresh=False)
                bar.update()
                self._stop_here()

    def _score(self, params: Params, pairs: Sequence[Pair], size: int) -> np.ndarray:
        unscored = [ScoredPair(pair, (0.0, 0.0)) for pair in pairs]
        batch = data.pair_batch(unscored, size, self.length, self.chat.unattended)
        with jax.set_mesh(self.mesh):
            logps = score_rows(self.decoder, params, sharding.put_batch(self.mesh, batch.rows))
        self._stop_here()
        return np.asarray(logps).reshape(-1, 2)[: len(pairs)]

    def scored_pairs(self, t: int, split: str) -> list[ScoredPair]:
        """Iteration t's pairs of `split` with their opponent log-probs, in the order of the files."""
        result = []
        for score_path, source, pair_path in self.score_files(t):
            if pair_path.name.startswith(split):
                scores = data.scores_from_parquet(score_path.read_bytes())
                for pair in data.pairs_from_parquet(pair_path.read_bytes()):
                    result.append(ScoredPair(pair, scores[source, pair.prompt_id, pair.sample_id]))
        return result

    def _need(self, paths: Sequence[epath.Path], problem: str, phase: str) -> None:
        if absent := [path for path in paths if not path.exists()]:
            raise FileNotFoundError(f"{problem} ({absent[0]} is missing): run --only={phase} first")

    # --- train -----------------------------------------------------------------------------------

    def train(self, t: int, params: Params) -> Params:
        """Iteration t from its scored pairs to its checkpoint, export, evaluation and samples."""
        began = time.perf_counter()
        options = self.options(t)
        beta = float(config_lib.per_iteration(self.config.loss.beta, t))
        self._need([path for path, *_ in self.score_files(t)], f"iteration {t} has no scores yet", "score")
        scored = self.scored_pairs(t, "train")
        steps = data.training_steps(len(scored), options.batch_size, options.epochs)
        final = self.folder(t) / "checkpoint"
        if checkpoint.exists(final):
            params = self._restore(final)
        else:

            def collate(chosen: Sequence[ScoredPair]) -> tuple[Any, int]:
                batch = data.pair_batch(chosen, options.batch_size, self.length, self.chat.unattended)
                return batch, int(np.sum(batch.rows.segments != 0, where=np.repeat(batch.weight, 2)[:, None] > 0))

            schedule_epochs = options.schedule_epochs or options.epochs
            schedule = data.training_steps(len(scored), options.batch_size, schedule_epochs)
            params = self._fit(
                "train",
                t,
                self.folder(t),
                params,
                objective=self.spin,
                options=options,
                items=scored,
                collate=collate,
                steps=steps,
                epochs=options.epochs,
                learning_rates=options.learning_rates(schedule),
                scalars={"beta": beta},
            )
            checkpoint.save(final, params)
            self._prune(self.folder(t))
        self._export(self.folder(t), params)
        row: Row = {"iteration": t, "pairs": len(scored), "steps": steps, "beta": beta}
        row |= self._held_out_pairs(t, params, options, beta) | self._answers(params)
        self._write_samples(t, params)
        row["minutes"] = round((time.perf_counter() - began) / 60, 3)
        self.metrics.rewind("eval", t)
        self.metrics.write("eval", t, steps, _numbers(row))
        self._add_row(row)
        return params

    def _prune(self, folder: epath.Path) -> None:
        """Step checkpoints have served once the phase's own checkpoint is there."""
        if (folder / "train").exists():
            (folder / "train").rmtree()

    def _export(self, folder: epath.Path, params: Params) -> None:
        if not (folder / "model" / "config.json").exists():
            model = dataclasses.replace(self.model, params=params)
            convert.save(model, folder / "model", dtype=self.model.dtype)

    def _held_out_pairs(self, t: int, params: Params, options: Optimization, beta: float) -> Row:
        """Loss, margin, accuracy … on held-out pairs, against the opponent of the iteration."""
        scored = self.scored_pairs(t, "test")
        if not scored:
            return {}
        size = options.microbatch_size or options.batch_size
        batches = (
            data.pair_batch(scored[i : i + size], size, self.length, self.chat.unattended)
            for i in range(0, len(scored), size)
        )
        return evaluate_objective(self.spin, params, batches, {"beta": beta}, self.mesh)

    def _answers(self, params: Params) -> Row:
        """NLL of held-out answers, and with a verifier the share of sampled ones that are right."""
        if not self.held_out:
            return {}
        c = self.config
        size = c.train.microbatch_size or c.train.batch_size
        row: Row = {
            "nll": evaluate.nll(
                self.decoder,
                params,
                self.held_out,
                mesh=self.mesh,
                batch_size=2 * size,  # the rows of a micro-batch of pairs: the program that scored them
                length=self.length,
                unattended=self.chat.unattended,
            )
        }
        if c.eval.verifier:
            verifier = evaluate.find_verifier(c.eval.verifier)
            weights = self._sampling_params(params)

            def share(sampling: Sampling, samples: int) -> float:
                answers = [
                    self.chat.decode(answer)
                    for sample_id in range(1, samples + 1)  # 0 is the pairs' own
                    for answer in self._answer(weights, self.held_out, sampling, BEFORE, sample_id)
                ]
                return evaluate.share_right(verifier, self.held_out, answers)

            row["greedy_accuracy"] = share(self._sampling(temperature=0.0), 1)
            plain = Sampling(c.sampling.max_new_tokens)
            row["sampled_accuracy"] = share(plain, c.eval.samples)
        return row

    def _write_samples(self, t: int, params: Params) -> None:
        """samples.jsonl: the human answer beside this iteration's greedy one, on fixed prompts."""
        chosen = (self.held_out or self.examples)[: self.config.eval.fixed_prompts]
        if not chosen:
            return
        answers = self._answer(self._sampling_params(params), chosen, self._sampling(temperature=0.0), t, 0)
        lines = [
            {
                "prompt_id": example.prompt_id,
                "prompt": example.messages[:-1],
                "real": example.messages[-1]["content"],
                "generated": self.chat.decode(answer),
            }
            for example, answer in zip(chosen, answers, strict=True)
        ]
        files.write_jsonl(self.folder(t) / "samples.jsonl", lines)

    # --- control and report ----------------------------------------------------------------------

    def control(self) -> None:
        """The paper's control: the start trained on by SFT, for as many steps as each iteration took."""
        if not self.config.sft.control:
            return
        folder = self.workdir / "control"
        params = None
        for t in self.iterations:
            row = next(row for row in self.summary if row["iteration"] == t)
            if "control" in row:
                continue
            if params is None:
                before = folder / f"checkpoint_{t - 1}"
                first = t == self.config.selfplay.start
                params = self.before(t) if first else self._restore(before)
            final = folder / f"checkpoint_{t}"
            if checkpoint.exists(final):
                params = self._restore(final)
            else:
                params = self._fit_sft("control", t, folder, params, row["steps"], row["steps"])
                checkpoint.save(final, params)
                self._prune(folder)
            row["control"] = self._answers(params)
            self._write_summary()
        if params is not None:
            self._export(folder, params)

    def report(self) -> None:
        """Prints the table; draws summary.png."""
        print(f"\n{report.table(self.summary)}\n")
        if self.config.logging.plot and self.summary:
            files.write(self.workdir / "summary.png", report.plot(self.summary))
        print(f"models, metrics and pairs: {self.workdir}", flush=True)

    def _add_row(self, row: Row) -> None:
        self.summary = sorted([*self.summary, row], key=lambda row: row["iteration"])
        self._write_summary()

    def _write_summary(self) -> None:
        files.write_json(self.workdir / "summary.json", self.summary)
        self.metrics.flush()

    def print_plan(self) -> None:
        """Devices, mesh, model, memory and what is about to run."""
        c, device = self.config, jax.devices()[0]
        shapes = sharding.unboxed(abstract_params(self.model.config))
        count = count_params(shapes)
        # float32 weights and gradients, and one (RMSProp) or two (AdamW) moments
        moments = {"rmsprop": 1, "adamw": 2, "adafactor": 0}[c.train.optimizer]
        shards = self.mesh.shape["fsdp"] * self.mesh.shape["tensor"]
        gib = count * 4 * (2 + moments) / shards / 2**30
        mesh = " × ".join(f"{name} {size}" for name, size in self.mesh.shape.items())
        where = c.model.path or f"a {self.model.config.model_type} initialized here"
        if self.model.revision:
            where += f" at {self.model.revision[:12]}"
        todo = [t for t in self.iterations if not self.finished(t)]
        state = f"{len(todo)} to do" if self.summary else "from the start"
        lines = [
            ("devices", f"{jax.device_count()} × {device.device_kind}, mesh {mesh}"),
            ("model", f"{where}: {compact(count)} parameters, computing in {self.model.dtype}"),
            ("memory", f"{gib:.2f} GiB a device for weights, gradients and optimizer, plus activations"),
            ("data", f"{len(self.examples)} prompts to train on, {len(self.held_out)} held out"),
            ("rows", f"{self.length} tokens, {c.train.batch_size} pairs a step"),
            ("self-play", f"iterations {c.selfplay.start} … {c.selfplay.iterations - 1}, {state}"),
            ("loss", f"{c.loss.name}, β {', '.join(f'{b:g}' for b in c.loss.beta)}"),
            *(("note", note) for note in self.notes),
        ]
        print("\n".join(f"{name:<10} {text}" for name, text in lines), flush=True)


# --- set-up's pieces -----------------------------------------------------------------------------


def _model(config: ConfigDict, mesh: jax.sharding.Mesh) -> tuple[Model, Any]:
    """The model without weights and its directory; or one initialized here, and None."""
    c = config.model
    if c.path:
        return convert.describe(
            c.path, c.revision, dtype=c.dtype, mesh=mesh, chat_template=config.data.chat_template
        )
    if not c.tokenizer:
        raise ValueError("model.architecture needs model.tokenizer: a directory, or module:function")
    if ":" in c.tokenizer:
        tokenizer = config_lib.import_function(c.tokenizer)()
        tokenizer = convert.with_chat_template(tokenizer, config.data.chat_template)
    else:
        tokenizer = convert.load_tokenizer(c.tokenizer, config.data.chat_template)
    key = jax.random.key(config.seed)
    options = c.architecture.to_dict()
    return convert.initialize(options, tokenizer, key=key, dtype=c.dtype, mesh=mesh), None


def _chat(config: ConfigDict, model: Model) -> Chat:
    kind = OfficialChat if config.official else Chat
    lengths = data.Lengths(config.lengths.max_prompt, config.lengths.max_length)
    return kind(
        model.tokenizer,
        model.stop_tokens,
        lengths=lengths,
        system_message=config.data.system_message,
    )


def _given(config: ConfigDict, chat: Chat, notes: list[str]) -> dict[int, list[Pair]]:
    given = {}
    for t, path in config_lib.given_pairs(config).items():
        rows = data.load_rows(path, config.data.split)
        given[t], counts = data.load_pairs(rows, chat, path=path)
        notes += _counted(path, counts)
    start = config.selfplay.start
    for s in range(max(0, start - config.selfplay.mix_previous), start):
        if s not in given:
            notes.append(
                f"iteration {s}'s pairs are not mixed in: give them with --config.selfplay.pairs={s}=PATH,…"
            )
    return given


def _examples(
    config: ConfigDict, chat: Chat, given: dict[int, list[Pair]], notes: list[str]
) -> tuple[list[Example], str]:
    """Prompts and human answers, and a fingerprint of the data."""
    c = config.data
    if not c.path:  # the given pairs are the data
        if absent := [t for t in range(config.selfplay.start, config.selfplay.iterations) if t not in given]:
            raise ValueError(f"data.path is not set, and iteration {absent[0]} has no given pairs")
        unique = {p.prompt_id: p for t in sorted(given) for p in given[t]}
        examples = [Example(i, p.real_messages, p.prompt, p.real) for i, p in sorted(unique.items())]
        return examples, ""
    rows = data.load_rows(c.path, c.split, c.revision)
    examples, counts = data.load_examples(
        rows,
        chat,
        path=c.path,
        prompt_column=c.prompt_column,
        answer_column=c.answer_column,
        limit=c.limit,
        seed=config.seed,
    )
    notes += _counted(c.path, counts)
    return examples, getattr(rows, "_fingerprint", "")


def _counted(path: str, counts: Counter) -> list[str]:
    return [f"{path}: {what}: {number}" for what, number in sorted(counts.items())]


def _row_length(config: ConfigDict, examples: Sequence[Example], given: dict[int, list[Pair]]) -> int:
    """A length that every pair of the run fits, whatever will be sampled: one program for all."""
    limit = config.lengths.max_length
    if config.official:  # answers are tokenized anew, and can grow
        longest = limit
    else:
        new = config.sampling.max_new_tokens
        sampled = bool(set(range(config.selfplay.start, config.selfplay.iterations)) - given.keys())
        longest = max(
            min(len(e.prompt) + max(len(e.real), new if sampled else 0), limit) for e in examples
        )
        for pair in (pair for pairs in given.values() for pair in pairs):
            longest = max(longest, len(pair.prompt) + max(len(pair.real), len(pair.generated)))
    return -(-longest // 16) * 16


def _check_mesh(config: ConfigDict, model: Model, mesh: jax.sharding.Mesh) -> None:
    tensor, shards = mesh.shape["tensor"], sharding.batch_shards(mesh)
    if model.config.num_key_value_heads % tensor:
        raise ValueError(
            f"mesh.tensor={tensor} does not divide the model's {model.config.num_key_value_heads} "
            "key/value heads"
        )
    for name in ("train", "sft"):
        size = config[name].microbatch_size or config[name].batch_size
        used = name == "train" or config.sft.epochs or config.sft.control
        if used and size % shards:
            raise ValueError(
                f"{name}: a micro-batch of {size} cannot be split over {shards} devices "
                f"(mesh.data={mesh.shape['data']} × mesh.fsdp={mesh.shape['fsdp']})"
            )


# What may differ when a run is continued; all else makes another run.
_FREE = ("selfplay.iterations", "mesh.", "eval.", "checkpoint.", "logging.", "sampling.batch_size", "sft.control")


def _record(config: ConfigDict, workdir: epath.Path, model: Model, fingerprint: str) -> None:
    """Writes config.json; refuses the workdir of another run, with the difference."""
    path = workdir / "config.json"
    packages = ("spin_jax", "jax", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "grain")
    ours = {
        "config": config.to_dict(),
        "model_revision": model.revision,
        "data_fingerprint": fingerprint,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    if path.exists():
        theirs = _flat(files.read_json(path)["config"])
        for name, value in _flat(_jsonable(ours["config"])).items():
            if not name.startswith(_FREE) and name in theirs and theirs[name] != value:
                raise ValueError(
                    f"{workdir} holds another run: there {name} is {theirs[name]!r}, now {value!r}. "
                    "Give a new --workdir, or the old value"
                )
    files.write_json(path, ours)


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _split(collated: tuple[Any, int], count: int) -> tuple[Any, int]:
    batch, tokens = collated
    return data.microbatches(batch, count), tokens


def _fold(seed: int, phase: str, t: int) -> int:
    """A seed for the data order of one phase of one iteration."""
    number = {"sft": 0, "train": 1, "control": 2}[phase]
    return int(np.random.SeedSequence([seed, number, t + 1]).generate_state(1)[0])


def _numbers(row: Row) -> dict[str, float]:
    return {k: float(v) for k, v in row.items() if isinstance(v, int | float) and k != "iteration"}


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
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
        print("\nstopping after this step or batch; what is done is kept", flush=True)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
