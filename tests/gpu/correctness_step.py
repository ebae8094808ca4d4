"""The equalities that the tests show on a CPU, on this machine: scores, gradients, the first loss, answers.

The model is small, and large enough that a GPU's kernels run as they do in a run.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from measuring import attempt, on_gpu
from workload import SMALL, set_up

from spin_jax import config as config_lib
from spin_jax.data.records import Pair
from spin_jax.kernels.layout import Layout
from spin_jax.models import loading
from spin_jax.models.architecture import ModelConfig, Params
from spin_jax.models.decoder import Decoder, forward, output_head, project
from spin_jax.models.params import init_params, sampling_params
from spin_jax.runtime import sharding
from spin_jax.runtime.sharding import round_up
from spin_jax.sampling.continuous import answer_prompts
from spin_jax.sampling.next_token import Sampling, draw, prompt_keys
from spin_jax.selfplay import from_config
from spin_jax.training import custom_loss
from spin_jax.training.batches import ScoredPair, pair_batches, stacked
from spin_jax.training.log_probs import response_logps, score_groups
from spin_jax.training.packing import Group, RowShape, packed
from spin_jax.training.step import SPIN, init_state, make_step

_LARGER = dict(
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=4,
    num_attention_heads=8,
    head_dim=128,
    vocab_size=32000,
)
# What rounding may come to: float32 adds up in another order; bfloat16 has 8 bits, at every layer.
_NATS_A_TOKEN = {"float32": 1e-5, "bfloat16": 0.02}
_GRADIENT = {"float32": 1e-5, "bfloat16": 0.05}  # relative
_FIRST_LOSS = {"float32": 1e-5, "bfloat16": 2e-3}
_BETWEEN_PACKINGS = 0.35  # nats of a whole answer, in bfloat16: what transformers has on real text


class Work(NamedTuple):
    """A small model, and groups to score."""

    config: ModelConfig
    params: Params
    mesh: jax.sharding.Mesh
    groups: Sequence[Group]
    many: RowShape  # several groups of a row
    alone: RowShape  # one group of a row

    def decoder(self, dtype: str, kernel: str, remat: str = "full") -> Decoder:
        return Decoder(self.config, jnp.dtype(dtype), remat, kernel)

    def scores(self, dtype: str, kernel: str, shape: RowShape) -> np.ndarray:
        return score_groups(self.decoder(dtype, kernel), self.params, self.groups, shape, self.mesh)


def run(dry: bool, short: bool) -> None:
    """Tells the rows of this step."""
    set_up(config_lib.default())
    work = _prepare(dry)
    _compare_scores(work, short)
    if not short:
        _compare_gradients(work)
    for dtype, kernel in (("float32", "plain"), ("bfloat16", "flash"))[short:]:
        measure = functools.partial(_first_losses, work, dtype, kernel)
        attempt(measure, what="ln 2", dtype=dtype, kernel=kernel)
    for kernel, temperature in (("flash", 1.0), ("plain", 1.0), ("plain", 0.0))[: 1 if short else 3]:
        sampling = Sampling(12 if dry else 24, temperature)
        measure = functools.partial(_same_answers, work, kernel, sampling, short)
        attempt(measure, what="answers", kernel=kernel, temperature=temperature)


def _prepare(dry: bool) -> Work:
    sizes = {**SMALL, **({} if dry else _LARGER), "initializer_range": 0.05}  # logits that are not all alike
    model = loading.new_model(sizes, None, dtype="float32")
    params = init_params(model.config, jax.random.key(0), model.mesh)
    rng, longest, length = np.random.default_rng(0), *((24, 256) if dry else (120, 768))

    def ids(least: int) -> np.ndarray:
        return rng.integers(3, model.config.vocab_size, rng.integers(least, longest)).astype(np.int32)

    groups = [Group(ids(4), (ids(2), ids(2))) for _ in range(16)]
    return Work(
        model.config,
        params,
        model.mesh,
        groups,
        RowShape(2, length, 8),
        RowShape(4, round_up(3 * longest, 64), 1),
    )


# --- scores and gradients --------------------------------------------------------------------------


def _compare_scores(work: Work, short: bool) -> None:
    exact = work.scores("float32", "plain", work.alone)
    cases = [
        ("bfloat16", "flash", "many"),
        ("float32", "plain", "many"),
        ("bfloat16", "plain", "alone"),
        ("bfloat16", "plain", "many"),
    ]
    for dtype, kernel, rows in cases[:1] if short else cases:
        measure = functools.partial(_scores_off, work, exact, dtype, kernel, rows)
        attempt(measure, what="scores", dtype=dtype, kernel=kernel, rows=rows)
    for kernel in () if short else ("plain", "flash"):
        attempt(functools.partial(_between_packings, work, kernel), what="two packings", kernel=kernel)


def _scores_off(work: Work, exact: np.ndarray, dtype: str, kernel: str, rows: str) -> dict[str, Any]:
    """Log-probs against those of each group by itself, in float32."""
    off = np.abs(work.scores(dtype, kernel, getattr(work, rows)) - exact)
    nats = float(off.sum() / sum(len(answer) for group in work.groups for answer in group.answers))
    return {"nats_a_token": nats, "most": float(off.max()), "right": nats <= _NATS_A_TOKEN[dtype]}


def _between_packings(work: Work, kernel: str) -> dict[str, Any]:
    """How far bfloat16 moves an answer's log-prob when its row has other company."""
    off = np.abs(work.scores("bfloat16", kernel, work.many) - work.scores("bfloat16", kernel, work.alone))
    return {
        "most": float(off.max()),
        "mean": float(off.mean()),
        "right": bool(off.max() <= _BETWEEN_PACKINGS),
    }


def _compare_gradients(work: Work) -> None:
    """Of all log-probs together, by kernel and remat policy, against float32 that keeps everything."""
    rows = packed(work.groups, work.many)[0]

    def gradient(dtype: str, kernel: str, remat: str) -> Params:
        decoder = work.decoder(dtype, kernel, remat)
        with jax.set_mesh(work.mesh):
            placed = sharding.put_batch(work.mesh, rows)
            total = jax.grad(lambda params: jnp.sum(response_logps(decoder, params, placed)))
            return jax.jit(total)(work.params)

    exact = gradient("float32", "plain", "none")

    def off(dtype: str, kernel: str, remat: str) -> dict[str, Any]:
        difference = jax.tree.map(jnp.subtract, gradient(dtype, kernel, remat), exact)
        share = math.sqrt(_square(difference) / _square(exact))
        return {"off": share, "right": share <= _GRADIENT[dtype]}

    cases = [
        ("bfloat16", "flash", "full"),
        ("float32", "plain", "full"),
        ("bfloat16", "plain", "full"),
        ("bfloat16", "flash", "attention+mlp"),
    ]
    for dtype, kernel, remat in cases:
        measure = functools.partial(off, dtype, kernel, remat)
        attempt(measure, what="gradient", dtype=dtype, kernel=kernel, remat=remat)


def _square(tree: Any) -> float:
    return sum(float(jnp.sum(jnp.square(leaf))) for leaf in jax.tree.leaves(tree))


def _first_losses(work: Work, dtype: str, kernel: str) -> dict[str, Any]:
    """Three steps of an iteration: at the first, policy and opponent are one model, and the loss is ln 2."""
    opponent = work.scores(dtype, kernel, work.many)
    pairs = [
        Pair(number, 0, [], [], group.prompt, *group.answers, truncated=False)
        for number, group in enumerate(work.groups)
    ]
    scored = [ScoredPair(pair, tuple(row)) for pair, row in zip(pairs, opponent, strict=True)]
    options = from_config.optimization(config_lib.default(), 0)
    step = make_step(SPIN(work.decoder(dtype, kernel), custom_loss.find("logistic")), options)
    state = init_state(jax.tree.map(jnp.copy, work.params), options, work.mesh)  # it is donated
    batches = pair_batches(scored, work.many)
    losses = []
    with jax.set_mesh(work.mesh):
        batch = sharding.put_batch(work.mesh, stacked(batches, len(batches)), axis=1)
        for _ in range(3):
            state, metrics = step(state, batch, np.float32(1e-4), {"beta": np.float32(0.1)})
            losses.append(float(metrics["loss"]))
    off = losses[0] - math.log(2)
    right = abs(off) <= _FIRST_LOSS[dtype] and losses[0] > losses[1] > losses[2]
    return {"off_ln2": off, "losses": losses, "right": right}


# --- answers ---------------------------------------------------------------------------------------


def _same_answers(work: Work, kernel: str, sampling: Sampling, short: bool) -> dict[str, Any]:
    """The sampler's answers in float32, token for token, against sampling by its definition."""
    longest = 16 if short else None  # of one shape
    prompts = [group.prompt[:longest] for group in work.groups[:10]]
    keys = prompt_keys(0, 0, range(len(prompts)))
    answers = answer_prompts(
        work.decoder("float32", kernel),
        sampling_params(work.params, work.config, jnp.float32, work.mesh),
        prompts,
        keys,
        mesh=work.mesh,
        sampling=sampling,
        stop_tokens=(),
        slots=4,
    )
    most = round_up(max(map(len, prompts)) + sampling.max_new_tokens, 64)
    with jax.set_mesh(work.mesh):
        same = [
            np.asarray(answer) == _simple_answer(work, prompt, key, sampling, most)
            for prompt, key, answer in zip(prompts, keys, answers, strict=True)
        ]
    share = float(np.mean(same))
    # A card multiplies float32 in less in a kernel: there a token may be another, and all that follow it.
    least = 0.5 if kernel == "flash" and on_gpu() else 1.0
    return {"same": share, "tokens": int(np.size(same)), "right": share >= least}


def _simple_answer(work: Work, prompt: np.ndarray, key: jax.Array, sampling: Sampling, most: int) -> np.ndarray:
    """One answer, without a cache: for every token the whole sequence is read again."""
    tokens, length = np.zeros((1, most), np.int32), len(prompt)
    tokens[0, :length] = prompt
    for number in range(sampling.max_new_tokens):
        token_key = jax.random.fold_in(key, number)
        decoder = Decoder(work.config, jnp.float32)
        tokens[0, length] = int(_next_token(decoder, work.params, tokens, length, token_key, sampling))
        length += 1
    return tokens[0, len(prompt) : length]


@functools.partial(jax.jit, static_argnames=("decoder", "sampling"))
def _next_token(decoder: Decoder, params: Params, tokens: Any, length: Any, key: Any, sampling: Sampling):
    layout = Layout(jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens))
    hidden, _ = forward(decoder, params, tokens, layout)
    logits = project(hidden, output_head(decoder, params))[:, length - 1]
    return draw(logits, key[None], sampling)[0]
