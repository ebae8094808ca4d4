"""Measures how fast this machine samples, scores and trains, with the functions of a run.

    python -m spin_jax.benchmark --config=FILE[:VARIANT] [--config.section.key=value …]
    python -m spin_jax.benchmark --model=DIR --pairs=FILE --prompts=FILE

  --model=DIR         a Hugging Face directory; unset: random weights of the config's architecture
  --pairs=FILE        pairs to score and train on; unset: random ones with the lengths of lengths.expected
  --prompts=FILE      rows with prompts to answer; unset: random prompts
  --batch_size=N      pairs in a step; unset: train.batch_size
  --num_prompts=N     how many prompts to answer; unset: as many as there are slots
  --new_tokens=N      tokens of each answer; unset: sampling.max_new_tokens
  --dtype=NAME        type of the computation; unset: model.dtype
  --remat=NAME        train.remat; unset: the config's, and none without a config
  --steps=5           how many training steps are timed
  --profile=DIR       writes a trace to this folder

With a config alone nothing is downloaded. The last line of the output is one JSON object.

Examples:

  python -m spin_jax.benchmark --config=configs/zephyr.py
  python -m spin_jax.benchmark --model=DIR --pairs=pairs.jsonl --prompts=train.jsonl --dtype=float32

Exit codes: 0 done, 2 bad input.
"""

import dataclasses
import functools
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from spin_jax import config as config_lib
from spin_jax.cli import fail, parse, read_config, set_up_jax
from spin_jax.data import sources
from spin_jax.data.examples import load_examples
from spin_jax.data.pairs import load_pairs
from spin_jax.data.records import Ids, Pair
from spin_jax.models import cost, loading
from spin_jax.models.architecture import Model, Params
from spin_jax.models.params import count_params, init_params, sampling_params
from spin_jax.runtime import chips, processes, sharding
from spin_jax.sampling.continuous import answer_prompts
from spin_jax.sampling.next_token import prompt_keys
from spin_jax.selfplay import from_config, inputs
from spin_jax.training import custom_loss
from spin_jax.training.batches import ScoredPair, batches, filled_tokens, pair_batches, rows_flops
from spin_jax.training.log_probs import score_groups
from spin_jax.training.packing import Group, RowShape, group_sizes, pair_group
from spin_jax.training.step import init_state, make_step

flags.DEFINE_string("config", None, "Config file; --config.key=value changes a key of it.")
_MODEL = flags.DEFINE_string("model", None, "Hugging Face directory; without it, random weights.")
_PAIRS = flags.DEFINE_string("pairs", None, "Pairs to score and train on: JSONL or parquet.")
_PROMPTS = flags.DEFINE_string("prompts", None, "Rows with prompts to answer.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Pairs in a step; unset: the config's.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 5, "Training steps that are timed.", lower_bound=1)
_NUM_PROMPTS = flags.DEFINE_integer("num_prompts", None, "Prompts to answer; unset: the slots.", lower_bound=1)
_NEW_TOKENS = flags.DEFINE_integer("new_tokens", None, "Tokens of each answer; unset: the config's.", lower_bound=1)
_DTYPE = flags.DEFINE_string("dtype", None, "Type of the computation; unset: the config's.")
_REMAT = flags.DEFINE_string("remat", None, "train.remat; unset: the config's, and none without a config.")
_PROFILE = flags.DEFINE_string("profile", None, "Directory to write a trace to.")

_PACKAGES = ("spin_jax", "jax", "jaxlib", "flax", "optax")


class Workload(NamedTuple):
    """What is measured: a model with its config, and the data for it."""

    config: Any
    model: Model  # without weights
    params: Callable[[], Params]  # makes float32 weights
    pairs: list[Pair]
    prompts: list[Ids]


def workload(config: Any, *, pairs: str | None, prompts: str | None, steps: int, count: int) -> Workload:
    """Reads the model and the data that are given, and makes random ones in place of the others.

    Args:
        pairs: a file, or None for random pairs, enough for `steps`.
        prompts: a file, or None for random prompts.
        count: how many prompts.

    Raises:
        ValueError, FileNotFoundError: the message names the key, or the file and the row.
    """
    if config.model.path:
        model, params, _ = inputs.open_model(config)
    else:
        model = loading.new_model(config.model.architecture.to_dict(), None, dtype=config.model.dtype)
        model = from_config.placed(config, model)
        params = functools.partial(init_params, model.config, jax.random.key(0), model.mesh)
    from_config.check_mesh(config, model)
    vocab_size = model.config.vocab_size
    if pairs:
        rows, chat = sources.load_rows(pairs, "train"), inputs.make_chat(config, model)
        read, _ = load_pairs(rows, chat, path=pairs, vocab_size=vocab_size)
        read = [dataclasses.replace(pair, start=pair.generated) for pair in read]  # as long as the start's may be
    else:
        read = from_config.expected_pairs(config, vocab_size, steps * config.train.batch_size)
    if prompts:
        rows, chat = sources.load_rows(prompts, "train"), inputs.make_chat(config, model)
        examples, _ = load_examples(rows, chat, path=prompts)
        to_answer = [chat.sampling_prompt(example) for example in examples[:count]]
    else:
        to_answer = [pair.prompt for pair in from_config.expected_pairs(config, vocab_size, count)]
    return Workload(config, model, params, read, to_answer)


def measure(work: Workload, steps: int, profile: str | None = None) -> dict[str, Any]:
    """Samples, scores and trains. Training comes last, so no optimizer state takes memory before."""
    compilations = _compilation_seconds()
    devices = list(work.model.mesh.devices.flat)
    params = work.params()
    parameters = count_params(params)
    sample = _measure_sampling(work, params, profile)
    score, scored = _measure_scoring(work, params)
    train = _measure_training(work, params, scored, steps, profile)
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    unit = 2**20 if sys.platform == "linux" else 2**30  # getrusage counts KiB on Linux, bytes on macOS
    return {
        "train": train,
        "score": score,
        "sample": sample,
        "compile_s": sum(compilations),
        "peak_host_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit,
        "peak_device_gb": max(peaks) / 2**30 or None,  # a CPU does not report any
        "device": f"{len(devices)} × {devices[0].device_kind}",
        "model": {"parameters": parameters, "dtype": str(work.model.dtype)},
        "versions": {name: metadata.version(name) for name in _PACKAGES} | {"python": platform.python_version()},
    }


def _measure_sampling(work: Workload, params: Any, profile: str | None) -> dict[str, Any]:
    model, c = work.model, work.config
    mesh = from_config.sampling_mesh(c, model)
    weights = sampling_params(params, model.config, model.dtype, mesh)
    slots = min(from_config.slots(c, model), len(work.prompts))
    new = c.sampling.max_new_tokens

    def answer() -> None:
        answer_prompts(
            from_config.decoder(c, model),
            weights,
            work.prompts,
            prompt_keys(0, 0, range(len(work.prompts))),
            mesh=mesh,
            sampling=from_config.sampling(c),
            stop_tokens=(),  # so each answer has all its tokens, whatever the weights are
            slots=slots,
        )

    answer()
    seconds = _timed(answer)
    _traced(answer, profile, "sample")
    tokens = new * len(work.prompts)
    chip = chips.chip(mesh.devices.flat[0].device_kind)
    tensor = from_config.sampling_tensor(c, model)
    copies = mesh.size // tensor
    share = None
    if chip is not None:
        context = sum(map(len, work.prompts)) / len(work.prompts) + new / 2
        step = cost.decode_step_s(model.config, chip, -(-slots // copies), context, model.dtype.itemsize, tensor)
        share = tokens / seconds / (slots / step)
    return {
        "tokens_per_s": tokens / seconds,
        "roofline": share,
        "prompts": len(work.prompts),
        "new_tokens": new,
        "slots": slots,
    }


def _measure_scoring(work: Workload, params: Any) -> tuple[dict[str, Any], list]:
    model, c = work.model, work.config
    groups = _groups(work)
    shape, decoder = _shape(work), from_config.decoder(c, model)
    logps: Any = None

    def score() -> None:
        nonlocal logps
        logps = score_groups(decoder, params, groups, shape, model.mesh)

    score()
    seconds = _timed(score)
    tokens = sum(len(group.prompt) + sum(map(len, group.answers)) for group in groups)
    scored = [ScoredPair(pair, tuple(row)) for pair, row in zip(work.pairs, logps, strict=True)]
    return {"real_tokens_per_s": tokens / seconds, "pairs": len(work.pairs)}, scored


def _measure_training(work: Workload, params: Any, scored: list, steps: int, profile: str | None) -> dict[str, Any]:
    model, c = work.model, work.config
    options = from_config.optimization(c, 0)
    shape = _shape(work)
    objective = from_config.spin(c, model)
    step = make_step(objective, options)
    state = init_state(params, options, model.mesh)
    scalars = {"beta": np.float32(c.loss.beta[0])}
    source = iter(
        batches(
            scored,
            lambda chosen: pair_batches(chosen, shape, roles=objective.roles),
            options.batch_size,
            shape,
            seed=0,
            epochs=-(-(steps + 1) * options.batch_size // len(scored)),
            start=0,
        )
    )
    times, waits, pairs, tokens, flops, computed = [], [], [], [], [], []
    with jax.set_mesh(model.mesh):
        for number in range(steps + 1):  # the first compiles
            began = time.perf_counter()
            batch = next(source)
            waits.append(time.perf_counter() - began)

            def run(batch: Any = batch) -> None:
                nonlocal state
                placed = sharding.put_batch(model.mesh, batch, axis=1)
                state, metrics = step(state, placed, np.float32(c.train.learning_rate[0]), scalars)
                jax.block_until_ready((state, metrics))

            times.append(_timed(run))
            if number == steps:
                _traced(run, profile, "train")
            pairs.append(int(np.count_nonzero(batch.rows.items)))
            tokens.append(filled_tokens(batch))
            used = int((batch.rows.items > 0).any(axis=(1, 2)).sum())
            computed.append(used * shape.rows * shape.length)
            flops.append(3 * rows_flops(model.config, batch.rows))
    seconds = statistics.median(times[1:])
    chip = chips.chip(model.mesh.devices.flat[0].device_kind)
    rate = sum(flops[1:]) / sum(times[1:]) / model.mesh.size
    return {
        "step_s": seconds,
        "pairs_per_s": sum(pairs[1:]) / sum(times[1:]),
        "real_tokens_per_s": sum(tokens[1:]) / sum(times[1:]),
        "mfu": None if chip is None else rate / chip.flops,
        "tflops_per_device": rate / 1e12,
        "padding": 1 - sum(tokens[1:]) / sum(computed[1:]),
        "microbatch": f"{shape.rows} × {shape.length}",
        "input_wait": sum(waits[1:]) / (sum(waits[1:]) + sum(times[1:])),
        "batch_size": max(pairs),
        "remat": c.train.remat,
        "attention": objective.decoder.kernel,
    }


def _groups(work: Workload) -> list[Group]:
    roles = custom_loss.roles(work.config.loss)
    return [pair_group(pair, roles) for pair in work.pairs]


def _shape(work: Workload) -> RowShape:
    """The shape of the micro-batches of a run with these pairs."""
    known = group_sizes(_groups(work))
    return from_config.row_shape(work.config.train, work.config, work.model, known, known.max(axis=0))


def _timed(run: Callable[[], None]) -> float:
    """The seconds that `run` takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _traced(run: Callable[[], None], folder: str | None, name: str) -> None:
    """Runs it once more under the profiler, if there is a folder: tracing takes time of its own."""
    if folder:
        with jax.profiler.trace(os.path.join(folder, name)):
            run()


def _compilation_seconds() -> list[float]:
    """A list to which every compilation from now on adds its seconds."""
    seconds: list[float] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)  # pyright: ignore[reportArgumentType]
    return seconds


def resolved_config() -> Any:
    """The config with the values of the other flags."""
    c = read_config()
    if c is None and not _MODEL.value:
        raise ValueError("--config or --model is needed; see --help")
    if c is None:
        c = config_lib.default()
        c.train.remat = "none"
        c.lengths.max_prompt = c.lengths.max_length = 2**20  # the data's own lengths
    if _MODEL.value:
        c.model.path, c.model.architecture = _MODEL.value, ConfigDict()
    elif _PAIRS.value or _PROMPTS.value:
        raise ValueError("--pairs and --prompts need --model=DIR: without its tokenizer they are only text")
    elif not c.model.architecture:
        raise ValueError("the config has no model.architecture: give --model=DIR")
    else:
        with c.unlocked():
            del c.model.path  # nothing is downloaded
    c.data.path = _PROMPTS.value or _PAIRS.value or "random"
    for section, key, value in (
        ("train", "batch_size", _BATCH_SIZE.value),
        ("sampling", "max_new_tokens", _NEW_TOKENS.value),
        ("model", "dtype", _DTYPE.value),
        ("train", "remat", _REMAT.value),
    ):
        if value is not None:
            c[section][key] = value
    return config_lib.resolve(c)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0 done, 2 bad input."""
    argv = sys.argv if argv is None else argv
    try:
        config = parse(argv, resolved_config)
        set_up_jax(config)
        work = workload(
            config,
            pairs=_PAIRS.value,
            prompts=_PROMPTS.value,
            steps=_STEPS.value,
            count=_NUM_PROMPTS.value or config.sampling.batch_size,
        )
    except (ValueError, FileNotFoundError) as error:
        return fail(str(error))
    if warning := chips.unknown_peak(work.model.mesh.devices.flat[0]):
        processes.say(warning)
    processes.say(json.dumps(measure(work, _STEPS.value, _PROFILE.value), ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
