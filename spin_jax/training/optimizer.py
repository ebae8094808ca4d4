"""How parameters follow gradients: optimizers, learning-rate schedules and clipping.

To add another optimizer, add an entry to OPTIMIZERS: the check of `train.optimizer` and the memory plan read it too.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spin_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Optimization:
    """The options of one training phase; each field is a config key of `train` and `sft`."""

    optimizer: str  # a name in OPTIMIZERS
    learning_rate: float
    schedule: str
    warmup_ratio: float
    weight_decay: float
    momentum: float  # AdamW's β1
    decay: float  # decay rate of the mean squared gradient: RMSProp's α, AdamW's β2
    eps: float
    clip_norm: float | None
    offload: bool  # whether the optimizer's state stays in the hosts' memory between steps
    batch_size: int
    epochs: int
    schedule_epochs: int | None
    lora_rank: int | None = None  # the adapters' rank; None trains the weights themselves
    lora_alpha: float = 16.0
    lora_targets: tuple[str, ...] = ()
    frozen_dtype: str | None = None  # int8 or nf4, in which the weights under adapters are stored

    def __post_init__(self):
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer={self.optimizer!r}: choose from {', '.join(OPTIMIZERS)}")
        if self.schedule not in ("linear", "cosine", "constant"):
            raise ValueError(f"schedule={self.schedule!r}: choose from linear, cosine, constant")
        if self.schedule_epochs is not None and self.schedule_epochs < self.epochs:
            raise ValueError(
                f"schedule_epochs={self.schedule_epochs} is shorter than epochs={self.epochs}: the rest of the data "
                "would be trained on at learning rate 0. Set it to epochs or more, or leave it unset"
            )

    @property
    def lora_scale(self) -> float:
        return self.lora_alpha / (self.lora_rank or 1)

    def schedule_steps(self, steps: int) -> int:
        """The length of the schedule, where all `epochs` together have `steps` steps."""
        return steps * (self.schedule_epochs or self.epochs) // max(self.epochs, 1)

    def learning_rates(self, total: int) -> np.ndarray:
        """Each step's learning rate over a schedule of `total` steps, float32 [total].

        The formulas are those of transformers' schedulers: with a warm-up, the rate of step 0 is 0.
        """
        warmup, peak = int(np.ceil(total * self.warmup_ratio)), self.learning_rate
        after = {
            "linear": optax.linear_schedule(peak, 0.0, max(total - warmup, 1)),
            "cosine": optax.cosine_decay_schedule(peak, max(total - warmup, 1)),
            "constant": optax.constant_schedule(peak),
        }[self.schedule]
        schedule = optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup, 1)), after], [warmup])
        return np.asarray(jax.vmap(schedule)(jnp.arange(total)), np.float32).reshape(-1)

    def check_schedule(self, section: str, steps: int, schedule_steps: int | None = None) -> list[str]:
        """Notes on steps that learn nothing: one where a tenth of `steps` or more has the learning rate 0.

        Args:
            section: the section of the config that has these options, for the message.
            schedule_steps: the length of the schedule; unset, the options say it.

        Raises:
            ConfigError: every step has the learning rate 0.
        """
        rates = self.learning_rates(schedule_steps or self.schedule_steps(steps))[:steps]
        idle = int(np.sum(rates == 0))
        advice = f"Set {section}.warmup_ratio=0, a smaller {section}.batch_size, or more {section}.epochs"
        if steps and idle == steps:
            which = f"all {steps} optimizer steps" if steps > 1 else "the only optimizer step"
            raise ConfigError(f"{section}: the learning rate is 0 in {which}, so nothing would be trained. {advice}")
        if idle and 10 * idle >= steps:
            return [f"{section}: the learning rate is 0 in {idle} of {steps} optimizer steps. {advice}"]
        return []


# --- the optimizers ------------------------------------------------------------------------------


class Optimizer(NamedTuple):
    """One choice of `train.optimizer`."""

    transformations: Callable[[Optimization], list[optax.GradientTransformation]]  # applied in this order
    moments: int  # numbers that it keeps for each parameter, rounded to a whole number


OPTIMIZERS: dict[str, Optimizer] = {
    # RMSProp as in PyTorch: eps outside of the root, no bias correction, weight decay added to the gradient.
    "rmsprop": Optimizer(
        lambda o: [
            optax.add_decayed_weights(o.weight_decay),
            optax.scale_by_rms(o.decay, eps=o.eps, eps_in_sqrt=False, bias_correction=False),
        ],
        moments=1,
    ),
    "adamw": Optimizer(
        lambda o: [optax.scale_by_adam(o.momentum, o.decay, eps=o.eps), optax.add_decayed_weights(o.weight_decay)],
        moments=2,
    ),
    "adafactor": Optimizer(
        lambda o: [
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(o.weight_decay),
        ],
        moments=0,  # it keeps one number for each row and each column of a matrix
    ),
}


def make_optimizer(options: Optimization) -> optax.GradientTransformation:
    """Turns gradients into directions; the training step subtracts learning_rate · direction."""
    clip = [] if options.clip_norm is None else [optax.clip_by_global_norm(options.clip_norm)]
    return optax.chain(*clip, *OPTIMIZERS[options.optimizer].transformations(options))
