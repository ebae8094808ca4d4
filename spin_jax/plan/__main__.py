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
import json
import sys
from collections.abc import Mapping
from typing import Any

import jax
from absl import flags

from spin_jax import config as config_lib
from spin_jax import config_values
from spin_jax.cli import fail, parse, read_config, set_compiler_flags
from spin_jax.errors import CompilerFailed
from spin_jax.models import cost
from spin_jax.plan import machine
from spin_jax.plan.compiled import Work, compiled_phases, fits, limit, workload
from spin_jax.plan.estimate import estimated_phases
from spin_jax.plan.suggestion import suggestion
from spin_jax.plan.time import Assumed, duration, fill_in_times, run_time
from spin_jax.runtime.console import compact
from spin_jax.selfplay import from_config
from spin_jax.training.optimizer import OPTIMIZERS

flags.DEFINE_string("config", None, "Config file; --config.key=value changes a key of it.")
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


# --- the answer ----------------------------------------------------------------------------------


def plan(work: Work, assumed: Assumed) -> dict[str, Any]:
    """The whole answer, as --json prints it."""
    phases, margin = estimated_phases(work), 1.0
    if work.compiles:
        guess, phases = phases, compiled_phases(work, phases)
        # Compilation will have the last word: arithmetic is as far off for other settings as for these.
        margin = min(0.9, *(0.97 * guess[name].memory / phase.memory for name, phase in phases.items()))
    fill_in_times(work, phases, assumed)
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
            "tensor": from_config.sampling_tensor(work.config, work.model),
            "slots": from_config.slots(work.config, work.model),
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
        "run": run_time(work, phases),
        "assumed": {
            **assumed._asdict(),
            "epochs": config_values.per_iteration(work.config.train.epochs, 0),
            "lengths": list(work.config.lengths.expected),
        },
        "suggestion": None if other is None else {"flags": other[1], "compiled": confirmed},
    }


def _saved(work: Work) -> dict[str, Any] | None:
    """What adapters save, by arithmetic; None without them."""
    t = work.config.train
    if not t.lora_rank:
        return None
    without = dataclasses.replace(work, config=work.config.changed({"train.lora_rank": None}))
    memory = [estimated_phases(w)["train"].memory for w in (without, work)]
    trained, each = (
        from_config.trained_params(work.config, work.model.config),
        4 * (1 + OPTIMIZERS[t.optimizer].moments) / _GIB,
    )
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
        unit = f"{duration(phase['unit_s'])} a {phase['unit']}"
        lines.append(
            f"{name:7}{phase['hbm_gib']:>11.1f}{mark}  {unit:>22}  {duration(phase['iteration_s']):>9}  "
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
        f"the first iteration: {duration(answer['iteration_s'])} for {assumed['pairs']:,} pairs and "
        f"{assumed['epochs']} epoch(s) of {'/'.join(map(str, assumed['lengths']))} tokens",
        f"(prompt/human/generated), at {assumed['mfu']:.0%} MFU, padding counted, and "
        f"{assumed['decode_efficiency']:.0%} of the decode roofline",
        f"all {run['iterations']}, with the pairs mixed in: {duration(3600 * run['hours'])}, "
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


def read_flags() -> tuple[Any, str, int]:
    """(config, topology, pairs) that the flags ask for."""
    config = read_config()
    if config is None or _TOPOLOGY.value is None:
        raise ValueError("--config and --topology are needed; see --help")
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
        machine.expect_no_device()
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
