"""The inputs of a run: read from config, data and model files, and checked before anything is compiled."""

import contextlib
import dataclasses
import datetime
import functools
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from spin_jax import config_values
from spin_jax.config import Config
from spin_jax.data.chat import Chat
from spin_jax.data.records import Example, Pair, prompt_turns
from spin_jax.evaluate import verifiers
from spin_jax.models import lora
from spin_jax.models.architecture import Model, Params
from spin_jax.models.decoder import Decoder
from spin_jax.runtime import processes
from spin_jax.sampling.next_token import Sampling
from spin_jax.selfplay import best, fingerprints, from_config
from spin_jax.selfplay.inputs import (
    all_examples,
    datasets_of,
    held_out_of,
    read_inputs,
    shared_content,
    without_held_out,
)
from spin_jax.selfplay.variants import Judge
from spin_jax.storage import files, hub
from spin_jax.training import custom_loss
from spin_jax.training.optimizer import Optimization
from spin_jax.training.packing import RowShape


@dataclasses.dataclass
class Prepared:
    """The inputs of a run, and what follows from them."""

    config: Config
    workdir: epath.Path
    model: Model  # without weights
    initial_params: Callable[[], Params]  # loads or initializes float32 weights
    chat: Chat
    datasets: list[list[Example]]  # to train on: one for all iterations, or one for each
    held_out: list[Example]  # from the first dataset
    judge: Judge | None  # scores sampled answers
    verifier: verifiers.Verifier | None  # says which held-out answers are right
    given: dict[int, list[Pair]]  # pairs that selfplay.pairs gives, by iteration
    pair_shape: RowShape  # of micro-batches of pairs, the same for all iterations
    example_shape: RowShape  # of micro-batches of examples
    identity: fingerprints.Identity  # fingerprints and versions, by which a run knows its workdir
    began: Mapping[str, Any]  # the config.json that is there already, or {}
    data_revision: str | dict[str, str | None] | None  # the commit of a hub dataset; of several, by path
    today: str  # the date that chat templates see
    commit: str | None  # the git commit of the code that the run began with
    notes: list[str]  # what was dropped, cut, left out or assumed

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return self.model.mesh

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of the answers in a row of self-play."""
        return custom_loss.roles(self.config.loss)

    @functools.cached_property
    def decoder(self) -> Decoder:
        """The model as a function, for policy and opponent alike."""
        return from_config.decoder(self.config, self.model)

    @functools.cached_property
    def sampling_mesh(self) -> jax.sharding.Mesh:
        """The sampler's mesh of the same devices."""
        return from_config.sampling_mesh(self.config, self.model)

    @functools.cached_property
    def best_direction(self) -> int:
        """1 where a higher checkpoint.best is better, −1 where a lower one is; 0 where it is not set.

        Raises:
            ValueError: the summary has no number of that name.
        """
        c = self.config
        if not c.checkpoint.best:
            return 0
        return best.direction(c.checkpoint.best, config_values.task_names(c), c.eval.include_path)

    def examples(self, t: int) -> list[Example]:
        """The examples of iteration t; the start has those of the first dataset.

        Raises:
            ValueError: data.path names several datasets, and none for iteration t.
        """
        place = 0 if t < 0 or len(self.datasets) == 1 else t
        if place >= len(self.datasets):
            raise ValueError(f"data.path names {len(self.datasets)} datasets, and none for iteration {t}")
        return self.datasets[place]

    def folder(self, t: int) -> epath.Path:
        """The folder of iteration t, or of the START."""
        return self.workdir / ("start" if t < 0 else f"iteration_{t}")

    def options(self, t: int) -> Optimization:
        """How iteration t is optimized."""
        return from_config.optimization(self.config, t)

    def sft_options(self, control: bool = False) -> Optimization:
        """How the start or the SFT control is optimized."""
        return from_config.sft_optimization(self.config, control)

    def sampling(self, **changes: Any) -> Sampling:
        """How the config draws answers, with some fields changed."""
        return dataclasses.replace(from_config.sampling(self.config), **changes)

    @property
    def makes_start(self) -> bool:
        """Whether this run makes the start itself: it has no model.path, or an SFT stage."""
        return not self.config.model.path or self.config.sft.epochs > 0

    @property
    def iterations(self) -> range:
        """The iterations of this run."""
        return range(self.config.selfplay.start, self.config.selfplay.iterations)


def prepare(config: Config, workdir: str | None) -> Prepared:
    """Reads the config's data and model files, and checks everything that can be checked; writes nothing.

    Raises:
        ValueError, FileNotFoundError: what is wrong, with the key, or the file and row.
    """
    place = workdir or "."
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
    processes.check_same("config or data", lambda: shared_content(config, read))
    model, chat, given, notes = read.model, read.chat, read.given, read.notes
    datasets = datasets_of(config, read)
    examples, held_out = all_examples(datasets), held_out_of(config, datasets[0])
    if config.lengths.max_length > model.config.max_position_embeddings:
        notes.append(
            f"lengths.max_length={config.lengths.max_length} exceeds the model's "
            f"{model.config.max_position_embeddings} positions"
        )
    found = fingerprints.digests(config, model, datasets, given, read.weights_digest)
    processes.check_same("model, tokenizer, data or code", lambda: repr(found).encode())
    notes += fingerprints.check(root, config, found, began)
    _check_given(root, read.given, began)
    prepared = Prepared(
        config=config,
        workdir=root,
        model=model,
        initial_params=read.initial_params,
        chat=chat,
        datasets=without_held_out(datasets, held_out),
        held_out=held_out,
        judge=read.judge,
        verifier=read.verifier,
        given=given,
        pair_shape=from_config.pair_shape(config, model, examples, given),
        example_shape=from_config.example_shape(config, model, examples),
        identity=found,
        began=began,
        data_revision=read.data_revision,
        today=today,
        commit=began["commit"] if "commit" in began else fingerprints.commit(),
        notes=notes,
    )
    _check_options(prepared)
    return prepared


def _check_tasks(config: Config, model: Model | None = None) -> None:
    """Checks that eval.tasks exist; with a model, also that their data do and that it can answer them."""
    tasks, include_path = config_values.task_names(config), config.eval.include_path
    if not tasks:
        return
    from spin_jax.evaluate.tasks import (  # it needs lm_eval, which is optional
        check_model,
        check_tasks,
        load_tasks,
    )

    if model is None:
        check_tasks(tasks, include_path)
    else:
        check_model(load_tasks(tasks, include_path=include_path), model)


def _check_options(prepared: Prepared) -> None:
    """Checks keys that belong together, and builds the options of every phase, which check themselves."""
    if prepared.config.logging.wandb_project and importlib.util.find_spec("wandb") is None:
        raise ValueError("logging.wandb_project is set, and wandb is not installed: pip install wandb")
    wanted = prepared.config.checkpoint.best
    if wanted in ("greedy_accuracy", "sampled_accuracy") and not prepared.config.eval.verifier:
        raise ValueError(f"checkpoint.best={wanted!r} needs eval.verifier")
    if wanted in best.DIRECTIONS and not prepared.held_out:
        raise ValueError(f"checkpoint.best={wanted!r} needs held-out rows: there are none")
    _ = prepared.best_direction
    if prepared.config.export.push_to:
        hub.check(prepared.config.export.push_to)
    if "start" in prepared.roles:
        _check_start_answers(prepared)
    if prepared.config.selfplay.start and prepared.config.selfplay.restart:
        raise ValueError("selfplay.restart trains the start anew: with selfplay.start that is another model")
    if prepared.config.selfplay.start and prepared.config.loss.reference_alpha < 1:
        raise ValueError("loss.reference_alpha asks the start: with selfplay.start that is another model")
    if wanted in ("margin", "accuracy") and not {"real", "generated"} <= set(prepared.roles):
        raise ValueError(f"checkpoint.best={wanted!r}: rows of loss {prepared.config.loss.name!r} have none")
    if prepared.config.selfplay.scorer is None and custom_loss.takes_score(prepared.config.loss):
        raise ValueError(f"loss.name={prepared.config.loss.name!r} takes a score: set selfplay.scorer")
    prepared.sampling()
    prepared.sft_options()
    for t in prepared.iterations:
        prepared.options(t)
    for section in (prepared.config.train, prepared.config.sft):
        if section.lora_rank:
            lora.check(prepared.model.config, section.lora_targets)


def _check_start_answers(prepared: Prepared) -> None:
    """Raises ValueError where a loss reads the start's answer, and the start does not answer every prompt."""
    c, given = prepared.config, prepared.given
    if len(prepared.datasets) > 1:
        raise ValueError("loss.answers has the role start, which needs one dataset, and data.path names several")
    if c.selfplay.start and 0 not in given:
        raise ValueError("loss.answers has the role start, which after selfplay.start selfplay.pairs=0=PATH gives")
    origin = min([c.selfplay.start, *given])
    prompts = {prompt_turns(e.messages) for e in (*prepared.datasets[0], *prepared.held_out)}
    prompts = {prompt_turns(p.real_messages) for p in given[origin]} if origin in given else prompts
    for t, pairs in given.items():
        if absent := [pair for pair in pairs if prompt_turns(pair.real_messages) not in prompts]:
            raise ValueError(
                f"selfplay.pairs: the start does not answer the prompt with prompt_id "
                f"{absent[0].prompt_id} of iteration {t}, and loss.answers asks for its answer"
            )


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


def locked(prepared: Prepared) -> contextlib.AbstractContextManager[None]:
    """Locks the workdir and writes its config.json; the lock is held as long as the context is open."""
    p = prepared
    revisions = {
        "model_revision": p.model.revision,
        "data_revision": p.data_revision,
        "today": p.today,
        "commit": p.commit,
    }
    return fingerprints.locked_workdir(p.workdir, p.config, p.identity, p.began, revisions)
