"""How parameters follow gradients: optimizers, schedules, clipping.

THE FILE TO EDIT FOR ANOTHER OPTIMIZER: a line in OPTIMIZERS, and one in MOMENTS.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax


@dataclasses.dataclass(frozen=True)
class Optimization:
    """How parameters follow gradients; each field is a config key of `train` and `sft`."""

    optimizer: str
    learning_rate: float
    schedule: str
    warmup_ratio: float
    weight_decay: float
    momentum: float  # AdamW's β1
    decay: float  # of the squared gradient: RMSProp's α, AdamW's β2
    eps: float
    clip_norm: float | None
    offload: bool  # the optimizer's state waits in the hosts' memory
    batch_size: int
    epochs: int
    schedule_epochs: int | None
    lora_rank: int | None = None  # of adapters that are trained in place of the weights; None: the weights
    lora_alpha: float = 16.0
    lora_targets: tuple[str, ...] = ()

    def __post_init__(self):
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer={self.optimizer!r}: choose from {', '.join(OPTIMIZERS)}")
        if self.schedule not in ("linear", "cosine", "constant"):
            raise ValueError(f"schedule={self.schedule!r}: choose from linear, cosine, constant")
        if self.schedule_epochs is not None and self.schedule_epochs < self.epochs:
            raise ValueError(f"schedule_epochs={self.schedule_epochs} is shorter than epochs={self.epochs}")

    @property
    def lora_scale(self) -> float:
        return self.lora_alpha / (self.lora_rank or 1)

    def schedule_steps(self, steps: int) -> int:
        """The length of the schedule that goes with `steps`, those of `epochs`."""
        return steps * (self.schedule_epochs or self.epochs) // max(self.epochs, 1)

    def learning_rates(self, total: int) -> np.ndarray:
        """Each step's learning rate over a schedule of `total` steps, float32 [total].

        The formulas of transformers' schedulers: with a warm-up, step 0 has 0.
        """
        warmup = int(np.ceil(total * self.warmup_ratio))
        peak = self.learning_rate
        after = {
            "linear": optax.linear_schedule(peak, 0.0, max(total - warmup, 1)),
            "cosine": optax.cosine_decay_schedule(peak, max(total - warmup, 1)),
            "constant": optax.constant_schedule(peak),
        }[self.schedule]
        schedule = optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup, 1)), after], [warmup])
        return np.asarray(jax.vmap(schedule)(jnp.arange(total)), np.float32).reshape(-1)


# --- the step ------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Optimization], list[optax.GradientTransformation]]] = {
    # PyTorch's form: eps outside of the root, no bias correction, L2 in the gradient.
    "rmsprop": lambda o: [
        optax.add_decayed_weights(o.weight_decay),
        optax.scale_by_rms(o.decay, eps=o.eps, eps_in_sqrt=False, bias_correction=False),
    ],
    "adamw": lambda o: [
        optax.scale_by_adam(o.momentum, o.decay, eps=o.eps),
        optax.add_decayed_weights(o.weight_decay),
    ],
    "adafactor": lambda o: [
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(o.weight_decay),
    ],
}


# Numbers that it keeps for each parameter, near enough.
MOMENTS = {"rmsprop": 1, "adamw": 2, "adafactor": 0}


def make_optimizer(options: Optimization) -> optax.GradientTransformation:
    """Gradients → descent directions; the step multiplies them by −learning_rate."""
    clip = [] if options.clip_norm is None else [optax.clip_by_global_norm(options.clip_norm)]
    return optax.chain(*clip, *OPTIMIZERS[options.optimizer](options))
