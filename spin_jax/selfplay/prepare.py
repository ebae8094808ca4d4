"""The inputs of a run: read from config, data and model files, and checked before anything is compiled."""

import contextlib
import dataclasses
import datetime
import functools
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from spin_jax import config_values
from spin_jax.config import Config
from spin_jax.data.examples import prompt_keys
from spin_jax.data.records import Pair
from spin_jax.data.store import Examples
from spin_jax.evaluate import best
from spin_jax.models import lora
from spin_jax.models.architecture import Model
from spin_jax.models.decoder import Decoder
from spin_jax.report.numbers import START
from spin_jax.runtime import processes
from spin_jax.selfplay import fingerprints, from_config
from spin_jax.selfplay.inputs import Inputs, datasets_of, lengths_of, read_inputs, shared_content, split
from spin_jax.selfplay.variants import by_prompt, try_judge
from spin_jax.storage import files, hub
from spin_jax.training import custom_loss
from spin_jax.training.batches import training_steps
from spin_jax.training.packing import RowShape


@dataclasses.dataclass
class Prepared(Inputs):
    """The inputs of a run, and what follows from them."""

    workdir: epath.Path
    datasets: list[Examples]  # to train on: one for all iterations, or one for each
    held_out: Examples  # from the first dataset, or from eval.path
    pair_shape: RowShape  # of micro-batches of pairs, the same for all iterations
    example_shape: RowShape  # of micro-batches of examples
    identity: fingerprints.Identity  # fingerprints and versions, by which a run knows its workdir
    began: Mapping[str, Any]  # the config.json that is there already, or {}
    today: str  # the date that chat templates see
    commit: str | None  # the git commit of the code that the run began with

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of the answers in a row of self-play."""
        return custom_loss.roles(self.config.loss)

    @functools.cached_property
    def decoder(self) -> Decoder:
        return from_config.decoder(self.config, self.model)

    @functools.cached_property
    def sampling_mesh(self) -> jax.sharding.Mesh:
        return from_config.sampling_mesh(self.config, self.model)

    @functools.cached_property
    def best_direction(self) -> int:
        """`best.direction` of checkpoint.best; 0 where it is not set."""
        c = self.config
        if not c.checkpoint.best:
            return 0
        return best.direction(c.checkpoint.best, config_values.task_names(c), c.eval.include_path)

    def examples(self, t: int) -> Examples:
        """The examples of iteration t; the start has those of the first dataset.

        Raises:
            ValueError: data.path names several datasets, and none for iteration t.
        """
        place = 0 if t < 0 or len(self.datasets) == 1 else t
        if place >= len(self.datasets):
            raise ValueError(f"data.path names {len(self.datasets)} datasets, and none for iteration {t}")
        return self.datasets[place]

    def given_pairs(self, t: int) -> tuple[list[Pair], list[Pair]]:
        """The pairs given for iteration t: to train on, and held out. Their ids may belong to another dataset."""
        return self._without_held_out(self.given[t])

    def _without_held_out(self, pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
        """The pairs whose prompts are not held out, and the others."""
        keys = np.array([prompt_keys(pair.real_messages, pair.prompt)[:2] for pair in pairs], "S16").reshape(-1, 2)
        split: tuple[list[Pair], list[Pair]] = [], []
        held_out = np.isin(keys, self.held_out.keys)
        for pair, own in zip(pairs, held_out.tolist(), strict=True):
            split[any(own)].append(pair)
        return split

    @functools.cached_property
    def pairs_to_add(self) -> list[Pair]:
        """The pairs of selfplay.add_pairs whose prompts are not held out, in an order that the seed chose."""
        pairs, _ = self._without_held_out(self.added)
        return [pairs[number] for number in np.random.default_rng([self.config.seed, 2]).permutation(len(pairs))]

    def added_pairs(self, t: int) -> list[Pair]:
        """The pairs of selfplay.add_pairs that join those of iteration t: the next ones after iteration t − 1's."""
        if not (pairs := self.pairs_to_add):
            return []
        counts = [min(self.wanted_pairs(k), len(pairs)) for k in range(t + 1)]
        return [pairs[number % len(pairs)] for number in range(sum(counts[:-1]), sum(counts))]

    def wanted_pairs(self, t: int) -> int:
        """How many pairs selfplay.add_share asks to be added to those of iteration t."""
        share = self.config.selfplay.add_share
        return round(self.most_pairs(t) * share / (1 - share))

    def most_pairs(self, t: int) -> int:
        """The most pairs that iteration t makes for training: selfplay.rows or selfplay.pairing may leave some out.

        It counts no pairs of selfplay.add_pairs.
        """
        rows = config_values.rows_of_a_prompt(self.config.selfplay)
        if t not in self.given:
            return len(self.examples(t)) * rows
        pairs = self.given_pairs(t)[0]
        few = self.pairing.chooses and ":" not in self.pairing.name
        return min(len(pairs), len(by_prompt(pairs)) * rows) if few else len(pairs)

    def sources(self, t: int) -> list[int]:
        """The iterations whose pairs iteration t trains on: earlier ones that are mixed in, and its own."""
        play = self.config.selfplay
        earlier = range(max(0, t - play.mix_previous), t)
        return [*(s for s in earlier if s >= play.start or s in self.given), t]

    def folder(self, t: int) -> epath.Path:
        """The folder of iteration t, or of the START."""
        return self.workdir / ("start" if t < 0 else f"iteration_{t}")

    @property
    def makes_start(self) -> bool:
        """Whether this run makes the start itself: it has no model.path, or an SFT stage."""
        return not self.config.model.path or self.config.sft.epochs > 0

    def base(self, t: int) -> tuple[str, str | None]:
        """Where others find θ_t, which iteration t trains: a path or hub id, and the hub's revision.

        It is the export of the iteration before, or of the start that this run makes; else model.path, as for the SFT
        stage, whose t is START. On the hub a local path shows its last name only.
        """
        c = self.config
        if t > c.selfplay.start or (self.makes_start and t != START):
            folder = self.folder(t - 1 if t > c.selfplay.start else START)
            return (c.export.push_to, folder.name) if c.export.push_to else (str(folder / "model"), None)
        path = os.path.abspath(c.model.path) if os.path.isdir(c.model.path) else c.model.path
        return (path if self.model.revision or not c.export.push_to else os.path.basename(path)), self.model.revision

    @property
    def iterations(self) -> range:
        return range(self.config.selfplay.start, self.config.selfplay.iterations)


def prepare(config: Config, workdir: str | None) -> Prepared:
    """Reads the config's data and model files, and checks everything that can be checked; writes nothing.

    Raises:
        ValueError, FileNotFoundError: what is wrong, with the key, or the file and row.
    """
    place = workdir or "."
    if config.sampling.command and "://" in place:
        way_out = "take a --workdir on a disk, or sampling.engine with servers that you start"
        raise ValueError(f"sampling.command starts a server, which can open no model in {place}: {way_out}")
    root = epath.Path(place if "://" in place else os.path.abspath(os.path.expanduser(place)))
    began = (files.read_agreed(root / "config.json") if workdir else None) or {}
    if began and not (isinstance(began, dict) and isinstance(began.get("config"), dict)):
        raise ValueError(f"{root / 'config.json'} was not written by spin_jax: choose another --workdir")
    # The config comes first, because reading the data may take minutes.
    fingerprints.check(root, config, {}, began)
    _check_tasks(config)
    today = config.data.today or began.get("today") or datetime.date.today().isoformat()
    today = processes.exchanged(today)[0]
    read = processes.together(lambda: read_inputs(config, began, today))
    _check_tasks(config, read.model)
    processes.check_same("config or data", lambda: shared_content(read))
    model, given, notes = read.model, read.given, read.notes
    datasets, held_out = datasets_of(read)
    lengths = lengths_of([*datasets, held_out])
    to_train_on, held_out = split(config, datasets, held_out)
    positions = model.config.max_position_embeddings
    if config.lengths.max_length > positions:
        problem = f"lengths.max_length={config.lengths.max_length} exceeds the model's {positions} positions"
        kind = (model.hf_config.get("rope_parameters") or {}).get("rope_type")
        if kind in ("dynamic", "longrope"):
            raise ValueError(
                f"{problem}, and its RoPE ({kind}) rotates all tokens of a longer text by other angles: "
                f"set lengths.max_length to {positions} or less"
            )
        notes.append(problem)
    weights = {"weights": read.weights_digest, **read.judge.digests}
    found = fingerprints.digests(config, model, datasets, held_out, given, weights, read.added)
    processes.check_same("model, tokenizer, data or code", lambda: repr(found).encode())
    notes += fingerprints.check(root, config, found, began)
    _check_given(root, given, began)
    added = {-1: read.added} if read.added else {}
    read.rows, read.held_out_rows = {}, None  # the examples are made of them; they only take up memory now
    prepared = Prepared(
        **vars(read),
        workdir=root,
        datasets=to_train_on,
        held_out=held_out,
        pair_shape=from_config.pair_shape_of_lengths(config, model, lengths, given | added),
        example_shape=from_config.example_shape_of_lengths(config, model, lengths),
        identity=found,
        began=began,
        today=today,
        commit=began["commit"] if "commit" in began else fingerprints.commit(),
    )
    _check_options(prepared)
    return prepared


def _check_tasks(config: Config, model: Model | None = None) -> None:
    """Checks that eval.tasks exist; with a model, also that their data do and that it can answer them."""
    names, include_path = config_values.task_names(config), config.eval.include_path
    if not names:
        return
    from spin_jax.evaluate import tasks  # it needs lm_eval, which is optional

    if model is None:
        tasks.check_tasks(names, include_path)
    else:
        tasks.check_model(tasks.load_tasks(names, include_path=include_path), model)


def _check_options(prepared: Prepared) -> None:
    """Checks keys that belong together, and builds the options of every phase, which check themselves."""
    c, wanted = prepared.config, prepared.config.checkpoint.best
    if c.logging.wandb_project and importlib.util.find_spec("wandb") is None:
        raise ValueError("logging.wandb_project is set, and wandb is not installed: pip install wandb")
    if wanted in ("greedy_accuracy", "sampled_accuracy") and not c.eval.verifier:
        raise ValueError(f"checkpoint.best={wanted!r} needs eval.verifier")
    if wanted in best.DIRECTIONS and not prepared.held_out:
        raise ValueError(f"checkpoint.best={wanted!r} needs held-out rows: there are none")
    for t in filter(prepared.given.get, prepared.iterations):
        if wanted in ("margin", "accuracy", "loss") and not prepared.given_pairs(t)[1]:
            said = f"checkpoint.best={wanted!r} needs held-out pairs, and selfplay.pairs gives none for iteration {t}"
            raise ValueError(f"{said}: add pairs with held-out prompts to the file, or take nll")
    _ = prepared.best_direction
    if c.export.push_to:
        hub.check(c.export.push_to)
    if "start" in prepared.roles:
        _check_start_answers(prepared)
    if c.selfplay.add_pairs:
        prepared.notes += _added_notes(prepared)
    if c.selfplay.start and c.selfplay.restart:
        raise ValueError("selfplay.restart trains the start anew: with selfplay.start that is another model")
    needs_start = {"loss.reference_alpha": c.loss.reference_alpha < 1, "loss.reference_decay": c.loss.reference_decay}
    needs_start |= {"selfplay.opponent_decay": c.selfplay.opponent_decay}
    if c.selfplay.start and (keys := [key for key, needs in needs_start.items() if needs]):
        raise ValueError(f"{keys[0]} needs the start: with selfplay.start that is another model")
    if wanted in ("margin", "accuracy") and not {"real", "generated"} <= set(prepared.roles):
        raise ValueError(f"checkpoint.best={wanted!r}: rows of loss {c.loss.name!r} have none")
    if c.selfplay.scorer is None and custom_loss.takes_score(c.loss):
        raise ValueError(f"loss.name={c.loss.name!r} takes a score: set selfplay.scorer")
    if prepared.pairing.chooses:
        _check_pairing(prepared)
    if not prepared.began:
        first = prepared.datasets[0][0]
        copies = [prepared.chat.pair(first, number, first.real) for number in range(c.selfplay.samples)]
        try_judge(c, prepared.judge, copies, prepared.given)
    from_config.sampling(c)
    prepared.notes += _schedule_notes(prepared)
    for section in (c.train, c.sft):
        if section.lora_rank:
            lora.check(prepared.model.config, section.lora_targets, section.frozen_dtype)


def _check_pairing(prepared: Prepared) -> None:
    """Raises ValueError where selfplay.pairing does not suit the loss or the given pairs."""
    pairing, loss = prepared.config.selfplay.pairing, prepared.config.loss
    if "real" not in prepared.roles and not pairing.startswith("human/") and ":" not in pairing:
        raise ValueError(
            f"loss.name={loss.name!r} reads one answer of a row, which with selfplay.pairing={pairing!r} is the "
            "rejected one: take human/best+worst, or another loss"
        )
    for t, pairs in prepared.given.items():
        for prompt_id, group in by_prompt(pairs).items():
            if any(pair.real_messages != group[0].real_messages for pair in group):
                raise ValueError(
                    f"selfplay.pairs: the rows of iteration {t} with prompt_id {prompt_id} have different prompts or "
                    f"human answers, and selfplay.pairing={pairing!r} compares the answers to one prompt: give each "
                    "prompt its own prompt_id"
                )


def _schedule_notes(prepared: Prepared) -> list[str]:
    """The first note of each section on steps that learn nothing; ConfigError for a phase that has no other steps."""
    c, notes, most = prepared.config, {}, 0
    sft, control = (from_config.sft_optimization(c, control) for control in (False, True))
    if sft.epochs:
        steps = training_steps(len(prepared.examples(START)), sft.batch_size, sft.epochs)
        notes["sft"] = sft.check_schedule("sft", steps)
    for t in prepared.iterations:
        options = from_config.optimization(c, t)
        pairs = sum(prepared.most_pairs(source) + len(prepared.added_pairs(source)) for source in prepared.sources(t))
        steps = training_steps(pairs, options.batch_size, options.epochs)
        most = max(most, steps)
        notes["train"] = notes.get("train") or options.check_schedule("train", steps)
        if c.sft.control:
            notes["sft"] = notes.get("sft") or control.check_schedule("sft", steps, steps)
    if (traced := c.logging.profile_steps) and prepared.iterations and traced[1] >= most:
        advice = f"choose from steps 0 to {most - 1}, or leave the key out"
        raise ValueError(f"logging.profile_steps={traced}: iterations have at most {most} steps; {advice}")
    return [note for found in notes.values() for note in found]


def _added_notes(prepared: Prepared) -> list[str]:
    """How many pairs of selfplay.add_pairs join those of an iteration; ValueError where they cannot."""
    c, count = prepared.config, len(prepared.pairs_to_add)
    if "real" not in prepared.roles:
        raise ValueError(
            f"selfplay.add_pairs: of these pairs, loss {c.loss.name!r} would read only the rejected answers"
        )
    if "start" in prepared.roles:
        raise ValueError("selfplay.add_pairs: a row of this loss has an answer of the start, and these pairs have none")
    if not count:
        raise ValueError(f"selfplay.add_pairs={c.selfplay.add_pairs}: the prompts of all its pairs are held out")
    notes = []
    for t in prepared.iterations:
        wanted, own, added = prepared.wanted_pairs(t), prepared.most_pairs(t), len(prepared.added_pairs(t))
        if not added:
            raise ValueError(f"selfplay.add_share={c.selfplay.add_share:g} adds no pair to the {own} of iteration {t}")
        said = f"selfplay.add_pairs: {added} of {count} pairs join the {own} of an iteration"
        notes.append(f"{said}, and selfplay.add_share asks for {wanted}" if wanted > added else said)
    if left_out := len(prepared.added) - count:
        notes.append(f"selfplay.add_pairs: {left_out} pairs are left out, because their prompts are held out")
    return list(dict.fromkeys(notes))


def _check_start_answers(prepared: Prepared) -> None:
    """Raises ValueError where a loss reads the start's answer, and the start does not answer every prompt."""
    c, given = prepared.config, prepared.given
    if c.official:
        raise ValueError("official cuts a prompt by its answer, so the role start has no answer to the same prompt")
    if len(prepared.datasets) > 1:
        raise ValueError("loss.answers has the role start, which needs one dataset, and data.path names several")
    if c.selfplay.start and 0 not in given:
        raise ValueError("loss.answers has the role start, which after selfplay.start selfplay.pairs=0=PATH gives")
    if not given:  # it answers all prompts itself, and there may be millions
        return
    origin = min([c.selfplay.start, *given])
    answered = set(map(_answer_key, given.get(origin, ()))) or {
        (key, sample_id)
        for held_out, examples in enumerate([prepared.datasets[0], prepared.held_out])
        for sample_id in range(config_values.answers_wanted(c.selfplay, bool(held_out)))
        for key in examples.keys[:, 0].tolist()
    }
    for t, pairs in given.items():
        if absent := next((pair for pair in pairs if _answer_key(pair) not in answered), None):
            raise ValueError(
                f"selfplay.pairs: the start does not answer the prompt with prompt_id {absent.prompt_id} of "
                f"iteration {t} under sample_id {absent.sample_id}, and loss.answers asks for it (selfplay.samples)"
            )


def _answer_key(pair: Pair) -> tuple[bytes, int]:
    return prompt_keys(pair.real_messages, pair.prompt)[0].rstrip(b"\0"), pair.sample_id  # as NumPy's S16 has it


def _check_given(root: epath.Path, given: Mapping[int, Sequence[Pair]], began: Mapping[str, Any]) -> None:
    """Raises ValueError where pairs are given for an iteration whose prompts were answered without them."""
    known = began.get("fingerprints", {}) if began else {f"given pairs {t}": "" for t in given}
    late = [t for t in given if f"given pairs {t}" not in known]
    folders = [root / f"iteration_{t}" / "pairs" for t in late]
    for t, folder, exists in zip(late, folders, files.existing(folders), strict=True):
        if exists:
            raise ValueError(
                f"selfplay.pairs gives pairs for iteration {t}, and {folder} holds answers already: remove "
                "that folder, or give none"
            )


@contextlib.contextmanager
def locked(run: Prepared) -> Iterator[None]:
    """Locks the workdir and writes its config.json; the lock is held as long as the context is open.

    Raises:
        ValueError: another run holds the lock.
    """
    path, began = run.workdir / "config.json", run.began
    with files.held(run.workdir):
        if files.read_agreed(path) not in (None, began):
            raise ValueError(f"{run.workdir}: another run has begun there in the meantime; start this one again")
        files.sweep(run.workdir)
        overrides = list(began.get("overrides", []))
        if began and (changed := fingerprints.differences(run.config, run.identity, began)):
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            overrides.append({"at": now, "differences": changed})
        record = {
            "config": fingerprints.recorded(run.config),
            "model_revision": run.model.revision,
            "data_revision": run.data_revision,
            "hub_names": run.hub_names,
            "today": run.today,
            "commit": run.commit,
            **run.identity,
            "overrides": overrides,
        }
        if record != began:
            files.write_json(path, record)
        processes.together(lambda: _check_shared(path))
        yield


def _check_shared(path: epath.Path) -> None:
    if not path.exists():
        raise FileNotFoundError(
            f"{path} was written by process 0 and is not visible here: processes need one workdir, on a shared disk "
            "or in an object store"
        )
