"""From a config to what a run needs, everything read and checked before anything is compiled."""

import dataclasses
import functools
import importlib.metadata
import os
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

from spin_jax import config as config_lib
from spin_jax import convert, data, evaluate, files, hosts, losses, programs, sharding
from spin_jax.batches import RowShape
from spin_jax.chat import Chat, Example, Lengths, Pair, asked
from spin_jax.draw import Sampling
from spin_jax.metrics import compact
from spin_jax.model import Decoder, Model, Params, abstract_params, count_params, init_params
from spin_jax.official import OfficialChat
from spin_jax.train import MOMENTS, Optimization

Config = Any  # a resolved ConfigDict: type checkers know nothing of its keys


@dataclasses.dataclass
class Prepared:
    """The inputs of a run."""

    config: Config
    workdir: epath.Path
    model: Model  # without weights
    initial_params: Callable[[], Params]  # loads or initializes float32 weights
    chat: Chat
    examples: list[Example]  # to train on
    held_out: list[Example]
    given: dict[int, list[Pair]]  # pairs from the config, by iteration
    pair_shape: RowShape  # of micro-batches, the same for all iterations
    example_shape: RowShape
    fingerprint: str  # of the dataset
    notes: list[str]  # what was dropped, cut or left out

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return self.model.mesh

    @functools.cached_property
    def decoder(self) -> Decoder:
        """The model as a function, for policy and opponent alike."""
        return programs.decoder(self.config, self.model)

    @functools.cached_property
    def sampling_mesh(self) -> jax.sharding.Mesh:
        """The mesh of the sampler, on the same devices."""
        return programs.sampling_mesh(self.config, self.model)

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
    def iterations(self) -> range:
        """The iterations this run makes."""
        return range(self.config.selfplay.start, self.config.selfplay.iterations)


def prepare(config: Config, workdir: str) -> Prepared:
    """Reads model files and data, checks what can be checked, and takes the workdir.

    Raises:
        ValueError, FileNotFoundError: naming the key, or the file and row.
    """
    root = epath.Path(workdir if "://" in workdir else os.path.abspath(os.path.expanduser(workdir)))
    began = files.read_agreed(root / "config.json") or {}
    read = hosts.together(lambda: _read(config, began.get("model_revision")))
    hosts.check_same("config or data", _seen(config, read))
    model, chat, given, notes = read.model, read.chat, read.given, read.notes
    examples = _examples(config, read)
    held_out = data.split_held_out(
        [example.prompt_id for example in examples],
        fraction=config.eval.fraction,
        limit=config.eval.limit,
        seed=config.seed,
    )
    if config.lengths.max_length > model.config.max_position_embeddings:
        notes.append(
            f"lengths.max_length={config.lengths.max_length} exceeds the model's "
            f"{model.config.max_position_embeddings} positions"
        )
    prepared = Prepared(
        config=config,
        workdir=root,
        model=model,
        initial_params=read.initial_params,
        chat=chat,
        examples=[example for example in examples if example.prompt_id not in held_out],
        held_out=[example for example in examples if example.prompt_id in held_out],
        given=given,
        pair_shape=programs.pair_shape(config, model, examples, given),
        example_shape=programs.example_shape(config, model, examples),
        fingerprint=read.rows._fingerprint if config.data.path else "",
        notes=notes,
    )
    _check_options(prepared)
    _record(prepared, began)
    return prepared


class _Read(NamedTuple):
    """What a process reads for itself, before processes share the work."""

    model: Model
    initial_params: Callable[[], Params]
    chat: Chat
    given: dict[int, list[Pair]]
    rows: Any  # a dataset; None where the given pairs are the data
    notes: list[str]


def _read(config: Config, revision: str | None) -> _Read:
    losses.find(config.loss.name)
    if config.eval.verifier:
        evaluate.find_verifier(config.eval.verifier)
    model, initial_params = open_model(config, revision)
    programs.check_mesh(config, model)
    notes = _other_architecture(config, model)
    chat = make_chat(config, model)
    given = _given(config, chat, model.config.vocab_size, notes)
    c = config.data
    rows = data.load_rows(c.path, c.split, name=c.name, revision=c.revision) if c.path else None
    return _Read(model, initial_params, chat, given, rows, notes)


def _seen(config: Config, read: _Read) -> bytes:
    """What processes must have alike: the config, the model's description, given pairs, some of the rows."""
    pairs = [ids for pairs in read.given.values() for p in pairs for ids in (p.prompt, p.real, p.generated)]
    rows = [] if read.rows is None else read.rows
    some = [rows[number] for number in range(0, len(rows), max(len(rows) // 64, 1))]
    m = read.model
    alike = config, m.hf_config, m.generation_config, m.stop_tokens, m.revision, len(rows), some
    return b"|".join([repr(alike).encode(), *(ids.tobytes() for ids in pairs)])


def open_model(config: Config, began_with: str | None = None) -> tuple[Model, Callable[[], Params]]:
    """The model without weights, and what makes them.

    Args:
        began_with: the commit of the hub's that a run began with: it goes on with that one, whatever the
            branch has come to since.
    """
    c = config.model
    template = config.data.chat_template
    if c.path:
        revision = c.revision or began_with
        model, directory = convert.describe(c.path, revision, dtype=c.dtype, chat_template=template)
        convert.check_weights(directory, model.config)
        model = programs.placed(config, model)
        return model, lambda: convert.load_params(directory, model.config, model.mesh, jnp.float32)
    if not c.tokenizer:
        raise ValueError("model.architecture needs model.tokenizer: a directory, or module:function")
    if ":" in c.tokenizer:
        made = config_lib.import_function(c.tokenizer)()
        tokenizer = convert.with_chat_template(made, template)
    else:
        tokenizer = convert.load_tokenizer(c.tokenizer, template)
    model = convert.new_model(c.architecture.to_dict(), tokenizer, dtype=c.dtype)
    model = programs.placed(config, model)
    return model, lambda: init_params(model.config, jax.random.key(config.seed), model.mesh)


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
    prepared.sampling()
    prepared.sft_options()
    for t in prepared.iterations:
        prepared.options(t)


def make_chat(config: Config, model: Model) -> Chat:
    """What turns conversations into ids for this model, as the config wants it."""
    kind = OfficialChat if config.official else Chat
    lengths = Lengths(config.lengths.max_prompt, config.lengths.max_length)
    return kind(
        model.tokenizer, model.stop_tokens, lengths=lengths, system_message=config.data.system_message
    )


def _given(config: Config, chat: Chat, vocab_size: int, notes: list[str]) -> dict[int, list[Pair]]:
    given = {}
    for t, path in config_lib.given_pairs(config).items():
        rows = data.load_rows(path, config.selfplay.pairs_split, all_files=True)
        given[t], counts = data.load_pairs(rows, chat, path=path, vocab_size=vocab_size)
        notes += _counted(path, counts)
    start = config.selfplay.start
    for t in range(max(0, start - config.selfplay.mix_previous), start):
        if t not in given:
            notes.append(
                f"the pairs of iteration {t} are not mixed in: --config.selfplay.pairs={t}=PATH gives them"
            )
    return given


def _examples(config: Config, read: _Read) -> list[Example]:
    """Prompts with their human answers."""
    c = config.data
    if not c.path:  # the given pairs are the data
        wanted = range(config.selfplay.start, config.selfplay.iterations)
        if absent := [t for t in wanted if t not in read.given]:
            raise ValueError(f"data.path is not set, and iteration {absent[0]} has no given pairs")
        unique = {asked(p.real_messages): p for t in sorted(read.given, reverse=True) for p in read.given[t]}
        pairs = sorted(unique.values(), key=lambda pair: pair.prompt_id)
        return [Example(p.prompt_id, p.real_messages, p.prompt, p.real) for p in pairs]
    examples, counts = data.load_examples(
        read.rows,
        read.chat,
        path=c.path,
        prompt_column=c.prompt_column,
        answer_column=c.answer_column,
        limit=c.limit,
        seed=config.seed,
    )
    read.notes.extend(_counted(c.path, counts))
    return examples


def _counted(path: str, counts: Counter) -> list[str]:
    return [f"{path}: {what}: {number}" for what, number in sorted(counts.items())]


# What may differ when a run is continued; all else would make it another run.
_FREE = (
    "selfplay.iterations",
    "mesh.",
    "eval.verifier",
    "eval.samples",
    "eval.fixed_prompts",
    "checkpoint.",
    "logging.",
    "sampling.batch_size",
    "sft.control",  # and its learning rate
    "sft.offload",
    "train.offload",
    "train.remat",
    "sampling.tensor",
    "compiler_flags",
)
_PACKAGES = ("spin_jax", "jax", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "grain")


def _record(prepared: Prepared, began: Mapping[str, Any]) -> None:
    """Writes config.json; refuses the workdir of another run, with the difference."""
    path = prepared.workdir / "config.json"
    config = prepared.config.to_dict()
    if began:
        theirs = _flat(began["config"])
        both = range(min(theirs["selfplay.iterations"], prepared.config.selfplay.iterations))
        for name, value in _flat(config).items():
            old, new = theirs.get(name, value), value
            if name in config_lib.PER_ITERATION:
                old, new = ([config_lib.per_iteration(v, t) for t in both] for v in (old, new))
            if not name.startswith(_FREE) and old != new:
                raise ValueError(
                    f"{prepared.workdir} holds another run: there {name} is {theirs[name]!r}, and now "
                    f"{value!r}. Take a new --workdir, or the old value"
                )
    files.write_json(
        path,
        {
            "config": config,
            "model_revision": prepared.model.revision,
            "data_fingerprint": prepared.fingerprint,
            "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        },
    )
    hosts.together(lambda: _see(path))


def _see(path: epath.Path) -> None:
    if not path.exists():
        raise FileNotFoundError(
            f"{path}, which process 0 has written, is not here: processes need one workdir, on a shared disk "
            "or in an object store"
        )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:  # JSON knows no tuples
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def plan(prepared: Prepared, finished: int) -> str:
    """The lines printed at start-up: devices, mesh, model, memory, data and what is about to run."""
    c, model = prepared.config, prepared.model
    device = jax.devices()[0]
    count = count_params(sharding.unboxed(abstract_params(model.config)))
    # float32 weights and gradients, and the optimizer's moments
    copies = 2 + MOMENTS[c.train.optimizer]
    gib = count * 4 * copies / (model.mesh.shape["fsdp"] * model.mesh.shape["tensor"]) / 2**30
    mesh = " × ".join(f"{name} {size}" for name, size in model.mesh.shape.items())
    source = c.model.path or "initialized here"
    revision = f" at {model.revision[:12]}" if model.revision else ""
    first, last, shape = c.selfplay.start, c.selfplay.iterations - 1, prepared.pair_shape
    betas = ", ".join(f"{beta:g}" for beta in c.loss.beta)
    lines = [
        ("devices", f"{jax.device_count()} × {device.device_kind}, mesh {mesh}"),
        (
            "model",
            f"{model.config.model_type}, {source}{revision}: {compact(count)} parameters, {model.dtype}",
        ),
        ("memory", f"{gib:.2f} GiB a device for weights, gradients and optimizer; activations come on top"),
        ("data", f"{len(prepared.examples)} prompts to train on, {len(prepared.held_out)} held out"),
        ("rows", f"{shape.rows} × {shape.length} tokens a micro-batch, {c.train.batch_size} pairs a step"),
        ("attention", prepared.decoder.kernel),
        ("self-play", f"iterations {first} to {last}, {finished} of them done"),
        ("loss", f"{c.loss.name}, β {betas}"),
        ("workdir", str(prepared.workdir)),
        *(("note", note) for note in prepared.notes),
    ]
    return "\n".join(f"{name:<10} {text}" for name, text in lines)
