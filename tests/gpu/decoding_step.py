"""Sampling with the recipe's model: decoding at several numbers of slots, and what a step of it is made of.

Axes: B slots, S columns of the cache, N query heads, K key/value heads, H head dim, V vocabulary.
"""

import dataclasses
import functools
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from measuring import attempt, memory, on_gpu, timed
from tracing import traced
from workload import prepared, recipe, set_up

from spin_jax.kernels import flash_decode
from spin_jax.kernels.layout import Layout
from spin_jax.models import cost
from spin_jax.models.architecture import ModelConfig
from spin_jax.models.attention import plain
from spin_jax.models.decoder import Decoder
from spin_jax.models.params import sampling_params_on
from spin_jax.runtime import chips, sharding
from spin_jax.sampling.continuous import DECODE_STEPS, cache_columns, fixed_steps, prefill_rows
from spin_jax.sampling.next_token import KEYS, Sampling, draw
from spin_jax.sampling.slots import Slots, decode, new_slots, prefill
from spin_jax.selfplay import from_config

TARGET = 0.5  # of the roofline, at 128 slots
_TARGET_SLOTS = 128
_CALLS = 4  # of `decode`, that are timed together


class Work(NamedTuple):
    """The recipe's sampling, in the middle of its answers."""

    model: ModelConfig
    decoder: Decoder
    mesh: jax.sharding.Mesh
    params: Any
    prompt: int  # tokens
    context: int  # tokens behind each slot: a prompt, and half of an answer
    columns: int
    how: dict[str, Any]  # the options of `prefill` and `decode`
    chip: chips.Chip | None


def run(dry: bool, short: bool, slots: list[int], trace: bool = False, extras: bool = False) -> None:
    """Tells the rows of this step.

    Args:
        slots: the numbers of slots; a dry run takes 8.
        trace: of the first.
        extras: what the step is made of is measured, too, and decoding without the kernel.
    """
    config = recipe("7b", dry)
    set_up(config)
    work = _prepare(config)
    rounds = 1 if dry else 3
    slots = [8] if dry else slots
    for count in slots:
        what = {"slots": count, "kernel": work.decoder.kernel}
        measure = functools.partial(_speed, work, count, rounds, trace and count == slots[0])
        attempt(measure, what="decode", **what)
    if not extras:
        return
    if not short:
        without = work._replace(decoder=work.decoder.clone(kernel="plain"))
        measure = functools.partial(_speed, without, slots[0], rounds, False)
        attempt(measure, what="decode", slots=slots[0], kernel="plain")
    attempt(functools.partial(_prefill, work, slots[0], rounds), what="prefill")
    for count in slots:
        for kernel in ("flash_decode",) if short else ("plain", "flash_decode"):
            measure = functools.partial(_one_layer, work, kernel, count, 2 if dry else 20)
            attempt(measure, what="a layer's cache", slots=count, kernel=kernel)
    _draws(work, slots[0], short)


def _prepare(config: Any) -> Work:
    model, _, _ = prepared(config)
    prompt, _, answer = config.lengths.expected
    mesh = from_config.sampling_mesh(config, model)
    return Work(
        model.config,
        from_config.decoder(config, model),
        mesh,
        _weights(sampling_params_on(mesh, model.config, model.dtype)),
        prompt,
        prompt + answer // 2,
        cache_columns(model.config, prompt + config.sampling.max_new_tokens),
        {"sampling": dataclasses.replace(from_config.sampling(config), max_new_tokens=1), "stop_tokens": ()},
        chips.chip(jax.devices()[0].device_kind),
    )


def _weights(shapes: Any) -> Any:
    """Random weights of a sampler's shapes, in its dtype at once: no float32 copy would fit beside them."""

    def maker(tree):
        leaves, form = jax.tree.flatten(tree)

        def make(key):
            keys = jax.random.split(key, len(leaves))
            parts = zip(keys, leaves, strict=True)
            return form.unflatten([0.02 * jax.random.normal(k, x.shape, x.dtype) for k, x in parts])

        return jax.jit(make, out_shardings=form.unflatten([leaf.sharding for leaf in leaves]))

    layers = shapes["layers"]
    one = maker(layers[0])
    params = maker({name: tree for name, tree in shapes.items() if name != "layers"})(jax.random.key(0))
    return {**params, "layers": tuple(one(jax.random.key(n + 1)) for n in range(len(layers)))}


def _begun(work: Work, count: int) -> Slots:
    """Slots in the middle of their answers, which do not end."""
    state = new_slots(work.decoder, count, work.columns)

    def put(old: jax.Array, new: Any) -> jax.Array:
        return jax.device_put(jnp.asarray(new, old.dtype), old.sharding)

    return state._replace(
        cache=state.cache._replace(column=put(state.cache.column, work.context)),
        positions=put(state.positions, np.full(count, work.context)),
        limits=put(state.limits, np.full(count, 10**6)),
        done=put(state.done, np.zeros(count, bool)),
    )


def _speed(work: Work, count: int, rounds: int, trace: bool) -> dict[str, Any]:
    """Milliseconds of a step, and the share that the least possible time has in it."""
    with jax.set_mesh(work.mesh):
        state = _begun(work, count)

        def advance() -> jax.Array:
            nonlocal state
            how = {**work.how, "steps": DECODE_STEPS, "fixed": fixed_steps(work.mesh)}
            state, drawn = decode(work.decoder, work.params, state, **how)
            return drawn

        def calls() -> None:  # as the sampler does: a call is enqueued before the last one's tokens are read
            drawn = advance()
            for _ in range(_CALLS - 1):
                before, drawn = drawn, advance()
                np.asarray(before)
            np.asarray(drawn)

        first = _seconds(lambda: np.asarray(advance()))
        seconds = statistics.median(_seconds(calls) for _ in range(rounds)) / (_CALLS * DECODE_STEPS)
        if trace:
            attempt(lambda: traced(advance), what="decode trace", slots=count, steps=DECODE_STEPS)
    found = {
        "columns": work.columns,
        "context": work.context,
        "first_s": first,
        "step_ms": 1e3 * seconds,
        "tokens_per_s": count / seconds,
        **memory(),
    }
    if work.chip is None:
        return found
    bytes_each = jnp.dtype(work.decoder.dtype).itemsize
    behind = work.context + DECODE_STEPS * (1 + rounds * _CALLS / 2)  # on average, while it was timed
    for name, seen in (("roofline", behind), ("roofline_if_columns_must_be_read", work.columns)):
        least = cost.decode_step_s(work.model, work.chip, count, seen, bytes_each)
        found[name] = least / seconds
    if count == _TARGET_SLOTS:
        found |= {"target_roofline": TARGET, "reached": found["roofline"] >= TARGET}
    return found


def _seconds(run: Any) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _prefill(work: Work, count: int, rounds: int) -> dict[str, Any]:
    """Reading prompts of the expected length, as many as a run reads at a time."""
    P, rows = work.prompt, prefill_rows(count, work.prompt, 1, work.decoder.kernel)
    tokens = np.random.default_rng(0).integers(3, work.model.vocab_size, (rows, P)).astype(np.int32)
    lengths, limits = np.full(rows, P, np.int32), np.full(rows, 100, np.int32)
    keys = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(0, impl=KEYS), rows)))
    with jax.set_mesh(work.mesh):
        state = new_slots(work.decoder, count, work.columns)
        arrays = (tokens, lengths, limits, keys, np.arange(rows, dtype=np.int32))
        *before, data, into = sharding.put_batch(work.mesh, arrays)

        def read() -> None:
            nonlocal state
            keys = jax.random.wrap_key_data(data, impl=KEYS)
            state, first = prefill(work.decoder, work.params, state, *before, keys, into, **work.how)
            jax.block_until_ready((state, first))

        first, *others = (_seconds(read) for _ in range(rounds + 1))
    rate = rows * cost.forward_flops(work.model, P, 1, P * P / 2) / min(others)
    return {
        "rows": rows,
        "prompt": P,
        "first_s": first,
        "seconds": min(others),
        "tokens_per_s": rows * P / min(others),
        "mfu": rate / work.chip.flops if work.chip else None,
    }


def _one_layer(work: Work, kernel: str, count: int, times: int) -> dict[str, Any]:
    """One layer's look at the cache: by plain attention, which reads every column, or by the kernel."""
    N, K, H = work.model.num_attention_heads, work.model.num_key_value_heads, work.model.head_dim
    k, v = (_normal(seed, count, K, work.columns, H) for seed in range(2))
    q = _normal(2, count, 1, N, H)
    behind = jnp.broadcast_to(jnp.arange(work.columns), (count, work.columns))
    keys = Layout(behind, (behind < work.context).astype(jnp.int32))
    here = Layout(jnp.full((count, 1), work.context - 1), jnp.ones((count, 1), jnp.int32))
    lengths, column = jnp.full(count, work.context, jnp.int32), jnp.int32(work.context - 1)

    def by_plain(q, k, v):
        return plain(q, k, v, here, keys, None)

    def by_kernel(q, k, v):
        return flash_decode.attend(q[:, 0], k, v, column, lengths, interpret=not on_gpu())[:, None]

    run = jax.jit({"plain": by_plain, "flash_decode": by_kernel}[kernel])
    seconds = timed(lambda: run(q, k, v), times)
    exact = jax.jit(by_plain)(*(x.astype(jnp.float32) for x in (q, k, v)))
    off = float(jnp.linalg.norm(run(q, k, v).astype(jnp.float32) - exact) / jnp.linalg.norm(exact))
    filled = 2 * count * K * work.context * H * k.dtype.itemsize
    # bfloat16 rounds the weights and the result by 0.2%.
    return {"us": 1e6 * seconds, "tb_s_of_filled": filled / seconds / 1e12, "off": off, "right": off <= 0.01}


def _normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def _draws(work: Work, count: int, short: bool) -> None:
    """The draw alone, by what it is drawn from."""
    logits = jax.random.normal(jax.random.key(1), (count, work.model.vocab_size), jnp.float32)
    keys = jax.random.split(jax.random.key(2, impl=KEYS), count)
    laws = {
        "greedy": Sampling(1, 0.0),
        "temperature 1": Sampling(1, 1.0),
        "top-k 50": Sampling(1, 1.0, top_k=50),
        "top-p 0.95": Sampling(1, 1.0, top_p=0.95),
    }
    for name in list(laws)[:1] if short else laws:
        one = jax.jit(functools.partial(draw, sampling=laws[name]))
        attempt(lambda one=one: {"ms": 1e3 * timed(lambda: one(logits, keys))}, what="draw", law=name)
