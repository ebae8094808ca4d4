"""The opponent's part of an iteration: it answers every prompt, and scores both answers of every pair.

What it does is on disk a file at a time: iteration_<t>/pairs/ holds the answers, iteration_<t>/scores/
the log-probs of all pairs that iteration trains on. A file that is there is not made again.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from spin_jax import data, files, programs
from spin_jax.batches import Group, ScoredPair, bucket, group_sizes, pair_group
from spin_jax.chat import Example, Ids, Pair, asked
from spin_jax.draw import Sampling, prompt_keys
from spin_jax.metrics import Metrics, compact, progress
from spin_jax.model import Params, sampling_params
from spin_jax.prepare import Prepared
from spin_jax.sample import answer_prompts
from spin_jax.scoring import score_groups
from spin_jax.train import Interrupted

BEFORE = -1  # the iteration number of the start


@dataclasses.dataclass
class Opponent:
    """Samples and scores with the weights it is given."""

    run: Prepared
    metrics: Metrics
    should_stop: Callable[[], Any]  # a signal's number, or 0
    _weights: tuple[Params, Params] | None = None  # parameters, and what sampling made of them

    # --- answers ---------------------------------------------------------------------------------

    def pair_files(self, t: int) -> list[tuple[epath.Path, list]]:
        """The files of iteration t's pairs, and what each is made from: examples, or pairs given.

        Held-out prompts are answered too, into files of their own.
        """
        run = self.run
        train, test = run.examples, run.held_out
        if t in run.given:  # their ids may be another dataset's: a prompt is known by its text
            held_out = {asked(example.messages) for example in run.held_out}
            train = [pair for pair in run.given[t] if asked(pair.real_messages) not in held_out]
            test = [pair for pair in run.given[t] if asked(pair.real_messages) in held_out]
        size = run.config.sampling.shard_size
        result = []
        for split, items in (("train", train), ("test", test)):
            shards = [items[i : i + size] for i in range(0, len(items), size)]
            for number, shard in enumerate(shards):
                name = f"{split}-{number:05d}-of-{len(shards):05d}.parquet"
                result.append((run.folder(t) / "pairs" / name, shard))
        return result

    def has_answers(self, t: int) -> bool:
        return all(files.existing([path for path, _ in self.pair_files(t)]))

    def sample(self, t: int, params: Params) -> None:
        """Answers every prompt of iteration t, or writes the pairs given for it."""
        shards = self.pair_files(t)
        done = files.existing([path for path, _ in shards])
        if all(done):
            return
        if t in self.run.given:
            for (path, pairs), there in zip(shards, done, strict=True):
                if not there:
                    files.write(path, data.pairs_to_parquet(pairs))
            return
        weights, rounds = self.weights(params), list(self._rounds(shards, done))
        sizes = [len(examples) for _, examples in shards]
        left = sum(sizes[number] for chosen in rounds for number in chosen)
        self.metrics.rewind("sample", t, lambda number: not done[number])
        with progress(f"iteration {t}: sample", sum(sizes), sum(sizes) - left, unit="prompt") as bar:
            for chosen in rounds:
                began = time.perf_counter()
                examples = [example for number in chosen for example in shards[number][1]]
                answers = self.answer(weights, examples, self.run.sampling(), iteration=t, bar=bar)
                rate = sum(map(len, answers)) / (time.perf_counter() - began)
                rest = iter(answers)
                for number in chosen:
                    path, asked_here = shards[number]
                    pairs = [self.run.chat.pair(e, 0, next(rest)) for e in asked_here]
                    if not done[number]:  # the row first: a file that is there is not made again
                        self.metrics.write("sample", t, number, {**_described(pairs), "tokens_per_s": rate})
                        self.metrics.flush()
                        files.write(path, data.pairs_to_parquet(pairs))
                self.stop_here()

    def _rounds(
        self, shards: Sequence[tuple[epath.Path, list]], done: Sequence[bool]
    ) -> Iterator[tuple[int, ...]]:
        """The shards that are answered together: enough to keep all slots busy, however many those are.

        Slots drain at the end of a round. One that an interruption broke off is repeated as a whole, in the
        same company, so that its answers are the same to the bit.
        """
        busy = 4 * programs.slots(self.run.config, self.run.model)
        count = max(1, busy // self.run.config.sampling.shard_size)
        for first in range(0, len(shards), count):
            chosen = tuple(range(first, min(first + count, len(shards))))
            if not all(done[number] for number in chosen):
                yield chosen

    def weights(self, params: Params) -> Params:
        """The parameters as sampling wants them: made once, and kept until `release`."""
        if self._weights is None or self._weights[0] is not params:
            self.release()
            run = self.run
            made = sampling_params(params, run.model.config, run.model.dtype, run.sampling_mesh)
            self._weights = params, made
        return self._weights[1]

    def release(self) -> None:
        """Forgets the sampling weights: training wants their room."""
        self._weights = None

    def answer(
        self,
        weights: Params,
        examples: Sequence[Example],
        sampling: Sampling,
        *,
        iteration: int,
        sample_id: int = 0,
        bar: Any = None,
    ) -> list[Ids]:
        """Answers to the examples' prompts, cut to the room that `lengths` leaves."""
        run, c = self.run, self.run.config
        sampled, began = 0, time.perf_counter()

        def on_chunk(prompts: int, tokens: int) -> None:
            nonlocal sampled
            sampled += tokens
            if bar is not None:
                rate = compact(sampled / (time.perf_counter() - began))
                bar.set_postfix({"tok/s": rate}, refresh=False)
                bar.update(prompts)
            self.stop_here()

        prompts = [run.chat.sampling_prompt(example) for example in examples]
        return answer_prompts(
            run.decoder,
            weights,
            prompts,
            prompt_keys(c.seed, iteration + 1, [e.prompt_id for e in examples], sample_id),
            mesh=run.sampling_mesh,
            sampling=sampling,
            stop_tokens=run.model.stop_tokens,
            slots=min(programs.slots(c, run.model), len(run.examples) + len(run.held_out)),
            limits=[max(c.lengths.max_length - len(prompt), 1) for prompt in prompts],
            on_chunk=on_chunk,
        )

    # --- scores ----------------------------------------------------------------------------------

    def sources(self, t: int) -> list[int]:
        """The iterations whose pairs iteration t trains on: earlier ones mixed in, and its own."""
        c = self.run.config.selfplay
        earlier = range(max(0, t - c.mix_previous), t)
        return [*(s for s in earlier if s >= c.start or s in self.run.given), t]

    def score_files(self, t: int) -> list[tuple[epath.Path, int, epath.Path, int]]:
        """(file of scores, source iteration, file of pairs, how many). Earlier held-out pairs stay out."""
        return [
            (self.run.folder(t) / "scores" / f"iteration_{source}-{path.name}", source, path, len(items))
            for source in self.sources(t)
            for path, items in self.pair_files(source)
            if source == t or path.name.startswith("train")
        ]

    def has_scores(self, t: int) -> bool:
        return all(files.existing([path for path, *_ in self.score_files(t)]))

    def score(self, t: int, params: Params) -> None:
        """The opponent's log-probs of both answers of every pair of iteration t, once."""
        for source in self.sources(t):
            if source in self.run.given:
                self.sample(source, params)
        shards = self.score_files(t)
        done = files.existing([path for path, *_ in shards])
        missing = [(number, *shard) for number, shard in enumerate(shards) if not done[number]]
        if not missing:
            return
        need([path for _, _, path, _ in shards], f"iteration {t} has no pairs yet", "sample")
        self.metrics.rewind("score", t, lambda number: not done[number])
        total = sum(count for *_, count in shards)
        scored = total - sum(count for *_, count in missing)
        with progress(f"iteration {t}: score", total, scored, unit="pair") as bar:
            for number, path, source, pair_path, _ in missing:
                began = time.perf_counter()
                pairs = data.pairs_from_parquet(pair_path.read_bytes(), pair_path)
                logps = self.score_groups(params, [pair_group(pair) for pair in pairs], bar)
                _check_finite(pairs, logps, pair_path)
                tokens = sum(len(p.prompt) + len(p.real) + len(p.generated) for p in pairs)
                values = {
                    "source_iteration": source,
                    "pairs": len(pairs),
                    "real_logp": float(logps[:, 0].mean()),
                    "generated_logp": float(logps[:, 1].mean()),
                    "tokens_per_s": tokens / (time.perf_counter() - began),
                }
                self.metrics.write("score", t, number, values)
                self.metrics.flush()
                files.write(path, data.scores_to_parquet(source, pairs, logps))
                bar.set_postfix({"tok/s": compact(values["tokens_per_s"])}, refresh=False)

    def score_groups(self, params: Params, groups: Sequence[Group], bar: Any = None) -> np.ndarray:
        """Log-probs of pairs of answers by any weights, float32 [groups, 2], in the rows of training."""
        run, longest = self.run, group_sizes(groups).max(axis=0)
        shape = run.pair_shape
        if (longest > shape.capacity).any():  # `official` asks prompts whole that it cuts in training
            shape = shape._replace(length=bucket(int(max(longest[0], shape.length))))

        def on_batch(scored: int) -> None:
            if bar is not None:
                bar.update(scored)
            self.stop_here()

        return score_groups(
            run.decoder,
            params,
            groups,
            shape,
            run.mesh,
            unattended=run.chat.unattended,
            on_batch=on_batch,
        )

    def scored_pairs(self, t: int, split: str) -> list[ScoredPair]:
        """Iteration t's pairs of a split with their opponent log-probs, in the order of the files."""
        shards = self.score_files(t)
        need([path for path, *_ in shards], f"iteration {t} has no scores yet", "score")
        result = []
        for score_path, source, pair_path, _ in shards:
            if pair_path.name.startswith(split):
                scores = data.scores_from_parquet(score_path.read_bytes(), score_path)
                for pair in data.pairs_from_parquet(pair_path.read_bytes(), pair_path):
                    result.append(ScoredPair(pair, scores[source, pair.prompt_id, pair.sample_id]))
        return result

    def stop_here(self) -> None:
        """Raises Interrupted where the run is asked to stop: between two units of work."""
        if number := self.should_stop():
            raise Interrupted(int(number))


def _described(pairs: Sequence[Pair]) -> dict[str, float]:
    """What metrics.jsonl says of sampled pairs."""
    count = len(pairs)
    return {
        "prompts": count,
        "response_tokens": sum(len(pair.generated) for pair in pairs) / count,
        "truncated": sum(pair.truncated for pair in pairs) / count,
        "identical": sum(pair.identical for pair in pairs) / count,
    }


class Missing(FileNotFoundError):
    """What another phase is to make first."""


def _check_finite(pairs: Sequence[Pair], logps: np.ndarray, path: epath.Path) -> None:
    """Raises FloatingPointError where a loss of these log-probs would be no number."""
    bad = [pair.prompt_id for pair, values in zip(pairs, logps, strict=True) if not np.isfinite(values).all()]
    if bad:
        raise FloatingPointError(
            f"{path}: the opponent's log-probs of {len(bad)} pairs are not finite, prompt_id {bad[0]} first: "
            "its weights are damaged, or overflow in model.dtype (float32 may help)"
        )


def need(paths: Sequence[epath.Path], problem: str, phase: str) -> None:
    """Raises Missing, naming the phase to run first, when a path is not there."""
    there = files.existing(paths)
    if not all(there):
        absent = paths[there.index(False)]
        raise Missing(f"{problem} ({absent} is missing): run --only={phase} first")
