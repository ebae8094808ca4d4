"""Training: one jitted step, and the loop over it.

An objective says what a batch costs; the step is the same for self-play and SFT. Axes: M micro-batches of
a step, N rows of a micro-batch, G pairs of a row, B = N · G.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from spin_jax import losses
from spin_jax.models import lora
from spin_jax.models.architecture import Params
from spin_jax.models.decoder import Decoder
from spin_jax.models.params import copies
from spin_jax.runtime import sharding
from spin_jax.training.batches import PairBatch
from spin_jax.training.custom_loss import logps_type
from spin_jax.training.log_probs import response_logps
from spin_jax.training.optimizer import Optimization, make_optimizer
from spin_jax.training.packing import Rows

Metrics = dict[str, Array]


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


class TrainState(NamedTuple):
    params: Params  # what is trained: float32 master weights, or with LoRA the adapters
    opt_state: Any
    skipped: Any  # int32 []: steps left out in a row up to now


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
