"""What a run takes of a machine that need not be there: memory by phase, and what devices send each other.

For TPUs the run's own programs are compiled for a topology; for GPUs, and for settings that might fit,
there is arithmetic.
"""

import concurrent.futures
import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spin_jax import collectives as traffic
from spin_jax import convert, files, lora, named_loss, programs, roofline, sharding
from spin_jax.batches import PairBatch, RowShape, ScoredPair, pair_batches, stacked
from spin_jax.chat import Example, Pair
from spin_jax.config import GPU_MEMORY
from spin_jax.draw import KEYS
from spin_jax.model import Model, params_on, sampling_params_on
from spin_jax.sample import DECODE_STEPS, cache_columns, fixed_steps, prefill_rows
from spin_jax.scoring import score_rows
from spin_jax.slots import decode, new_slots, prefill
from spin_jax.train import MOMENTS, abstract_state, make_step

GPUS = {"a100": "NVIDIA A100", "h100": "NVIDIA H100", "h200": "NVIDIA H200"}
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
SIZES = {"v5e": _FLAT, "v6e": _FLAT, "v4": _DEEP, "v5p": _DEEP, **dict.fromkeys(GPUS, ("1", "2", "4", "8"))}
_GIB = 2.0**30
# libtpu asks where it runs, complains where that is nowhere, and else lets one process in at a time.
_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Described(NamedTuple):
    """What is asked of a mesh, where there is nothing to make one of."""

    devices: np.ndarray
    shape: Mapping[str, int]
    size: int


@dataclasses.dataclass(frozen=True)
class _Gpu:
    device_kind: str
    platform: str = "gpu"


@dataclasses.dataclass(frozen=True)
class Work:
    """A config on a machine."""

    config: Any
    topology: str
    slices: int
    model: Model  # without weights; its mesh is Described for GPUs
    shape: RowShape
    pairs: list[Pair]

    @property
    def compiles(self) -> bool:
        return isinstance(self.model.mesh, jax.sharding.Mesh)

    @property
    def chip(self) -> roofline.Chip:
        chip = roofline.chip(self.model.mesh.devices.flat[0].device_kind)
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


def workload(config: Any, topology: str) -> Work:
    """Reads the config for a machine.

    Raises:
        ValueError: an unknown machine, or a mesh that does not suit it.
    """
    family, size, slices = parsed(topology)
    stated = config.model.architecture.to_dict()
    if config.model.path and os.path.isdir(config.model.path):  # where the two differ, the checkpoint counts
        stated = files.read_json(os.path.join(config.model.path, "config.json"))
    if not stated:
        raise ValueError("the config states no model.architecture: --config.model.path=DIR has one")
    model = convert.new_model(stated, None, dtype=config.model.dtype)
    if family in GPUS:
        count = int(size) * slices
        sizes = programs.mesh_sizes(config, model.config, count, slices)
        axes: dict[str, int] = dict(zip(sharding.AXES, sizes, strict=True))
        mesh: Any = Described(np.array([_Gpu(GPUS[family])] * count), axes, count)
        model = dataclasses.replace(model, mesh=mesh)
    else:
        model = programs.placed(config, model, _tpus(f"{family}:{size}", slices))
    programs.check_mesh(config, model)
    pairs = programs.expected_pairs(config, model.config.vocab_size, 16 * config.train.batch_size)
    examples = [Example(p.prompt_id, [], p.prompt, p.real) for p in pairs]
    prompt = np.zeros(min(config.lengths.max_prompt, config.lengths.max_length - 1), np.int32)
    answer = np.zeros(config.lengths.max_length - len(prompt), np.int32)
    shape = programs.pair_shape(config, model, [*examples, Example(-1, [], prompt, answer)], {})
    return Work(config, topology, slices, model, shape, pairs)


def parsed(topology: str) -> tuple[str, str, int]:
    """(family, size of a slice, slices) of `v5e:8x8`, or of `v5e:8x8*2`: two slices, or nodes of GPUs."""
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)(?:\*([1-9]\d*))?", topology)
    if not found or found[1] not in SIZES or (found[1] in GPUS and "x" in found[2]):
        machines = ", ".join(f"{name}:{sizes[3]}" for name, sizes in SIZES.items())
        raise ValueError(f"--topology={topology}: a machine such as {machines}; v5e:8x8*2 is two slices")
    return found[1], found[2], int(found[3] or 1)


@functools.cache
def _tpus(topology: str, slices: int) -> list[Any]:
    """The devices of TPU slices that need not be there."""
    from jax.experimental import topologies

    for name, value in _NO_TPU.items():
        os.environ.setdefault(name, value)
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology, num_slices=slices)
        return list(described.devices)
    except Exception as error:  # whatever kind it is, it says that libtpu is missing or the name is wrong
        raise ValueError(
            f"--topology={topology} cannot be compiled for here (pip install 'jax[tpu]'): {error}"
        ) from error


def limit(work: Work) -> float:
    """Bytes of a device that a program may have: some are the runtime's own; of a GPU, what JAX takes."""
    on_gpu = work.model.mesh.devices.flat[0].platform == "gpu"
    return work.chip.memory * (float(GPU_MEMORY) if on_gpu else 63 / 64)


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
    roles = named_loss.roles(work.config.loss)
    return pair_batches([ScoredPair(pair, (0.0,) * len(roles)) for pair in pairs], work.shape, roles=roles)


def train_program(work: Work) -> tuple[Any, tuple]:
    options, mesh = programs.optimization(work.config, 0), work.model.mesh
    params, frozen = params_on(mesh, work.model.config), None
    if options.lora_rank:
        frozen = params_on(mesh, work.model.config, work.model.dtype)
        params = lora.adapters_on(params, options.lora_rank, options.lora_targets)
    state = abstract_state(params, options, mesh)
    batch = stacked(
        batches_of(work, work.pairs[: options.batch_size]), -(-options.batch_size // work.shape.rows)
    )
    arguments = state, _abstract(mesh, batch, 1), _numbers(), {"beta": _numbers()}, frozen
    return make_step(programs.spin(work.config, work.model), options), arguments


def _score_program(work: Work) -> tuple[Any, tuple]:
    (rows, *_) = batches_of(work, work.pairs[:1])
    params = params_on(work.model.mesh, work.model.config)
    decoder = programs.decoder(work.config, work.model)
    return score_rows, (decoder, params, _abstract(work.model.mesh, rows.rows))


def _sample_programs(work: Work) -> dict[str, tuple[Any, tuple, dict[str, Any]]]:
    """Prefill and decode with the widest cache and the longest prompts."""
    c, model = work.config, work.model
    mesh, slots = programs.sampling_mesh(c, model), programs.slots(c, model)
    decoder, params = programs.decoder(c, model), sampling_params_on(mesh, model.config, model.dtype)
    how: dict[str, Any] = {"sampling": programs.sampling(c), "stop_tokens": (2,)}
    rows = prefill_rows(slots, c.lengths.max_prompt, sharding.batch_shards(mesh))
    prompts, row = np.zeros((rows, c.lengths.max_prompt), np.int32), np.zeros(rows, np.int32)
    tokens, lengths = _abstract(mesh, (prompts, row))
    with jax.set_mesh(mesh):
        columns = cache_columns(model.config, programs.longest(c))
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
    """
    platform = mesh.devices.flat[0].platform
    with jax.set_mesh(mesh):
        lowered = program.trace(*arguments, **keywords or {}).lower(lowering_platforms=(platform,))
        try:
            return lowered.compile({"exec_time_optimization_effort": effort} if effort else None)
        except jax.errors.JaxRuntimeError as error:
            if used := re.search(
                r"(?:Used |temporaries \()([\d.]+)([GM])\)? .*hbm", str(error), re.IGNORECASE
            ):
                raise OutOfMemory(float(used[1]) * {"G": _GIB, "M": 2.0**20}[used[2]]) from error
            raise


class OutOfMemory(Exception):
    def __init__(self, needed: float):
        super().__init__(f"needs {needed / _GIB:.1f} GiB")
        self.needed = needed


def taken(program: Any) -> tuple[float, float]:
    """Bytes of a device: (arguments, all else)."""
    m = program.memory_analysis()
    return m.argument_size_in_bytes, m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes


def compiled_phases(work: Work, only: tuple[str, ...] = ("train", "score", "sample")) -> dict[str, Phase]:
    """Memory and traffic as TPU's compiler has them.

    Training, which takes most, is compiled as the run compiles it; the others with little effort, which is
    a few times as fast and finds the same memory within some tenths of a GiB.
    """
    guess, mesh = estimated_phases(work), work.model.mesh

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
        found = traffic.collectives(program.as_text())
        return dataclasses.replace(guess[name], parts=parts, traffic=traffic.totals(found))

    def sample() -> Phase:
        mesh = programs.sampling_mesh(work.config, work.model)
        temporary, found = 0.0, {}
        for name, (program, arguments, keywords) in _sample_programs(work).items():
            try:
                made = compiled(mesh, program, arguments, keywords, effort=-1.0)
            except OutOfMemory as error:
                known = guess["sample"].parts["copy"] + guess["sample"].parts["cache"]
                temporary = max(temporary, error.needed - known)
                continue
            temporary = max(temporary, taken(made)[1])
            if name == "decode":
                of_call = traffic.totals(traffic.collectives(made.as_text()))
                found = {kind: size / DECODE_STEPS for kind, size in of_call.items()}
        parts = {**guess["sample"].parts, "temporary": temporary}
        return dataclasses.replace(guess["sample"], parts=parts, traffic=found)

    jobs = {
        "train": lambda: step("train", train_program),
        "score": lambda: step("score", _score_program, effort=-1.0),
        "sample": sample,
    }
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        running = {name: pool.submit(jobs[name]) for name in only}
        return {name: job.result() for name, job in running.items()}


# --- arithmetic ----------------------------------------------------------------------------------


def _per_device(work: Work) -> float:
    """Parameters that each device keeps in training."""
    shape = work.model.mesh.shape
    return roofline.all_params(work.model.config) / (shape["fsdp"] * shape["tensor"])


def estimated_phases(work: Work) -> dict[str, Phase]:
    """Memory and traffic by arithmetic: what GPUs are told, and what suggestions are made of."""
    return {"train": _training(work), "score": _scoring(work), "sample": _sampling(work)}


class _Layer(NamedTuple):
    """Of a micro-batch on a device."""

    tokens: int
    wide: float  # numbers of a token's inner MLP layer, or of those of the experts it goes through
    heads: float  # numbers of a token's queries, keys, values and attended values
    weights: float  # bytes of a layer, gathered
    working: float  # bytes that a layer works on
    logits: float  # bytes of a chunk's, and of their softmax


def _layer(work: Work) -> _Layer:
    m, shape, item = work.model.config, work.shape, work.model.dtype.itemsize
    tensor = work.model.mesh.shape["tensor"]
    tokens = shape.rows // sharding.batch_shards(work.model.mesh) * shape.length
    heads = 2 * (m.num_attention_heads + m.num_key_value_heads) * m.head_dim / tensor
    wide = max(1, m.experts_per_token) * m.intermediate_size / tensor
    return _Layer(
        tokens,
        wide,
        heads,
        weights=item * roofline.layer_params(m, m.num_experts) / tensor,
        working=item * tokens * (3 * wide + 6 * m.hidden_size + 2 * heads),
        logits=2 * 4 * min(2**25, tokens * m.vocab_size / 4) / tensor,  # scoring's chunks: a quarter at most
    )


def _training(work: Work) -> Phase:
    c, m, layer, item = work.config, work.model.config, _layer(work), work.model.dtype.itemsize
    whole = _per_device(work)
    share = programs.trained(c, m) / roofline.all_params(m)
    weights, mine = item * whole if c.train.lora_rank else 4 * whole, 4 * share * whole
    tensor, D = work.model.mesh.shape["tensor"], m.hidden_size
    kept = {  # numbers of a token and layer, beside the layer's input
        "full": 0,
        "attention": layer.heads,
        "attention+mlp": layer.heads + D + 2 * layer.wide,
        "none": 2 * layer.heads + 6 * D + 4 * layer.wide,
    }[c.train.remat]
    moments = MOMENTS[c.train.optimizer] * mine
    gradients = mine * (2 if c.train.batch_size > work.shape.rows else 1)  # the sum, and a micro-batch's
    # The head in both dtypes, the embedding, and their gradients; a layer's weights, the next one's as they
    # arrive, and a gradient. Frozen ones have none.
    gathered = 14 * m.vocab_size * D / tensor + 3 * layer.weights
    if c.train.lora_rank:
        gathered = 8 * m.vocab_size * D / tensor + 2 * layer.weights
    activations = m.num_hidden_layers * layer.tokens * item * (kept + D)
    temporary = gradients + gathered + activations + layer.working + layer.logits
    return Phase(
        {
            "weights": weights,
            "optimizer": (mine if c.train.lora_rank else 0.0) + (0.0 if c.train.offload else moments),
            "temporary": temporary + (moments if c.train.offload else 0.0),
        },
        _estimated_traffic(work, layer.tokens, passes=3, gradients=share),
        "step",
        offloaded=moments if c.train.offload else 0.0,
    )


def _scoring(work: Work) -> Phase:
    m, layer, item = work.model.config, _layer(work), work.model.dtype.itemsize
    table = item * m.vocab_size * m.hidden_size / work.model.mesh.shape["tensor"]
    temporary = layer.weights + layer.working + table + layer.logits
    return Phase(
        {"weights": 4 * _per_device(work), "optimizer": 0.0, "temporary": temporary},
        _estimated_traffic(work, layer.tokens, passes=1),
        "micro-batch",
    )


def _sampling(work: Work) -> Phase:
    c, m, item = work.config, work.model.config, work.model.dtype.itemsize
    share = programs.sampling_tensor(c, work.model)
    copies = work.model.mesh.size // share
    columns, prompt = cache_columns(m, programs.longest(c)), c.lengths.max_prompt
    rows = prefill_rows(programs.slots(c, work.model), prompt, copies) // copies
    scores = 4 * m.num_attention_heads * prompt * prompt / share / 8  # of a block of queries
    states = item * prompt * (4 * m.hidden_size + 3 * m.intermediate_size / share)
    read = rows * (scores + states + item * roofline.cached_numbers(m, prompt) / share)
    return Phase(
        {
            "weights": 4 * _per_device(work),
            "copy": item * roofline.all_params(m) / share,
            "cache": item * roofline.cached_numbers(m, columns) * c.sampling.batch_size / share,
            "temporary": 4 * c.sampling.batch_size * m.vocab_size + read,
        },
        {},
        "token",
    )


def _estimated_traffic(work: Work, tokens: float, passes: int, gradients: float = 1.0) -> dict[str, float]:
    """A micro-batch's bytes: FSDP gathers for each pass over the weights, and scatters their gradients.

    `gradients` is the share of the weights that have some.
    """
    m, shape, item = work.model.config, work.model.mesh.shape, work.model.dtype.itemsize
    weights = item * roofline.all_params(m) / shape["tensor"]
    result = {}
    if shape["fsdp"] > 1:
        result["all-gather"] = weights * min(passes, 2)
    if passes > 1 and sharding.batch_shards(work.model.mesh) > 1:
        result["reduce-scatter"] = gradients * weights
    replicas = math.gcd(shape["data"], work.slices)
    between = 2 * (1 - 1 / replicas) * gradients * weights / shape["fsdp"] if passes > 1 else 0.0
    if parts := work.slices // replicas - 1:  # fsdp spans slices: each gets what the others hold
        mine = work.model.mesh.size / work.slices
        between += (min(passes, 2) + (passes > 2) * gradients) * weights * parts / (parts + 1) / mine
    if between:
        result[traffic.BETWEEN_SLICES] = between
    if shape["tensor"] > 1:
        result["all-reduce"] = 2 * passes * m.num_hidden_layers * tokens * m.hidden_size * item
    return result
