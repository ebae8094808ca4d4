"""From a config to what a run needs, everything read and checked before anything is compiled."""

import contextlib
import dataclasses
import datetime
import functools
import importlib.util
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from spin_jax import config as config_lib
from spin_jax import heldout, identity, judging, programs
from spin_jax.data import sources
from spin_jax.data.chat import Chat
from spin_jax.data.examples import load_examples, split_held_out
from spin_jax.data.official import OfficialChat
from spin_jax.data.pairs import load_pairs
from spin_jax.data.records import Example, Lengths, Pair, asked
from spin_jax.judging import Judge
from spin_jax.models import loading, lora, tokenizers, weight_files
from spin_jax.models.architecture import Model, Params
from spin_jax.models.decoder import Decoder
from spin_jax.models.params import abstract_params, count_params, init_params
from spin_jax.runtime import processes, sharding, user_code
from spin_jax.runtime.console import compact
from spin_jax.sampling.next_token import Sampling
from spin_jax.storage import files, hub
from spin_jax.training import custom_loss
from spin_jax.training.optimizer import MOMENTS, Optimization
from spin_jax.training.packing import RowShape

Config = Any  # a resolved ConfigDict: type checkers know nothing of its keys


@dataclasses.dataclass
class Prepared:
    """The inputs of a run."""

    config: Config
    workdir: epath.Path
    model: Model  # without weights
    initial_params: Callable[[], Params]  # loads or initializes float32 weights
    chat: Chat
    datasets: list[list[Example]]  # to train on: one for all iterations, or one each
    held_out: list[Example]  # of the first
    judge: Judge | None  # of sampled answers
    verifier: heldout.Verifier | None  # of held-out ones
    given: dict[int, list[Pair]]  # pairs from the config, by iteration
    pair_shape: RowShape  # of micro-batches, the same for all iterations
    example_shape: RowShape
    identity: identity.Identity  # fingerprints and versions: what makes this run this run
    began: Mapping[str, Any]  # the config.json that is there already, or {}
    data_revision: str | dict[str, str | None] | None  # the commit of a hub dataset; of several, by path
    today: str  # what chat templates are told
    commit: str | None  # of the code that the run began with
    notes: list[str]  # what was dropped, cut or left out

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return self.model.mesh

    @property
    def roles(self) -> tuple[str, ...]:
        """The answers that a row of self-play has."""
        return custom_loss.roles(self.config.loss)

    @functools.cached_property
    def decoder(self) -> Decoder:
        """The model as a function, for policy and opponent alike."""
        return programs.decoder(self.config, self.model)

    @functools.cached_property
    def sampling_mesh(self) -> jax.sharding.Mesh:
        """The mesh of the sampler, on the same devices."""
        return programs.sampling_mesh(self.config, self.model)

    @functools.cached_property
    def better(self) -> int:
        """1 where more of checkpoint.best is better, −1 where less is; 0 where it is not set.

        Raises:
            ValueError: a run has no such number.
        """
        c = self.config
        if not c.checkpoint.best:
            return 0
        return heldout.direction(c.checkpoint.best, config_lib.task_names(c), c.eval.include_path)

    def examples(self, t: int) -> list[Example]:
        """What iteration t trains on; the start trains on the first dataset.

        Raises:
            ValueError: data.path names datasets, and none for iteration t.
        """
        place = 0 if t < 0 or len(self.datasets) == 1 else t
        if place >= len(self.datasets):
            raise ValueError(f"data.path names {len(self.datasets)} datasets, and none for iteration {t}")
        return self.datasets[place]

    def folder(self, t: int) -> epath.Path:
        """Where iteration t is kept; −1 is the start."""
        return self.workdir / ("start" if t < 0 else f"iteration_{t}")

    def options(self, t: int) -> Optimization:
        """How iteration t is trained."""
        return programs.optimization(self.config, t)

    def sft_options(self, control: bool = False) -> Optimization:
        """How the start is trained, or the control."""
        return programs.sft_optimization(self.config, control)

    def sampling(self, **changes: Any) -> Sampling:
        """The config's way of drawing answers, with some of it changed."""
        return dataclasses.replace(programs.sampling(self.config), **changes)

    @property
    def makes_start(self) -> bool:
        """Whether the start is made here: there is no model.path, or an SFT stage."""
        return not self.config.model.path or self.config.sft.epochs > 0

    @property
    def iterations(self) -> range:
        """The iterations this run makes."""
        return range(self.config.selfplay.start, self.config.selfplay.iterations)


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
    identity.check(root, config, {}, began)  # the config alone, before minutes of reading
    _check_tasks(config)
    today = config.data.today or began.get("today") or datetime.date.today().isoformat()
    today = processes.exchanged(today)[0]
    read = processes.together(lambda: _read(config, began, today))
    _check_tasks(config, read.model)
    processes.check_same("config or data", lambda: _seen(config, read))
    model, chat, given, notes = read.model, read.chat, read.given, read.notes
    datasets = _datasets(config, read)
    examples, held_out = _distinct(datasets), _held_out(config, datasets[0])
    if config.lengths.max_length > model.config.max_position_embeddings:
        notes.append(
            f"lengths.max_length={config.lengths.max_length} exceeds the model's "
            f"{model.config.max_position_embeddings} positions"
        )
    found = identity.digests(config, model, datasets, given, read.start)
    processes.check_same("model, tokenizer, data or code", lambda: repr(found).encode())
    notes += identity.check(root, config, found, began)
    _check_given(root, read.given, began)
    prepared = Prepared(
        config=config,
        workdir=root,
        model=model,
        initial_params=read.initial_params,
        chat=chat,
        datasets=_without(datasets, held_out),
        held_out=held_out,
        judge=read.judge,
        verifier=read.verifier,
        given=given,
        pair_shape=programs.pair_shape(config, model, examples, given),
        example_shape=programs.example_shape(config, model, examples),
        identity=found,
        began=began,
        data_revision=read.data_revision,
        today=today,
        commit=began["commit"] if "commit" in began else identity.commit(),
        notes=notes,
    )
    _check_options(prepared)
    return prepared


def _check_tasks(config: Config, model: Model | None = None) -> None:
    """Whether eval.tasks are there; and with a model, whether their data are, and it can answer them."""
    tasks, include_path = config_lib.task_names(config), config.eval.include_path
    if not tasks:
        return
    from spin_jax import harness  # it needs lm_eval, which is optional

    if model is None:
        harness.check_tasks(tasks, include_path)
    else:
        harness.check_asked(harness.load_tasks(tasks, include_path=include_path), model)


class _Read(NamedTuple):
    """What a process reads for itself, before processes share the work."""

    model: Model
    initial_params: Callable[[], Params]
    chat: Chat
    given: dict[int, list[Pair]]
    judge: Judge | None
    verifier: heldout.Verifier | None
    rows: dict[str, Any]  # datasets by path; none where the given pairs are the data
    data_revision: str | dict[str, str | None] | None
    start: str  # a digest of the weights that it starts from
    notes: list[str]


def _read(config: Config, began: Mapping[str, Any], today: str) -> _Read:
    custom_loss.check(config.loss)
    judge, name = judging.judge(config), config.eval.verifier
    verifier = heldout.find_verifier(name) if name else None
    model, initial_params, start = open_model(config, _model_began_with(config, began))
    programs.check_mesh(config, model)
    custom_loss.check(config.loss, model.mesh)
    notes = _other_architecture(config, model)
    chat = make_chat(config, model, today)
    given = _given(config, chat, model.config.vocab_size, notes)
    c = config.data
    rows, revisions = {}, {}
    known = _data_began_with(config, began)
    for path in dict.fromkeys(config_lib.data_paths(c.path)):
        revisions[path] = sources.pinned(path, known.get(path) or c.revision)
        rows[path] = sources.load_rows(path, c.split, name=c.name, revision=revisions[path])
    pinned = revisions if len(revisions) > 1 else next(iter(revisions.values()), None)
    return _Read(model, initial_params, chat, given, judge, verifier, rows, pinned, start, notes)


def _model_began_with(config: Config, began: Mapping[str, Any]) -> str | None:
    """The commit of the hub's model that the run began with, where it is still the same one's."""
    asked_for = [began.get("config", {}).get("model", {}).get(key) for key in ("path", "revision")]
    same = asked_for == [config.model.path, config.model.revision]
    return began.get("model_revision") if same else None


def _data_began_with(config: Config, began: Mapping[str, Any]) -> Mapping[str, str | None]:
    """The same of each dataset, by path: others can have joined it."""
    before, commits = began.get("config", {}).get("data", {}), began.get("data_revision")
    if before.get("revision") != config.data.revision:
        return {}
    return (
        commits
        if isinstance(commits, dict)
        else dict.fromkeys(config_lib.data_paths(before.get("path")), commits)
    )


def _seen(config: Config, read: _Read) -> bytes:
    """What processes must have alike: the config, the model's description, given pairs, some of the rows."""
    pairs = [ids for pairs in read.given.values() for p in pairs for ids in (p.prompt, p.real, p.generated)]
    some = [
        (len(rows), [_row(rows, number) for number in range(0, len(rows), max(len(rows) // 64, 1))])
        for rows in read.rows.values()
    ]
    m = read.model
    alike = config, m.hf_config, m.generation_config, m.stop_tokens, m.revision, some
    return b"|".join([repr(alike).encode(), *(ids.tobytes() for ids in pairs)])


def _row(rows: Any, number: int) -> Any:
    try:
        return rows[number]
    except ValueError as error:  # whoever reads them all will say which is the first
        return str(error)


def open_model(config: Config, began_with: str | None = None) -> tuple[Model, Callable[[], Params], str]:
    """The model without weights, what makes them, and a digest of what they are made from.

    Args:
        began_with: the commit of the hub's that a run began with: it goes on with that one, whatever the
            branch has come to since.
    """
    c = config.model
    template = config.data.chat_template
    if c.path:
        revision = began_with or c.revision
        model, directory = loading.describe(c.path, revision, dtype=c.dtype, chat_template=template)
        loading.check_architecture({"model_type": model.config.model_type, **c.architecture.to_dict()})
        loading.check_weights(directory, model.config)
        model = programs.placed(config, model)
        digest = weight_files.digest(directory)
        return model, lambda: loading.load_params(directory, model.config, model.mesh, jnp.float32), digest
    if not c.tokenizer:
        raise ValueError("model.architecture needs model.tokenizer: a directory, or module:function")
    if ":" in c.tokenizer:
        tokenizer = tokenizers.with_chat_template(user_code.called(c.tokenizer), template)
    else:
        tokenizer = tokenizers.load_tokenizer(c.tokenizer, template)
    model = loading.new_model(c.architecture.to_dict(), tokenizer, dtype=c.dtype)
    model = programs.placed(config, model)
    return model, lambda: init_params(model.config, jax.random.key(config.seed), model.mesh), ""


def _other_architecture(config: Config, model: Model) -> list[str]:
    """A note where the checkpoint is not of the architecture that the config states: another was named."""
    stated, theirs = config.model.architecture, model.hf_config
    differing = [
        f"{key} {value!r} ({theirs[key]!r})"
        for key, value in stated.items()
        if key in theirs and theirs[key] != value
    ]
    if not differing:
        return []
    return [f"the checkpoint, which counts, differs from model.architecture in {', '.join(differing)}"]


def _check_options(prepared: Prepared) -> None:
    """Builds the options of every phase, which check themselves."""
    if prepared.config.logging.wandb_project and importlib.util.find_spec("wandb") is None:
        raise ValueError("logging.wandb_project is set, and wandb is not installed: pip install wandb")
    best = prepared.config.checkpoint.best
    if best in ("greedy_accuracy", "sampled_accuracy") and not prepared.config.eval.verifier:
        raise ValueError(f"checkpoint.best={best!r} needs eval.verifier")
    if best in heldout.BETTER and not prepared.held_out:
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


def make_chat(config: Config, model: Model, today: str | None = None) -> Chat:
    """What turns conversations into ids for this model, as the config wants it."""
    kind = OfficialChat if config.official else Chat
    lengths = Lengths(config.lengths.max_prompt, config.lengths.max_length)
    return kind(
        model.tokenizer,
        model.stop_tokens,
        lengths=lengths,
        system_message=config.data.system_message,
        today=_day(today or config.data.today),
    )


def _day(text: str | None) -> datetime.date | None:
    try:
        return datetime.date.fromisoformat(text) if text else None
    except ValueError as error:
        raise ValueError(f"data.today={text!r}: a day is wanted, as in 2026-01-31") from error


def _given(config: Config, chat: Chat, vocab_size: int, notes: list[str]) -> dict[int, list[Pair]]:
    given, c = {}, config.data
    for t, path in config_lib.given_pairs(config).items():
        rows = sources.load_rows(path, config.selfplay.pairs_split, all_files=True)
        given[t], counts = load_pairs(
            rows,
            chat,
            path=path,
            vocab_size=vocab_size,
            bad_rows=c.bad_rows,
            max_bad=c.max_bad,
            scored=bool(config.selfplay.scorer),
        )
        notes += _counted(path, counts)
    start = config.selfplay.start
    for t in range(max(0, start - config.selfplay.mix_previous), start):
        if t not in given:
            notes.append(
                f"the pairs of iteration {t} are not mixed in: --config.selfplay.pairs={t}=PATH gives them"
            )
    return given


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


# Rows of datasets after the first are numbered from here, twice this, …: a prompt has one id in a run.
_NEXT_DATASET = 2**40


def _datasets(config: Config, read: _Read) -> list[list[Example]]:
    """Prompts with their human answers: one dataset for all iterations, or one each."""
    c = config.data
    if not read.rows:  # the given pairs are the data
        wanted = range(config.selfplay.start, config.selfplay.iterations)
        if absent := [t for t in wanted if t not in read.given]:
            raise ValueError(f"data.path is not set, and iteration {absent[0]} has no given pairs")
        unique = {asked(p.real_messages): p for t in sorted(read.given, reverse=True) for p in read.given[t]}
        pairs = sorted(unique.values(), key=lambda pair: pair.prompt_id)
        return [[Example(p.prompt_id, p.real_messages, p.prompt, p.real) for p in pairs]]
    loaded: dict[str, list[Example]] = {}
    for number, (path, rows) in enumerate(read.rows.items()):
        examples, counts = load_examples(
            rows,
            read.chat,
            path=path,
            prompt_column=c.prompt_column,
            answer_column=c.answer_column,
            limit=c.limit,
            seed=config.seed,
            bad_rows=c.bad_rows,
            max_bad=c.max_bad,
        )
        read.notes.extend(_counted(path, counts))
        if number and max(example.prompt_id for example in examples) >= _NEXT_DATASET:
            raise ValueError(f"{path}: of several datasets, a prompt_id is below {_NEXT_DATASET}")
        moved = number * _NEXT_DATASET
        loaded[path] = [dataclasses.replace(e, prompt_id=e.prompt_id + moved) for e in examples]
    return [loaded[path] for path in config_lib.data_paths(config.data.path)]


def _distinct(datasets: Sequence[list[Example]]) -> list[Example]:
    """All examples: those of a dataset that serves several iterations once."""
    return [example for dataset in {id(d): d for d in datasets}.values() for example in dataset]


def _held_out(config: Config, examples: Sequence[Example]) -> list[Example]:
    ids = split_held_out(
        [example.prompt_id for example in examples],
        fraction=config.eval.fraction,
        limit=config.eval.limit,
        seed=config.seed,
    )
    return [example for example in examples if example.prompt_id in ids]


def _without(datasets: Sequence[list[Example]], held_out: Sequence[Example]) -> list[list[Example]]:
    """The datasets without what is held out of the first; and of later ones without the same prompts."""
    ids = {example.prompt_id for example in held_out}
    prompts = {asked(example.messages) for example in held_out} if len(datasets) > 1 else set()

    def stays(example: Example, later: bool) -> bool:
        return example.prompt_id not in ids and not (later and asked(example.messages) in prompts)

    return [[e for e in examples if stays(e, examples is not datasets[0])] for examples in datasets]


def _counted(path: str, counts: Counter) -> list[str]:
    return [f"{path}: {what}: {number}" for what, number in sorted(counts.items())]


def take(prepared: Prepared) -> contextlib.AbstractContextManager[None]:
    """Holds the workdir and writes its config.json."""
    p = prepared
    revisions = {
        "model_revision": p.model.revision,
        "data_revision": p.data_revision,
        "today": p.today,
        "commit": p.commit,
    }
    return identity.taken(p.workdir, p.config, p.identity, p.began, revisions)


def lengths(prepared: Prepared) -> str:
    """A table of the data's lengths in tokens, before anything is dropped or cut, against the limits."""
    unlimited: Config = ConfigDict(prepared.config).copy_and_resolve_references()
    unlimited.lengths.max_prompt = unlimited.lengths.max_length = 2**31 - 1
    read = processes.together(lambda: _read(unlimited, prepared.began, prepared.today))
    examples = _distinct(_datasets(unlimited, read))
    prompts, answers = (
        np.array([len(ids) for ids in of]) for of in zip(*((e.prompt, e.real) for e in examples), strict=True)
    )
    columns = {"prompt": prompts, "answer": answers, "both": prompts + answers}
    lines = [f"{'tokens':<10}" + "".join(f"{name:>10}" for name in columns)]
    for title, share in (("median", 50), ("90%", 90), ("99%", 99), ("longest", 100)):
        lines.append(f"{title:<10}" + "".join(f"{np.percentile(n, share):>10.0f}" for n in columns.values()))
    limits, count = prepared.config.lengths, len(examples)
    long = int((prompts > limits.max_prompt).sum())
    cut = int(((prompts <= limits.max_prompt) & (prompts + answers > limits.max_length)).sum())
    lines.append(f"prompts longer than lengths.max_prompt={limits.max_prompt}, dropped: {long} of {count}")
    lines.append(f"answers cut at lengths.max_length={limits.max_length}: {cut} of {count}")
    return "\n".join(lines)


def plan(prepared: Prepared, finished: int) -> str:
    """The lines printed at start-up: devices, mesh, model, memory, data and what is about to run."""
    c, model = prepared.config, prepared.model
    device = jax.devices()[0]
    count = count_params(sharding.unboxed(abstract_params(model.config)))
    rank = c.train.lora_rank
    trained = programs.trained(c, model.config)
    frozen = count * model.dtype.itemsize if rank else 0
    # float32 weights and gradients, and the optimizer's moments
    copies = 2 + MOMENTS[c.train.optimizer]
    gib = (trained * 4 * copies + frozen) / (model.mesh.shape["fsdp"] * model.mesh.shape["tensor"]) / 2**30
    mesh = " × ".join(f"{name} {size}" for name, size in model.mesh.shape.items())
    source = c.model.path or "initialized here"
    revision = f" at {model.revision[:12]}" if model.revision else ""
    first, last, shape = c.selfplay.start, c.selfplay.iterations - 1, prepared.pair_shape
    betas = ", ".join(f"{beta:g}" for beta in c.loss.beta)
    beside = "".join(f", {text}" for text in config_lib.beside_loss(c))
    lines = [
        ("devices", f"{jax.device_count()} × {device.device_kind}, mesh {mesh}"),
        (
            "model",
            f"{model.config.model_type}, {source}{revision}: {compact(count)} parameters, {model.dtype}",
        ),
        ("memory", f"{gib:.2f} GiB a device for weights, gradients and optimizer; activations come on top"),
        *([("LoRA", f"rank {rank}: {compact(trained)} numbers are trained")] if rank else []),
        ("disk", _disk(prepared, finished, count, trained)),
        ("data", f"{_counts(prepared)} prompts to train on, {len(prepared.held_out)} held out"),
        ("rows", f"{shape.rows} × {shape.length} tokens a micro-batch, {c.train.batch_size} pairs a step"),
        ("attention", prepared.decoder.kernel),
        ("self-play", f"iterations {first} to {last}, {finished} of them done"),
        ("loss", f"{c.loss.name}, β {betas}{beside}"),
        ("workdir", str(prepared.workdir)),
        *(("note", note) for note in prepared.notes),
    ]
    return "\n".join(f"{name:<10} {text}" for name, text in lines)


def _counts(prepared: Prepared) -> str:
    return ", ".join(str(len(dataset)) for dataset in prepared.datasets)


def _disk(prepared: Prepared, finished: int, parameters: int, trained: int) -> str:
    """What the iterations to come will write, and what there is room for."""
    c, left = prepared.config, len(prepared.iterations) - finished
    iteration = parameters * (4 + prepared.model.dtype.itemsize)  # float32 parameters, and the export
    steps = (c.checkpoint.keep + 1) * trained * 4 * (1 + MOMENTS[c.train.optimizer])
    need = left * iteration + (steps if left else 0)
    room = files.free(prepared.workdir)
    text = f"{need / 2**30:.2f} GiB for {left} iterations to come, step checkpoints included"
    if room is None:
        return text
    short = " (TOO LITTLE: the run will stop where it runs out)" if room < need else ""
    return f"{text}; {room / 2**30:.2f} GiB free{short}"
