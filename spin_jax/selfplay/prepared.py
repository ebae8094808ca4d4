"""The inputs of a run, read and checked."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from spin_jax import config_values
from spin_jax.config import Config
from spin_jax.data.chat import Chat
from spin_jax.data.records import Example, Pair
from spin_jax.evaluate import verifiers
from spin_jax.models.architecture import Model, Params
from spin_jax.models.decoder import Decoder
from spin_jax.sampling.next_token import Sampling
from spin_jax.selfplay import best, fingerprints, from_config
from spin_jax.selfplay.judge import Judge
from spin_jax.training import custom_loss
from spin_jax.training.optimizer import Optimization
from spin_jax.training.packing import RowShape


@dataclasses.dataclass
class Prepared:
    """The inputs of a run."""

    config: Config
    workdir: epath.Path
    model: Model  # without weights
    initial_params: Callable[[], Params]  # loads or initializes float32 weights
    chat: Chat
    datasets: list[list[Example]]  # to train on: one for all iterations, or one each
    held_out: list[Example]  # of the first
    judge: Judge | None  # of sampled answers
    verifier: verifiers.Verifier | None  # of held-out ones
    given: dict[int, list[Pair]]  # pairs from the config, by iteration
    pair_shape: RowShape  # of micro-batches, the same for all iterations
    example_shape: RowShape
    identity: fingerprints.Identity  # fingerprints and versions: what makes this run this run
    began: Mapping[str, Any]  # the config.json that is there already, or {}
    data_revision: str | dict[str, str | None] | None  # the commit of a hub dataset; of several, by path
    today: str  # what chat templates are told
    commit: str | None  # of the code that the run began with
    notes: list[str]  # what was dropped, cut or left out

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return self.model.mesh

    @property
    def roles(self) -> tuple[str, ...]:
        """The answers that a row of self-play has."""
        return custom_loss.roles(self.config.loss)

    @functools.cached_property
    def decoder(self) -> Decoder:
        """The model as a function, for policy and opponent alike."""
        return from_config.decoder(self.config, self.model)

    @functools.cached_property
    def sampling_mesh(self) -> jax.sharding.Mesh:
        """The mesh of the sampler, on the same devices."""
        return from_config.sampling_mesh(self.config, self.model)

    @functools.cached_property
    def better(self) -> int:
        """1 where more of checkpoint.best is better, −1 where less is; 0 where it is not set.

        Raises:
            ValueError: a run has no such number.
        """
        c = self.config
        if not c.checkpoint.best:
            return 0
        return best.direction(c.checkpoint.best, config_values.task_names(c), c.eval.include_path)

    def examples(self, t: int) -> list[Example]:
        """What iteration t trains on; the start trains on the first dataset.

        Raises:
            ValueError: data.path names datasets, and none for iteration t.
        """
        place = 0 if t < 0 or len(self.datasets) == 1 else t
        if place >= len(self.datasets):
            raise ValueError(f"data.path names {len(self.datasets)} datasets, and none for iteration {t}")
        return self.datasets[place]

    def folder(self, t: int) -> epath.Path:
        """Where iteration t is kept; −1 is the start."""
        return self.workdir / ("start" if t < 0 else f"iteration_{t}")

    def options(self, t: int) -> Optimization:
        """How iteration t is trained."""
        return from_config.optimization(self.config, t)

    def sft_options(self, control: bool = False) -> Optimization:
        """How the start is trained, or the control."""
        return from_config.sft_optimization(self.config, control)

    def sampling(self, **changes: Any) -> Sampling:
        """The config's way of drawing answers, with some of it changed."""
        return dataclasses.replace(from_config.sampling(self.config), **changes)

    @property
    def makes_start(self) -> bool:
        """Whether the start is made here: there is no model.path, or an SFT stage."""
        return not self.config.model.path or self.config.sft.epochs > 0

    @property
    def iterations(self) -> range:
        """The iterations this run makes."""
        return range(self.config.selfplay.start, self.config.selfplay.iterations)
