"""How long an iteration and a run take, by a roofline at stated efficiencies."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from spin_jax import config_values
from spin_jax.models import cost
from spin_jax.plan.collectives import BETWEEN_SLICES, received_bytes
from spin_jax.plan.compiled import batches_of
from spin_jax.plan.planned_run import PhaseCost, PlannedRun
from spin_jax.selfplay import from_config
from spin_jax.selfplay.variants import reference_weights
from spin_jax.training import batches


class Assumed(NamedTuple):
    """What the times depend on, apart from config and machine. The defaults are those of the command."""

    pairs: int
    mfu: float = 0.45
    decode_efficiency: float = 0.5
    dcn_gbit_s: float = 50.0
    host_gb_s: float = 16.0  # between a device and its host's memory


def fill_in_times(run: PlannedRun, phases: dict[str, PhaseCost], assumed: Assumed) -> None:
    """Fills in the times, rates and bottlenecks of the phases, for the first iteration."""
    c, m, chip, mesh = run.config, run.model.config, run.chip, run.model.mesh
    epochs, size = config_values.per_iteration(c.train.epochs, 0), c.train.batch_size
    steps = [batches_of(run, run.pairs[first : first + size]) for first in range(0, len(run.pairs), size)]
    parts = [part for step in steps for part in step]
    microbatches = len(parts) / len(steps)
    filled = sum(map(batches.filled_tokens, parts)) / len(steps)
    forward = sum(batches.rows_flops(m, part.rows) for part in parts) / len(steps)
    padding = microbatches * run.shape.rows * run.shape.length / filled

    def bound(phase: PhaseCost, passes: int, per_unit: float) -> None:
        """Computation and transfers overlap, so the slowest of them is the time of a unit."""
        flops = passes * forward * per_unit / mesh.size
        phase.tflops = flops / 1e12
        between = phase.traffic.get(BETWEEN_SLICES, 0) * microbatches * per_unit
        times = {
            "compute": flops * padding / (chip.flops * assumed.mfu),
            "collectives": received_bytes(phase.traffic) * microbatches * per_unit / chip.links,
            "network between slices": between * 8 / (assumed.dcn_gbit_s * 1e9),
            "host memory": 2 * phase.offloaded / (assumed.host_gb_s * 1e9),  # to the device and back
        }
        phase.bottleneck = max(times, key=lambda name: times[name])
        phase.seconds = times[phase.bottleneck]
        phase.tokens_per_s = filled * per_unit / phase.seconds

    train, score, sample = phases["train"], phases["score"], phases["sample"]
    bound(train, 2 if c.train.lora_rank else 3, 1.0)  # frozen weights have no gradients
    train.units = math.ceil(assumed.pairs / size) * epochs
    bound(score, 1, 1 / microbatches)
    score.units = math.ceil(assumed.pairs / size) * microbatches

    prompt, _, new = c.lengths.expected
    share = from_config.sampling_tensor(c, run.model)
    copies = mesh.size // share
    step = cost.decode_step_s(m, chip, c.sampling.batch_size, prompt + new / 2, run.model.dtype.itemsize, share)
    links = received_bytes(sample.traffic) / chip.links
    reading = cost.forward_flops(m, prompt, 1, prompt * prompt / 2) / (share * chip.flops * assumed.mfu)
    reading /= c.selfplay.samples  # a prompt is read once for all its answers
    each = max(step / assumed.decode_efficiency, links) / c.sampling.batch_size + reading / new
    sample.bottleneck = "collectives" if links > step / assumed.decode_efficiency else "memory bandwidth"
    sample.tflops = cost.forward_flops(m, 1, 1, prompt + new / 2) / mesh.size / 1e12
    answers = assumed.pairs * c.selfplay.samples / config_values.rows_of_a_prompt(c.selfplay)
    sample.seconds, sample.units = each / copies, answers * new
    sample.tokens_per_s = copies / each


def run_time(run: PlannedRun, phases: Mapping[str, PhaseCost]) -> dict[str, float]:
    """Hours of all iterations. A later iteration also scores the pairs of earlier ones and trains on them."""
    c, hours = run.config, 0.0
    with_added = 1 / (1 - (c.selfplay.add_share or 0.0))  # pairs that are scored and trained on, for each own one
    seconds = {name: phase.seconds * phase.units for name, phase in phases.items()}
    for t in range(c.selfplay.start, c.selfplay.iterations):
        sources = 1 + min(t - c.selfplay.start, c.selfplay.mix_previous)
        epochs = config_values.per_iteration(c.train.epochs, t) / config_values.per_iteration(c.train.epochs, 0)
        scoring = len(reference_weights(c, t)) * seconds["score"]
        hours += (seconds["sample"] + sources * with_added * (scoring + epochs * seconds["train"])) / 3600
    iterations = c.selfplay.iterations - c.selfplay.start
    return {"iterations": iterations, "hours": hours, "device_hours": hours * run.model.mesh.size}


def duration(seconds: float) -> str:
    """3 significant digits in the unit that suits them: 1.5 h, 20 ms."""
    for size, unit in ((3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"
