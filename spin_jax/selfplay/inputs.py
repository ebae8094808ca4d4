"""What a run reads: model files, tokenizer and chat template, datasets, given pairs."""

import dataclasses
import datetime
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spin_jax import config_values
from spin_jax.config import Config
from spin_jax.data import sources
from spin_jax.data.chat import Chat
from spin_jax.data.examples import load_examples, split_held_out
from spin_jax.data.official import OfficialChat
from spin_jax.data.pairs import load_pairs
from spin_jax.data.records import Example, Lengths, Pair, prompt_turns
from spin_jax.evaluate import verifiers
from spin_jax.models import loading, tokenizers, weight_files
from spin_jax.models.architecture import Model, Params
from spin_jax.models.params import init_params
from spin_jax.runtime import user_code
from spin_jax.selfplay import from_config
from spin_jax.selfplay.variants import Judge, find_judge
from spin_jax.training import custom_loss


class Inputs(NamedTuple):
    """What each process reads for itself, before the processes share any work."""

    model: Model
    initial_params: Callable[[], Params]
    chat: Chat
    given: dict[int, list[Pair]]
    judge: Judge | None
    verifier: verifiers.Verifier | None
    rows: dict[str, Any]  # datasets by path; empty where the given pairs are the data
    data_revision: str | dict[str, str | None] | None  # the commit of a hub dataset; of several, by path
    weights_digest: str  # of the checkpoint that the run starts from; "" for new weights
    notes: list[str]


def read_inputs(config: Config, began: Mapping[str, Any], today: str) -> Inputs:
    """Reads everything that the config names.

    Args:
        began: config.json of the run in the workdir, or {}.
        today: the date that chat templates see, YYYY-MM-DD.

    Raises:
        ValueError, FileNotFoundError: what is wrong, with the key, or the file and row.
    """
    custom_loss.check(config.loss)
    judge, name = find_judge(config), config.eval.verifier
    verifier = verifiers.find_verifier(name) if name else None
    model, initial_params, weights_digest = open_model(config, _recorded_revision(config, began))
    from_config.check_mesh(config, model)
    custom_loss.check(config.loss, model.mesh)
    notes = _architecture_notes(config, model)
    chat = make_chat(config, model, today)
    given = _read_given_pairs(config, chat, model.config.vocab_size, notes)
    c = config.data
    rows, revisions = {}, {}
    recorded = _recorded_data_revisions(config, began)
    for path in dict.fromkeys(config_values.data_paths(c.path)):
        revisions[path] = sources.pinned(path, recorded.get(path) or c.revision)
        rows[path] = sources.load_rows(path, c.split, name=c.name, revision=revisions[path])
    pinned = revisions if len(revisions) > 1 else next(iter(revisions.values()), None)
    return Inputs(model, initial_params, chat, given, judge, verifier, rows, pinned, weights_digest, notes)


def _recorded_revision(config: Config, began: Mapping[str, Any]) -> str | None:
    """The commit of the hub model that the run began with; None where the config names another model now."""
    before = began.get("config", {}).get("model", {})
    is_same = all(before.get(key) == config.model[key] for key in ("path", "revision"))
    return began.get("model_revision") if is_same else None


def _recorded_data_revisions(config: Config, began: Mapping[str, Any]) -> Mapping[str, str | None]:
    """The commits of the hub datasets that the run began with, by path; new datasets have none."""
    before, commits = began.get("config", {}).get("data", {}), began.get("data_revision")
    if before.get("revision") != config.data.revision:
        return {}
    return (
        commits if isinstance(commits, dict) else dict.fromkeys(config_values.data_paths(before.get("path")), commits)
    )


def shared_content(config: Config, read: Inputs) -> bytes:
    """What all processes must have read alike: config, model description, given pairs, some rows."""
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
    except ValueError as error:  # reading all rows will find the first bad one, and name it
        return str(error)


def open_model(config: Config, recorded_revision: str | None = None) -> tuple[Model, Callable[[], Params], str]:
    """The model without weights, the function that loads or makes float32 weights, and their digest.

    Args:
        recorded_revision: the commit of the hub model that the run began with. The run continues with it,
            even if the branch has moved on.
    """
    c = config.model
    template = config.data.chat_template
    if c.path:
        revision = recorded_revision or c.revision
        model, directory = loading.describe(c.path, revision, dtype=c.dtype, chat_template=template)
        loading.check_architecture({"model_type": model.config.model_type, **c.architecture.to_dict()})
        loading.check_weights(directory, model.config)
        model = from_config.placed(config, model)
        digest = weight_files.digest(directory)
        return model, lambda: loading.load_params(directory, model.config, model.mesh, jnp.float32), digest
    if not c.tokenizer:
        raise ValueError("model.architecture needs model.tokenizer: a directory, or module:function")
    if ":" in c.tokenizer:
        tokenizer = tokenizers.with_chat_template(user_code.called(c.tokenizer), template)
    else:
        tokenizer = tokenizers.load_tokenizer(c.tokenizer, template)
    model = loading.new_model(c.architecture.to_dict(), tokenizer, dtype=c.dtype)
    model = from_config.placed(config, model)
    return model, lambda: init_params(model.config, jax.random.key(config.seed), model.mesh), ""


def _architecture_notes(config: Config, model: Model) -> list[str]:
    """A note where the checkpoint differs from the architecture that the config states."""
    stated, theirs = config.model.architecture, model.hf_config
    differing = [
        f"{key} {value!r} ({theirs[key]!r})" for key, value in stated.items() if key in theirs and theirs[key] != value
    ]
    if not differing:
        return []
    return [f"the checkpoint differs from model.architecture, and counts: it differs in {', '.join(differing)}"]


def make_chat(config: Config, model: Model, today: str | None = None) -> Chat:
    """The chat template and tokenizer of the model, with the limits and the system message of the config."""
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
        raise ValueError(f"data.today={text!r}: expected a date such as 2026-01-31") from error


def _read_given_pairs(config: Config, chat: Chat, vocab_size: int, notes: list[str]) -> dict[int, list[Pair]]:
    given, c = {}, config.data
    for t, path in config_values.given_pairs(config).items():
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
        notes += _count_notes(path, counts)
    start = config.selfplay.start
    for t in range(max(0, start - config.selfplay.mix_previous), start):
        if t not in given:
            notes.append(f"the pairs of iteration {t} are not mixed in: --config.selfplay.pairs={t}=PATH gives them")
    return given


# Datasets after the first number their rows from here, from twice this, and so on, so that each prompt_id is
# unique in a run.
_NEXT_DATASET = 2**40


def datasets_of(config: Config, read: Inputs) -> list[list[Example]]:
    """Prompts with their human answers: one dataset for all iterations, or one for each."""
    c = config.data
    if not read.rows:  # then the given pairs are the data
        iterations = range(config.selfplay.start, config.selfplay.iterations)
        if absent := [t for t in iterations if t not in read.given]:
            raise ValueError(f"data.path is not set, and iteration {absent[0]} has no given pairs")
        unique = {prompt_turns(p.real_messages): p for t in sorted(read.given, reverse=True) for p in read.given[t]}
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
        read.notes.extend(_count_notes(path, counts))
        if number and max(example.prompt_id for example in examples) >= _NEXT_DATASET:
            raise ValueError(f"{path}: with several datasets, each prompt_id must be below {_NEXT_DATASET}")
        offset = number * _NEXT_DATASET
        loaded[path] = [dataclasses.replace(e, prompt_id=e.prompt_id + offset) for e in examples]
    return [loaded[path] for path in config_values.data_paths(config.data.path)]


def all_examples(datasets: Sequence[list[Example]]) -> list[Example]:
    """The examples of all datasets. A dataset that serves several iterations counts once."""
    return [example for dataset in {id(d): d for d in datasets}.values() for example in dataset]


def held_out_of(config: Config, examples: Sequence[Example]) -> list[Example]:
    """The examples that are kept from training, chosen by the seed."""
    ids = split_held_out(
        [example.prompt_id for example in examples],
        fraction=config.eval.fraction,
        limit=config.eval.limit,
        seed=config.seed,
    )
    return [example for example in examples if example.prompt_id in ids]


def without_held_out(datasets: Sequence[list[Example]], held_out: Sequence[Example]) -> list[list[Example]]:
    """The datasets without the held-out examples, and without the same prompts in later datasets."""
    ids = {example.prompt_id for example in held_out}
    prompts = {prompt_turns(example.messages) for example in held_out} if len(datasets) > 1 else set()

    def is_kept(example: Example, later: bool) -> bool:
        return example.prompt_id not in ids and not (later and prompt_turns(example.messages) in prompts)

    return [[e for e in examples if is_kept(e, examples is not datasets[0])] for examples in datasets]


def _count_notes(path: str, counts: Counter) -> list[str]:
    return [f"{path}: {what}: {number}" for what, number in sorted(counts.items())]
