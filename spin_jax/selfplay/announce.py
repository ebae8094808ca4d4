"""What a run prints before it begins: its config, the lengths of the data, and an overview of the run."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from spin_jax import config_values
from spin_jax.config import default
from spin_jax.data.records import Pair
from spin_jax.forecast import sizes
from spin_jax.forecast.job import Amounts, Work
from spin_jax.models import cost
from spin_jax.runtime import processes, sharding
from spin_jax.runtime.console import compact
from spin_jax.selfplay import from_config
from spin_jax.selfplay.inputs import datasets_of, lengths_of, read_inputs
from spin_jax.selfplay.prepare import Prepared
from spin_jax.storage import files
from spin_jax.training.optimizer import OPTIMIZERS
from spin_jax.training.packing import group_sizes, pair_group


def length_table(prepared: Prepared) -> str:
    """A table of the data's lengths in tokens, before anything is dropped or cut, with the limits below."""
    most = 2**31 - 1
    unlimited = prepared.config.changed({"lengths.max_prompt": most - 1, "lengths.max_length": most})
    read = processes.together(lambda: read_inputs(unlimited, prepared.began, prepared.today))
    datasets, held_out = datasets_of(read)
    prompts, answers = lengths_of([*datasets, held_out]).T
    columns = {"prompt": prompts, "answer": answers, "both": prompts + answers}
    lines = [f"{'tokens':<10}" + "".join(f"{name:>10}" for name in columns)]
    for title, share in (("median", 50), ("90%", 90), ("99%", 99), ("longest", 100)):
        lines.append(f"{title:<10}" + "".join(f"{np.percentile(n, share):>10.0f}" for n in columns.values()))
    limits, count = prepared.config.lengths, len(prompts)
    long = int((prompts > limits.max_prompt).sum())
    cut = int(((prompts <= limits.max_prompt) & (prompts + answers > limits.max_length)).sum())
    lines.append(f"prompts longer than lengths.max_prompt={limits.max_prompt}, dropped: {long} of {count}")
    lines.append(f"answers cut at lengths.max_length={limits.max_length}: {cut} of {count}")
    return "\n".join(lines)


def example_rows(prepared: Prepared, count: int = 3) -> str:
    """Some examples as the model sees them: the prompt, the tokens of the answer, which are trained on, and its end."""
    examples, chat = prepared.datasets[0], prepared.chat
    lines = []
    for example in examples[:: -(-len(examples) // count)]:
        prompt, real = example.prompt.tolist(), example.real.tolist()
        places = [] if example.earlier is None else example.earlier.tolist()
        tokens = [_piece(chat.tokenizer, *two) for two in itertools.pairwise([prompt[-1], *real])]
        before = " ".join(_piece(chat.tokenizer, *prompt[place - 1 : place + 1]) for place in places)
        last = f"{tokens[-1]} (id {real[-1]}), {'a stop token' if chat.stopped(example.real) else 'NO stop token'}"
        lines += [
            f"row with prompt_id {example.prompt_id}",
            f"  prompt   {len(prompt)} tokens: {_shortened(repr(chat.tokenizer.decode(prompt)))}",
            *([f"  earlier  {len(places)} tokens, which SFT trains on too: {_shortened(before)}"] if places else []),
            f"  answer   {len(real)} tokens, which are trained on: {_shortened(' '.join(tokens))}",
            f"  its end  {last}",
        ]
    return "\n".join(lines)


def _piece(tokenizer: Any, before: int, token: int) -> str:
    """The text that a token adds to the one before it: alone, some tokenizers leave out its space."""
    return repr(tokenizer.decode([before, token]).removeprefix(tokenizer.decode([before])))


def _shortened(text: str, most: int = 300) -> str:
    """The text, without its middle where it is long."""
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"


def run_overview(prepared: Prepared, finished: int) -> str:
    """Devices, mesh, model, memory, disk, data, loss and notes: a line for each.

    Of the iterations, `finished` have ended already.
    """
    c, model = prepared.config, prepared.model
    device = jax.devices()[0]
    count, trained = cost.all_params(model.config), from_config.trained_params(c, model.config)
    rank = c.train.lora_rank
    frozen = cost.frozen_bytes(model.config, model.mesh, model.dtype.itemsize, c.train.frozen_dtype) if rank else 0
    # float32 weights and gradients, and the optimizer's moments
    copies = 2 + OPTIMIZERS[c.train.optimizer].moments
    gib = (trained * 4 * copies / sharding.weight_shards(model.mesh) + frozen) / 2**30
    mesh = " × ".join(f"{name} {size}" for name, size in model.mesh.shape.items())
    source = c.model.path or "initialized here"
    revision = f" at {model.revision[:12]}" if model.revision else ""
    first, last, shape = c.selfplay.start, c.selfplay.iterations - 1, prepared.pair_shape
    betas = ", ".join(f"{beta:g}" for beta in c.loss.beta)
    beside = "".join(f", {text}" for text in config_values.algorithm_notes(c))
    data = ", ".join(str(len(dataset)) for dataset in prepared.datasets)
    lines = [
        ("devices", f"{jax.device_count()} × {device.device_kind}, mesh {mesh}"),
        ("model", f"{model.config.model_type}, {source}{revision}: {compact(count)} parameters, {model.dtype}"),
        ("memory", f"{gib:.2f} GiB a device for weights, gradients and optimizer; activations come on top"),
        *([("LoRA", f"rank {rank}: {compact(trained)} numbers are trained")] if rank else []),
        ("disk", _disk(prepared, finished)),
        ("data", f"{data} prompts to train on, {len(prepared.held_out)} held out"),
        ("rows", f"{shape.rows} × {shape.length} tokens a micro-batch, {c.train.batch_size} pairs a step"),
        ("attention", prepared.decoder.kernel),
        ("self-play", f"iterations {first} to {last}, {finished} of them done"),
        ("engine", c.sampling.command or c.sampling.engine or "ours"),
        ("loss", f"{c.loss.name}, β {betas}{beside}"),
        ("workdir", str(prepared.workdir)),
        *(("note", note) for note in prepared.notes),
    ]
    return "\n".join(f"{name:<10} {text}" for name, text in lines)


def work(prepared: Prepared) -> Work:
    """What the run has to do. selfplay.rows or selfplay.pairing may leave some pairs out."""
    play, held_out, iterations = prepared.config.selfplay, len(prepared.held_out), {}
    held_pairs = held_out * config_values.answers_wanted(play, held_out=True)
    for t in prepared.iterations:
        sampled = len(prepared.examples(t)) * play.samples + held_pairs
        answers, written = (0, len(prepared.given[t])) if t in prepared.given else (sampled, sampled)
        sources = prepared.sources(t)
        pairs = sum(prepared.most_pairs(source) + len(prepared.added_pairs(source)) for source in sources)
        iterations[t] = Amounts(answers, written + len(prepared.added_pairs(t)), pairs)
    return Work(iterations, len(prepared.datasets[0]), held_out, held_pairs)


def typical_pairs(prepared: Prepared, response_tokens: float | None) -> list[Pair]:
    """Pairs as long as those of the run, at most 16 for each of a step.

    They have some of its prompts and human answers. The generated ones have their mean length, `response_tokens`; None:
    that of the human ones.
    """
    examples, c, roles = prepared.datasets[0], prepared.config, prepared.roles
    count = min(len(examples), 16 * c.train.batch_size)
    chosen = [examples[n] for n in np.linspace(0, len(examples) - 1, count).astype(int).tolist()]
    length = response_tokens or np.mean([len(example.real) for example in chosen])
    new = np.zeros(max(round(length), 1), np.int32)
    pairs = [Pair(n, 0, [], [], e.prompt, e.real, new, truncated=False, start=new) for n, e in enumerate(chosen)]
    fits = np.all(group_sizes([pair_group(pair, roles) for pair in pairs]) <= prepared.pair_shape.capacity, axis=1)
    return [pairs[n] for n in np.flatnonzero(fits)]


def _disk(prepared: Prepared, finished: int) -> str:
    """What the iterations to come will write, and how much room there is."""
    all_work, left = work(prepared), prepared.iterations[finished:]
    to_come = all_work._replace(iterations={t: all_work.iterations[t] for t in left})
    job = from_config.job(prepared.config, prepared.model, prepared.pair_shape, ())
    written = sizes.of_run(job, to_come) if left else {}
    need = sum(size for what, size in written.items() if what != "start" or not finished)
    room = files.free(prepared.workdir)
    text = f"{need / 2**30:.2f} GiB for {len(left)} iterations to come, step checkpoints included"
    if room is None:
        return text
    short = " (TOO LITTLE: the run will stop where it runs out)" if room < need else ""
    return f"{text}; {room / 2**30:.2f} GiB free{short}"


def config_tree(config: Any, everything: bool = False) -> str:
    """The keys that differ from their defaults, with the defaults; or all keys, those that differ marked."""
    rows = list(_branch(config.to_dict(), default().to_dict(), everything))
    if not rows:
        return "config: the defaults"
    widths = [min(max(len(row[column]) for row in rows), 32) for column in (0, 1)]
    lines = [f"{key:<{widths[0]}}  {value:<{widths[1]}}  {default_text}".rstrip() for key, value, default_text in rows]
    head = "(*: not the default, which follows)" if everything else "(what is not the default)"
    return "\n".join([f"config {head}", *lines])


def _branch(
    section: Mapping[str, Any], defaults: Mapping[str, Any], everything: bool, indent: str = ""
) -> Iterator[tuple[str, str, str]]:
    """(key, value, default) of each line of a section: its own keys first, then the sections in it."""
    for key, value in sorted(section.items(), key=lambda item: isinstance(item[1], Mapping)):
        if isinstance(value, Mapping):
            lines = list(_branch(value, defaults.get(key, {}), everything, f"{indent}  "))
            if lines:
                yield f"  {indent}{key}", "", ""
                yield from lines
        elif key not in defaults or value != defaults[key]:
            default_text = f"({_value_text(defaults[key])})" if key in defaults else ""
            yield f"{'*' if everything else ' '} {indent}{key}", _value_text(value), default_text
        elif everything:
            yield f"  {indent}{key}", _value_text(value), ""


def _value_text(value: Any) -> str:
    if isinstance(value, tuple):
        return _value_text(value[0]) if len(value) == 1 else ", ".join(map(_value_text, value))
    text = "unset" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
