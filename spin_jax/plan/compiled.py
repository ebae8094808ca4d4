"""The programs of a run, compiled for a machine that need not be there.

The compiler says how much memory each phase takes, and what the devices send each other. It is the one of a real run,
with the same flags. The docstring of `plan/__main__.py` says what it leaves out without a GPU.
"""

import concurrent.futures
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spin_jax.errors import CompilerFailed, OutOfMemory
from spin_jax.forecast.job import batches_of
from spin_jax.models import lora
from spin_jax.models.params import params_on, sampling_params_on
from spin_jax.plan.collectives import bytes_by_kind, find_collectives
from spin_jax.plan.planned_run import GIB, PhaseCost, PlannedRun
from spin_jax.runtime import sharding
from spin_jax.sampling.continuous import DECODE_STEPS, cache_columns, fixed_steps, prefill_rows
from spin_jax.sampling.next_token import KEYS
from spin_jax.sampling.slots import decode, new_slots, prefill
from spin_jax.selfplay import from_config
from spin_jax.training.batches import stacked
from spin_jax.training.log_probs import score_rows
from spin_jax.training.step import abstract_state, make_step

_NUMBER = jax.ShapeDtypeStruct((), jnp.float32)


def _abstract(mesh: Any, batch: Any, axis: int = 0) -> Any:
    """Shapes and shardings of a host batch, as `put_batch` would place it."""
    layout = sharding.batch_layout(mesh, axis)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout), batch)


def train_program(run: PlannedRun) -> tuple[Any, tuple]:
    """(the training step, its abstract arguments)."""
    options, mesh = from_config.optimization(run.config, 0), run.model.mesh
    params, frozen = params_on(mesh, run.model.config), None
    if options.lora_rank:
        frozen = lora.frozen_on(params, run.model.dtype, options.frozen_dtype)
        params = lora.adapters_on(params, options.lora_rank, options.lora_targets)
    state = abstract_state(params, options, mesh)
    batch = stacked(
        batches_of(run.config, run.shape, run.pairs[: options.batch_size]), -(-options.batch_size // run.shape.rows)
    )
    arguments = state, _abstract(mesh, batch, 1), _NUMBER, {"beta": _NUMBER}, frozen
    return make_step(from_config.spin(run.config, run.model), options), arguments


def _score_program(run: PlannedRun) -> tuple[Any, tuple]:
    (rows, *_) = batches_of(run.config, run.shape, run.pairs[:1])
    decoder, params = from_config.decoder(run.config, run.model), params_on(run.model.mesh, run.model.config)
    return score_rows, (decoder, params, _abstract(run.model.mesh, rows.rows))


def _sample_programs(run: PlannedRun) -> dict[str, tuple[Any, tuple, dict[str, Any]]]:
    """Prefill and decode with the widest cache and the longest prompts.

    Prefill has all that `read_prompts` and `begin_answers` have, which run in its place where prompts have several
    answers.
    """
    c, model = run.config, run.model
    mesh, slots = from_config.sampling_mesh(c, model), from_config.slots(c, model)
    decoder, params = from_config.decoder(c, model), sampling_params_on(mesh, model.config, model.dtype)
    keywords: dict[str, Any] = {"sampling": from_config.sampling(c), "stop_tokens": (2,)}
    rows = prefill_rows(slots, c.lengths.max_prompt, sharding.batch_shards(mesh), decoder.kernel)
    prompts, row = np.zeros((rows, c.lengths.max_prompt), np.int32), np.zeros(rows, np.int32)
    tokens, lengths = _abstract(mesh, (prompts, row))
    with jax.set_mesh(mesh):
        columns = cache_columns(model.config, from_config.longest(c))
        state = jax.eval_shape(lambda: new_slots(decoder, slots, columns))
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0, impl=KEYS), rows))
    arguments = decoder, params, state
    return {
        "prefill": (prefill, (*arguments, tokens, lengths, lengths, keys, lengths), keywords),
        "decode": (decode, arguments, {**keywords, "steps": DECODE_STEPS, "fixed": fixed_steps(mesh)}),
    }


def compiled(
    mesh: Any, program: Any, arguments: tuple, keywords: Mapping[str, Any] | None = None, effort: float = 0.0
) -> Any:
    """Compiles a program for the devices of a mesh. OutOfMemory: it has no room; CompilerFailed: for another reason.

    `effort` says how hard the compiler tries, from −1 to 1. A real run has 0.
    """
    platform = mesh.devices.flat[0].platform
    with jax.set_mesh(mesh):
        traced = program.trace(*arguments, **keywords or {})
        lowered = traced.lower(lowering_platforms=({"gpu": "cuda"}.get(platform, platform),))
        try:
            return lowered.compile({"exec_time_optimization_effort": effort} if effort else None)
        except jax.errors.JaxRuntimeError as error:
            if used := re.search(r"(?:Used |temporaries \()([\d.]+)([GM])\)? .*hbm", str(error), re.IGNORECASE):
                raise OutOfMemory(float(used[1]) * {"G": GIB, "M": 2.0**20}[used[2]]) from error
            first_line = str(error).partition("\n")[0]
            raise CompilerFailed(f"the compiler fails, as it would in a run: {first_line}") from error


def memory_of(program: Any) -> tuple[float, float]:
    """(the bytes of a device that arguments take, the bytes that all else takes)."""
    m = program.memory_analysis()
    return m.argument_size_in_bytes, m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes


def compiled_phases(
    run: PlannedRun, guess: Mapping[str, PhaseCost], only: tuple[str, ...] = ("train", "score", "sample")
) -> dict[str, PhaseCost]:
    """Memory and traffic according to the compiler.

    Training takes the most memory and is compiled as in a run. For TPUs the other phases are compiled with little
    effort, which is a few times as fast and finds the same memory to some tenths of a GiB. The TPU compiler refuses a
    program that has no room, and says how much it would need. The GPU compiler does not: its result has to be compared
    with `limit`. The phases by arithmetic, `guess`, tell weights, optimizer and temporary memory apart.
    """
    mesh, slices = run.model.mesh, run.topology.slices
    node = mesh.size // slices if run.on_gpu and slices > 1 else 0
    little_effort = -1.0 if run.job.platform == "tpu" else 0.0

    def step(name: str) -> PhaseCost:
        make, effort = (train_program, 0.0) if name == "train" else (_score_program, little_effort)
        parts = {k: v for k, v in guess[name].parts.items() if k in ("weights", "optimizer")}
        try:
            program = compiled(mesh, *make(run), effort=effort)
        except OutOfMemory as error:
            parts["temporary"] = error.needed - sum(parts.values())
            return dataclasses.replace(guess[name], parts=parts)
        state, temporary = memory_of(program)
        parts |= {"optimizer": max(state - parts["weights"], 0.0), "temporary": temporary}
        found = find_collectives(program.as_text(), node)
        return dataclasses.replace(guess[name], parts=parts, traffic=bytes_by_kind(found))

    def sample(name: str) -> PhaseCost:
        mesh = from_config.sampling_mesh(run.config, run.model)
        parts, temporary, found = guess[name].parts, 0.0, {}
        for part, (program, arguments, keywords) in _sample_programs(run).items():
            try:
                executable = compiled(mesh, program, arguments, keywords, effort=little_effort)
            except OutOfMemory as error:
                temporary = max(temporary, error.needed - parts["copy"] - parts["cache"])
                continue
            temporary = max(temporary, memory_of(executable)[1])
            if part == "decode":
                per_call = bytes_by_kind(find_collectives(executable.as_text(), node))
                found = {kind: size / DECODE_STEPS for kind, size in per_call.items()}
        return dataclasses.replace(guess[name], parts={**parts, "temporary": temporary}, traffic=found)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        running = {name: pool.submit(sample if name == "sample" else step, name) for name in only}
        return {name: job.result() for name, job in running.items()}
