"""What the models of a run are measured by: held-out answers, human and their own, tasks, and KL."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from spin_jax import config_values
from spin_jax.data import parquet
from spin_jax.data.records import Ids
from spin_jax.evaluate import measures, verifiers
from spin_jax.models.architecture import Params
from spin_jax.runtime.sharding import free
from spin_jax.sampling.next_token import Sampling
from spin_jax.selfplay.opponent import BEFORE, Opponent
from spin_jax.selfplay.prepared import Prepared
from spin_jax.storage import files
from spin_jax.training.custom_loss import logps_type
from spin_jax.training.packing import Group, pair_group
from spin_jax.training.step import SPIN

Row = dict[str, Any]


class Evaluation:
    """Numbers of summary.json, made by the programs that train and sample."""

    def __init__(self, run: Prepared, opponent: Opponent, objective: SPIN):
        self._run = run
        self._opponent = opponent  # who samples, whatever the weights
        self._objective = objective

    def pairs(self, t: int, params: Params, beta: float) -> Row:
        """Loss, margin, accuracy … on held-out pairs, against the opponent of the iteration.

        Each pair's numbers go to held_out.parquet.
        """
        run, roles = self._run, self._run.roles
        scored = self._opponent.scored_pairs(t, "test")
        if not scored:
            return {}
        groups = [pair_group(s.pair, roles) for s in scored]
        policy = self._opponent.score_groups(params, groups)
        reference = np.array([s.opponent for s in scored], np.float32)
        score = np.array([s.pair.score or 0.0 for s in scored], np.float32)
        policy, opponent = (logps_type(roles)(*logps.T) for logps in (policy, reference))
        loss, metrics = self._objective.of(policy, opponent, np.float32(beta), score)
        columns = {name: np.asarray(values) for name, values in {"loss": loss, **metrics}.items()}
        columns |= {f"{role}_reference": reference[:, n] for n, role in enumerate(roles)}
        pairs = [s.pair for s in scored]
        path = run.folder(t) / "held_out.parquet"
        if not files.exists(path):  # an evaluation that was interrupted begins anew, and comes to the same
            files.write(path, parquet.held_out_to_parquet(pairs, columns))
        columns["identical"] = np.array([pair.identical for pair in pairs])
        means = {name: float(np.mean(values, dtype=np.float64)) for name, values in columns.items()}
        return {name: mean for name, mean in means.items() if not name.endswith("_reference")}

    def draw(self, params: Params) -> list[Ids]:
        """A model's own answers to the held-out prompts, at temperature 1: all prompts, again and again."""
        c = self._run.config
        return self._answer_held_out(params, Sampling(c.sampling.max_new_tokens), c.eval.samples)

    def _answer_held_out(self, params: Params, sampling: Sampling, samples: int) -> list[Ids]:
        if not self._run.held_out:
            return []
        weights = self._opponent.weights(params)
        return [
            answer
            for sample_id in range(samples)
            for answer in self._opponent.answer(
                weights, self._run.held_out, sampling, iteration=BEFORE, sample_ids=sample_id
            )
        ]

    def alone(self, folder: epath.Path, params: Params, drawn: Sequence[Ids]) -> Row:
        """What a model is measured by without another: held-out answers, human and its own, and tasks."""
        return {**self._answers(params, drawn), **self._tasks(folder, params)}

    def _answers(self, params: Params, drawn: Sequence[Ids]) -> Row:
        """NLL of held-out human answers; length of the `drawn` ones and, with a verifier, the share right."""
        run = self._run
        if not run.held_out:
            return {}
        row: Row = {
            "nll": measures.nll(
                run.decoder,
                params,
                run.held_out,
                mesh=run.mesh,
                shape=run.example_shape,
                unattended=run.chat.unattended,
                on_batch=lambda scored: self._opponent.stop_here(),
            )
        }
        if run.verifier:
            greedy = self._answer_held_out(params, run.sampling(temperature=0.0), 1)
            row["greedy_accuracy"] = self._share_right(greedy)
            row["sampled_accuracy"] = self._share_right(drawn)
        return row | measures.response_statistics(run.chat, run.held_out, drawn)

    def _share_right(self, answers: Sequence[Ids]) -> float:
        run = self._run
        assert run.verifier is not None
        return verifiers.share_correct(
            run.verifier, run.held_out, [run.chat.decode(answer) for answer in answers]
        )

    def _tasks(self, folder: epath.Path, params: Params) -> Row:
        """Numbers of lm-eval's tasks. Each is on disk when it is done: an interruption costs one of them."""
        c = self._run.config
        names = config_values.task_names(c)
        if not names:
            return {}
        from spin_jax.evaluate import harness  # it needs lm_eval, which is optional

        path, limit = folder / "tasks.json", c.eval.tasks_limit
        done = files.read_agreed(path)
        if done is None or done["limit"] != limit:
            done = {"limit": limit, "tasks": {}}
        self._opponent.release()
        model = dataclasses.replace(self._run.model, params=params)
        for name in names:
            if name not in done["tasks"]:
                done["tasks"][name] = harness.run_tasks(
                    model,
                    [name],
                    include_path=c.eval.include_path,
                    limit=limit,
                    seed=c.seed,
                    should_stop=self._opponent.stop_here,
                )
                files.write_json(path, done)
        return {metric: value for name in names for metric, value in done["tasks"][name].items()}

    def divergence(
        self, t: int, params: Params, drawn: Sequence[Ids], before: Callable[[int], Params]
    ) -> Row:
        """How far iteration t has moved from its opponent and from the start, by its own answers.

        One model's weights are held at a time: `params` are gone after this. `before` loads those that an
        iteration began with.
        """
        own = self._logps(params, drawn)
        self._opponent.release()
        free(params)
        first = self._run.config.selfplay.start
        opponent = self._logps(before(t), drawn)
        start = opponent if t == first else self._logps(before(first), drawn)
        return {"kl_opponent": measures.kl(own, opponent), "kl_start": measures.kl(own, start)}

    def _logps(self, params: Params, drawn: Sequence[Ids]) -> np.ndarray:
        """A model's log-probs of answers to the held-out prompts, float32 [drawn].

        Beside the human ones, in the rows of training: no other program is compiled.
        """
        run, examples = self._run, self._run.held_out
        groups = []
        for number, answer in enumerate(drawn):
            example = examples[number % len(examples)]
            answers = tuple(example.real if role == "real" else answer for role in run.roles)
            groups.append(Group(run.chat.sampling_prompt(example), answers))
        return self._opponent.score_groups(params, groups)[:, run.roles.index("generated")]

    def write_samples(self, t: int, params: Params) -> None:
        """samples.jsonl: the human answer beside this iteration's greedy one, on fixed prompts."""
        run = self._run
        chosen = (run.held_out or run.examples(BEFORE))[: run.config.eval.fixed_prompts]
        path = run.folder(t) / "samples.jsonl"
        if not chosen or files.exists(path):
            return
        greedy = self._run.sampling(temperature=0.0)
        answers = self._opponent.answer(self._opponent.weights(params), chosen, greedy, iteration=t)
        rows = [
            {
                "prompt_id": example.prompt_id,
                "prompt": example.messages[:-1],
                "real": example.messages[-1]["content"],
                "generated": run.chat.decode(answer),
            }
            for example, answer in zip(chosen, answers, strict=True)
        ]
        files.write_jsonl(path, rows)
