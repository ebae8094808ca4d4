"""A run as arithmetic sees it: what there is to do, on which machine, and at which rates."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from spin_jax import config_values
from spin_jax.data.records import Pair
from spin_jax.models.architecture import Model, ModelConfig
from spin_jax.training import custom_loss
from spin_jax.training.batches import PairBatch, ScoredPair, pair_batches
from spin_jax.training.packing import RowShape


class Rates(NamedTuple):
    """How fast a machine is. Flags of `plan` change them; a run takes these."""

    mfu: float = 0.0  # share of the peak that training and scoring reach; 0: that of MFU
    decode_efficiency: float = 0.5  # share of its roofline that decoding reaches
    dcn_gbit_s: float = 50.0  # that a device gets from other slices
    host_gb_s: float = 16.0  # between a device and its host's memory: half of PCIe 4.0 × 16
    # Files of a process. A network disk of Google's (pd-ssd) has 1.2 GB/s. A file is read once when it is checked and
    # once for its content; one that is written is read again for its seal.
    read_gb_s: float = 0.6
    write_gb_s: float = 0.6
    compile_s: float = 0.0  # for each program; 0: that of COMPILE_S

    def on(self, platform: str) -> "Rates":
        """The rates with those filled in that depend on the platform: tpu, gpu or cpu."""
        mfu, compile_s = self.mfu or MFU[platform], self.compile_s or COMPILE_S[platform]
        return self._replace(mfu=mfu, compile_s=compile_s)


# On a CPU the peak is that of a matrix product that was measured. Compiling: plan/README.md has measurements.
MFU = {"tpu": 0.45, "gpu": 0.45, "cpu": 0.6}
COMPILE_S = {"tpu": 40.0, "gpu": 15.0, "cpu": 3.0}


class Amounts(NamedTuple):
    """What an iteration has to do."""

    answers: float  # that are sampled, those to held-out prompts included
    written: float  # the rows of its files of pairs
    pairs: float  # that are trained on, with those of earlier iterations and added ones


class Work(NamedTuple):
    """What a run has to do."""

    iterations: Mapping[int, Amounts]
    examples: float  # that SFT trains on
    held_out: float  # prompts
    held_pairs: float  # of answers to them, in each iteration


@dataclasses.dataclass(frozen=True)
class Job:
    """A run without its data. `from_config.job` makes it."""

    config: Any
    model: Model  # without weights; its mesh may be a `planning_mesh`
    shape: RowShape  # of a micro-batch of pairs
    pairs: Sequence[Pair]  # some pairs, by which the work on one is estimated
    tensor: int  # how many devices share a copy of the sampler's weights
    slots: int  # answers in progress at a time on all devices together
    trained: int  # how many numbers self-play trains
    references: Mapping[int, int]  # how many models score the pairs of each iteration
    judge: ModelConfig | None  # the reward model of selfplay.scorer
    hosts: int  # processes
    slices: int

    @property
    def platform(self) -> str:
        return self.model.mesh.devices.flat[0].platform

    @property
    def lengths(self) -> tuple[float, float, float]:
        """The tokens of prompt, human and generated answer: `lengths.expected`, as far as the limits allow them."""
        c = self.config.lengths
        prompt = min(c.expected[0], c.max_prompt, c.max_length - 1)
        real, new = (min(n, c.max_length - prompt) for n in c.expected[1:])
        return prompt, real, min(new, self.config.sampling.max_new_tokens)


def assumed_work(config: Any, pairs: float) -> Work:
    """What a run has to do whose iterations make so many pairs each."""
    play, held = config.selfplay, config.eval
    prompts = pairs / config_values.rows_of_a_prompt(play)
    held_out = held.limit if held.path else min(held.limit, round(held.fraction * prompts))
    held_pairs = held_out * config_values.answers_wanted(play, held_out=True)
    sampled = prompts * play.samples + held_pairs
    with_added, given, iterations = pairs / (1 - (play.add_share or 0.0)), config_values.given_pairs(config), {}
    for t in range(play.start, play.iterations):
        written = (pairs + held_pairs if t in given else sampled) + with_added - pairs
        sources = 1 + min(t - play.start, play.mix_previous)
        iterations[t] = Amounts(0 if t in given else sampled, written, with_added * sources)
    return Work(iterations, prompts, held_out, held_pairs)


def batches_of(config: Any, shape: RowShape, pairs: Sequence[Pair]) -> list[PairBatch]:
    """Micro-batches of pairs, with zeros as the opponent's log-probs."""
    roles = custom_loss.roles(config.loss)
    return pair_batches([ScoredPair(pair, (0.0,) * len(roles)) for pair in pairs], shape, roles=roles)
