"""Training: one jitted step, and the loop over it.

An objective says what a batch costs; the step is the same for self-play and SFT. Axes: M micro-batches of
a step, N rows of a micro-batch, G pairs of a row, B = N · G.
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

from spin_jax import losses
from spin_jax.batches import PairBatch, Rows, filled_tokens
from spin_jax.errors import Interrupted, NotFinite
from spin_jax.models import lora
from spin_jax.models.architecture import Params
from spin_jax.models.decoder import Decoder
from spin_jax.models.params import copies
from spin_jax.named_loss import logps_type
from spin_jax.runtime import sharding
from spin_jax.scoring import response_logps
from spin_jax.storage import checkpoints as checkpoint

Metrics = dict[str, Array]


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


# --- objectives ----------------------------------------------------------------------------------


class Objective(Protocol):
    """What a batch costs. Sums, so that micro-batches add up to the large batch."""

    @property
    def decoder(self) -> Decoder:
        """The model, whose compute dtype the step's copies of the weights have."""
        ...

    def size(self, batch: Any) -> Array:
        """What the sums are divided by, counted over the whole batch: []."""
        ...

    def __call__(self, params: Params, batch: Any, **scalars: Array) -> tuple[Array, Metrics]:
        """(summed loss [], summed metrics {name: []}) of one micro-batch."""
        ...


@dataclasses.dataclass(frozen=True)
class SPIN:
    """The paper's objective: mean over pairs of ℓ(policy, opponent); and those of other losses of rows."""

    decoder: Decoder
    loss: losses.Loss  # from named_loss.make
    roles: tuple[str, ...] = losses.PAIR  # of a row's answers
    takes_score: bool = False  # whether the loss wants `score`, too

    def size(self, batch: PairBatch) -> Array:
        return jnp.sum(batch.rows.items > 0)

    def __call__(self, params: Params, batch: PairBatch, **scalars: Array) -> tuple[Array, Metrics]:
        logps = response_logps(self.decoder, params, batch.rows)
        policy, opponent = (self._by_role(x) for x in (logps, batch.opponent))
        values, details = self.of(policy, opponent, scalars["beta"], sharding.merged_rows(batch.score))
        details["identical"] = sharding.merged_rows(batch.identical)
        # Rows weigh nothing, pairs do: a row's empty places are left out.
        total = functools.partial(jnp.sum, where=sharding.merged_rows(batch.rows.items) > 0)
        return total(values), {name: total(value) for name, value in details.items()}

    def of(self, policy: Any, opponent: Any, beta: Any, score: Any) -> tuple[Array, Metrics]:
        """Loss [B] and metrics {name: [B]} of log-probs by role."""
        scores = {"score": score} if self.takes_score else {}
        loss = self.loss(policy, opponent, beta=beta, **scores)
        return loss, losses.metrics(policy, opponent, beta=beta)

    def _by_role(self, logps: Array) -> Any:
        """[N, G, A] → each role's [B]."""
        columns = (sharding.merged_rows(logps[..., place]) for place in range(len(self.roles)))
        return logps_type(self.roles)(*columns)


@dataclasses.dataclass(frozen=True)
class SFT:
    """Mean negative log-likelihood a response token."""

    decoder: Decoder

    def size(self, batch: Rows) -> Array:
        return jnp.sum(batch.lengths)

    def __call__(self, params: Params, batch: Rows, **scalars: Array) -> tuple[Array, Metrics]:
        del scalars
        return -jnp.sum(response_logps(self.decoder, params, batch)), {}


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


class TrainState(NamedTuple):
    params: Params  # what is trained: float32 master weights, or with LoRA the adapters
    opt_state: Any
    skipped: Any  # int32 []: steps left out in a row up to now


def make_optimizer(options: Optimization) -> optax.GradientTransformation:
    """Gradients → descent directions; the step multiplies them by −learning_rate."""
    clip = [] if options.clip_norm is None else [optax.clip_by_global_norm(options.clip_norm)]
    return optax.chain(*clip, *OPTIMIZERS[options.optimizer](options))


Step = Callable[..., tuple[TrainState, Metrics]]


def make_step(objective: Objective, options: Optimization) -> Step:
    """The jitted training step. Shardings need no pinning: they are part of the arguments' types.

    step(state, batch, learning_rate, scalars, frozen) → (state, metrics): `batch` holds arrays [M, N, …]; the
    micro-batches that are not empty run one after another, and their gradients are added up in float32.
    `state` is donated; `scalars` go to the objective; `frozen` are the weights under adapters, or None.
    Learning rate and scalars (β) are arguments, so that all iterations share one program. Metrics are those
    of the parameters before the update.
    A step whose loss or gradient is not finite leaves parameters and optimizer as they were; the metric
    `skipped` says how many of those there were in a row.
    """
    # Only these decide the program: iterations that differ in learning rate or epochs share it.
    options = dataclasses.replace(options, learning_rate=0.0, epochs=1, schedule_epochs=None)
    return _make_step(objective, options)


@functools.cache
def _make_step(objective: Objective, options: Optimization) -> Step:
    optimizer = make_optimizer(options)

    def step(
        state: TrainState,
        batch: Any,
        learning_rate: Array,
        scalars: Mapping[str, Array],
        frozen: Params | None = None,
    ):
        size = objective.size(batch)
        cast = copies(state.params if frozen is None else frozen, objective.decoder.dtype)

        def mean_loss(params: Params, part: Any) -> tuple[Array, Metrics]:
            params = params if frozen is None else lora.joined(frozen, params, options.lora_scale)
            loss, metrics = objective({**params, **cast}, part, **scalars)
            metrics = {"loss": loss, **metrics}
            return loss / size, jax.tree.map(lambda total: total / size, metrics)

        # How many micro-batches hold something differs from step to step: the count is data, not shape.
        filled = jax.vmap(objective.size)(batch) > 0
        count = jnp.max(jnp.where(filled, jnp.arange(1, len(filled) + 1), 0))
        gradients, metrics = summed_gradients(mean_loss, state.params, batch, count, in_place=frozen is None)
        metrics["grad_norm"] = optax.tree.norm(gradients)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        before = sharding.to_device(state.opt_state) if options.offload else state.opt_state
        directions, after = optimizer.update(gradients, before, state.params)
        opt_state = jax.tree.map(functools.partial(jnp.where, finite), after, before)
        opt_state = sharding.to_host_memory(opt_state) if options.offload else opt_state
        params = jax.tree.map(
            lambda w, d: jnp.where(finite, w - learning_rate * d, w), state.params, directions
        )
        skipped = jnp.where(finite, 0, state.skipped + 1)
        metrics["skipped"] = skipped
        return TrainState(params, opt_state, skipped), metrics

    return jax.jit(step, donate_argnums=0)


def summed_gradients(
    loss: Callable[[Params, Any], tuple[Array, Metrics]],
    params: Params,
    batch: Any,
    count: Array | int,
    in_place: bool = True,
) -> tuple[Params, Metrics]:
    """Gradients and metrics of a batch's first `count` micro-batches, added up.

    Args:
        loss: (parameters, a micro-batch) → (loss [], metrics {name: []}).
        params: of the model, or its adapters; the sums have their dtypes.
        batch: arrays [M, …].
        in_place: the layers' gradients, which are nearly all, are added up where the sums stand, within the
            backward pass over the layers: no second tree of them exists. `loss` hands "layers" to the
            decoder as they are, for JAX 0.10 confuses destinations of gradients with gradients by value.
    """
    sums = jax.tree.map(jnp.zeros_like, params)
    places = {"layers": jax.tree.map(jax.new_ref, sums.pop("layers"))} if in_place else {}
    wanted = {**jax.tree.map(lambda _: jax.ad.GradValue(), sums), **places}

    def part_of(number: Array | int) -> Any:
        return jax.tree.map(lambda x: x[number], batch)

    def add(number: Array | int, so_far: Any) -> Any:
        vjp: Any = jax.vjp(lambda p: loss(p, part_of(number)), params, has_aux=True)
        value, backward, metrics = vjp
        (gradients,) = backward.with_refs(wanted)(jnp.ones_like(value))
        # The barrier keeps each micro-batch's sum over devices apart: moved out of the loop together with
        # these additions, it makes the compiler for TPU7x fail (libtpu 0.0.48).
        more = jax.lax.optimization_barrier(({name: gradients[name] for name in sums}, metrics))
        return jax.tree.map(jnp.add, so_far, more)

    metrics = jax.tree.map(jnp.zeros_like, jax.eval_shape(lambda: loss(params, part_of(0)))[1])
    sums, metrics = jax.lax.fori_loop(0, count, add, (sums, metrics))
    return {**sums, **jax.tree.map(lambda place: place[...], places)}, metrics


def init_state(params: Params, options: Optimization, mesh: jax.sharding.Mesh) -> TrainState:
    """Parameters with a fresh optimizer state, laid out as they are."""
    with jax.set_mesh(mesh):
        opt_state, skipped = jax.jit(functools.partial(_fresh, options))(params)
        opt_state = sharding.to_host_memory(opt_state) if options.offload else opt_state
        return TrainState(params, opt_state, skipped)


def abstract_state(params: Params, options: Optimization, mesh: Any) -> TrainState:
    """`init_state` of parameters that are shapes and shardings only."""
    with jax.set_mesh(mesh):
        fresh = jax.eval_shape(functools.partial(_fresh, options), params)
    opt_state, skipped = sharding.laid_out(mesh, fresh)
    opt_state = sharding.in_host_memory(opt_state) if options.offload else opt_state
    return TrainState(params, opt_state, skipped)


def _fresh(options: Optimization, params: Params) -> tuple[Any, Array]:
    return make_optimizer(options).init(params), jnp.zeros((), jnp.int32)


@dataclasses.dataclass
class Loop:
    """What surrounds the steps of one training phase."""

    steps: int  # steps of this phase
    save_every: int  # steps between checkpoints; an interruption makes one too
    most_skipped: int  # steps in a row that may be not finite, less one
    # Told each step's metrics, in order, and the share of its time that was spent waiting for the batch.
    on_step: Callable[[int, dict[str, float], float], None]
    should_stop: Callable[[], Any]  # asked while a step runs: a signal's number or 0, or what will be one


def fit(
    state: TrainState,
    batches: Iterable[Any],
    step: Step,
    *,
    start: int,
    learning_rates: np.ndarray,
    scalars: Mapping[str, float],
    frozen: Params | None = None,
    mesh: jax.sharding.Mesh,
    checkpoints: checkpoint.StepCheckpoints,
    loop: Loop,
) -> TrainState:
    """Runs the steps `start` … `loop.steps` − 1.

    Args:
        state: donated.
        batches: those of step `start` and after; arrays are [M, N, …].
        learning_rates: one a step of the schedule.
        scalars: of the objective, the same for all steps.
        frozen: the weights under the adapters, where the state is of those.

    Raises:
        Interrupted: `loop.should_stop()`; the state has been saved.
        NotFinite: nothing of the skipped steps went into the state; the last checkpoint stays.
    """
    arguments = {name: np.float32(value) for name, value in scalars.items()}
    pending: tuple[int, Metrics, Any] | None = None
    clock, waited = time.perf_counter(), 0.0  # when the last report was, and waiting since then

    def report(item: tuple[int, Metrics, Any]) -> None:
        nonlocal clock, waited
        number, metrics, batch = item
        values = {name: float(value) for name, value in metrics.items()}  # waits for the device
        before, clock = clock, time.perf_counter()
        values["learning_rate"] = float(learning_rates[number])
        values["tokens_per_s"] = filled_tokens(batch) / (clock - before)
        share, waited = waited / (clock - before), 0.0
        loop.on_step(number, values, share)
        if values["skipped"] >= loop.most_skipped:
            raise NotFinite(number, batch)

    if loop.save_every < loop.steps:
        checkpoints.check_room(state)  # now, and not when the work is done
    source, asked = iter(batches), 0
    with jax.set_mesh(mesh):
        for number in range(start, loop.steps):
            began = time.perf_counter()
            batch = next(source)
            waited += time.perf_counter() - began
            placed = sharding.put_batch(mesh, batch, axis=1)
            state, metrics = step(state, placed, learning_rates[number], arguments, frozen)
            # The device works on this step while the host reports the one before.
            if pending is not None:
                report(pending)
            pending = (number, metrics, batch)
            done = number + 1
            before, asked = asked, loop.should_stop()  # several processes come to an answer a step later
            stop = done < loop.steps and (int(before) or (asked if isinstance(asked, int) else 0))
            if stop or (done % loop.save_every == 0 and done < loop.steps):
                report(pending)
                pending = None
                checkpoints.save(done, state)
                clock = time.perf_counter()  # a step's speed is not the disk's
            if stop:
                raise Interrupted(stop)
            if pending is None:
                checkpoints.check_room(state)  # for the next one, while nothing would be lost
        if pending is not None:
            report(pending)
    return state
