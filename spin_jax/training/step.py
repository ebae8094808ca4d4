"""The training step, which `make_step` jits. The loop over the steps is in `loop.py`.

An objective computes the loss of a micro-batch as a sum, and `size` counts what the sums over the whole batch are
divided by. The step casts its copies of the weights to the dtype of the objective's decoder.

Axes: M micro-batches of a step, N rows of a micro-batch, G groups of a row, A answers of a group, B = N · G.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

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
from spin_jax.training.custom_loss import call, logps_type
from spin_jax.training.log_probs import response_logps
from spin_jax.training.optimizer import Optimization, make_optimizer
from spin_jax.training.packing import Rows

Metrics = dict[str, Array]


# --- objectives ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SPIN:
    """The paper's objective: the mean over pairs of ℓ(policy, opponent). Other losses of pairs use it too."""

    decoder: Decoder
    loss: losses.Loss  # from custom_loss.make
    roles: tuple[str, ...] = losses.PAIR  # the role of each answer of a group

    def size(self, batch: PairBatch) -> Array:
        return jnp.sum(batch.rows.items > 0)

    def __call__(self, params: Params, batch: PairBatch, **scalars: Array) -> tuple[Array, Metrics]:
        """(summed loss [], summed metrics {name: []}) of one micro-batch."""
        logps = response_logps(self.decoder, params, batch.rows)
        policy, opponent = (self._by_role(x) for x in (logps, batch.opponent))
        inputs = {"lengths": self._by_role(batch.rows.lengths), "score": sharding.merged_rows(batch.score)}
        values, details = self.loss_and_metrics(policy, opponent, beta=scalars["beta"], **inputs)
        details["identical"] = sharding.merged_rows(batch.identical)
        # Every pair has the same weight, and the empty places of a row have none.
        total = functools.partial(jnp.sum, where=sharding.merged_rows(batch.rows.items) > 0)
        return total(values), {name: total(value) for name, value in details.items()}

    def loss_and_metrics(self, policy: Any, opponent: Any, **inputs: Any) -> tuple[Array, Metrics]:
        """The loss [B] and the metrics {name: [B]} of log-probabilities by role; `inputs` are all INPUTS of a loss."""
        # Empty places have no tokens, and nothing may become NaN in them: its gradient would.
        inputs["lengths"] = jax.tree.map(lambda tokens: jnp.maximum(tokens, 1), inputs["lengths"])
        loss = call(self.loss, policy, opponent, inputs)
        return loss, losses.metrics(policy, opponent, beta=inputs["beta"])

    def _by_role(self, values: Array) -> Any:
        """Splits values of answers, [N, G, A], by role, into a NamedTuple of [B]."""
        columns = (sharding.merged_rows(values[..., place]) for place in range(len(self.roles)))
        return logps_type(self.roles)(*columns)


@dataclasses.dataclass(frozen=True)
class SFT:
    """The mean negative log-likelihood of the response tokens: each token of a batch has the same weight."""

    decoder: Decoder

    def size(self, batch: Rows) -> Array:
        return jnp.sum(batch.lengths)

    def __call__(self, params: Params, batch: Rows, **scalars: Array) -> tuple[Array, Metrics]:
        return -jnp.sum(response_logps(self.decoder, params, batch)), {}


Objective = SPIN | SFT


class TrainState(NamedTuple):
    params: Params  # the parameters that are trained: float32 master weights, or with LoRA the adapters
    opt_state: Any
    skipped: Any  # int32 []: how many steps were skipped in a row up to now


Step = Callable[..., tuple[TrainState, Metrics]]


def make_step(objective: Objective, options: Optimization) -> Step:
    """The jitted training step: step(state, batch, learning_rate, scalars, frozen) → (state, metrics).

    `batch` holds arrays [M, N, …]. The micro-batches that are not empty run one after another, and their gradients are
    added up in float32. `state` is donated. `frozen` are the weights under the adapters, or None. The metrics belong
    to the parameters before the update. Learning rate and scalars (β), which the objective gets, are arguments, so
    that all iterations share one program.

    A step whose loss or gradient is not finite changes neither the parameters nor the optimizer's state; the metric
    `skipped` counts such steps in a row.
    """
    # Learning rate and epochs do not change the program, so iterations that differ in them share it.
    options = dataclasses.replace(options, learning_rate=0.0, epochs=1, schedule_epochs=None)
    return _make_step(objective, options)


@functools.cache
def _make_step(objective: Objective, options: Optimization) -> Step:
    optimizer = make_optimizer(options)

    def step(
        state: TrainState, batch: Any, learning_rate: Array, scalars: Mapping[str, Array], frozen: Params | None = None
    ):
        size = objective.size(batch)
        cast = copies(state.params, objective.decoder.dtype) if frozen is None else {}  # frozen ones need no copies

        def mean_loss(params: Params, part: Any) -> tuple[Array, Metrics]:
            params = params if frozen is None else lora.joined(frozen, params, options.lora_scale)
            loss, metrics = objective({**params, **cast}, part, **scalars)
            metrics = {"loss": loss, **metrics}
            return loss / size, jax.tree.map(lambda total: total / size, metrics)

        # Steps fill different numbers of micro-batches; `count` is an array, so no step is compiled anew.
        filled = jax.vmap(objective.size)(batch) > 0
        count = jnp.max(jnp.where(filled, jnp.arange(1, len(filled) + 1), 0))
        gradients, metrics = summed_gradients(mean_loss, state.params, batch, count, in_place=frozen is None)
        metrics["grad_norm"] = optax.tree.norm(gradients)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        before = sharding.to_device(state.opt_state) if options.offload else state.opt_state
        directions, after = optimizer.update(gradients, before, state.params)
        opt_state = jax.tree.map(functools.partial(jnp.where, finite), after, before)
        opt_state = sharding.to_host_memory(opt_state) if options.offload else opt_state
        params = jax.tree.map(lambda w, d: jnp.where(finite, w - learning_rate * d, w), state.params, directions)
        metrics["skipped"] = jnp.where(finite, 0, state.skipped + 1)
        return TrainState(params, opt_state, metrics["skipped"]), metrics

    return jax.jit(step, donate_argnums=0)


def summed_gradients(
    loss: Callable[[Params, Any], tuple[Array, Metrics]],
    params: Params,
    batch: Any,
    count: Array | int,
    in_place: bool = True,
) -> tuple[Params, Metrics]:
    """Adds up the gradients and metrics of the first `count` micro-batches of a batch [M, …].

    Args:
        loss: a function (parameters, a micro-batch) → (loss [], metrics {name: []}).
        params: the weights of the model, or its adapters; the sums have their dtypes.
        in_place: whether the backward pass adds the gradients of the layers, which are nearly all, directly to the
            sums, so that no second tree of them exists. Then `loss` must pass "layers" to the decoder unchanged,
            because JAX 0.10 confuses gradients written to a reference with returned gradients.
    """
    sums = jax.tree.map(jnp.zeros_like, params)
    layer_refs = {"layers": jax.tree.map(jax.new_ref, sums.pop("layers"))} if in_place else {}
    destinations = {**jax.tree.map(lambda _: jax.ad.GradValue(), sums), **layer_refs}

    def microbatch(number: Array | int) -> Any:
        return jax.tree.map(lambda x: x[number], batch)

    def add_microbatch(number: Array | int, total: Any) -> Any:
        vjp: Any = jax.vjp(lambda p: loss(p, microbatch(number)), params, has_aux=True)
        value, backward, metrics = vjp
        (gradients,) = backward.with_refs(destinations)(jnp.ones_like(value))
        # The barrier keeps the sum over devices of each micro-batch inside the loop. Where the compiler for
        # TPU7x moves it out of the loop together with these additions, it fails (libtpu 0.0.48).
        more = jax.lax.optimization_barrier(({name: gradients[name] for name in sums}, metrics))
        return jax.tree.map(jnp.add, total, more)

    metrics = jax.tree.map(jnp.zeros_like, jax.eval_shape(lambda: loss(params, microbatch(0)))[1])
    sums, metrics = jax.lax.fori_loop(0, count, add_microbatch, (sums, metrics))
    return {**sums, **jax.tree.map(lambda ref: ref[...], layer_refs)}, metrics


def init_state(params: Params, options: Optimization, mesh: jax.sharding.Mesh) -> TrainState:
    """The parameters with a new optimizer state, which is sharded as they are."""
    with jax.set_mesh(mesh):
        opt_state, skipped = jax.jit(functools.partial(_new_optimizer_state, options))(params)
        opt_state = sharding.to_host_memory(opt_state) if options.offload else opt_state
        return TrainState(params, opt_state, skipped)


def abstract_state(params: Params, options: Optimization, mesh: Any) -> TrainState:
    """`init_state` for parameters that are only shapes and shardings."""
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(functools.partial(_new_optimizer_state, options), params)
    opt_state, skipped = sharding.laid_out(mesh, shapes)
    opt_state = sharding.in_host_memory(opt_state) if options.offload else opt_state
    return TrainState(params, opt_state, skipped)


def _new_optimizer_state(options: Optimization, params: Params) -> tuple[Any, Array]:
    return make_optimizer(options).init(params), jnp.zeros((), jnp.int32)
