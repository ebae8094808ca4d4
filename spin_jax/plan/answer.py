"""The answer of `plan`: memory, traffic and time of each phase, whether all of them fit, and what would."""

import dataclasses
from typing import Any

from spin_jax import config_values
from spin_jax.models import cost
from spin_jax.plan.compiled import compiled_phases
from spin_jax.plan.estimate import estimated_phases
from spin_jax.plan.planned_run import GIB, PlannedRun, fits, limit
from spin_jax.plan.suggestion import suggestion
from spin_jax.plan.time import Assumed, fill_in_times, run_time
from spin_jax.runtime.console import compact
from spin_jax.selfplay import from_config
from spin_jax.training.optimizer import OPTIMIZERS


def plan(run: PlannedRun, assumed: Assumed) -> dict[str, Any]:
    """The answer, as --json prints it."""
    phases, margin = estimated_phases(run), 1.0
    if run.compiles:
        guess, phases = phases, compiled_phases(run, phases)
        # Suggestions are found by arithmetic. It errs for other settings about as much as for these, and the compiler
        # tells how much that is.
        margin = min(0.9, *(0.97 * guess[name].memory / phase.memory for name, phase in phases.items()))
    fill_in_times(run, phases, assumed)
    c, model, mesh, whole = run.config, run.model.config, run.model.mesh, fits(run, phases)
    other = None if whole else suggestion(run, margin)
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
        "run": run_time(run, phases),
        "assumed": {
            **assumed._asdict(),
            "epochs": config_values.per_iteration(c.train.epochs, 0),
            "lengths": list(c.lengths.expected),
        },
        "suggestion": None if other is None else {"flags": other[1], "compiled": confirmed},
    }


def _lora_savings(run: PlannedRun) -> dict[str, Any] | None:
    """What adapters save, by arithmetic. None for a run without adapters."""
    t = run.config.train
    if not t.lora_rank:
        return None
    without = dataclasses.replace(run, config=run.config.changed({"train.lora_rank": None}))
    saved = estimated_phases(without)["train"].memory - estimated_phases(run)["train"].memory
    trained = from_config.trained_params(run.config, run.model.config)
    each = 4 * (1 + OPTIMIZERS[t.optimizer].moments) / GIB
    return {
        "rank": t.lora_rank,
        "trained": trained,
        "saved_gib": saved / GIB,
        "checkpoint_gib": each * trained,
        "checkpoint_without_gib": each * cost.all_params(run.model.config),
    }
