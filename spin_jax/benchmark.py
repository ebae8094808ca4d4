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
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from spin_jax import config as config_lib
from spin_jax.cli import fail, parse, read_config, set_up_jax
from spin_jax.data import sources
from spin_jax.data.loading import load_examples
from spin_jax.data.pairs import load_pairs
from spin_jax.data.records import Ids, Pair
from spin_jax.models import cost, loading, lora
from spin_jax.models.architecture import Model, Params
from spin_jax.models.params import count_params, init_params, params_on, sampling_params
from spin_jax.runtime import chips, platforms, processes, sharding, stopwatch
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


class Workload(NamedTuple):
    """What is measured: a model with its config, and the data for it."""

    config: Any
    model: Model  # without weights
    params: Callable[[], Params]  # makes float32 weights
    pairs: list[Pair]
    prompts: list[Ids]


def workload(config: Any) -> Workload:
    """Reads the model and the data that are given, and makes random ones in place of the others.

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
    vocab_size, count = model.config.vocab_size, _NUM_PROMPTS.value or from_config.slots(config, model)
    if path := _PAIRS.value:
        rows, chat = sources.load_rows(path, "train"), inputs.make_chat(config, model)
        pairs, _ = load_pairs(rows, chat, path=path, vocab_size=vocab_size)
        pairs = [dataclasses.replace(pair, start=pair.generated) for pair in pairs]  # as long as the start's may be
    else:
        pairs = from_config.expected_pairs(config, vocab_size, _STEPS.value * config.train.batch_size)
    if path := _PROMPTS.value:
        rows, chat = sources.load_rows(path, "train"), inputs.make_chat(config, model)
        examples, _ = load_examples(rows, chat, path=path)
        prompts = [chat.sampling_prompt(example) for example in examples[:count]]
    else:
        prompts = [pair.prompt for pair in from_config.expected_pairs(config, vocab_size, count)]
    return Workload(config, model, params, pairs, prompts)


def measure(work: Workload) -> dict[str, Any]:
    """Samples, scores and trains. Training comes last, so no optimizer state takes memory before."""
    seconds = stopwatch.count_in(Counter())
    devices = list(work.model.mesh.devices.flat)
    params = work.params()
    parameters = count_params(params)
    sample = _measure_sampling(work, params)
    roles = custom_loss.roles(work.config.loss)
    groups = [pair_group(pair, roles) for pair in work.pairs]
    sizes = group_sizes(groups)
    shape = from_config.row_shape(work.config.train, work.config, work.model, sizes, sizes.max(axis=0))
    score, scored = _measure_scoring(work, params, groups, shape)
    train = _measure_training(work, params, scored, shape)
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    unit = 2**20 if sys.platform == "linux" else 2**30  # getrusage counts KiB on Linux, bytes on macOS
    return {
        "train": train,
        "score": score,
        "sample": sample,
        "compile_s": seconds["compile"],
        "peak_host_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit,
        "peak_device_gb": max(peaks) / 2**30 or None,  # a CPU does not report any
        "device": f"{len(devices)} × {devices[0].device_kind}",
        "model": {"parameters": parameters, "dtype": str(work.model.dtype)},
        "versions": platforms.versions("jax", "jaxlib", "flax", "optax") | {"python": platform.python_version()},
    }


def _measure_sampling(work: Workload, params: Any) -> dict[str, Any]:
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
    seconds, _ = _timed(answer)
    _traced(answer, "sample")
    tokens, share = new * len(work.prompts), None
    tensor = from_config.sampling_tensor(c, model)
    copies = mesh.size // tensor
    if chip := chips.chip(mesh.devices.flat[0].device_kind):
        context = sum(map(len, work.prompts)) / len(work.prompts) + new / 2
        step = cost.decode_step_s(model.config, chip, -(-slots // copies), context, model.dtype.itemsize, tensor)
        share = tokens / seconds / (slots / step)
    sizes = {"prompts": len(work.prompts), "new_tokens": new, "slots": slots}
    return {"tokens_per_s": tokens / seconds, "roofline": share, **sizes}


def _measure_scoring(work: Workload, params: Any, groups: list[Group], shape: RowShape) -> tuple[dict[str, Any], list]:
    decoder = from_config.decoder(work.config, work.model)
    if stored := work.config.train.frozen_dtype:  # a run scores by what training freezes
        params = lora.freeze(params, work.model.dtype, stored, keep=True)
    score = functools.partial(score_groups, decoder, params, groups, shape, work.model.mesh)
    score()
    seconds, logps = _timed(score)
    tokens = sum(len(group.prompt) + sum(map(len, group.answers)) for group in groups)
    scored = [ScoredPair(pair, tuple(row)) for pair, row in zip(work.pairs, logps, strict=True)]
    return {"real_tokens_per_s": tokens / seconds, "pairs": len(work.pairs)}, scored


def _measure_training(work: Workload, params: Any, scored: list, shape: RowShape) -> dict[str, Any]:
    model, c, steps = work.model, work.config, _STEPS.value
    options = from_config.optimization(c, 0)
    objective = from_config.spin(c, model)
    step, frozen = make_step(objective, options), None
    if options.lora_rank:
        frozen = lora.freeze(params, model.dtype, options.frozen_dtype)
        shapes = params_on(model.mesh, model.config)
        params = lora.init(lora.adapters_on(shapes, options.lora_rank, options.lora_targets), jax.random.key(0))
    state = init_state(params, options, model.mesh)
    scalars = {"beta": np.float32(c.loss.beta[0])}
    source = batches(
        scored,
        lambda chosen: pair_batches(chosen, shape, roles=objective.roles),
        options.batch_size,
        shape,
        seed=0,
        epochs=-(-(steps + 1) * options.batch_size // len(scored)),
        start=0,
    )
    measured = []
    with jax.set_mesh(model.mesh):
        for number in range(steps + 1):  # the first compiles
            wait, batch = _timed(functools.partial(next, source))

            def run(batch: Any = batch) -> None:
                nonlocal state
                placed = sharding.put_batch(model.mesh, batch, axis=1)
                state, metrics = step(state, placed, np.float32(c.train.learning_rate[0]), scalars, frozen)
                jax.block_until_ready((state, metrics))

            seconds, _ = _timed(run)
            if number == steps:
                _traced(run, "train")
            used = int((batch.rows.items > 0).any(axis=(1, 2)).sum())
            sizes = np.count_nonzero(batch.rows.items), filled_tokens(batch), used * shape.rows * shape.length
            measured.append((seconds, wait, *sizes, 3 * rows_flops(model.config, batch.rows)))
    seconds, waits, pairs, tokens, computed, flops = np.sum(measured[1:], axis=0)
    chip = chips.chip(model.mesh.devices.flat[0].device_kind)
    rate = flops / seconds / model.mesh.size
    return {
        "step_s": statistics.median(step[0] for step in measured[1:]),
        "pairs_per_s": pairs / seconds,
        "real_tokens_per_s": tokens / seconds,
        "mfu": None if chip is None else rate / chip.flops,
        "tflops_per_device": rate / 1e12,
        "padding": 1 - tokens / computed,
        "microbatch": f"{shape.rows} × {shape.length}",
        "input_wait": waits / (waits + seconds),
        "batch_size": int(max(pairs for _, _, pairs, *_ in measured)),
        "trained": count_params(params),
        "remat": c.train.remat,
        "attention": objective.decoder.kernel,
    }


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """(the seconds that `run` takes, its result)."""
    began = time.perf_counter()
    result = run()
    return time.perf_counter() - began, result


def _traced(run: Callable[[], object], name: str) -> None:
    """Runs it once more under the profiler, if a trace is wanted: tracing takes time of its own."""
    if folder := _PROFILE.value:
        with jax.profiler.trace(os.path.join(folder, name)):
            run()


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
    try:
        config = parse(sys.argv if argv is None else argv, resolved_config)
        set_up_jax(config)
        work = workload(config)
    except (ValueError, FileNotFoundError) as error:
        return fail(str(error))
    if warning := chips.unknown_peak(work.model.mesh.devices.flat[0]):
        processes.say(warning)
    processes.say(json.dumps(measure(work), ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
