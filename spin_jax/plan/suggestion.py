"""The nearest settings that would fit, found by arithmetic."""

import itertools
from typing import Any

from spin_jax import config_values
from spin_jax.plan.estimate import estimated_phases
from spin_jax.plan.machine import FAMILIES, Topology
from spin_jax.plan.planned_run import PlannedRun, fits, planned_run
from spin_jax.runtime import sharding

# The values that are tried for a key after the config's own value, in this order.
_REMATS = ("none", "attention+mlp", "attention", "full")
_TOKENS = (4096, 2048)
_SPLITS = (2, 4, 8)
_ANSWERS = (64, 32, 16)


def suggestion(run: PlannedRun, margin: float = 1.0) -> tuple[PlannedRun, list[str]] | None:
    """(the run with the nearest settings that fit, the flags that change them); None if none was found.

    It tries what the backward pass computes again, the size of micro-batches, the mesh, and larger machines. `margin`
    is the share of the memory that the settings may fill by arithmetic.
    """
    c, own_machine, sizes = run.config, run.topology, FAMILIES[run.topology.family].sizes
    larger = sizes[sizes.index(own_machine.size) :] if own_machine.size in sizes else (own_machine.size,)
    choices = {
        "sampling.batch_size": [n for n in _ANSWERS if n < c.sampling.batch_size],
        "train.offload": [True] * (not c.train.offload),
        "mesh.tensor": [n for n in _SPLITS if n > sharding.tensor_shards(run.model.mesh)],
        "train.tokens_per_device": [n for n in _TOKENS if n < c.train.tokens_per_device],
        "train.remat": _REMATS[_REMATS.index(c.train.remat) + 1 :],
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
        frugal = [values if key == "mesh.tensor" else values[-1:] for key, values in zip(choices, options, strict=True)]
        if not any(candidate_with(machine, values)[0] for values in itertools.product(*frugal)):
            continue
        for values in itertools.product(*options):
            candidate, keys = candidate_with(machine, values)
            if candidate:
                settings = [f"--config.{key}={str(value).lower()}" for key, value in keys.items()]
                return candidate, [f"--topology={machine}"] * (machine != own_machine) + settings
    return None
