"""What a run reads: model files, tokenizer and chat template, datasets, given pairs."""

import dataclasses
import datetime
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spin_jax import config_values
from spin_jax.config import Config
from spin_jax.data import parquet, sources
from spin_jax.data.chat import Chat, unprompted_header
from spin_jax.data.examples import mixed_rows, split_held_out
from spin_jax.data.loading import load_examples
from spin_jax.data.official import OfficialChat
from spin_jax.data.pairs import load_pairs
from spin_jax.data.records import Example, Lengths, Pair, list_names, prompt_turns
from spin_jax.data.store import Examples
from spin_jax.evaluate import verifiers
from spin_jax.models import loading, lora, tokenizers, weight_files
from spin_jax.models.architecture import Model, Params
from spin_jax.models.params import init_params
from spin_jax.runtime import user_code
from spin_jax.selfplay import from_config
from spin_jax.selfplay.pairing import Pairing
from spin_jax.selfplay.variants import Judge, find_judge
from spin_jax.training import custom_loss


@dataclasses.dataclass
class Inputs:
    """What each process reads for itself, before the processes share any work."""

    config: Config
    model: Model  # without weights
    initial_params: Callable[[], Params]  # loads or initializes float32 weights
    chat: Chat
    given: dict[int, list[Pair]]  # pairs that selfplay.pairs gives, by iteration
    added: list[Pair]  # pairs of selfplay.add_pairs; their prompt_ids are negative
    judge: Judge  # scores sampled answers
    pairing: Pairing  # says which answers make a row
    verifier: verifiers.Verifier | None  # says which held-out answers are right
    rows: dict[str, Any]  # datasets by path; empty where the given pairs are the data
    held_out_rows: Any  # those of eval.path; None where it is not set
    data_revision: str | dict[str, str | None] | None  # the commit of a hub dataset; of several, by path
    hub_names: dict[str, str]  # OWNER/NAME@COMMIT of model.adapters and selfplay.scorer, where they are on the hub
    weights_digest: str  # of the checkpoint that the run starts from; "" for new weights
    notes: list[str]  # what was dropped, cut, left out or assumed


def read_inputs(config: Config, began: Mapping[str, Any], today: str) -> Inputs:
    """Reads everything that the config names.

    Args:
        began: config.json of the run in the workdir, or {}.
        today: the date that chat templates see, YYYY-MM-DD.

    Raises:
        ValueError, FileNotFoundError: what is wrong, with the key, or the file and row.
    """
    custom_loss.check(config.loss)
    name = config.eval.verifier
    verifier = verifiers.find_verifier(name) if name else None
    hub_names = _hub_names(config, began)
    pinned_config = config.changed(hub_names)
    model, initial_params, weights_digest = open_model(pinned_config, _recorded_revision(config, began))
    from_config.check_mesh(config, model)
    custom_loss.check(config.loss, model.mesh)
    stated, theirs = config.model.architecture, model.hf_config
    differing = [
        f"{key} {value!r} ({theirs[key]!r})" for key, value in stated.items() if key in theirs and theirs[key] != value
    ]
    notes = list(model.notes)
    if differing:
        notes += [f"the checkpoint differs from model.architecture, and counts: it differs in {', '.join(differing)}"]
    if model.end_of_turn is not None:
        name = model.tokenizer.convert_ids_to_tokens(model.end_of_turn)
        notes.append(
            f"{name} is a stop token: the chat template ends answers with it, and the checkpoint names another"
        )
    if header := unprompted_header(model.tokenizer):
        notes.append(
            f"the chat template ignores add_generation_prompt: {header!r} begins each answer, and the model must "
            "learn to write it; a template that has it (data.chat_template) would write it for the model"
        )
    chat = make_chat(config, model, today)
    judge = find_judge(pinned_config, model.mesh, datetime.date.fromisoformat(today))
    notes += judge.notes(config.lengths.max_length)
    pairing = Pairing(config, judge.fields)
    pairs = _read_given_pairs(config, chat, model.config.vocab_size, notes)
    c = config.data
    recorded, revisions = _recorded_data_revisions(config, began), {}

    def load(path: str, split: str) -> Any:
        revisions[path] = sources.pinned(path, recorded.get(path) or c.revision)
        return sources.load_rows(path, split, name=c.name, revision=revisions[path], notes=notes)

    rows = {path: load(path, c.split) for path in config_values.data_paths(c.path)}
    held_out = load(config.eval.path, config.eval.split) if config.eval.path else None
    pinned = revisions if len(revisions) > 1 else next(iter(revisions.values()), None)
    read = rows, held_out, pinned, hub_names, weights_digest, notes
    return Inputs(config, model, initial_params, chat, *pairs, judge, pairing, verifier, *read)


def _recorded_revision(config: Config, began: Mapping[str, Any]) -> str | None:
    """The commit of the hub model that the run began with; None where the config names another model now."""
    before = began.get("config", {}).get("model", {})
    is_same = all(before.get(key) == config.model[key] for key in ("path", "revision"))
    return began.get("model_revision") if is_same else None


def _hub_names(config: Config, began: Mapping[str, Any]) -> dict[str, str]:
    """model.adapters and selfplay.scorer as OWNER/NAME@COMMIT, where they are on the hub.

    The run continues with the commits that it began with, unless the config has other names now.
    """
    before, now = config_values.flat(began.get("config", {})), config_values.flat(config)
    recorded = {key: name for key, name in began.get("hub_names", {}).items() if before.get(key) == now[key]}
    keys = ("model.adapters", "selfplay.scorer")
    names = {key: recorded.get(key) or loading.pinned(now[key] or "") for key in keys}
    return {key: name for key, name in names.items() if name}


def _recorded_data_revisions(config: Config, began: Mapping[str, Any]) -> Mapping[str, str | None]:
    """The commits of the hub datasets that the run began with, by path; new datasets have none."""
    before, commits = began.get("config", {}).get("data", {}), began.get("data_revision")
    if before.get("revision") != config.data.revision:
        return {}
    paths = config_values.data_paths(before.get("path"))
    return commits if isinstance(commits, dict) else dict.fromkeys(paths, commits)


def shared_content(read: Inputs) -> bytes:
    """What all processes must have read alike: config, model description, given pairs, some rows."""
    given = itertools.chain(*read.given.values(), read.added)
    pairs = [ids for p in given for ids in (p.prompt, p.real, p.generated)]
    some = [
        (len(rows), [_row(rows, number) for number in range(0, len(rows), max(len(rows) // 64, 1))])
        for rows in filter(None, (*read.rows.values(), read.held_out_rows))
    ]
    m = read.model
    alike = read.config, m.hf_config, m.generation_config, m.stop_tokens, m.revision, read.hub_names, some
    return b"|".join([repr(alike).encode(), *(ids.tobytes() for ids in pairs)])


def _row(rows: Any, number: int) -> Any:
    try:
        return rows[number]
    except ValueError as error:  # reading all rows will find the first bad one, and name it
        return str(error)


def open_model(config: Config, recorded_revision: str | None = None) -> tuple[Model, Callable[[], Params], str]:
    """The model without weights, the function that loads or makes float32 weights, and their digest.

    The run continues with `recorded_revision`, the commit of the hub model that it began with, even if the branch
    has moved on.
    """
    c = config.model
    template = config.data.chat_template
    if c.path:
        revision = recorded_revision or c.revision
        model, directory = loading.describe(c.path, revision, dtype=c.dtype, chat_template=template)
        loading.check_architecture({"model_type": model.config.model_type, **c.architecture.to_dict()})
        model.notes.extend(loading.check_weights(directory, model.config))
        model = from_config.placed(config, model)
        if config.export.adapters and config_values.trains_on_path(config):
            loading.check_base(directory)
        digest, adapters = weight_files.digest(directory), None
        if c.adapters:
            adapters = loading.open_adapters(c.adapters, c.path, model)
            digest += f" with adapters {lora.digest(adapters)}"
        return model, lambda: loading.load_params(directory, model.config, model.mesh, jnp.float32, adapters), digest
    if not c.tokenizer:
        raise ValueError("model.architecture needs model.tokenizer: a directory, or module:function")
    notes: list[str] = []
    if ":" in c.tokenizer:
        tokenizer = tokenizers.with_chat_template(user_code.called(c.tokenizer), template)
    else:
        tokenizer = tokenizers.load_tokenizer(c.tokenizer, template, notes)
    model = from_config.placed(config, loading.new_model(c.architecture.to_dict(), tokenizer, dtype=c.dtype))
    model.notes.extend(notes)
    return model, lambda: init_params(model.config, jax.random.key(config.seed), model.mesh), ""


def make_chat(config: Config, model: Model, today: str | None = None) -> Chat:
    """The chat template and tokenizer of the model, with the limits and the system message of the config."""
    kind = OfficialChat if config.official else Chat
    lengths = Lengths(config.lengths.max_prompt, config.lengths.max_length)
    day = today or config.data.today
    try:
        date = datetime.date.fromisoformat(day) if day else None
    except ValueError as error:
        raise ValueError(f"data.today={day!r}: expected a date such as 2026-01-31") from error
    system = config.data.system_message
    return kind(model.tokenizer, model.stop_tokens, lengths=lengths, system_message=system, today=date)


def _read_given_pairs(
    config: Config, chat: Chat, vocab_size: int, notes: list[str]
) -> tuple[dict[int, list[Pair]], list[Pair]]:
    """The pairs of selfplay.pairs by iteration, and those of selfplay.add_pairs."""
    play = config.selfplay
    options = {"bad_rows": config.data.bad_rows, "max_bad": config.data.max_bad, "scored": bool(play.scorer)}

    def read(path: str) -> list[Pair]:
        # This run holds out its own prompts, of whichever file of another run's.
        of_a_run = parquet.holds_pairs_of_a_run(path)
        rows = sources.load_rows(path, play.pairs_split, all_files=of_a_run, notes=notes)
        pairs, counts = load_pairs(rows, chat, path=path, vocab_size=vocab_size, **options)
        notes.extend([*_count_notes(path, counts), *_check_ends(config, chat, path, _as_examples(pairs, chat))])
        if play.length_penalty and not of_a_run and any(pair.score is not None for pair in pairs):  # a run's hold it
            said = f"{path}: selfplay.length_penalty={play.length_penalty:g} changes no score that the pairs bring"
            raise ValueError(f"{said}: leave out their column score, or take the penalty from it and unset the key")
        return pairs

    given = {t: read(path) for t, path in config_values.given_pairs(config).items()}
    added = read(play.add_pairs) if play.add_pairs else []
    for t in range(max(0, play.start - play.mix_previous), play.start):
        if t not in given:
            notes.append(f"the pairs of iteration {t} are not mixed in: --config.selfplay.pairs={t}=PATH gives them")
    # No other pair of the run has a negative prompt_id.
    return given, [dataclasses.replace(pair, prompt_id=-1 - pair.prompt_id) for pair in added]


# Datasets after the first number their rows from here, from twice this, and so on, so that each prompt_id is unique
# in a run.
_NEXT_DATASET = 2**40


def datasets_of(read: Inputs) -> tuple[list[Examples], Examples]:
    """Prompts with their human answers: one dataset for all iterations, or one for each; and those of eval.path."""
    config, limit = read.config, read.config.data.limit
    mixtures = config_values.data_mixtures(config.data.path)
    has_mixture, numbers = any(len(shares) > 1 for shares in mixtures), {path: n for n, path in enumerate(read.rows)}
    keys = "prompt_column", "answer_column", "bad_rows", "max_bad"
    options = {"seed": config.seed, "all_turns": config.sft.turns == "all", **{key: config.data[key] for key in keys}}

    def load(number: int, path: str, rows: Any, limit: int | None) -> Examples:
        examples, counts = load_examples(rows, read.chat, path=path, limit=limit, **options)
        if repeated := len(examples) - len(np.unique(examples.groups)):
            counts["rows with the prompt of an earlier row"] = repeated
        read.notes.extend([*_count_notes(path, counts), *_check_ends(config, read.chat, path, examples)])
        if (number or has_mixture) and examples.column("prompt_id").max() >= _NEXT_DATASET:
            raise ValueError(f"{path}: with several datasets, each prompt_id must be below {_NEXT_DATASET}")
        return examples.shifted(number * _NEXT_DATASET)

    @functools.cache
    def load_part(path: str, limit: int | None) -> Examples:
        return load(numbers[path], path, read.rows[path], limit)

    @functools.cache
    def load_mixture(shares: tuple[tuple[str, Fraction], ...]) -> Examples:
        sizes = {path: len(read.rows[path]) for path, _ in shares}
        if len(shares) == 1:
            return load_part(shares[0][0], limit)
        parts = {path: load_part(path, count) for path, count in mixed_rows(sizes, dict(shares), limit).items()}
        total = sum(map(len, parts.values()))
        for path, examples in parts.items():
            share = f"{len(examples) / total:.1%} of the mixture's {total}"
            read.notes.append(f"{path}: {len(examples)} of {sizes[path]} rows, {share}")
        return Examples.joined(list(parts.values()))

    held_out = Examples.of([], read.chat)
    if read.held_out_rows is not None:
        held_out = load(max(len(read.rows), 1), config.eval.path, read.held_out_rows, config.eval.limit)
    if read.rows:
        return [load_mixture(tuple(shares.items())) for shares in mixtures], held_out
    iterations = range(config.selfplay.start, config.selfplay.iterations)  # the given pairs are the data
    if absent := [t for t in iterations if t not in read.given]:
        raise ValueError(f"data.path is not set, and iteration {absent[0]} has no given pairs")
    unique = {prompt_turns(p.real_messages): p for t in sorted(read.given, reverse=True) for p in read.given[t]}
    return [_as_examples(sorted(unique.values(), key=lambda pair: pair.prompt_id), read.chat)], held_out


def _as_examples(pairs: Sequence[Pair], chat: Chat) -> Examples:
    return Examples.of((Example(p.prompt_id, p.real_messages, p.prompt, p.real) for p in pairs), chat)


def lengths_of(datasets: Sequence[Examples]) -> np.ndarray:
    """The tokens of each prompt and human answer, int [N, 2]. A dataset that serves several iterations counts once."""
    different = {id(dataset): dataset for dataset in datasets}.values()
    return np.concatenate([dataset.lengths for dataset in different])


def split(config: Config, datasets: Sequence[Examples], held_out: Examples) -> tuple[list[Examples], Examples]:
    """The datasets to train on, and the held-out examples: those of eval.path, or some of the first dataset.

    The seed chooses among the prompts of the first dataset. No dataset keeps a prompt that is held out, and
    with sft.turns=all no conversation in which one is answered on the way.

    Raises:
        ValueError: every prompt of a dataset is held out.
    """
    if not config.eval.path:
        options = {key: config.eval[key] for key in ("fraction", "limit")}
        chosen = split_held_out(datasets[0].groups, seed=config.seed, **options)
        held_out = datasets[0].select(np.isin(datasets[0].groups, list(chosen)))
    keys = held_out.keys

    def rest(examples: Examples) -> Examples:
        is_held_out = examples.has_prompt_of(keys) | examples.answered_earlier(keys)
        if len(examples) and is_held_out.all():
            raise ValueError("nothing is left to train on: every prompt of a dataset is among the held-out ones")
        return examples.select(~is_held_out)

    return list(map(rest, datasets)), held_out


def _check_ends(config: Config, chat: Chat, path: str, read: Examples) -> list[str]:
    """A note on human answers that end in no stop token; ValueError where too few end in one."""
    stopped, ended = read.column("stopped"), int(read.column("stopped").sum())
    endless = np.flatnonzero(~stopped & (read.lengths.sum(axis=1) < chat.lengths.max_length))  # not the cut ones
    if not len(endless) or config.official:  # there each answer gets EOS, and loses it only where it is cut
        return []
    names = chat.tokenizer.convert_ids_to_tokens(list(chat.stop_tokens))
    what = f"{len(endless)} of {ended + len(endless)} human answers end in no stop token ({list_names(names)})"
    if ended < config.data.min_ended * (ended + len(endless)):
        last = chat.tokenizer.decode(read[endless[0]].real[-3:].tolist())
        raise ValueError(
            f"{path}: {what}, and a model that is trained on them does not learn to end: the first such answer ends "
            f"in {last!r}. Set data.chat_template to a template that writes a stop token after each answer, or "
            f"data.min_ended (now {config.data.min_ended:g}) to 0 if this is as it should be"
        )
    return [f"{path}: {what}"]


def _count_notes(path: str, counts: Counter) -> list[str]:
    return [f"{path}: {what}: {number}" for what, number in sorted(counts.items())]
