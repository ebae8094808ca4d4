"""How many bytes a run writes, and how many each of its processes keeps in its host's memory.

Bytes in an object store are the same as on a disk. Orbax compresses checkpoints, by less than a tenth: their sizes are
the most that they take.
"""

import math

import jax

from spin_jax import config_values
from spin_jax.forecast.job import Amounts, Job, Work
from spin_jax.models import cost
from spin_jax.models.params import abstract_params
from spin_jax.runtime import sharding
from spin_jax.training import custom_loss
from spin_jax.training.optimizer import OPTIMIZERS

# Measured on English text (GSM8K, a vocabulary of 49,152), compressed: a row of a file of pairs has each token id once,
# and its text once, but that of the prompt twice. A row of scores has its ids, and a float32 for each answer.
_ID_BYTES, _TEXT_BYTES, _SCORE_BYTES = 1.5, 1.25, 4.0
_FILE_BYTES = 4000  # schema and digests of a file of pairs
_STEP_BYTES = 650  # a row of metrics.jsonl and of TensorBoard's file

# Resident memory: Python with JAX and transformers, and what an example adds, whose text and tokens stay on the disk
# (data/README.md has the measurement).
_PROCESS_BYTES, _EXAMPLE_BYTES = 1.0e9, 240
_EXPORTED_FILE = 2 * 2**30  # models/saving.py parts an export into files of this size


def steps(job: Job, amounts: Amounts, t: int) -> int:
    """The training steps of an iteration."""
    c = job.config.train
    return math.ceil(amounts.pairs / c.batch_size) * config_values.per_iteration(c.epochs, t)


def saves(job: Job, steps: int) -> int:
    """How many step checkpoints are written in so many steps. There is none after the last step."""
    return max(steps - 1, 0) // job.config.checkpoint.every_steps


def moments(job: Job) -> float:
    """The bytes of the optimizer's state."""
    return 4.0 * OPTIMIZERS[job.config.train.optimizer].moments * job.trained


def state(job: Job) -> float:
    """The bytes of a step checkpoint."""
    return 4.0 * job.trained + moments(job)


def offloaded(job: Job) -> float:
    """The bytes of each device's optimizer state that wait in its host's memory."""
    return moments(job) / sharding.weight_shards(job.model.mesh) if job.config.train.offload else 0.0


def export(job: Job) -> float:
    """The bytes of the weights of an exported model."""
    return float(job.model.dtype.itemsize * cost.all_params(job.model.config))


def makes_start(job: Job) -> bool:
    """Whether the run makes the model that self-play starts from."""
    return not job.config.model.path or job.config.sft.epochs > 0


def of_iteration(job: Job, amounts: Amounts, work: Work, t: int) -> dict[str, float]:
    """The bytes that iteration t leaves, by what they are."""
    c, (prompt, real, new) = job.config, job.lengths
    row = _ID_BYTES * (prompt + real + new) + _TEXT_BYTES * (2 * prompt + real + new)
    files = math.ceil(amounts.written / c.sampling.shard_size)
    scored = (amounts.pairs + work.held_pairs) * job.references[t]
    checkpoint = 4.0 * cost.all_params(job.model.config)
    return {
        "pairs": amounts.written * row + files * _FILE_BYTES,
        "scores": scored * _SCORE_BYTES * (2 + len(custom_loss.roles(c.loss))),
        "checkpoint": checkpoint,
        "export": export(job),
        "adapters": 4.0 * job.trained if c.export.adapters and c.train.lora_rank else 0.0,
        "control": checkpoint if c.sft.control else 0.0,
        "logs": float(_STEP_BYTES * steps(job, amounts, t) * (1 + c.sft.control)),
    }


def of_run(job: Job, work: Work) -> dict[str, float]:
    """The bytes that a run leaves, by what they are; and the most that its step checkpoints take while it trains."""
    c, total = job.config, dict[str, float]()
    for t, amounts in work.iterations.items():
        for name, size in of_iteration(job, amounts, work, t).items():
            total[name] = total.get(name, 0.0) + size
    if makes_start(job):
        total["start"] = 4.0 * cost.all_params(job.model.config) + export(job)
    if c.sft.control:
        total["control"] = total.get("control", 0.0) + export(job)
    total["best"] = export(job) if c.checkpoint.best else 0.0
    most = max((saves(job, steps(job, amounts, t)) for t, amounts in work.iterations.items()), default=0)
    total["step checkpoints"] = min(most, c.checkpoint.keep + 1) * state(job)
    return {name: size for name, size in total.items() if size}


def host_memory(job: Job, work: Work, devices_bytes: float = 0.0) -> dict[str, float]:
    """The bytes of each process, by what fills them, and the `most` of them at a time.

    `devices_bytes` are those that devices take of it, which CPUs do.
    """
    m, shards = job.model.config, sharding.weight_shards(job.model.mesh)
    devices = job.model.mesh.size // job.hosts
    share = min(devices, shards) / shards  # of the weights that the devices of a process hold
    leaf = max(leaf.size for leaf in jax.tree.leaves(sharding.unboxed(abstract_params(m))))
    always = {
        "process": _PROCESS_BYTES,
        "examples": _EXAMPLE_BYTES * (work.examples + work.held_out),
        "optimizer": offloaded(job) * devices,
        "devices": devices_bytes,
    }
    at_a_time = {
        "loading": 4.0 * leaf * share,  # a weight of all layers, before it is on the devices
        "checkpoint": max(state(job), 4.0 * cost.all_params(m)) * share,
        "export": 2 * min(export(job), _EXPORTED_FILE),  # the tensors of a file, and its bytes
    }
    return always | at_a_time | {"most": sum(always.values()) + max(at_a_time.values())}
