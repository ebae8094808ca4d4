"""From a config to what a run needs, everything read and checked before anything is compiled."""

import contextlib
import datetime
import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from spin_jax import config_values
from spin_jax.config import Config
from spin_jax.data.records import Pair, asked
from spin_jax.models import lora
from spin_jax.models.architecture import Model
from spin_jax.runtime import processes
from spin_jax.selfplay import fingerprints, from_config
from spin_jax.selfplay.best import DIRECTIONS
from spin_jax.selfplay.inputs import agreed_inputs, datasets_of, distinct, held_out_of, read_inputs, without
from spin_jax.selfplay.prepared import Prepared
from spin_jax.storage import files, hub
from spin_jax.training import custom_loss


def prepare(config: Config, workdir: str | None) -> Prepared:
    """Reads model files and data, and checks what can be checked; nothing is written.

    Raises:
        ValueError, FileNotFoundError: naming the key, or the file and row.
    """
    place = workdir or "."
    root = epath.Path(place if "://" in place else os.path.abspath(os.path.expanduser(place)))
    began = (files.read_agreed(root / "config.json") if workdir else None) or {}
    if began and not (isinstance(began, dict) and isinstance(began.get("config"), dict)):
        raise ValueError(f"{root / 'config.json'} is no run's of spin_jax: take another --workdir")
    fingerprints.check(root, config, {}, began)  # the config alone, before minutes of reading
    _check_tasks(config)
    today = config.data.today or began.get("today") or datetime.date.today().isoformat()
    today = processes.exchanged(today)[0]
    read = processes.together(lambda: read_inputs(config, began, today))
    _check_tasks(config, read.model)
    processes.check_same("config or data", lambda: agreed_inputs(config, read))
    model, chat, given, notes = read.model, read.chat, read.given, read.notes
    datasets = datasets_of(config, read)
    examples, held_out = distinct(datasets), held_out_of(config, datasets[0])
    if config.lengths.max_length > model.config.max_position_embeddings:
        notes.append(
            f"lengths.max_length={config.lengths.max_length} exceeds the model's "
            f"{model.config.max_position_embeddings} positions"
        )
    found = fingerprints.digests(config, model, datasets, given, read.start)
    processes.check_same("model, tokenizer, data or code", lambda: repr(found).encode())
    notes += fingerprints.check(root, config, found, began)
    _check_given(root, read.given, began)
    prepared = Prepared(
        config=config,
        workdir=root,
        model=model,
        initial_params=read.initial_params,
        chat=chat,
        datasets=without(datasets, held_out),
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
    """Whether eval.tasks are there; and with a model, whether their data are, and it can answer them."""
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
    """Builds the options of every phase, which check themselves."""
    if prepared.config.logging.wandb_project and importlib.util.find_spec("wandb") is None:
        raise ValueError("logging.wandb_project is set, and wandb is not installed: pip install wandb")
    best = prepared.config.checkpoint.best
    if best in ("greedy_accuracy", "sampled_accuracy") and not prepared.config.eval.verifier:
        raise ValueError(f"checkpoint.best={best!r} needs eval.verifier")
    if best in DIRECTIONS and not prepared.held_out:
        raise ValueError(f"checkpoint.best={best!r} needs held-out rows: there are none")
    _ = prepared.better
    if prepared.config.export.push_to:
        hub.check(prepared.config.export.push_to)
    if "start" in prepared.roles:
        _check_start_answers(prepared)
    if prepared.config.selfplay.start and prepared.config.selfplay.restart:
        raise ValueError("selfplay.restart trains the start anew: with selfplay.start that is another model")
    if prepared.config.selfplay.start and prepared.config.loss.reference_alpha < 1:
        raise ValueError("loss.reference_alpha asks the start: with selfplay.start that is another model")
    if best in ("margin", "accuracy") and not {"real", "generated"} <= set(prepared.roles):
        raise ValueError(f"checkpoint.best={best!r}: rows of loss {prepared.config.loss.name!r} have none")
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
    """Whether there will be an answer of the start to every prompt, for losses that see one.

    Raises:
        ValueError: there will be none.
    """
    c, given = prepared.config, prepared.given
    if len(prepared.datasets) > 1:
        raise ValueError("loss.answers has start, which answers one dataset: data.path names several")
    if c.selfplay.start and 0 not in given:
        raise ValueError("loss.answers has start, which after selfplay.start selfplay.pairs=0=PATH gives")
    origin = min([c.selfplay.start, *given])
    prompts = {asked(e.messages) for e in (*prepared.datasets[0], *prepared.held_out)}
    prompts = {asked(p.real_messages) for p in given[origin]} if origin in given else prompts
    for t, pairs in given.items():
        if absent := [pair for pair in pairs if asked(pair.real_messages) not in prompts]:
            raise ValueError(
                f"selfplay.pairs: the start answers no such prompt as that of prompt_id "
                f"{absent[0].prompt_id}, iteration {t}, and loss.answers asks for its answer"
            )


def _check_given(root: epath.Path, given: Mapping[int, Sequence[Pair]], began: Mapping[str, Any]) -> None:
    """Raises ValueError where pairs are given for an iteration that was answered without them."""
    known = began.get("fingerprints", {}) if began else {f"given pairs {t}": "" for t in given}
    late = [t for t in given if f"given pairs {t}" not in known]
    folders = [root / f"iteration_{t}" / "pairs" for t in late]
    for t, folder, there in zip(late, folders, files.existing(folders), strict=True):
        if there:
            raise ValueError(
                f"selfplay.pairs gives pairs for iteration {t}, and {folder} holds answers already: remove "
                "that folder, or give none"
            )


def take(prepared: Prepared) -> contextlib.AbstractContextManager[None]:
    """Holds the workdir and writes its config.json."""
    p = prepared
    revisions = {
        "model_revision": p.model.revision,
        "data_revision": p.data_revision,
        "today": p.today,
        "commit": p.commit,
    }
    return fingerprints.taken(p.workdir, p.config, p.identity, p.began, revisions)
