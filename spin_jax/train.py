"""Training: one jitted step, and the loop over it.

An objective says what a batch costs; the step is the same for self-play and SFT. Axes: A
micro-batches, B pairs (or sequences) of one micro-batch.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from spin_jax import checkpoint, losses, sharding
from spin_jax.batches import PairBatch, SFTBatch, real_rows
from spin_jax.losses import PairLogps
from spin_jax.model import Decoder, Params
from spin_jax.scoring import response_logps

Metrics = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Optimization:
    """How parameters follow gradients; every field is a config key of `train` and `sft`."""

    optimizer: str
    learning_rate: float
    schedule: str
    warmup_ratio: float
    weight_decay: float
    momentum: float  # AdamW's β1
    decay: float  # of the squared gradient: RMSProp's α, AdamW's β2
    eps: float
    clip_norm: float | None
    batch_size: int
    microbatch_size: int | None
    epochs: int
    schedule_epochs: int | None

    def __post_init__(self):
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer={self.optimizer!r}: choose from {', '.join(OPTIMIZERS)}")
        if self.schedule not in ("linear", "cosine", "constant"):
            raise ValueError(f"schedule={self.schedule!r}: choose from linear, cosine, constant")
        if self.schedule_epochs is not None and self.schedule_epochs < self.epochs:
            raise ValueError(f"schedule_epochs={self.schedule_epochs} is shorter than epochs={self.epochs}")

    @property
    def microbatch(self) -> int:
        """Pairs or conversations that one forward pass holds: a divisor of the batch."""
        most = min(self.microbatch_size or self.batch_size, self.batch_size)
        return max(size for size in range(1, most + 1) if self.batch_size % size == 0)

    @property
    def accumulation(self) -> int:
        """Micro-batches a step."""
        return self.batch_size // self.microbatch

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


# --- objectives ----------------------------------------------------------------------------------


class Objective(Protocol):
    """What a batch costs. Sums, so that micro-batches add up to the large batch."""

    def size(self, batch: Any) -> Array:
        """What the sums are divided by, counted over the whole batch: []."""
        ...

    def __call__(self, params: Params, batch: Any, **scalars: Array) -> tuple[Array, Metrics]:
        """(summed loss [], summed metrics {name: []}) of one micro-batch."""
        ...


@dataclasses.dataclass(frozen=True)
class SPIN:
    """The paper's objective: mean over pairs of ℓ(policy, opponent)."""

    decoder: Decoder
    loss: losses.Loss

    def size(self, batch: PairBatch) -> Array:
        return jnp.sum(batch.weight)

    def __call__(self, params: Params, batch: PairBatch, **scalars: Array) -> tuple[Array, Metrics]:
        beta = scalars["beta"]
        logps = response_logps(self.decoder, params, batch.rows).reshape(-1, 2)
        logps = sharding.reshard(logps, "batch", None)
        policy = PairLogps(real=logps[:, 0], generated=logps[:, 1])
        opponent = PairLogps(real=batch.opponent[:, 0], generated=batch.opponent[:, 1])
        values = self.loss(policy, opponent, beta=beta)
        details = losses.metrics(policy, opponent, beta=beta) | {"identical": batch.identical}
        counted = batch.weight > 0
        total = functools.partial(jnp.sum, where=counted)
        return total(values), {name: total(value) for name, value in details.items()}


@dataclasses.dataclass(frozen=True)
class SFT:
    """Mean negative log-likelihood a response token."""

    decoder: Decoder

    def size(self, batch: SFTBatch) -> Array:
        return jnp.sum(batch.weight[..., None] * (batch.rows.response > 0))

    def __call__(self, params: Params, batch: SFTBatch, **scalars: Array) -> tuple[Array, Metrics]:
        del scalars
        logps = response_logps(self.decoder, params, batch.rows)
        return -jnp.sum(logps, where=batch.weight > 0), {}


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


class TrainState(NamedTuple):
    params: Params  # float32 master weights
    opt_state: Any


def make_optimizer(options: Optimization) -> optax.GradientTransformation:
    """Gradients → descent directions; the step multiplies them by −learning_rate."""
    clip = [] if options.clip_norm is None else [optax.clip_by_global_norm(options.clip_norm)]
    return optax.chain(*clip, *OPTIMIZERS[options.optimizer](options))


Step = Callable[..., tuple[TrainState, Metrics]]


def make_step(objective: Objective, options: Optimization) -> Step:
    """The jitted training step. Shardings need no pinning: they are part of the arguments' types.

    step(state, batch, learning_rate, scalars) → (state, metrics): `batch` holds arrays [A, …] whose
    gradients are accumulated in float32; `state` is donated; `scalars` go to the objective. Learning
    rate and scalars (β) are arguments, so that all iterations share one program. Metrics are those of
    the parameters before the update.
    """
    # Only these decide the program: iterations that differ in learning rate or epochs share it.
    options = dataclasses.replace(options, learning_rate=0.0, epochs=1, schedule_epochs=None)
    return _make_step(objective, options)


@functools.cache
def _make_step(objective: Objective, options: Optimization) -> Step:
    optimizer = make_optimizer(options)

    def step(state: TrainState, batch: Any, learning_rate: Array, scalars: Mapping[str, Array]):
        size = objective.size(batch)

        def mean_loss(params: Params, part: Any) -> tuple[Array, Metrics]:
            loss, metrics = objective(params, part, **scalars)
            metrics = {"loss": loss, **metrics}
            return loss / size, jax.tree.map(lambda total: total / size, metrics)

        def add_part(sums, part):
            gradients, metrics = jax.grad(mean_loss, has_aux=True)(state.params, part)
            return jax.tree.map(jnp.add, sums, (gradients, metrics)), None

        def part(index: int) -> Any:
            return jax.tree.map(lambda x: x[index], batch)

        sums = jax.grad(mean_loss, has_aux=True)(state.params, part(0))
        if options.accumulation > 1:
            rest = jax.tree.map(lambda x: x[1:], batch)
            sums, _ = jax.lax.scan(add_part, sums, rest)
        gradients, metrics = sums
        directions, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = jax.tree.map(lambda w, d: w - learning_rate * d, state.params, directions)
        metrics["grad_norm"] = optax.tree.norm(gradients)
        return TrainState(params, opt_state), metrics

    return jax.jit(step, donate_argnums=0)


def init_state(params: Params, options: Optimization, mesh: jax.sharding.Mesh) -> TrainState:
    """Parameters with a fresh optimizer state, laid out as they are."""
    with jax.set_mesh(mesh):
        return TrainState(params, jax.jit(make_optimizer(options).init)(params))


# --- the loop ------------------------------------------------------------------------------------


class Interrupted(KeyboardInterrupt):
    """A phase stopped between two units of work; everything done so far is saved."""


@dataclasses.dataclass
class Loop:
    """What surrounds the steps of one training phase."""

    steps: int  # steps of this phase
    save_every: int  # steps between checkpoints; an interruption makes one too
    on_step: Callable[[int, dict[str, float]], None]  # told each step's metrics, in order
    should_stop: Callable[[], bool]  # asked between steps


def fit(
    state: TrainState,
    batches: Iterable[Any],
    step: Step,
    *,
    start: int,
    learning_rates: np.ndarray,
    scalars: Mapping[str, float],
    mesh: jax.sharding.Mesh,
    checkpoints: checkpoint.StepCheckpoints,
    loop: Loop,
) -> TrainState:
    """Runs the steps `start` … `loop.steps` − 1.

    Args:
        state: donated.
        batches: those of step `start` and after; arrays are [A, B, …].
        learning_rates: one a step of the schedule.
        scalars: of the objective, the same for all steps.

    Raises:
        Interrupted: `loop.should_stop()`; the state has been saved.
    """
    arguments = {name: np.float32(value) for name, value in scalars.items()}
    pending: tuple[int, Metrics, int] | None = None
    clock = time.perf_counter()

    def report(item: tuple[int, Metrics, int]) -> None:
        nonlocal clock
        number, metrics, tokens = item
        values = {name: float(value) for name, value in metrics.items()}  # waits for the device
        before, clock = clock, time.perf_counter()
        values["learning_rate"] = float(learning_rates[number])
        values["tokens_per_s"] = tokens / (clock - before)
        loop.on_step(number, values)

    with jax.set_mesh(mesh):
        for number, batch in zip(range(start, loop.steps), batches, strict=False):
            tokens = int(np.sum(batch.rows.segments != 0, where=real_rows(batch)[..., None]))
            placed = sharding.put_batch(mesh, batch, axis=1)
            state, metrics = step(state, placed, learning_rates[number], arguments)
            # The device works on this step while the host reports the one before.
            if pending is not None:
                report(pending)
            pending = (number, metrics, tokens)
            done = number + 1
            stop = done < loop.steps and loop.should_stop()
            if stop or (done % loop.save_every == 0 and done < loop.steps):
                report(pending)
                pending = None
                checkpoints.save(done, state)
            if stop:
                raise Interrupted
        if pending is not None:
            report(pending)
    return state


def evaluate(
    objective: Objective,
    params: Params,
    batches: Iterable[Any],
    scalars: Mapping[str, float],
    mesh: jax.sharding.Mesh,
) -> dict[str, float]:
    """Means of loss and metrics over held-out batches (arrays [B, …])."""
    arguments = {name: np.float32(value) for name, value in scalars.items()}
    totals: dict[str, float] = {}
    count = 0.0
    with jax.set_mesh(mesh):
        for batch in batches:
            placed = sharding.put_batch(mesh, batch)
            size, loss, metrics = _evaluate(objective, params, placed, arguments)
            count += float(size)
            for name, value in {"loss": loss, **metrics}.items():
                totals[name] = totals.get(name, 0.0) + float(value)
    return {name: total / count for name, total in totals.items()}


@functools.partial(jax.jit, static_argnames=("objective",))
def _evaluate(objective: Objective, params: Params, batch: Any, scalars: Mapping[str, Array]):
    return objective.size(batch), *objective(params, batch, **scalars)
