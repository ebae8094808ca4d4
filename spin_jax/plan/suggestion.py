"""What would fit: the nearest settings, found by arithmetic."""

import itertools
from typing import Any

from spin_jax.plan import machine as machines
from spin_jax.plan.compiled import Work, fits, workload
from spin_jax.plan.estimate import estimated_phases

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
            candidate = workload(c.changed(keys), str(machine), work.compiles)
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
