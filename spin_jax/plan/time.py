"""How long an iteration and a run take, by a roofline at stated efficiencies."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from spin_jax import config_values
from spin_jax.models import cost
from spin_jax.plan import collectives as traffic
from spin_jax.plan.compiled import Phase, Work, batches_of
from spin_jax.selfplay import from_config
from spin_jax.training import batches
from spin_jax.training.batches import filled_tokens

# --- time ----------------------------------------------------------------------------------------


class Assumed(NamedTuple):
    """What times are computed from, beside the config."""

    pairs: int
    mfu: float = 0.45
    decode_efficiency: float = 0.5
    dcn_gbit_s: float = 50.0
    host_gb_s: float = 16.0  # between a device and its host's memory


def fill_in_times(work: Work, phases: dict[str, Phase], assumed: Assumed) -> None:
    """Fills in what each phase takes of an iteration."""
    c, m, chip, mesh = work.config, work.model.config, work.chip, work.model.mesh
    epochs = config_values.per_iteration(c.train.epochs, 0)
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
    share = from_config.sampling_tensor(c, work.model)
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


def run_time(work: Work, phases: Mapping[str, Phase]) -> dict[str, float]:
    """What all iterations take; a later one scores and trains on pairs of those before as well."""
    c, hours = work.config, 0.0
    seconds = {name: phase.seconds * phase.units for name, phase in phases.items()}
    for t in range(c.selfplay.start, c.selfplay.iterations):
        sources = 1 + min(t - c.selfplay.start, c.selfplay.mix_previous)
        epochs = config_values.per_iteration(c.train.epochs, t) / config_values.per_iteration(
            c.train.epochs, 0
        )
        references = 2 if t > c.selfplay.start and 0 < c.loss.reference_alpha < 1 else 1
        scoring = references * seconds["score"]
        hours += (seconds["sample"] + sources * (scoring + epochs * seconds["train"])) / 3600
    iterations = c.selfplay.iterations - c.selfplay.start
    return {"iterations": iterations, "hours": hours, "device_hours": hours * work.model.mesh.size}


def duration(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"
