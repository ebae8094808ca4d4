"""The opponent's part of an iteration: it answers every prompt, and scores both answers of every pair.

What it does is on disk a file at a time: iteration_<t>/pairs/ holds the answers, iteration_<t>/scores/
the log-probs of all pairs that iteration trains on. A file that is there is not made again.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from spin_jax.data import parquet
from spin_jax.data.records import Example, Ids, Pair, asked
from spin_jax.errors import Interrupted, MissingInput
from spin_jax.models.architecture import Params
from spin_jax.models.params import sampling_params
from spin_jax.runtime.console import compact, progress
from spin_jax.runtime.sharding import bucket
from spin_jax.sampling.continuous import answer_prompts
from spin_jax.sampling.next_token import Sampling, prompt_keys
from spin_jax.selfplay import from_config, judge
from spin_jax.selfplay.judge import judged
from spin_jax.selfplay.prepared import Prepared
from spin_jax.storage import files
from spin_jax.storage.metrics import Metrics
from spin_jax.training.batches import ScoredPair
from spin_jax.training.log_probs import score_groups
from spin_jax.training.packing import Group, group_sizes, pair_group

BEFORE = -1  # the iteration number of the start
OPPONENT, START = "opponent", "start"  # whose log-probs


class ScoreFile(NamedTuple):
    """A file of log-probs, and what it is made from."""

    path: epath.Path
    by: str  # whose log-probs: the opponent's, or the start's
    source: int  # the iteration whose pairs these are
    pairs: epath.Path
    total: int  # of those


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
        train, test = run.examples(t), run.held_out
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

    def _asked(self, t: int, path: epath.Path, examples: Sequence[Example]) -> list[tuple[Example, int]]:
        """(example, sample_id) of each answer in a file.

        Held-out prompts are answered once, unless a scorer compares answers.
        """
        play = self.run.config.selfplay
        many = play.samples if path.name.startswith("train") or play.scorer else 1
        return [(example, sample_id) for example in examples for sample_id in range(many)]

    def _pairs_in(self, t: int, path: epath.Path, items: Sequence[Any]) -> int:
        return len(items) if t in self.run.given else len(self._asked(t, path, items))

    def has_answers(self, t: int) -> bool:
        return all(files.existing([path for path, _ in self.pair_files(t)]))

    def sample(self, t: int, params: Params) -> None:
        """Answers every prompt of iteration t, or writes the pairs given for it."""
        shards = self.pair_files(t)
        done = files.existing([path for path, _ in shards])
        if all(done):
            return
        if t in self.run.given:
            # All at once: a scorer may compare the answers to a prompt, and files part them.
            rest = iter(judged([pair for _, pairs in shards for pair in pairs], self.run.judge))
            for (path, pairs), there in zip(shards, done, strict=True):
                scored = list(itertools.islice(rest, len(pairs)))
                if not there:
                    files.write(path, parquet.pairs_to_parquet(scored))
            return
        weights, rounds = self.weights(params), list(self._rounds(shards, done))
        wanted = [self._asked(t, path, examples) for path, examples in shards]
        sizes = list(map(len, wanted))
        left = sum(sizes[number] for chosen in rounds for number in chosen)
        self.metrics.rewind("sample", t, lambda number: not done[number])
        with progress(f"iteration {t}: sample", sum(sizes), sum(sizes) - left, unit="answer") as bar:
            for chosen in rounds:
                began = time.perf_counter()
                examples, ids = zip(*(one for number in chosen for one in wanted[number]), strict=True)
                answers = self.answer(
                    weights, examples, self.run.sampling(), iteration=t, sample_ids=ids, bar=bar
                )
                rate = sum(map(len, answers)) / (time.perf_counter() - began)
                rest = iter(answers)
                for number in chosen:
                    path, _ = shards[number]
                    pairs = [self.run.chat.pair(e, sample_id, next(rest)) for e, sample_id in wanted[number]]
                    pairs = pairs if done[number] else judged(pairs, self.run.judge)
                    if not done[number]:  # the row first: a file that is there is not made again
                        self.metrics.write("sample", t, number, {**_described(pairs), "tokens_per_s": rate})
                        self.metrics.flush()
                        files.write(path, parquet.pairs_to_parquet(pairs))
                self.stop_here()

    def _rounds(
        self, shards: Sequence[tuple[epath.Path, list]], done: Sequence[bool]
    ) -> Iterator[tuple[int, ...]]:
        """The shards that are answered together: enough to keep all slots busy, however many those are.

        Slots drain at the end of a round. One that an interruption broke off is repeated as a whole, in the
        same company, so that its answers are the same to the bit.
        """
        busy = 4 * from_config.slots(self.run.config, self.run.model)
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
        sample_ids: int | Sequence[int] = 0,
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
            prompt_keys(c.seed, iteration + 1, [e.prompt_id for e in examples], sample_ids),
            mesh=run.sampling_mesh,
            sampling=sampling,
            stop_tokens=run.model.stop_tokens,
            slots=min(from_config.slots(c, run.model), self._most_answers),
            limits=[max(c.lengths.max_length - len(prompt), 1) for prompt in prompts],
            on_chunk=on_chunk,
        )

    @functools.cached_property
    def _most_answers(self) -> int:
        """At a time: the same for all iterations, or each would compile the sampler anew."""
        run = self.run
        return max(map(len, run.datasets)) * run.config.selfplay.samples + len(run.held_out)

    # --- scores ----------------------------------------------------------------------------------

    def sources(self, t: int) -> list[int]:
        """The iterations whose pairs iteration t trains on: earlier ones mixed in, and its own."""
        c = self.run.config.selfplay
        earlier = range(max(0, t - c.mix_previous), t)
        return [*(s for s in earlier if s >= c.start or s in self.run.given), t]

    @property
    def origin(self) -> int:
        """The iteration whose answers are the start's."""
        return min([self.run.config.selfplay.start, *self.run.given])

    def references(self, t: int) -> dict[str, float]:
        """Whose log-probs a loss sees as the opponent's, and with which weight (loss.reference_alpha)."""
        alpha = self.run.config.loss.reference_alpha
        if t == self.run.config.selfplay.start:  # the opponent is the start
            return {OPPONENT: 1.0}
        return {by: share for by, share in ((OPPONENT, alpha), (START, 1 - alpha)) if share}

    def needed(self, t: int) -> list[int]:
        """The iterations whose answers have to be there before iteration t is scored, t the last."""
        first = [self.origin] if "start" in self.run.roles else []
        return list(dict.fromkeys([*first, *self.sources(t)[:-1], t]))

    def score_files(self, t: int) -> list[ScoreFile]:
        """Those of iteration t, each reference's side by side. Earlier held-out pairs stay out."""
        prefix, folder = {OPPONENT: "", START: "start-"}, self.run.folder(t) / "scores"
        return [
            ScoreFile(
                folder / f"{prefix[by]}iteration_{source}-{path.name}",
                by,
                source,
                path,
                self._pairs_in(source, path, items),
            )
            for by in self.references(t)
            for source in self.sources(t)
            for path, items in self.pair_files(source)
            if source == t or path.name.startswith("train")
        ]

    def has_scores(self, t: int, by: str) -> bool:
        return all(files.existing([shard.path for shard in self.score_files(t) if shard.by == by]))

    def score(self, t: int, params: Params, by: str = OPPONENT) -> None:
        """A reference's log-probs of the answers of every row of iteration t, once."""
        for source in self.needed(t):
            if source in self.run.given:
                self.sample(source, params)
        shards = self.score_files(t)
        done = files.existing([shard.path for shard in shards])
        own = [number for number, shard in enumerate(shards) if shard.by == by]
        missing = [number for number in own if not done[number]]
        if not missing:
            return
        need([shards[number].pairs for number in own], f"iteration {t} has no pairs yet", "sample")
        self.metrics.rewind("score", t, lambda number: not done[number])
        total, left = (sum(shards[number].total for number in numbers) for numbers in (own, missing))
        title = f"iteration {t}: score" + (" (start)" if by == START else "")
        with progress(title, total, total - left, unit="pair") as bar:
            for number in missing:
                began, shard = time.perf_counter(), shards[number]
                pairs = self._rows_of(shard)
                bar.update(shard.total - len(pairs))  # those that nobody trains on
                groups = [pair_group(pair, self.run.roles) for pair in pairs]
                logps = self.score_groups(params, groups, bar)
                _check_finite(pairs, logps, shard.pairs)
                tokens = sum(len(group.prompt) + sum(map(len, group.answers)) for group in groups)
                rate = tokens / (time.perf_counter() - began)
                means = {
                    f"{r}_logp": float(logps[:, n].mean()) for n, r in enumerate(self.run.roles) if pairs
                }
                values = {
                    "source_iteration": shard.source,
                    "pairs": len(pairs),
                    **means,
                    "tokens_per_s": rate,
                }
                self.metrics.write("score", t, number, values)
                self.metrics.flush()
                scores = parquet.scores_to_parquet(shard.source, pairs, logps, self.run.roles)
                files.write(shard.path, scores)
                bar.set_postfix({"tok/s": compact(rate)}, refresh=False)

    def _rows_of(self, shard: ScoreFile) -> list[Pair]:
        """The pairs of a file that are trained on, with the start's answers where the loss asks for them."""
        pairs = parquet.pairs_from_parquet(shard.pairs.read_bytes(), shard.pairs)
        pairs = judge.chosen(pairs, self.run.config.selfplay.rows)
        if "start" not in self.run.roles:
            return pairs
        answers, wanted = self._start_answers, [_question(pair) for pair in pairs]
        if absent := [pair for pair, key in zip(pairs, wanted, strict=True) if key not in answers]:
            raise MissingInput(
                f"{shard.pairs}: prompt_id {absent[0].prompt_id}, sample_id {absent[0].sample_id} has no "
                f"answer of the start among the pairs of iteration {self.origin}, and the loss asks for one"
            )
        return [dataclasses.replace(p, start=answers[key]) for p, key in zip(pairs, wanted, strict=True)]

    @functools.cached_property
    def _start_answers(self) -> dict[tuple[bytes, int], Ids]:
        """What the model that self-play began with answered."""
        paths = [path for path, _ in self.pair_files(self.origin)]
        need(paths, f"iteration {self.origin} has no pairs yet", "sample")
        pairs = (pair for path in paths for pair in parquet.pairs_from_parquet(path.read_bytes(), path))
        return {_question(pair): pair.generated for pair in pairs}

    def score_groups(self, params: Params, groups: Sequence[Group], bar: Any = None) -> np.ndarray:
        """Log-probs of answers by any weights, float32 [groups, answers], in the rows of training."""
        run, shape = self.run, self.run.pair_shape
        if not groups:
            return np.zeros((0, len(run.roles)), np.float32)
        longest = group_sizes(groups).max(axis=0)
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
        """Iteration t's pairs of a split with their opponent log-probs, in the order of the files.

        Where the start has a part in those, they are log p_t^α p_0^(1 − α), unnormalized (α-SPIN,
        arXiv 2404.04291).
        """
        shards, shares, roles = self.score_files(t), self.references(t), self.run.roles
        need([shard.path for shard in shards], f"iteration {t} has no scores yet", "score")
        of_pairs: dict[epath.Path, list[ScoreFile]] = {}
        for shard in shards:
            if shard.pairs.name.startswith(split):
                of_pairs.setdefault(shard.pairs, []).append(shard)
        result = []
        for alike in of_pairs.values():
            scores = [
                (shares[s.by], parquet.scores_from_parquet(s.path.read_bytes(), s.path, roles)) for s in alike
            ]
            for pair in self._rows_of(alike[0]):
                key = alike[0].source, pair.prompt_id, pair.sample_id
                sums = (sum(share * of[key][n] for share, of in scores) for n in range(len(roles)))
                result.append(ScoredPair(pair, tuple(sums)))
        return result

    def stop_here(self) -> None:
        """Raises Interrupted where the run is asked to stop: between two units of work."""
        if number := self.should_stop():
            raise Interrupted(int(number))


def _question(pair: Pair) -> tuple[bytes, int]:
    """What an answer answers. A given pair's prompt_id may be another dataset's; its prompt is not."""
    return pair.prompt.tobytes(), pair.sample_id


def _described(pairs: Sequence[Pair]) -> dict[str, float]:
    """What metrics.jsonl says of sampled pairs."""
    count, scores = len(pairs), [pair.score for pair in pairs if pair.score is not None]
    return {
        "prompts": count,
        "response_tokens": sum(len(pair.generated) for pair in pairs) / count,
        "truncated": sum(pair.truncated for pair in pairs) / count,
        "identical": sum(pair.identical for pair in pairs) / count,
        **({"score": sum(scores) / count} if len(scores) == count else {}),
    }


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
        raise MissingInput(f"{problem} ({absent} is missing): run --only={phase} first")
