"""The answer of `plan`: memory, traffic and time of each phase, whether all of them fit, and what would."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping
from typing import Any

from spin_jax import config_values
from spin_jax.forecast import sizes, times
from spin_jax.forecast.job import Rates, Work, assumed_work
from spin_jax.models import cost
from spin_jax.plan.compiled import compiled_phases
from spin_jax.plan.estimate import estimated_phases
from spin_jax.plan.machine import FAMILIES, Topology
from spin_jax.plan.planned_run import GIB, PlannedRun, fits, limit, planned_run
from spin_jax.runtime import sharding
from spin_jax.runtime.console import compact
from spin_jax.selfplay import from_config
from spin_jax.training.optimizer import OPTIMIZERS

_RATES = Rates()


def plan(run: PlannedRun, pairs: int, rates: Rates = _RATES) -> dict[str, Any]:
    """The answer, as --json prints it, for iterations of so many pairs each."""
    phases, margin = estimated_phases(run), 1.0
    if run.compiles:
        guess, phases = phases, compiled_phases(run, phases)
        # Suggestions are found by arithmetic. It errs for other settings about as much as for these, and the compiler
        # tells how much that is.
        margin = min(0.9, *(0.97 * guess[name].memory / phase.memory for name, phase in phases.items()))
    c, model, mesh, whole = run.config, run.model.config, run.model.mesh, fits(run, phases)
    work, job, rates = assumed_work(c, pairs), run.job, rates.on(run.job.platform)
    speeds = times.speeds(job, run.chip, rates, {name: phase.traffic for name, phase in phases.items()})
    seconds = times.phase_seconds(job, work, run.chip, rates, speeds)
    first = seconds.get(c.selfplay.start, {})
    on_host = max(phase.memory for phase in phases.values()) if job.platform == "cpu" else 0.0
    other = None if whole else _suggestion(run, margin)
    confirmed = None
    if other and other[0].compiles:
        confirmed = fits(other[0], compiled_phases(other[0], estimated_phases(other[0]), ("train",)))
    return {
        "fits": whole,
        "topology": str(run.topology),
        "devices": f"{mesh.size} × {mesh.devices.flat[0].device_kind}",
        "by": "compilation" if run.compiles else "arithmetic",
        "uncompiled": run.uncompiled or None,
        "mesh": dict(mesh.shape),
        "model": f"{model.model_type}, {compact(cost.all_params(model))} parameters",
        "lora": _lora_savings(run),
        "sampling": {"tensor": from_config.sampling_tensor(c, run.model), "slots": from_config.slots(c, run.model)},
        "rows": {"rows": run.shape.rows, "length": run.shape.length},
        "remat": c.train.remat,
        "hbm_limit_gib": limit(run) / GIB,
        "phases": {
            name: {
                "hbm_gib": phase.memory / GIB,
                "parts_gib": {part: size / GIB for part, size in phase.parts.items()},
                "collective_gib": {kind: size / GIB for kind, size in phase.traffic.items()},
                "offloaded_gib": phase.offloaded / GIB,
                "tflops": speeds[name].tflops,
                "unit": phase.unit,
                "unit_s": speeds[name].seconds,
                "iteration_s": first.get(name, 0.0),
                "tokens_per_s": speeds[name].tokens_per_s,
                "bottleneck": speeds[name].bottleneck,
            }
            for name, phase in phases.items()
        },
        "iteration_s": sum(first.values()),
        "run": _whole_run(run, work, seconds),
        "host_gib": {what: size / GIB for what, size in sizes.host_memory(job, work, on_host).items() if size},
        "assumed": {
            "pairs": pairs,
            **rates._asdict(),
            "epochs": config_values.per_iteration(c.train.epochs, 0),
            "lengths": list(c.lengths.expected),
        },
        "suggestion": None if other is None else {"flags": other[1], "compiled": confirmed},
    }


def _whole_run(run: PlannedRun, work: Work, seconds: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    """Time, chip-hours and bytes of all iterations, with what comes before them and after."""
    phases = sum(map(Counter, seconds.values()), Counter())
    hours = phases.total() / 3600
    first = {t: sizes.of_iteration(run.job, amounts, work, t) for t, amounts in [*work.iterations.items()][:1]}
    return {
        "iterations": len(work.iterations),
        "hours": hours,
        "device_hours": hours * run.model.mesh.size,
        "chip_hours": hours * run.model.mesh.size / FAMILIES[run.topology.family].per_chip,
        "phases_s": dict(phases),
        "iteration_gib": {what: size / GIB for sizes_of in first.values() for what, size in sizes_of.items()},
        "written_gib": {what: size / GIB for what, size in sizes.of_run(run.job, work).items()},
        "not_counted": [f"eval.tasks={run.config.eval.tasks}"] if run.config.eval.tasks else [],
    }


def _lora_savings(run: PlannedRun) -> dict[str, Any] | None:
    """What adapters save, by arithmetic. None for a run without adapters."""
    t = run.config.train
    if not t.lora_rank:
        return None

    def memory(**keys: None) -> float:
        changed = {f"train.{key}": value for key, value in keys.items()}
        changed = run.config.changed({**changed, "export.adapters": False})
        return estimated_phases(dataclasses.replace(run, config=changed))["train"].memory / GIB

    trained = from_config.trained_params(run.config, run.model.config)
    each = 4 * (1 + OPTIMIZERS[t.optimizer].moments) / GIB
    return {
        "rank": t.lora_rank,
        "trained": trained,
        "saved_gib": memory(lora_rank=None, frozen_dtype=None) - memory(),
        "frozen_dtype": t.frozen_dtype,
        "frozen_saved_gib": memory(frozen_dtype=None) - memory(),
        "checkpoint_gib": each * trained,
        "checkpoint_without_gib": each * cost.all_params(run.model.config),
    }


def _suggestion(run: PlannedRun, margin: float) -> tuple[PlannedRun, list[str]] | None:
    """(the run with the nearest settings that fit, the flags that change them); None if none was found.

    It tries what the backward pass computes again, the size of micro-batches, the mesh, and larger machines. `margin`
    is the share of the memory that the settings may fill by arithmetic.
    """
    c, own_machine, sizes = run.config, run.topology, FAMILIES[run.topology.family].sizes
    larger = sizes[sizes.index(own_machine.size) :] if own_machine.size in sizes else (own_machine.size,)
    remats = ("none", "attention+mlp", "attention", "full")
    # A micro-batch of one row has fewer tokens for each device only if more devices share the row.
    long_rows = run.shape.length > c.train.tokens_per_device * c.mesh.context
    choices = {  # the values that are tried after the config's own, in this order
        "sampling.batch_size": [n for n in (64, 32, 16) if n < c.sampling.batch_size],
        "train.offload": [True] * (not c.train.offload),
        "mesh.tensor": [n for n in (2, 4, 8) if n > sharding.tensor_shards(run.model.mesh)],
        "mesh.context": [n for n in (2, 4, 8, 16) if n > c.mesh.context] * long_rows,
        "train.tokens_per_device": [n for n in (4096, 2048) if n < c.train.tokens_per_device],
        "train.remat": remats[remats.index(c.train.remat) + 1 :],
    }
    own = config_values.flat(c)
    options = [[own[key], *more] for key, more in choices.items()]

    def candidate_with(machine: Topology, values: tuple) -> tuple[PlannedRun | None, dict[str, Any]]:
        """(the run with these values, or None if it does not fit; the keys that change)."""
        keys = {key: value for key, value in zip(choices, values, strict=True) if value != own[key]}
        try:
            candidate = planned_run(c.changed(keys), str(machine), run.compiles)
        except ValueError:  # for example: the mesh does not divide the heads
            return None, keys
        return candidate if fits(candidate, estimated_phases(candidate), margin) else None, keys

    for machine in [own_machine._replace(size=size) for size in larger]:
        meshes = ("mesh.tensor", "mesh.context")
        frugal = [values if key in meshes else values[-1:] for key, values in zip(choices, options, strict=True)]
        if not any(candidate_with(machine, values)[0] for values in itertools.product(*frugal)):
            continue
        for values in itertools.product(*options):
            candidate, keys = candidate_with(machine, values)
            if candidate:
                settings = [f"--config.{key}={str(value).lower()}" for key, value in keys.items()]
                return candidate, [f"--topology={machine}"] * (machine != own_machine) + settings
    return None
