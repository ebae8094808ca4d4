"""The opponent of each iteration: whose weights it has, what it answers, and its log-probs of all answers.

Everything is written one file at a time: iteration_<t>/pairs/ holds the answers, iteration_<t>/scores/ the log-probs of
all pairs that iteration t trains on. A file that exists is never made again, unless answers before it are.
"""

import functools
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from spin_jax import config_values
from spin_jax.data import parquet
from spin_jax.data.records import Ids, Pair, has_more_fields
from spin_jax.errors import MissingInput
from spin_jax.models.architecture import Params
from spin_jax.runtime import processes
from spin_jax.runtime.console import compact, progress
from spin_jax.selfplay import from_config, pairing, variants
from spin_jax.selfplay.engine import Engine
from spin_jax.selfplay.prepare import Prepared
from spin_jax.storage import files
from spin_jax.storage.metrics import Metrics
from spin_jax.training.batches import ScoredPair, ScoredPairs
from spin_jax.training.packing import pair_group


class ScoreFile(NamedTuple):
    """A file of log-probs, and the pairs that they belong to."""

    path: epath.Path
    by: int  # k: these are log-probs by θ_k
    source: int  # the iteration that the pairs come from
    pairs: epath.Path
    total: int  # pairs in that file


class Opponent:
    """The model that iteration t plays against: θ_t, which its training starts from, or an average (opponent_decay)."""

    def __init__(self, run: Prepared, engine: Engine, metrics: Metrics, weights: Callable[[int], Params]):
        """`weights(t)` reads or makes the weights of iteration t's opponent."""
        self._run = run
        self._engine = engine
        self._metrics = metrics
        self.weights = weights

    # --- answers ---------------------------------------------------------------------------------

    def sample(self, t: int, params: Params | None) -> Params | None:
        """Writes the answers that iteration t needs and that are not there yet.

        `params` are θ_t; None reads them where they are needed. Returns θ_t where it is in memory now.
        """
        for source in self._needed(t)[:-1]:  # all but t itself
            self._write_answers(source, None)
        return self._write_answers(t, params)

    def _pair_files(self, t: int) -> list[tuple[epath.Path, list]]:
        """The files of iteration t's pairs, each with what it is made from: examples, or given pairs.

        Held-out prompts are answered too, into files of their own. Pairs that are added have a folder of their own.
        """
        run, result = self._run, []
        train, test = run.given_pairs(t) if t in run.given else (run.examples(t), run.held_out)
        for split, items in (("train", train), ("test", test), ("added", run.added_pairs(t))):
            shards = variants.in_files(items, run.config.sampling.shard_size, t in run.given and run.pairing.chooses)
            for number, shard in enumerate(shards):
                name = f"{split}-{number:05d}-of-{len(shards):05d}.parquet"
                result.append((run.folder(t) / ("added" if split == "added" else "pairs") / name, shard))
        return result

    def _write_answers(self, t: int, params: Params | None) -> Params | None:
        """Answers every prompt of iteration t, or writes the pairs given for it; returns θ_t if it is in memory."""
        run, metrics = self._run, self._metrics
        self._write_given(t)
        shards = [(path, items) for path, items in self._pair_files(t) if not isinstance(items[0], Pair)]
        done = files.existing([path for path, _ in shards])
        if all(done):
            return params
        opponent = self._engine.opponent(t, params, self.weights)
        rounds = list(self._rounds(shards, done))
        counts = [self._samples(path) * len(examples) for path, examples in shards]
        total, left = sum(counts), sum(counts[number] for chosen in rounds for number in chosen)
        metrics.rewind("sample", t, lambda number: not done[number])
        with opponent as (params, by), progress(f"iteration {t}: sample", total, total - left, unit="answer") as bar:
            for chosen in rounds:
                began = time.perf_counter()
                tasks = {n: list(itertools.product(shards[n][1], range(self._samples(shards[n][0])))) for n in chosen}
                examples, ids = zip(*itertools.chain(*tasks.values()), strict=True)
                sampling = from_config.sampling(run.config)
                answers = self._engine.answer(by, examples, sampling, iteration=t, sample_ids=ids, bar=bar)
                rate = sum(map(len, answers)) / (time.perf_counter() - began)
                remaining = iter(answers)
                for number in chosen:
                    pairs = [run.chat.pair(e, sample_id, next(remaining)) for e, sample_id in tasks[number]]
                    if done[number]:
                        continue
                    pairs = variants.with_scores(pairs, run.judge)
                    # The row is written first, because a file that exists is never made again.
                    metrics.write("sample", t, number, {**pairing.statistics(pairs), "tokens_per_s": rate})
                    metrics.flush()
                    self._write_pairs(t, shards[number][0], pairs)
                self._engine.stop_if_asked()
        return params

    def _write_given(self, t: int) -> None:
        """Writes the pairs that are given for iteration t, or added to its own."""
        shards = {path: items for path, items in self._pair_files(t) if isinstance(items[0], Pair)}
        paths, done = [*shards], files.existing([*shards])
        for number, pairs in variants.judged_files([*shards.values()], done, self._run.judge):
            self._write_pairs(t, paths[number], pairs)
            self._engine.stop_if_asked()

    def _write_pairs(self, t: int, path: epath.Path, pairs: Sequence[Pair]) -> None:
        """Writes a file of answers. The log-probs of answers that it had before, which may be others, are removed."""
        is_start = "start" in self._run.roles and t == self._answers_of_start  # all files have its log-probs
        ending = "" if is_start else f"iteration_{t}-{path.name}"

        def remove_scores() -> None:
            folders = [self._run.folder(k) / "scores" for k in self._run.iterations if k >= t]
            for old in itertools.chain(*(folder.iterdir() for folder in folders if folder.exists())):
                if old.name.endswith(ending):
                    old.unlink()

        processes.by_first(remove_scores)
        files.write(path, parquet.pairs_to_parquet(pairs, self._more_fields))

    @functools.cached_property
    def _more_fields(self) -> bool:
        """Whether messages of the run have more fields than role and content: its files of pairs then have one more."""
        given = itertools.chain(*self._run.given.values(), self._run.added)
        examples = *self._run.datasets, self._run.held_out
        conversations = (messages for pair in given for messages in (pair.real_messages, pair.generated_messages))
        return any(each.column("more_fields").any() for each in examples) or has_more_fields(conversations)

    def _samples(self, path: epath.Path) -> int:
        """How many answers each prompt of a file has."""
        return config_values.answers_wanted(self._run.config.selfplay, held_out=path.name.startswith("test"))

    def _rounds(self, shards: Sequence[tuple[epath.Path, list]], done: Sequence[bool]) -> Iterator[tuple[int, ...]]:
        """The files that are answered together: enough of them to keep all slots busy.

        Slots run empty at the end of a round. A round that was interrupted is repeated as a whole, with the same
        prompts beside each other, so that its answers are the same to the bit.
        """
        busy = 4 * from_config.slots(self._run.config, self._run.model)
        count = max(1, busy // self._run.config.sampling.shard_size)
        for first in range(0, len(shards), count):
            chosen = tuple(range(first, min(first + count, len(shards))))
            if not all(done[number] for number in chosen):
                yield chosen

    # --- scores ----------------------------------------------------------------------------------

    def score(self, t: int, params: Params | None) -> Params | None:
        """Writes the log-probs that iteration t needs and that are not there yet, as `sample` writes answers.

        Returns θ_t where it is in memory now; not where other weights took its place.
        """
        for by in variants.reference_weights(self._run.config, t):
            if all(files.existing([shard.path for shard in self._score_files(t) if shard.by == by])):
                continue
            if by == t:
                params = self.weights(t) if params is None else params
                self._write_scores(t, params, by)
            else:
                self._engine.free(params)
                params = None
                self._write_scores(t, self.weights(by), by)
        return params

    def scored_pairs(self, t: int, split: str) -> tuple[Sequence[ScoredPair], Counter[str]]:
        """Iteration t's pairs of a split with the opponent's log-probs, in the order of the files; and their counts."""
        shards, counts = self._score_files(t), Counter[str]()
        _need([shard.path for shard in shards], f"iteration {t} has no scores yet", "score")
        of_pairs: dict[epath.Path, list[ScoreFile]] = {}
        for shard in shards:
            if shard.pairs.name.startswith("test") == (split == "test"):
                of_pairs.setdefault(shard.pairs, []).append(shard)
        return ScoredPairs(self._scored(t, shards, counts) for shards in of_pairs.values()), counts

    def _scored(self, t: int, shards: Sequence[ScoreFile], counts: Counter[str]) -> list[ScoredPair]:
        """The pairs of one file, from all files of its log-probs. What is counted in it is added to `counts`."""
        weights, (pairs, own) = variants.reference_weights(self._run.config, t), self._pairs_of(shards[0])
        scores = {s.by: parquet.scores_from_parquet(s.path.read_bytes(), s.path, self._run.roles) for s in shards}
        counts.update(own)
        return [ScoredPair(pair, variants.mixed_logps(weights, scores, shards[0].source, pair)) for pair in pairs]

    @property
    def _answers_of_start(self) -> int:
        """The iteration that holds the answers of the very first model, which is the role `start`."""
        return min([self._run.config.selfplay.start, *self._run.given])

    def _needed(self, t: int) -> list[int]:
        """The iterations whose answers must exist before iteration t is scored; t comes last."""
        first = [self._answers_of_start] if "start" in self._run.roles else []
        return list(dict.fromkeys([*first, *self._run.sources(t)[:-1], t]))

    def _score_files(self, t: int) -> list[ScoreFile]:
        """The score files of iteration t. Earlier held-out pairs are left out."""
        prefix, folder = {self._run.config.selfplay.start: "start-", t: ""}, self._run.folder(t) / "scores"
        return [
            ScoreFile(
                path=folder / f"{prefix.get(by, f'opponent_{by}-')}iteration_{source}-{path.name}",
                by=by,
                source=source,
                pairs=path,
                total=len(items) * (1 if isinstance(items[0], Pair) else self._samples(path)),
            )
            for by in variants.reference_weights(self._run.config, t)
            for source in self._run.sources(t)
            for path, items in self._pair_files(source)
            if source == t or not path.name.startswith("test")
        ]

    def _write_scores(self, t: int, params: Params, by: int) -> None:
        run, metrics = self._run, self._metrics
        for source in self._needed(t):  # given pairs need no earlier --only=sample
            self._write_given(source)
        shards = self._score_files(t)
        done = files.existing([shard.path for shard in shards])
        own = [number for number, shard in enumerate(shards) if shard.by == by]
        missing = [number for number in own if not done[number]]
        _need([shards[number].pairs for number in own], f"iteration {t} has no pairs yet", "sample")
        metrics.rewind("score", t, lambda number: not done[number])
        total, left = (sum(shards[number].total for number in numbers) for numbers in (own, missing))
        title = f"iteration {t}: score" + ("" if by == t else f" (by opponent {by})")
        is_first, total_counts = by == shards[0].by, Counter[str]()  # all references score the same pairs
        with progress(title, total, total - left, unit="pair") as bar:
            for number in missing:
                began, shard = time.perf_counter(), shards[number]
                pairs, counts = self._pairs_of(shard)
                total_counts += counts
                bar.update(shard.total - len(pairs))  # pairs that nobody trains on
                groups = [pair_group(pair, run.roles) for pair in pairs]
                logps = self._engine.score(params, groups, bar, frozen=not shard.pairs.name.startswith("test"))
                _check_finite(pairs, logps, shard.pairs)
                tokens = sum(len(group.prompt) + sum(map(len, group.answers)) for group in groups)
                rate = tokens / (time.perf_counter() - began)
                means = {f"{r}_logp": float(logps[:, n].mean()) for n, r in enumerate(run.roles) if pairs}
                row = {"source_iteration": shard.source, "pairs": len(pairs), **means, "tokens_per_s": rate}
                reference = {} if by == t else {"reference": by}
                metrics.write("score", t, number, row | reference | (pairing.metrics(counts) if is_first else {}))
                metrics.flush()
                files.write(shard.path, parquet.scores_to_parquet(shard.source, pairs, logps, run.roles))
                bar.set_postfix({"tok/s": compact(rate)}, refresh=False)
        if is_first and (note := run.pairing.note(total_counts)):
            processes.say(f"{title}: {note}")

    def _pairs_of(self, shard: ScoreFile) -> tuple[list[Pair], Counter[str]]:
        """What `Pairing.pairs_of` makes of a file; with the start's answers where a loss reads them."""
        pairs = parquet.pairs_from_parquet(shard.pairs.read_bytes(), shard.pairs)
        pairs, counts = self._run.pairing.pairs_of(pairs, shard.pairs)
        if "start" in self._run.roles:
            pairs = variants.with_start_answers(pairs, self._start_answers, shard.pairs, self._answers_of_start)
        return pairs, counts

    @functools.cached_property
    def _start_answers(self) -> dict[tuple[bytes, int], Ids]:
        t = self._answers_of_start
        paths = [path for path, _ in self._pair_files(t)]
        _need(paths, f"iteration {t} has no pairs yet", "sample")
        files_of_pairs = (parquet.pairs_from_parquet(path.read_bytes(), path) for path in paths)
        return variants.answers_by_prompt(itertools.chain.from_iterable(files_of_pairs))


def _check_finite(pairs: Sequence[Pair], logps: np.ndarray, path: epath.Path) -> None:
    bad = [pair.prompt_id for pair, values in zip(pairs, logps, strict=True) if not np.isfinite(values).all()]
    if bad:
        raise FloatingPointError(
            f"{path}: the opponent's log-probs of {len(bad)} pairs are not finite, prompt_id {bad[0]} first: "
            "its weights are damaged, or overflow in model.dtype (float32 may help)"
        )


def _need(paths: Sequence[epath.Path], problem: str, phase: str) -> None:
    """Raises MissingInput, naming the phase to run first, where a path does not exist."""
    absent = [path for path, exists in zip(paths, files.existing(paths), strict=True) if not exists]
    if absent:
        raise MissingInput(f"{problem} ({absent[0]} is missing): run --only={phase} first")
