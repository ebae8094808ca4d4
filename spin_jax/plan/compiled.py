"""What a run takes of a machine that need not be there: its own programs, compiled for it.

That gives memory by phase and what devices send each other. The compilers are a run's own, with its flags;
`spin_jax.plan` says what they leave out where no GPU is.
"""

import concurrent.futures
import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spin_jax import errors
from spin_jax.data.records import Example, Pair
from spin_jax.errors import CompilerFailed, OutOfMemory
from spin_jax.models import loading, lora
from spin_jax.models.architecture import Model
from spin_jax.models.params import params_on, sampling_params_on
from spin_jax.plan import collectives as traffic
from spin_jax.plan import machine as machines
from spin_jax.runtime import chips, sharding
from spin_jax.runtime.chips import GPU_MEMORY
from spin_jax.sampling.continuous import DECODE_STEPS, cache_columns, fixed_steps, prefill_rows
from spin_jax.sampling.next_token import KEYS
from spin_jax.sampling.slots import decode, new_slots, prefill
from spin_jax.selfplay import from_config
from spin_jax.storage import files
from spin_jax.training import custom_loss
from spin_jax.training.batches import PairBatch, ScoredPair, pair_batches, stacked
from spin_jax.training.log_probs import score_rows
from spin_jax.training.packing import RowShape
from spin_jax.training.step import abstract_state, make_step

_GIB = 2.0**30


@dataclasses.dataclass(frozen=True)
class Work:
    """A config on a machine."""

    config: Any
    topology: machines.Topology
    model: Model  # without weights; its mesh is Described where nothing is compiled
    shape: RowShape
    pairs: list[Pair]
    uncompiled: str = ""  # why nothing is

    @property
    def compiles(self) -> bool:
        return not self.uncompiled

    @property
    def on_gpu(self) -> bool:
        return self.model.mesh.devices.flat[0].platform == "gpu"

    @property
    def chip(self) -> chips.Chip:
        chip = chips.chip(self.model.mesh.devices.flat[0].device_kind)
        assert chip is not None
        return chip


@dataclasses.dataclass
class Phase:
    """What one phase takes of each device."""

    parts: dict[str, float]  # bytes of device memory, by what fills them
    traffic: dict[str, float]  # bytes a unit by kind of collective
    unit: str  # what `seconds` is of
    offloaded: float = 0.0  # bytes of each device's that wait in the host's memory
    seconds: float = 0.0
    units: float = 0.0  # of an iteration
    tflops: float = 0.0  # the model's, a unit and device
    tokens_per_s: float = 0.0  # of all devices
    bottleneck: str = ""

    @property
    def memory(self) -> float:
        return sum(self.parts.values())


# --- the machine ---------------------------------------------------------------------------------


def workload(config: Any, topology: str, compiles: bool = True) -> Work:
    """Reads the config for a machine.

    Args:
        compiles: False for arithmetic, which needs no compiler.

    Raises:
        ValueError: an unknown machine, or a mesh that does not suit it.
    """
    machine = machines.parsed(topology)
    stated = config.model.architecture.to_dict()
    if config.model.path and os.path.isdir(config.model.path):  # where the two differ, the checkpoint counts
        stated = files.read_json(os.path.join(config.model.path, "config.json"))
    if not stated:
        raise ValueError("the config states no model.architecture: --config.model.path=DIR has one")
    model = loading.new_model(stated, None, dtype=config.model.dtype)
    sizes = from_config.mesh_sizes(config, model.config, machine.devices, machine.slices)
    uncompiled = "" if compiles else "--nocompile"
    mesh: Any = machines.described(machine, dict(zip(sharding.AXES, sizes, strict=True)))
    if compiles:
        try:
            mesh = sharding.make_mesh(*sizes, machines.devices(machine))
        except errors.NoCompiler as missing:
            uncompiled = str(missing)
    model = dataclasses.replace(model, mesh=mesh)
    from_config.check_mesh(config, model)
    pairs = from_config.expected_pairs(config, model.config.vocab_size, 16 * config.train.batch_size)
    examples = [Example(p.prompt_id, [], p.prompt, p.real) for p in pairs]
    prompt = np.zeros(min(config.lengths.max_prompt, config.lengths.max_length - 1), np.int32)
    answer = np.zeros(config.lengths.max_length - len(prompt), np.int32)
    shape = from_config.pair_shape(config, model, [*examples, Example(-1, [], prompt, answer)], {})
    return Work(config, machine, model, shape, pairs, uncompiled)


def limit(work: Work) -> float:
    """Bytes of a device that a program may have: some are the runtime's own; of a GPU, what JAX takes."""
    return work.chip.memory * (float(GPU_MEMORY) if work.on_gpu else 63 / 64)


def fits(work: Work, phases: Mapping[str, Phase], margin: float = 1.0) -> bool:
    return all(phase.memory <= margin * limit(work) for phase in phases.values())


# --- programs, compiled --------------------------------------------------------------------------


def _numbers(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _abstract(mesh: Any, batch: Any, axis: int = 0) -> Any:
    """A host batch without its contents, laid out as `put_batch` would."""
    layout = sharding.batch_layout(mesh, axis)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout), batch)


def batches_of(work: Work, pairs: Sequence[Pair]) -> list[PairBatch]:
    """Micro-batches of pairs that nobody has scored."""
    roles = custom_loss.roles(work.config.loss)
    return pair_batches([ScoredPair(pair, (0.0,) * len(roles)) for pair in pairs], work.shape, roles=roles)


def train_program(work: Work) -> tuple[Any, tuple]:
    options, mesh = from_config.optimization(work.config, 0), work.model.mesh
    params, frozen = params_on(mesh, work.model.config), None
    if options.lora_rank:
        frozen = params_on(mesh, work.model.config, work.model.dtype)
        params = lora.adapters_on(params, options.lora_rank, options.lora_targets)
    state = abstract_state(params, options, mesh)
    batch = stacked(
        batches_of(work, work.pairs[: options.batch_size]), -(-options.batch_size // work.shape.rows)
    )
    arguments = state, _abstract(mesh, batch, 1), _numbers(), {"beta": _numbers()}, frozen
    return make_step(from_config.spin(work.config, work.model), options), arguments


def _score_program(work: Work) -> tuple[Any, tuple]:
    (rows, *_) = batches_of(work, work.pairs[:1])
    params = params_on(work.model.mesh, work.model.config)
    decoder = from_config.decoder(work.config, work.model)
    return score_rows, (decoder, params, _abstract(work.model.mesh, rows.rows))


def _sample_programs(work: Work) -> dict[str, tuple[Any, tuple, dict[str, Any]]]:
    """Prefill and decode with the widest cache and the longest prompts."""
    c, model = work.config, work.model
    mesh, slots = from_config.sampling_mesh(c, model), from_config.slots(c, model)
    decoder, params = from_config.decoder(c, model), sampling_params_on(mesh, model.config, model.dtype)
    how: dict[str, Any] = {"sampling": from_config.sampling(c), "stop_tokens": (2,)}
    rows = prefill_rows(slots, c.lengths.max_prompt, sharding.batch_shards(mesh), decoder.kernel)
    prompts, row = np.zeros((rows, c.lengths.max_prompt), np.int32), np.zeros(rows, np.int32)
    tokens, lengths = _abstract(mesh, (prompts, row))
    with jax.set_mesh(mesh):
        columns = cache_columns(model.config, from_config.longest(c))
        state = jax.eval_shape(lambda: new_slots(decoder, slots, columns))
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0, impl=KEYS), rows))
    arguments = decoder, params, state
    return {
        "prefill": (prefill, (*arguments, tokens, lengths, lengths, keys, lengths), how),
        "decode": (decode, arguments, {**how, "steps": DECODE_STEPS, "fixed": fixed_steps(mesh)}),
    }


def compiled(
    mesh: Any, program: Any, arguments: tuple, keywords: Mapping[str, Any] | None = None, effort: float = 0.0
) -> Any:
    """The program, compiled for the mesh's devices.

    Args:
        effort: of the compiler, from −1 to 1; a run's is 0.

    Raises:
        OutOfMemory: the compiler found no room.
        CompilerFailed: of anything else.
    """
    platform = mesh.devices.flat[0].platform
    with jax.set_mesh(mesh):
        traced = program.trace(*arguments, **keywords or {})
        lowered = traced.lower(lowering_platforms=({"gpu": "cuda"}.get(platform, platform),))
        try:
            return lowered.compile({"exec_time_optimization_effort": effort} if effort else None)
        except jax.errors.JaxRuntimeError as error:
            if used := re.search(
                r"(?:Used |temporaries \()([\d.]+)([GM])\)? .*hbm", str(error), re.IGNORECASE
            ):
                raise OutOfMemory(float(used[1]) * {"G": _GIB, "M": 2.0**20}[used[2]]) from error
            said = str(error).partition("\n")[0]
            raise CompilerFailed(f"the compiler fails, and would in a run: {said}") from error


def taken(program: Any) -> tuple[float, float]:
    """Bytes of a device: (arguments, all else)."""
    m = program.memory_analysis()
    return m.argument_size_in_bytes, m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes


def compiled_phases(
    work: Work, guess: Mapping[str, Phase], only: tuple[str, ...] = ("train", "score", "sample")
) -> dict[str, Phase]:
    """Memory and traffic as the compiler has them.

    Training, which takes most, is compiled as the run compiles it; the others for TPUs with little effort,
    which is a few times as fast and finds the same memory within some tenths of a GiB. TPU's compiler refuses
    what has no room, and says what it would take; that for GPUs leaves it to who compares with `limit`.

    Args:
        guess: of arithmetic, whose parts those of the compiler are told apart by.
    """
    mesh, node = work.model.mesh, 0
    if work.on_gpu and work.topology.slices > 1:
        node = mesh.size // work.topology.slices
    hasty = 0.0 if work.on_gpu else -1.0

    def step(name: str, make: Callable[[Work], tuple[Any, tuple]], effort: float = 0.0) -> Phase:
        weights = guess[name].parts["weights"]
        try:
            program = compiled(mesh, *make(work), effort=effort)
        except OutOfMemory as error:
            known = {k: v for k, v in guess[name].parts.items() if k in ("weights", "optimizer")}
            rest = error.needed - sum(known.values())
            return dataclasses.replace(guess[name], parts={**known, "temporary": rest})
        state, temporary = taken(program)
        parts = {"weights": weights, "optimizer": max(state - weights, 0.0), "temporary": temporary}
        found = traffic.collectives(program.as_text(), node)
        return dataclasses.replace(guess[name], parts=parts, traffic=traffic.totals(found))

    def sample() -> Phase:
        mesh = from_config.sampling_mesh(work.config, work.model)
        temporary, found = 0.0, {}
        for name, (program, arguments, keywords) in _sample_programs(work).items():
            try:
                made = compiled(mesh, program, arguments, keywords, effort=hasty)
            except OutOfMemory as error:
                known = guess["sample"].parts["copy"] + guess["sample"].parts["cache"]
                temporary = max(temporary, error.needed - known)
                continue
            temporary = max(temporary, taken(made)[1])
            if name == "decode":
                of_call = traffic.totals(traffic.collectives(made.as_text(), node))
                found = {kind: size / DECODE_STEPS for kind, size in of_call.items()}
        parts = {**guess["sample"].parts, "temporary": temporary}
        return dataclasses.replace(guess["sample"], parts=parts, traffic=found)

    jobs = {
        "train": lambda: step("train", train_program),
        "score": lambda: step("score", _score_program, effort=hasty),
        "sample": sample,
    }
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        running = {name: pool.submit(jobs[name]) for name in only}
        return {name: job.result() for name, job in running.items()}
