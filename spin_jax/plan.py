"""Whether a run fits a machine, and how long it takes, before the machine is rented.

    python -m spin_jax.plan --config=FILE[:VARIANT] --topology=TOPOLOGY [--config.section.key=value …]

  --topology=TOPOLOGY      TPUs: v4:2x2x4, v5e:8x8, v5p:2x2x2, v6e:4x4, tpu7x:2x2x1 …; GPUs: h200:1, h100:8,
                           a100:8 …; v5e:8x8*2 are two slices, h100:8*2 two nodes
  --pairs=N                of an iteration; unset: of data.limit prompts, or of 50,000, selfplay.samples each
  --json                   one JSON object in place of the table
  --mfu=0.45               share of the peak that training and scoring reach
  --decode_efficiency=0.5  share of its roofline that decoding reaches
  --dcn_gbit_s=50          what a device gets from other slices
  --compile=true           compile the run's programs; false: arithmetic alone, in seconds

The run's own programs are compiled for the topology: for TPUs wherever jax[tpu] is installed, for GPUs
wherever jax[cuda13] is, or jax-cuda13-plugin alone. No TPU or GPU is needed. Without the plugin, memory on
GPUs comes from arithmetic, and the answer says so. Lengths are those of `lengths.expected`, and the longest
that `lengths` allows; times are a roofline's at the efficiencies above.

Where no GPU is, XLA cannot time kernels and choose between them (autotuning), cuDNN's kernels are not
compiled, and none are assembled to machine code. Memory is compared with the share of the card that JAX
takes, 92%; CUDA's and NCCL's own must fit into the rest, and is not counted.

Examples:

  python -m spin_jax.plan --config=configs/zephyr.py --topology=v5e:8x8
  python -m spin_jax.plan --config=configs/zephyr.py --topology=h200:1 --config.train.batch_size=32 --json

Exit codes: 0 it fits, 1 it does not, or the compiler fails, 2 bad input.
"""

import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from absl import flags
from ml_collections import config_flags

from spin_jax import collectives as traffic
from spin_jax import config as config_lib
from spin_jax import machines, programs
from spin_jax.command import fail, parse, set_compiler_flags
from spin_jax.errors import CompilerFailed
from spin_jax.estimate import estimated_phases
from spin_jax.footprint import Phase, Work, batches_of, compiled_phases, fits, limit, workload
from spin_jax.models import cost
from spin_jax.runtime.console import compact
from spin_jax.training import batches
from spin_jax.training.batches import filled_tokens
from spin_jax.training.optimizer import MOMENTS

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with overrides of its keys.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "TPUs: v5e:8x8, v5p:2x2x2 …; GPUs: h200:1, h100:8 …")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object in place of the table.")
_PAIRS = flags.DEFINE_integer("pairs", None, "Pairs of an iteration; unset: data.limit.", lower_bound=1)
_MFU = flags.DEFINE_float(
    "mfu", 0.45, "Share of the peak that training and scoring reach, padding counted as work."
)
_DECODE = flags.DEFINE_float("decode_efficiency", 0.5, "Share of its roofline that decoding reaches.")
_COMPILE = flags.DEFINE_bool("compile", True, "Compile the run's programs; --nocompile: arithmetic alone.")
_DCN = flags.DEFINE_float("dcn_gbit_s", 50.0, "Gbit a second that a device gets from other slices.")

_GIB = 2.0**30


# --- time ----------------------------------------------------------------------------------------


class Assumed(NamedTuple):
    """What times are computed from, beside the config."""

    pairs: int
    mfu: float = 0.45
    decode_efficiency: float = 0.5
    dcn_gbit_s: float = 50.0
    host_gb_s: float = 16.0  # between a device and its host's memory


def _timed(work: Work, phases: dict[str, Phase], assumed: Assumed) -> None:
    """Fills in what each phase takes of an iteration."""
    c, m, chip, mesh = work.config, work.model.config, work.chip, work.model.mesh
    epochs = config_lib.per_iteration(c.train.epochs, 0)
    size = c.train.batch_size
    steps = [batches_of(work, work.pairs[first : first + size]) for first in range(0, len(work.pairs), size)]
    microbatches = sum(map(len, steps)) / len(steps)
    filled = sum(filled_tokens(part) for step in steps for part in step) / len(steps)
    forward = sum(batches.rows_flops(m, part.rows) for step in steps for part in step) / len(steps)
    padding = microbatches * work.shape.rows * work.shape.length / filled

    def bound(phase: Phase, passes: int, per_unit: float) -> None:
        """What overlaps: the slowest is what it takes."""
        flops = passes * forward * per_unit / mesh.size
        phase.tflops = flops / 1e12
        times = {
            "compute": flops * padding / (chip.flops * assumed.mfu),
            "collectives": traffic.received(phase.traffic) * microbatches * per_unit / chip.links,
        }
        between = phase.traffic.get(traffic.BETWEEN_SLICES, 0)
        times["network between slices"] = between * microbatches * per_unit * 8 / (assumed.dcn_gbit_s * 1e9)
        times["host memory"] = 2 * phase.offloaded / (assumed.host_gb_s * 1e9)  # there and back
        phase.bottleneck = max(times, key=lambda name: times[name])
        phase.seconds = times[phase.bottleneck]
        phase.tokens_per_s = filled * per_unit / phase.seconds

    train, score, sample = phases["train"], phases["score"], phases["sample"]
    bound(train, 2 if c.train.lora_rank else 3, 1.0)  # frozen weights have no gradient
    train.units = math.ceil(assumed.pairs / size) * epochs
    bound(score, 1, 1 / microbatches)
    score.units = math.ceil(assumed.pairs / size) * microbatches

    prompt, _, new = c.lengths.expected
    share = programs.sampling_tensor(c, work.model)
    copies = mesh.size // share
    step = cost.decode_step_s(
        m, chip, c.sampling.batch_size, prompt + new / 2, work.model.dtype.itemsize, share
    )
    links = traffic.received(sample.traffic) / chip.links
    reading = cost.forward_flops(m, prompt, 1, prompt * prompt / 2) / (share * chip.flops * assumed.mfu)
    each = max(step / assumed.decode_efficiency, links) / c.sampling.batch_size + reading / new
    sample.bottleneck = "collectives" if links > step / assumed.decode_efficiency else "memory bandwidth"
    sample.tflops = cost.forward_flops(m, 1, 1, prompt + new / 2) / mesh.size / 1e12
    sample.seconds, sample.units = each / copies, assumed.pairs * new
    sample.tokens_per_s = copies / each


def _run(work: Work, phases: Mapping[str, Phase]) -> dict[str, float]:
    """What all iterations take; a later one scores and trains on pairs of those before as well."""
    c, hours = work.config, 0.0
    seconds = {name: phase.seconds * phase.units for name, phase in phases.items()}
    for t in range(c.selfplay.start, c.selfplay.iterations):
        sources = 1 + min(t - c.selfplay.start, c.selfplay.mix_previous)
        epochs = config_lib.per_iteration(c.train.epochs, t) / config_lib.per_iteration(c.train.epochs, 0)
        references = 2 if t > c.selfplay.start and 0 < c.loss.reference_alpha < 1 else 1
        scoring = references * seconds["score"]
        hours += (seconds["sample"] + sources * (scoring + epochs * seconds["train"])) / 3600
    iterations = c.selfplay.iterations - c.selfplay.start
    return {"iterations": iterations, "hours": hours, "device_hours": hours * work.model.mesh.size}


# --- what would fit ------------------------------------------------------------------------------


# In the order in which they are tried, each key's values after the config's own.
_REMATS = ("none", "attention+mlp", "attention", "full")
_TOKENS = (4096, 2048)
_SPLITS = (2, 4, 8)
_ANSWERS = (64, 32, 16)


def suggestion(work: Work, margin: float = 1.0) -> tuple[Work, list[str]] | None:
    """The nearest settings that fit by arithmetic: what is computed again, accumulation, mesh, machine.

    Args:
        margin: share of the memory that arithmetic may fill.
    """
    c, own_machine, sizes = work.config, work.topology, machines.FAMILIES[work.topology.family].sizes
    larger = sizes[sizes.index(own_machine.size) :] if own_machine.size in sizes else (own_machine.size,)
    choices = {
        "sampling.batch_size": [n for n in _ANSWERS if n < c.sampling.batch_size],
        "train.offload": [True] * (not c.train.offload),
        "mesh.tensor": [n for n in _SPLITS if n > work.model.mesh.shape["tensor"]],
        "train.tokens_per_device": [n for n in _TOKENS if n < c.train.tokens_per_device],
        "train.remat": _REMATS[_REMATS.index(c.train.remat) + 1 :],
    }
    own = [_value(c, key) for key in choices]
    options = [[mine, *more] for mine, more in zip(own, choices.values(), strict=True)]

    def tried(machine: machines.Topology, values: tuple) -> tuple[Work | None, dict[str, Any]]:
        keys = {k: v for k, v, mine in zip(choices, values, own, strict=True) if v != mine}
        try:
            candidate = workload(_changed(c, keys), str(machine), work.compiles)
        except ValueError:  # heads that the mesh does not divide, say
            return None, keys
        return candidate if fits(candidate, estimated_phases(candidate), margin) else None, keys

    for machine in [own_machine._replace(size=size) for size in larger]:
        frugal = [
            values if key == "mesh.tensor" else values[-1:]
            for key, values in zip(choices, options, strict=True)
        ]
        if not any(tried(machine, values)[0] for values in itertools.product(*frugal)):
            continue
        for values in itertools.product(*options):
            candidate, keys = tried(machine, values)
            if candidate:
                settings = [f"--config.{key}={str(value).lower()}" for key, value in keys.items()]
                return candidate, [f"--topology={machine}"] * (machine != own_machine) + settings
    return None


def _value(config: Any, key: str) -> Any:
    section, name = key.split(".")
    return config[section][name]


def _changed(config: Any, keys: Mapping[str, Any]) -> Any:
    other = config_lib.resolve(config.to_dict())
    other.update_from_flattened_dict(keys)
    return other


# --- the answer ----------------------------------------------------------------------------------


def plan(work: Work, assumed: Assumed) -> dict[str, Any]:
    """The whole answer, as --json prints it."""
    phases, margin = estimated_phases(work), 1.0
    if work.compiles:
        guess, phases = phases, compiled_phases(work, phases)
        # Compilation will have the last word: arithmetic is as far off for other settings as for these.
        margin = min(0.9, *(0.97 * guess[name].memory / phase.memory for name, phase in phases.items()))
    _timed(work, phases, assumed)
    model, mesh, whole = work.model.config, work.model.mesh, fits(work, phases)
    other = None if whole else suggestion(work, margin)
    confirmed = None
    if other and other[0].compiles:
        confirmed = fits(other[0], compiled_phases(other[0], estimated_phases(other[0]), ("train",)))
    return {
        "fits": whole,
        "topology": str(work.topology),
        "devices": f"{mesh.size} × {mesh.devices.flat[0].device_kind}",
        "by": "compilation" if work.compiles else "arithmetic",
        "uncompiled": work.uncompiled or None,
        "mesh": dict(mesh.shape),
        "model": f"{model.model_type}, {compact(cost.all_params(model))} parameters",
        "lora": _saved(work),
        "sampling": {
            "tensor": programs.sampling_tensor(work.config, work.model),
            "slots": programs.slots(work.config, work.model),
        },
        "rows": {"rows": work.shape.rows, "length": work.shape.length},
        "remat": work.config.train.remat,
        "hbm_limit_gib": limit(work) / _GIB,
        "phases": {
            name: {
                "hbm_gib": phase.memory / _GIB,
                "parts_gib": {part: size / _GIB for part, size in phase.parts.items()},
                "collective_gib": {kind: size / _GIB for kind, size in phase.traffic.items()},
                "offloaded_gib": phase.offloaded / _GIB,
                "tflops": phase.tflops,
                "unit": phase.unit,
                "unit_s": phase.seconds,
                "iteration_s": phase.seconds * phase.units,
                "tokens_per_s": phase.tokens_per_s,
                "bottleneck": phase.bottleneck,
            }
            for name, phase in phases.items()
        },
        "iteration_s": sum(phase.seconds * phase.units for phase in phases.values()),
        "run": _run(work, phases),
        "assumed": {
            **assumed._asdict(),
            "epochs": config_lib.per_iteration(work.config.train.epochs, 0),
            "lengths": list(work.config.lengths.expected),
        },
        "suggestion": None if other is None else {"flags": other[1], "compiled": confirmed},
    }


def _saved(work: Work) -> dict[str, Any] | None:
    """What adapters save, by arithmetic; None without them."""
    t = work.config.train
    if not t.lora_rank:
        return None
    without = dataclasses.replace(work, config=_changed(work.config, {"train.lora_rank": None}))
    memory = [estimated_phases(w)["train"].memory for w in (without, work)]
    trained, each = programs.trained(work.config, work.model.config), 4 * (1 + MOMENTS[t.optimizer]) / _GIB
    return {
        "rank": t.lora_rank,
        "trained": trained,
        "saved_gib": (memory[0] - memory[1]) / _GIB,
        "checkpoint_gib": each * trained,
        "checkpoint_without_gib": each * cost.all_params(work.model.config),
    }


def table(answer: Mapping[str, Any]) -> str:
    """The answer for people."""
    mesh = " × ".join(f"{name} {size}" for name, size in answer["mesh"].items())
    why = f" ({answer['uncompiled']})" if answer["uncompiled"] else ""
    sampling, assumed, room = answer["sampling"], answer["assumed"], answer["hbm_limit_gib"]
    run = answer["run"]
    lines = [
        f"{answer['topology']}: {answer['devices']}, mesh {mesh}; memory by {answer['by']}{why}",
        f"model      {answer['model']}",
        f"training   {answer['rows']['rows']} × {answer['rows']['length']} tokens a micro-batch, "
        f"remat {answer['remat']}",
        f"sampling   {sampling['slots']} answers at a time, a copy of the weights for every "
        f"{'device' if sampling['tensor'] == 1 else str(sampling['tensor']) + ' devices'}",
        "",
        f"{'':7}{f'GiB of {room:.1f}':>12}  {'time':>22}  {'iteration':>9}  {'tokens/s':>9}  bound by",
    ]
    if saved := answer["lora"]:
        checkpoint = f"{saved['checkpoint_gib']:.2f} GiB and not {saved['checkpoint_without_gib']:.1f}"
        memory = f"{saved['saved_gib']:.1f} GiB less a device; a step checkpoint has {checkpoint}"
        lines.insert(
            -2, f"LoRA       rank {saved['rank']}: {compact(saved['trained'])} numbers trained, {memory}"
        )
    for name, phase in answer["phases"].items():
        mark = " " if phase["hbm_gib"] <= room else "!"
        unit = f"{_duration(phase['unit_s'])} a {phase['unit']}"
        lines.append(
            f"{name:7}{phase['hbm_gib']:>11.1f}{mark}  {unit:>22}  {_duration(phase['iteration_s']):>9}  "
            f"{phase['tokens_per_s']:>9.3g}  {phase['bottleneck']}"
        )
    for what, key in (("memory, GiB a device", "parts_gib"), ("collectives, GiB", "collective_gib")):
        lines += ["", what]
        for name, phase in answer["phases"].items():
            sizes = ", ".join(f"{part} {size:.2f}" for part, size in phase[key].items() if size >= 0.005)
            per = {"parts_gib": "", "collective_gib": f" (a {_unit_of_traffic(name)})"}[key]
            lines.append(f"  {name:7}{sizes or 'none'}{per if sizes else ''}")
    if away := answer["phases"]["train"]["offloaded_gib"]:
        lines += ["", f"{away:.2f} GiB of each device's optimizer state wait in the hosts' memory"]
    lines += [
        "",
        f"the first iteration: {_duration(answer['iteration_s'])} for {assumed['pairs']:,} pairs and "
        f"{assumed['epochs']} epoch(s) of {'/'.join(map(str, assumed['lengths']))} tokens",
        f"(prompt/human/generated), at {assumed['mfu']:.0%} MFU, padding counted, and "
        f"{assumed['decode_efficiency']:.0%} of the decode roofline",
        f"all {run['iterations']}, with the pairs mixed in: {_duration(3600 * run['hours'])}, "
        f"{run['device_hours']:.3g} device-hours",
        "it fits" if answer["fits"] else "it does not fit",
    ]
    if not answer["fits"]:
        other = answer["suggestion"]
        if other is None:
            lines.append("no setting was found that does, up to the largest machine of this family")
        else:
            checked = {True: ", compiled", False: ", though training did not when compiled", None: ""}
            lines.append(f"this would{checked[other['compiled']]}: {' '.join(other['flags'])}")
    return "\n".join(lines)


def _unit_of_traffic(name: str) -> str:
    return "decode step" if name == "sample" else "micro-batch"


def _duration(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def read_flags() -> tuple[Any, str, int]:
    """(config, topology, pairs) that the flags ask for."""
    if _CONFIG.value is None or _TOPOLOGY.value is None:
        raise ValueError("--config and --topology are needed; see --help")
    config = _CONFIG.value
    config.data.path = config.data.path or "planned"
    config = config_lib.resolve(config)
    pairs = _PAIRS.value or (config.data.limit or 50_000) * config.selfplay.samples
    return config, _TOPOLOGY.value, pairs


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns its exit code: 0 it fits, 1 it does not, 2 bad input."""
    argv = sys.argv if argv is None else argv
    try:
        config, topology, pairs = parse(argv, read_flags)
        set_compiler_flags(config)
        machines.expect_no_device()
        jax.config.update("jax_platforms", "cpu")  # nothing runs; an accelerator here is left alone
        work = workload(config, topology, _COMPILE.value)
    except (ValueError, FileNotFoundError) as error:
        return fail(str(error))
    try:
        answer = plan(work, Assumed(pairs, _MFU.value, _DECODE.value, _DCN.value))
    except CompilerFailed as error:
        return fail(f"{error}\n--nocompile gives the answer of arithmetic", 1)
    print(json.dumps(answer, ensure_ascii=False) if _JSON.value else table(answer), flush=True)
    return 0 if answer["fits"] else 1


if __name__ == "__main__":
    sys.exit(main())
