"""The numbers of summary.json: held-out pairs and answers, tasks of lm-evaluation-harness, and KL."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
from etils import epath

from spin_jax import config_values
from spin_jax.data import parquet
from spin_jax.data.records import Ids
from spin_jax.evaluate import measures, verifiers
from spin_jax.models.architecture import Params
from spin_jax.report.numbers import START
from spin_jax.runtime import stopwatch
from spin_jax.sampling.next_token import Sampling
from spin_jax.selfplay.engine import Engine
from spin_jax.selfplay.opponent import Opponent
from spin_jax.selfplay.prepare import Prepared
from spin_jax.storage import files
from spin_jax.storage.metrics import Row
from spin_jax.training.custom_loss import logps_type
from spin_jax.training.packing import Group, pair_group
from spin_jax.training.step import SPIN


class Evaluation:
    """Measures models with the programs that train and sample."""

    def __init__(self, run: Prepared, engine: Engine, opponent: Opponent, objective: SPIN):
        self._run = run
        self._engine = engine
        self._opponent = opponent
        self._objective = objective

    @stopwatch.phase(stopwatch.EVALUATION)
    def measure_pairs(self, t: int, params: Params, beta: float) -> Row:
        """Loss, margin, accuracy … on held-out pairs, against the opponent; held_out.parquet has those of each pair."""
        run, roles = self._run, self._run.roles
        scored, _ = self._opponent.scored_pairs(t, "test")
        if not scored:
            return {}
        groups = [pair_group(s.pair, roles) for s in scored]
        policy = self._engine.score(params, groups)
        reference = np.array([s.opponent for s in scored], np.float32)
        score = np.array([s.pair.score or 0.0 for s in scored], np.float32)
        tokens = np.array([[len(answer) for answer in group.answers] for group in groups], np.int32)
        policy, opponent, lengths = (logps_type(roles)(*values.T) for values in (policy, reference, tokens))
        inputs = {"beta": np.float32(beta), "lengths": lengths, "score": score}
        loss, metrics = self._objective.loss_and_metrics(policy, opponent, **inputs)
        columns = {name: np.asarray(values) for name, values in {"loss": loss, **metrics}.items()}
        references = {f"{role}_reference": reference[:, n] for n, role in enumerate(roles)}
        pairs = [s.pair for s in scored]
        # The file may exist with other numbers: an interrupted run may continue with another β.
        table = parquet.held_out_to_parquet(pairs, columns | references)
        files.write_if_changed(run.folder(t) / "held_out.parquet", table)
        columns["identical"] = np.array([pair.identical for pair in pairs])
        return {name: float(np.mean(values, dtype=np.float64)) for name, values in columns.items()}

    @stopwatch.phase(stopwatch.EVALUATION)
    def sample(self, params: Params) -> list[Ids]:
        """A model's own answers to the held-out prompts, at temperature 1; `eval.samples` for each prompt."""
        return self._answer_held_out(params, 1.0, self._run.config.eval.samples)

    def _answer_held_out(self, params: Params, temperature: float, samples: int) -> list[Ids]:
        examples = self._run.held_out
        if not examples:
            return []
        sampling = Sampling(self._run.config.sampling.max_new_tokens, temperature)
        sample_ids = [number for number in range(samples) for _ in examples]
        return self._engine.answer(params, [*examples] * samples, sampling, iteration=START, sample_ids=sample_ids)

    @stopwatch.phase(stopwatch.EVALUATION)
    def measure_alone(self, folder: epath.Path, params: Params, sampled: Sequence[Ids]) -> Row:
        """The numbers that need no other model: held-out answers, human and the model's own, and tasks."""
        return {**self._measure_answers(folder, params, sampled), **self._run_tasks(folder, params)}

    def _measure_answers(self, folder: epath.Path, params: Params, sampled: Sequence[Ids]) -> Row:
        """NLL of human answers, statistics of sampled ones and, with a verifier, the share that is right.

        held_out_prompts.parquet has what each prompt adds to the NLL and to the shares of right answers.
        """
        run = self._run
        if not run.held_out:
            return {}
        logps = measures.real_logps(
            run.decoder,
            params,
            run.held_out,
            mesh=run.model.mesh,
            shape=run.example_shape,
            unattended=run.chat.unattended,
            on_batch=lambda scored: self._engine.stop_if_asked(),
        )
        tokens = np.array([len(example.real) for example in run.held_out])
        row: Row = measures.likelihood(logps, tokens)
        columns = {"real_logp": logps, "real_tokens": tokens}
        if run.verifier:
            greedy = self._answer_held_out(params, 0.0, 1)
            for name, answers in (("greedy_accuracy", greedy), ("sampled_accuracy", sampled)):
                texts = [run.chat.decode(answer) for answer in answers]
                verdicts = verifiers.verdicts(run.verifier, run.held_out, texts)
                row |= measures.accuracy(name, verdicts)
                columns[name] = verdicts.mean(axis=0)
        table = parquet.prompts_to_parquet([example.prompt_id for example in run.held_out], columns)
        files.write_if_changed(folder / "held_out_prompts.parquet", table)
        return row | measures.response_statistics(run.chat, run.held_out, sampled)

    def _run_tasks(self, folder: epath.Path, params: Params) -> Row:
        """Numbers of the tasks; each is on disk as soon as it is done: an interruption costs one task."""
        c = self._run.config
        names = config_values.task_names(c)
        if not names:
            return {}
        from spin_jax.evaluate import harness  # lm_eval is optional

        path, limit = folder / "tasks.json", c.eval.tasks_limit
        done = files.read_agreed(path)
        if done is None or done["limit"] != limit:
            done = {"limit": limit, "tasks": {}}
        options = {"include_path": c.eval.include_path, "limit": limit, "seed": c.seed}
        self._engine.release()
        model = dataclasses.replace(self._run.model, params=params)
        for name in names:
            if name not in done["tasks"]:
                done["tasks"][name] = harness.run_tasks(
                    model, [name], should_stop=self._engine.stop_if_asked, **options
                )
                files.write_json(path, done)
        numbers = {metric: value for name in names for metric, value in done["tasks"][name].items()}
        return {metric: math.nan if value is None else value for metric, value in numbers.items()}

    @stopwatch.phase(stopwatch.EVALUATION)
    def divergence(self, t: int, params: Params, sampled: Sequence[Ids]) -> Row:
        """KL of iteration t from its opponent and from the start, estimated on its answers; `params` are freed."""
        own = self._logps(params, sampled)
        self._engine.free(params)
        first = self._run.config.selfplay.start
        opponent = self._logps(self._opponent.weights(t), sampled)
        start = opponent if t == first else self._logps(self._opponent.weights(first), sampled)
        return {"kl_opponent": measures.kl(own, opponent), "kl_start": measures.kl(own, start)}

    def _logps(self, params: Params, sampled: Sequence[Ids]) -> np.ndarray:
        """A model's log-probs of answers to the held-out prompts, float32 [sampled].

        They stand beside the human answers in the rows of training, so that no other program is compiled.
        """
        run, groups = self._run, []
        for example, answer in zip(itertools.cycle(run.held_out), sampled, strict=False):
            answers = tuple(example.real if role == "real" else answer for role in run.roles)
            groups.append(Group(run.chat.sampling_prompt(example), answers))
        return self._engine.score(params, groups)[:, run.roles.index("generated")]

    @stopwatch.phase(stopwatch.EVALUATION)
    def write_samples(self, t: int, params: Params) -> None:
        """samples.jsonl: the human answer beside this iteration's greedy one, on fixed prompts."""
        run = self._run
        chosen = (run.held_out or run.examples(START))[: run.config.eval.fixed_prompts]
        path = run.folder(t) / "samples.jsonl"
        if not chosen or files.exists(path):
            return
        greedy = Sampling(run.config.sampling.max_new_tokens, temperature=0.0)
        answers = self._engine.answer(params, chosen, greedy, iteration=t)
        rows = [
            {
                "prompt_id": example.prompt_id,
                "prompt": example.messages[:-1],
                "real": example.messages[-1].get("content", ""),
                "generated": run.chat.decode(answer),
            }
            for example, answer in zip(chosen, answers, strict=True)
        ]
        files.write_jsonl(path, rows)
