"""Whether a run fits a machine, and how long it takes, before the machine is rented.

    python -m spin_jax.plan --config=FILE[:VARIANT] --topology=TOPOLOGY [--config.section.key=value …]

  --topology=TOPOLOGY      TPUs: v4:2x2x4, v5e:8x8, v5p:2x2x2, v6e:4x4, tpu7x:2x2x1 …; GPUs: h200:1, h100:8,
                           a100:8 …; v5e:8x8*2 are two slices, h100:8*2 two nodes; cpu:1: this machine
  --pairs=N                pairs of an iteration; unset: those of data.limit prompts, or of 50,000, by
                           selfplay.samples and selfplay.pairing
  --json                   prints one JSON object in place of the table
  --mfu=0.45               share of the peak that training and scoring reach; on a CPU 0.6 of a matrix product
                           that is measured here
  --decode_efficiency=0.5  share of its roofline that decoding reaches
  --dcn_gbit_s=50          Gbit per second that a device receives from other slices
  --read_gb_s=0.6          GB per second that each process reads of a checkpoint, its check included
  --write_gb_s=0.6         GB per second that each process writes of a checkpoint or export, its seal included
  --compile_s=N            seconds that each of the run's programs compiles; 0: 40 for TPUs, 15 for GPUs,
                           2 for a CPU
  --compile=true           compiles the run's programs; --nocompile: arithmetic alone, which takes seconds

The programs of the run are compiled for the topology. No TPU or GPU is needed: the compiler for TPUs comes
with jax[tpu], the compiler for GPUs with jax[cuda13] or with jax-cuda13-plugin alone. Without the plugin,
memory on GPUs comes from arithmetic, and the answer says so. The plan assumes the lengths of
`lengths.expected`, and room for the longest pairs that `lengths` allows. Times come from a roofline at the
efficiencies above. Reading and tokenizing the data, the tasks of eval.tasks and pushes to the hub do not
count.

On a machine without a GPU, XLA cannot time kernels to choose between them (autotuning), cuDNN's kernels are
not compiled, and no kernel is assembled to machine code. Memory is compared with the 92% of the card that
JAX takes. What CUDA and NCCL need for themselves must fit into the rest, and is not counted.

Examples:

  python -m spin_jax.plan --config=configs/zephyr.py --topology=v5e:8x8
  python -m spin_jax.plan --config=configs/zephyr.py --topology=h200:1 --config.train.batch_size=32 --json

Exit codes: 0 the run fits, 1 it does not fit, or the compiler fails, 2 bad input.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any

import jax
from absl import flags

from spin_jax import config as config_lib
from spin_jax import config_values
from spin_jax.cli import fail, parse, read_config
from spin_jax.errors import CompilerFailed
from spin_jax.forecast.job import Rates
from spin_jax.plan.answer import plan
from spin_jax.plan.machine import expect_no_device
from spin_jax.plan.planned_run import planned_run
from spin_jax.runtime import platforms
from spin_jax.runtime.console import compact, duration

flags.DEFINE_string("config", None, "Config file; --config.key=value changes a key of it.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "TPUs: v5e:8x8, v5p:2x2x2 …; GPUs: h200:1, h100:8 …")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object in place of the table.")
_PAIRS = flags.DEFINE_integer("pairs", None, "Pairs of an iteration; unset: data.limit.", lower_bound=1)
_MFU = flags.DEFINE_float("mfu", 0.0, "Share of the peak that training and scoring reach, padding counted as work.")
_DECODE = flags.DEFINE_float("decode_efficiency", 0.5, "Share of its roofline that decoding reaches.", lower_bound=1e-3)
_READ = flags.DEFINE_float(
    "read_gb_s", Rates().read_gb_s, "GB a second that each process reads of a checkpoint.", lower_bound=1e-3
)
_WRITE = flags.DEFINE_float(
    "write_gb_s", Rates().write_gb_s, "GB a second that each process writes of a checkpoint.", lower_bound=1e-3
)
_COMPILE_S = flags.DEFINE_float("compile_s", 0.0, "Seconds that each program compiles; 0: by platform.")
_COMPILE = flags.DEFINE_bool("compile", True, "Compile the run's programs; --nocompile: arithmetic alone.")
_DCN = flags.DEFINE_float("dcn_gbit_s", 50.0, "Gbit a second that a device gets from other slices.", lower_bound=1e-3)


def table(answer: Mapping[str, Any]) -> str:
    """The answer as a table."""
    mesh = " × ".join(f"{name} {size}" for name, size in answer["mesh"].items())
    why = f" ({answer['uncompiled']})" if answer["uncompiled"] else ""
    assumed, room, run, phases = answer["assumed"], answer["hbm_limit_gib"], answer["run"], answer["phases"]
    rows, slots, tensor = answer["rows"], answer["sampling"]["slots"], answer["sampling"]["tensor"]
    lines = [
        f"{answer['topology']}: {answer['devices']}, mesh {mesh}; memory by {answer['by']}{why}",
        f"model      {answer['model']}",
        f"training   {rows['rows']} × {rows['length']} tokens a micro-batch, remat {answer['remat']}",
        f"sampling   {slots} answers at a time, a copy of the weights for every "
        f"{'device' if tensor == 1 else f'{tensor} devices'}",
        "",
        f"{'':7}{f'GiB of {room:.1f}':>12}  {'time':>22}  {'iteration':>9}  {'tokens/s':>9}  bound by",
    ]
    if saved := answer["lora"]:
        checkpoint = f"{saved['checkpoint_gib']:.2f} GiB instead of {saved['checkpoint_without_gib']:.1f}"
        memory = f"{saved['saved_gib']:.1f} GiB less per device; a step checkpoint has {checkpoint}"
        lines.insert(-2, f"LoRA       rank {saved['rank']}: {compact(saved['trained'])} numbers trained, {memory}")
        if saved["frozen_dtype"]:
            freed = f"{saved['frozen_saved_gib']:.1f} GiB of these by frozen weights in {saved['frozen_dtype']}"
            lines.insert(-2, f"           {freed}, in training alone")
    for name, phase in phases.items():
        mark = " " if phase["hbm_gib"] <= room else "!"
        unit = f"{duration(phase['unit_s'])} a {phase['unit']}"
        lines.append(
            f"{name:7}{phase['hbm_gib']:>11.1f}{mark}  {unit:>22}  {duration(phase['iteration_s']):>9}  "
            f"{phase['tokens_per_s']:>9.3g}  {phase['bottleneck']}"
        )
    for what, key in (("memory, GiB a device", "parts_gib"), ("collectives, GiB", "collective_gib")):
        lines += ["", what]
        for name, phase in phases.items():
            sizes = ", ".join(f"{part} {size:.2f}" for part, size in phase[key].items() if size >= 0.005)
            per = f" (a {'decode step' if name == 'sample' else 'micro-batch'})" if key == "collective_gib" else ""
            lines.append(f"  {name:7}{sizes + per if sizes else 'none'}")
    if offloaded := phases["train"]["offloaded_gib"]:
        lines += ["", f"{offloaded:.2f} GiB of each device's optimizer state wait in the hosts' memory"]
    lines += [
        "",
        f"memory of each process, GiB  {_sizes(answer['host_gib'])}",
        f"files, GiB   an iteration: {_sizes(run['iteration_gib'])}",
        f"             the run: {_sizes(run['written_gib'])}; {sum(run['written_gib'].values()):.3g} in all",
        "",
        f"the first iteration: {duration(answer['iteration_s'])} for {assumed['pairs']:,} pairs and "
        f"{assumed['epochs']} epoch(s) of {'/'.join(map(str, assumed['lengths']))} tokens",
        f"(prompt/human/generated), at {assumed['mfu']:.0%} MFU, padding counted, and "
        f"{assumed['decode_efficiency']:.0%} of the decode roofline",
        f"all {run['iterations']}, with the pairs mixed in: {duration(3600 * run['hours'])}, "
        f"{run['chip_hours']:.3g} chip-hours",
        f"({', '.join(f'{name} {duration(seconds)}' for name, seconds in run['phases_s'].items())})",
        *(f"not counted: {what}" for what in run["not_counted"]),
        "it fits" if answer["fits"] else "it does not fit",
    ]
    if other := answer["suggestion"]:
        checked = {
            True: " (training was compiled)",
            False: " by arithmetic, though training does not when it is compiled",
            None: " by arithmetic",
        }[other["compiled"]]
        lines.append(f"this would fit{checked}: {' '.join(other['flags'])}")
    elif not answer["fits"]:
        lines.append("no setting was found that fits, up to the largest machine of this family")
    return "\n".join(lines)


def _sizes(parts: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {size:.3g}" for name, size in parts.items())


def read_flags() -> tuple[Any, str, int]:
    """(config, topology, pairs), from the flags."""
    config = read_config()
    if config is None or _TOPOLOGY.value is None:
        raise ValueError("--config and --topology are needed; see --help")
    config.data.path = config.data.path or "planned"
    config = config_lib.resolve(config)
    pairs = _PAIRS.value or (config.data.limit or 50_000) * config_values.rows_of_a_prompt(config.selfplay)
    return config, _TOPOLOGY.value, pairs


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code, which the docstring of this file explains."""
    try:
        config, topology, pairs = parse(sys.argv if argv is None else argv, read_flags)
        platforms.set_compiler_flags(config)
        expect_no_device()
        jax.config.update("jax_platforms", "cpu")  # nothing runs; an accelerator here is left alone
        run = planned_run(config, topology, _COMPILE.value)
    except (ValueError, FileNotFoundError) as error:
        return fail(str(error))
    try:
        rates = Rates(_MFU.value, _DECODE.value, _DCN.value, Rates().host_gb_s, _READ.value, _WRITE.value)
        answer = plan(run, pairs, rates._replace(compile_s=_COMPILE_S.value))
    except CompilerFailed as error:
        return fail(f"{error}\n--nocompile gives the answer of arithmetic", 1)
    print(json.dumps(answer, ensure_ascii=False) if _JSON.value else table(answer), flush=True)
    return 0 if answer["fits"] else 1


if __name__ == "__main__":
    sys.exit(main())
