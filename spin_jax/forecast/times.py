"""How long the phases of a run take: a roofline for the devices, stated rates for files and compilers.

`plan` and the summary of a run use these functions alike.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from spin_jax.forecast import sizes
from spin_jax.forecast.job import Job, Rates, Work, batches_of
from spin_jax.models import cost
from spin_jax.report.numbers import START
from spin_jax.runtime import sharding
from spin_jax.runtime.chips import Chip
from spin_jax.training import batches

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
BETWEEN_SLICES = "between slices"  # by way of the hosts and the data-centre network
Traffic = Mapping[str, float]  # bytes of a device per unit, by the kind of collective


class Speed(NamedTuple):
    """How fast a phase goes."""

    seconds: float  # per unit: a step of training, a micro-batch of scoring, or a token
    items: float  # pairs of a unit; 1 for a token
    tflops: float  # of the model, per unit and device
    tokens_per_s: float  # of all devices together
    bottleneck: str


def received_bytes(traffic: Traffic) -> float:
    """Bytes that reach a device over the links of its slice. An all-reduce counts twice, there and back."""
    return sum(size * (2 if kind == "all-reduce" else 1) for kind, size in traffic.items() if kind in COLLECTIVES)


def speeds(job: Job, chip: Chip, rates: Rates, traffic: Mapping[str, Traffic] | None = None) -> dict[str, Speed]:
    """{train, score, sample: its speed}. Where the compiler has not said what the devices exchange, arithmetic does."""
    c, m, mesh, shape = job.config, job.model.config, job.model.mesh, job.shape
    rates, size, exchanged = rates.on(job.platform), c.train.batch_size, traffic or estimated_traffic(job)
    steps = [batches_of(c, shape, job.pairs[first : first + size]) for first in range(0, len(job.pairs), size)]
    parts = [part for step in steps for part in step]
    microbatches = len(parts) / len(steps)
    filled = sum(map(batches.filled_tokens, parts)) / len(steps)
    forward = sum(batches.rows_flops(m, part.rows) for part in parts) / len(steps)
    padding = microbatches * shape.rows * shape.length / filled

    def bound(traffic: Traffic, passes: int, per_unit: float, offloaded: float = 0.0) -> Speed:
        """Computation and transfers overlap, so the slowest of them is the time of a unit."""
        flops = passes * forward * per_unit / mesh.size
        between = traffic.get(BETWEEN_SLICES, 0) * microbatches * per_unit
        times = {
            "compute": flops * padding / (chip.flops * rates.mfu),
            "collectives": received_bytes(traffic) * microbatches * per_unit / chip.links,
            "network between slices": between * 8 / (rates.dcn_gbit_s * 1e9),
            "host memory": 2 * offloaded / (rates.host_gb_s * 1e9),  # to the device and back
        }
        slowest = max(times, key=lambda name: times[name])
        rate = filled * per_unit / times[slowest]
        return Speed(times[slowest], size * per_unit, flops / 1e12, rate, slowest)

    prompt, _, new = job.lengths
    step = cost.decode_step_s(m, chip, c.sampling.batch_size, prompt + new / 2, job.model.dtype.itemsize, job.tensor)
    step /= rates.decode_efficiency
    links = received_bytes(exchanged["sample"]) / chip.links
    reading = cost.forward_flops(m, prompt, 1, prompt * prompt / 2) / (job.tensor * chip.flops * rates.mfu)
    reading /= c.selfplay.samples  # a prompt is read once for all its answers
    each = (max(step, links) / c.sampling.batch_size + reading / new) / (mesh.size // job.tensor)
    flops = cost.forward_flops(m, 1, 1, prompt + new / 2) / mesh.size
    return {
        "train": bound(exchanged["train"], 2 if c.train.lora_rank else 3, 1.0, sizes.offloaded(job)),
        "score": bound(exchanged["score"], 1, 1 / microbatches),
        "sample": Speed(each, 1, flops / 1e12, 1 / each, "collectives" if links > step else "memory bandwidth"),
    }


def phase_seconds(
    job: Job, work: Work, chip: Chip, rates: Rates, speed: Mapping[str, Speed]
) -> dict[int, dict[str, float]]:
    """{iteration: {phase: seconds}}, from the START on, which compiles. Tasks of eval.tasks do not count.

    The phases have the names that the stopwatch of a run knows.
    """
    c, m, mesh = job.config, job.model.config, job.model.mesh
    rates, held_out, (prompt, real, new) = rates.on(job.platform), work.held_out, job.lengths
    read, write = (1e9 * job.hosts * rate for rate in (rates.read_gb_s, rates.write_gb_s))
    pair = speed["score"].seconds / speed["score"].items
    example = pair * (prompt + real) / (prompt + real + new)  # seconds of its forward pass
    sft_step = (2 if c.sft.lora_rank else 3) * example * c.sft.batch_size
    checkpoint = 4 * cost.all_params(m)
    evaluates, most = bool(held_out), max((amounts.answers for amounts in work.iterations.values()), default=0)

    def answers(count: float) -> float:
        """The seconds of so many answers. Slots are computed whether or not they are filled."""
        return max(count, min(job.slots, most) if count else 0) * new * speed["sample"].seconds

    def judged(count: float) -> float:
        tokens = prompt + new
        flops = cost.forward_flops(job.judge, tokens, 0, tokens * tokens / 2) if job.judge else 0.0
        return count * flops / (mesh.size * chip.flops * rates.mfu)

    # Of a model by itself: log-probs of human answers, its own answers at temperature 1 and, for a verifier, greedily.
    verified = answers(held_out) if c.eval.verifier else 0.0
    alone = held_out * example + answers(held_out * c.eval.samples) + verified
    fixed = answers(c.eval.fixed_prompts)
    programs = 3 + 4 * evaluates + bool(c.sft.epochs or c.sft.control) + bool(job.judge)
    programs += 2 * (c.sampling.temperature not in (0.0, 1.0) or c.sampling.top_k is not None)
    result = {START: {"compile": rates.compile_s * programs, "evaluation": alone + fixed}}
    start = result[START]
    if c.model.path:
        start["load"] = sizes.export(job) / read
    if sizes.makes_start(job):
        start["sft"] = math.ceil(work.examples / c.sft.batch_size) * c.sft.epochs * sft_step
        start |= {"checkpoint": checkpoint / write, "export": sizes.export(job) / write}

    for t, amounts in work.iterations.items():
        steps = sizes.steps(job, amounts, t)
        references, written = job.references[t], sizes.of_iteration(job, amounts, work, t)
        # Float32 weights are read: an average of opponents from those of each, and with LoRA to merge the adapters.
        averaged = t - c.selfplay.start + 1 if c.selfplay.opponent_decay else 0
        loads = references - 1 + bool(c.train.lora_rank) + averaged
        loads += t > c.selfplay.start and (c.selfplay.restart or bool(averaged))  # training begins from other weights
        phases = {
            "sample": answers(amounts.answers),
            "judge": judged(amounts.answers),
            "score": references * (amounts.pairs + work.held_pairs) * pair,
            "train": steps * speed["train"].seconds,
            "evaluation": alone + fixed + work.held_pairs * pair,
        }
        if evaluates and c.eval.kl:
            others = 1 if t == c.selfplay.start else 2
            phases["evaluation"] += (1 + others) * held_out * c.eval.samples * pair
            loads += others + max(averaged - 1, 0)
            loads += t + 1 in work.iterations and not averaged  # the iteration's own again, to go on
        saved = written["checkpoint"] + sizes.saves(job, steps) * sizes.state(job)
        if c.sft.control:
            phases["control"] = steps * sft_step
            phases["evaluation"] += alone
            saved += written["control"]
        copies = 1 + bool(c.checkpoint.best)
        loaded = loads * checkpoint + (job.model.dtype.itemsize * cost.all_params(job.judge) if job.judge else 0)
        phases |= {"load": loaded / read, "checkpoint": saved / write}
        result[t] = phases | {"export": (written["export"] + written["adapters"]) * copies / write}
    return {t: {name: seconds for name, seconds in phases.items() if seconds} for t, phases in result.items()}


def estimated_traffic(job: Job) -> dict[str, dict[str, float]]:
    """{train, score, sample: the bytes of a micro-batch}, by arithmetic."""
    gradients = job.trained / cost.all_params(job.model.config)
    return {"train": _traffic(job, 3, gradients), "score": _traffic(job, 1, 0.0), "sample": {}}


def shared_numbers(job: Job) -> float:
    """How many numbers of a token each device gets in a layer from those that share its rows."""
    m, mesh = job.model.config, job.model.mesh
    if sharding.context_shards(mesh) == 1:
        return 0.0
    # Splash gathers queries and their results as well, for it has them in another order.
    heads = m.num_key_value_heads + (m.num_attention_heads if job.shape.unshared else 0)
    return 2 * heads * m.head_dim / sharding.tensor_shards(mesh)


def _traffic(job: Job, passes: int, gradients: float) -> dict[str, float]:
    """The bytes of a micro-batch. FSDP gathers weights in each pass over them, and scatters their gradients.

    Devices that share a row split the weights too, and gather keys and values in each layer.

    `passes` is 1 for a forward pass, 3 for a forward and a backward pass; `gradients` is the share of the weights that
    have gradients.
    """
    m, mesh, item = job.model.config, job.model.mesh, job.model.dtype.itemsize
    data, tensor = mesh.shape["data"], sharding.tensor_shards(mesh)
    of_rows = job.shape.rows // sharding.batch_shards(mesh) * job.shape.length
    tokens = of_rows // sharding.context_shards(mesh)
    weights, stored = item * cost.all_params(m) / tensor, sharding.weight_shards(mesh) // tensor
    rows = item * m.num_hidden_layers * of_rows * shared_numbers(job)
    result = {}
    if stored > 1:
        result["all-gather"] = (weights + rows) * min(passes, 2)
    if passes > 1 and data * stored > 1:
        result["reduce-scatter"] = gradients * weights + rows
    replicas = math.gcd(data, job.slices)
    between = 2 * (1 - 1 / replicas) * gradients * weights / stored if passes > 1 else 0.0
    if parts := job.slices // replicas - 1:  # fsdp spans slices: each slice gets the parts of the others
        mine = mesh.size / job.slices
        between += (min(passes, 2) + (passes > 2) * gradients) * weights * parts / (parts + 1) / mine
    if between:
        result[BETWEEN_SLICES] = between
    if tensor > 1:
        result["all-reduce"] = 2 * passes * m.num_hidden_layers * tokens * m.hidden_size * item
    return result
