"""A config on a machine, and what its phases take of each device."""

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from spin_jax import errors
from spin_jax.data.records import Pair
from spin_jax.forecast.job import Job
from spin_jax.models import loading
from spin_jax.models.architecture import Model
from spin_jax.plan.machine import Topology, parse_topology, planning_mesh, topology_devices
from spin_jax.runtime import chips, sharding
from spin_jax.selfplay import from_config
from spin_jax.storage import files
from spin_jax.training.packing import RowShape

GIB = 2.0**30


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """A config on a machine. Nothing of it runs."""

    config: Any
    topology: Topology
    model: Model  # without weights; its mesh is a `planning_mesh` where nothing is compiled
    shape: RowShape
    pairs: list[Pair]
    uncompiled: str = ""  # why nothing is compiled; empty where the programs are

    @property
    def compiles(self) -> bool:
        return not self.uncompiled

    @property
    def on_gpu(self) -> bool:
        return self.job.platform == "gpu"

    @functools.cached_property
    def chip(self) -> chips.Chip:
        return chips.chip_of(list(self.model.mesh.devices.flat))

    @functools.cached_property
    def job(self) -> Job:
        machine = self.topology
        return from_config.job(self.config, self.model, self.shape, self.pairs, machine.hosts, machine.slices)


@dataclasses.dataclass
class PhaseCost:
    """What one phase takes of each device."""

    parts: dict[str, float]  # bytes of device memory, by what fills them
    traffic: dict[str, float]  # bytes per unit, by the kind of collective
    unit: str  # a step, a micro-batch or a token: what `traffic` and the speed count for
    offloaded: float = 0.0  # bytes of each device that stay in the host's memory

    @property
    def memory(self) -> float:
        return sum(self.parts.values())


def planned_run(config: Any, topology: str, compiles: bool = True) -> PlannedRun:
    """The run of a config on a machine; ValueError for an unknown machine, or a mesh that does not fit it.

    `compiles` says whether programs will be compiled. Arithmetic needs no compiler.
    """
    machine = parse_topology(topology)
    stated = config.model.architecture.to_dict()
    if config.model.path and os.path.isdir(config.model.path):  # it wins where the two differ
        stated = files.read_json(os.path.join(config.model.path, "config.json"))
    if not stated:
        raise ValueError("the config has no model.architecture: give it, or --config.model.path=DIR")
    model = loading.new_model(stated, None, dtype=config.model.dtype)
    sizes = from_config.mesh_sizes(config, model.config, machine.devices, machine.slices)
    uncompiled = "" if compiles else "--nocompile"
    mesh: Any = planning_mesh(machine, sizes)
    if compiles:
        try:
            mesh = sharding.make_mesh(**sizes, devices=topology_devices(machine))
        except errors.NoCompiler as missing:
            uncompiled = str(missing)
    model = dataclasses.replace(model, mesh=mesh)
    from_config.check_mesh(config, model)
    pairs = from_config.expected_pairs(config, model.config.vocab_size, 16 * config.train.batch_size)
    longest = min(config.lengths.max_prompt, config.lengths.max_length - 1)
    lengths = [*((len(pair.prompt), len(pair.real)) for pair in pairs), (longest, config.lengths.max_length - longest)]
    shape = from_config.pair_shape_of_lengths(config, model, np.array(lengths), {})
    return PlannedRun(config, machine, model, shape, pairs, uncompiled)


def limit(run: PlannedRun) -> float:
    """The bytes of a device that a program may use: JAX's share of a GPU; a TPU less the runtime's part."""
    return run.chip.memory * (float(chips.GPU_MEMORY) if run.on_gpu else 63 / 64)


def fits(run: PlannedRun, phases: Mapping[str, PhaseCost], margin: float = 1.0) -> bool:
    """Whether every phase has room, with `margin` as the share of the memory that it may fill."""
    return all(phase.memory <= margin * limit(run) for phase in phases.values())
