"""Flash attention against `plain`, interpreted on CPU, and what XLA's compiler for GPUs makes of it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_compiler import for_gpu, gpu_mesh
from jax.interpreters import partial_eval
from jax.sharding import NamedSharding, PartitionSpec

from spin_jax.kernels import flash, visible_blocks
from spin_jax.kernels.layout import Layout
from spin_jax.kernels.visible_blocks import Blocks
from spin_jax.models.architecture import ModelConfig
from spin_jax.models.attention import attend, visible
from spin_jax.models.layers import REMAT, Block
from spin_jax.runtime import sharding
from spin_jax.training.packing import Group, RowShape, packed

# float32 on both sides, in sums of at most some hundred terms of another order: results of up to ~10 were
# seen to differ by 5e-6.
CLOSE = {"rtol": 0, "atol": 1e-5}
ROWS, T = 2, 100  # no multiple of any block below
SMALL = Blocks(32, 16, 4, 1), Blocks(16, 32, 4, 1), Blocks(16, 32, 4, 1)  # several, of unlike sizes


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(flash, "blocks_for", lambda H, dtype: SMALL)


def random_rows(seed, rows=ROWS, length=T) -> Layout:
    """Rows of groups of 1 to 3 answers; the lengths are now and then 1, the ends of rows padding."""
    rng = np.random.default_rng(seed)
    answers, most = rng.integers(1, 4), rng.integers(2, length // 4)

    def some() -> np.ndarray:
        return rng.integers(3, 64, max(1, rng.integers(-1, most)))

    groups = [Group(some(), tuple(some() for _ in range(answers))) for _ in range(4 * rows * length // most)]
    return packed(groups, RowShape(rows, length, length))[0].layout


def left_padded(seed, rows=ROWS, length=T) -> Layout:
    """Prompts as the sampler lays them out: one a row, at its end, without branches."""
    padding = np.random.default_rng(seed).integers(0, length, rows)[:, None]
    index = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    return Layout(np.maximum(index - padding, 0).astype(np.int32), (index >= padding).astype(np.int32))


def arrays_for(layout, heads=(4, 2), dim=16, seed=0):
    """(q, k, v, cotangent): random, the cotangent zero where there is only padding."""
    rng = np.random.default_rng(seed)
    there = (layout.segments != 0)[:, :, None, None]
    sizes = (heads[0], heads[1], heads[1], heads[0])
    q, k, v, cotangent = (rng.normal(size=(*there.shape[:2], n, dim)).astype(np.float32) for n in sizes)
    return q, k, v, cotangent * there


def gradients(kernel, **options):
    """A function of (arrays, layout) → output, dq, dk, dv."""

    def run(arrays, layout):
        *inputs, cotangent = arrays
        out, pull_back = jax.vjp(functools.partial(attend, layout=layout, kernel=kernel, **options), *inputs)
        return out, *pull_back(cotangent)

    return jax.jit(run)


def assert_same(results, expected, layout):
    """… but for padding, whose output is zeros."""
    padding = np.asarray(layout.segments) == 0
    for name, got, wanted in zip(("out", "dq", "dk", "dv"), map(np.asarray, results), expected, strict=True):
        np.testing.assert_array_equal(got[padding], 0)
        wanted = np.where(padding[:, :, None, None], 0, wanted)
        assert np.abs(wanted).max() > 0.5  # zeros would agree as well
        np.testing.assert_allclose(got, wanted, err_msg=name, **CLOSE)


# --- equal to plain -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"window": None}, {"window": 30, "softcap": 2.0, "scale": 0.4}], ids=str)
def test_any_packing_equals_plain(options, small_blocks):
    """Forward and backward: one to three answers a group, from a token to a quarter of a row long."""
    plain, kernel = gradients("plain", **options), gradients("flash", **options)
    for seed in range(25):
        layout = random_rows(seed)
        arrays = arrays_for(layout, seed=seed)
        assert_same(kernel(arrays, layout), plain(arrays, layout), layout)


def test_left_padded_prompts_equal_plain(small_blocks):
    """With a window narrower than a block."""
    plain, kernel = gradients("plain", window=7), gradients("flash", window=7)
    for seed in range(10):
        layout = left_padded(seed)
        arrays = arrays_for(layout, seed=seed)
        assert_same(kernel(arrays, layout), plain(arrays, layout), layout)


@pytest.mark.parametrize(("dim", "heads"), [(80, (2, 2)), (24, (6, 2))])
def test_any_head_dim(dim, heads):
    """No powers of two, as Phi-2's 80; any number of heads that share a key's; in the card's own blocks."""
    layout = random_rows(0)
    arrays = arrays_for(layout, heads, dim)
    results, expected = (gradients(kernel, window=None)(arrays, layout) for kernel in ("flash", "plain"))
    assert_same(results, expected, layout)


def test_eight_devices_attend_as_one(mesh8, small_blocks):
    """Rows and heads split in two."""
    layout = random_rows(5, rows=4)
    arrays = arrays_for(layout)
    expected = gradients("plain", window=None)(arrays, layout)
    with jax.set_mesh(mesh8):
        rows = sharding.put_batch(mesh8, layout)
        heads = NamedSharding(mesh8, PartitionSpec(sharding.RULES["batch"], None, "tensor", None))
        results = gradients("flash", window=None)(jax.device_put(arrays, heads), rows)
        assert results[1].sharding.spec == heads.spec
    assert_same(results, expected, layout)


# --- blocks that no query sees --------------------------------------------------------------------


def key_blocks(segments, size) -> list[list[tuple[int, int]]]:
    """Each row's blocks of keys: groups are cut from their beginning on."""
    rows = []
    for row in np.asarray(segments):
        starts = [t for t in range(T) if t == 0 or row[t] != row[t - 1]]
        groups = [(a, b) for a, b in zip(starts, [*starts[1:], T], strict=True) if row[a]]
        rows.append([(first, min(first + size, b)) for a, b in groups for first in range(a, b, size)])
    return rows


def looks(layout, window) -> np.ndarray:
    """Which query sees which key; bool [B, T, T], from `visible`."""
    there = layout.segments != 0
    return np.asarray(visible(layout, layout, window)) & there[:, :, None] & there[:, None, :]


def visits_of_queries(layout, window, blocks):
    """(how often each block of queries visits each of its row's blocks of keys, whether it is to)."""
    ends, stretches = visible_blocks.key_stretches(visible_blocks.seen_until(layout, window), layout.segments, blocks)
    ends, stretches, seen = np.asarray(ends), np.asarray(stretches), looks(layout, window)
    for b, own in enumerate(key_blocks(layout.segments, blocks.keys)):
        assert own == [(first, ends[b, first]) for first, _ in own]
        for i, (first, far, near, count) in enumerate(stretches[b]):
            visits, at = dict.fromkeys([first for first, _ in own], 0), first
            for n in range(count):
                at = near if n == far else at
                visits[at] += 1
                at = ends[b, at]
            rows = seen[b, i * blocks.queries : (i + 1) * blocks.queries]
            yield np.array([*visits.values()]), np.array([rows[:, first:end].any() for first, end in own])


def visits_of_keys(layout, window, blocks):
    """The same of the kernel of keys, whose blocks begin with the row."""
    stretches = np.asarray(visible_blocks.query_stretches(visible_blocks.seen_until(layout, window), blocks))
    seen = np.pad(looks(layout, window), [(0, 0), (0, -T % blocks.queries), (0, -T % blocks.keys)])
    B, queries, keys = seen.shape
    seen = seen.reshape(B, queries // blocks.queries, blocks.queries, keys // blocks.keys, blocks.keys)
    for (b, j), _ in np.ndenumerate(stretches[..., 0]):
        first, count = stretches[b, j]
        visits = np.zeros(seen.shape[1], int)
        visits[first : first + count] += 1
        yield visits, seen.any((2, 4))[b, :, j]


@pytest.mark.parametrize("blocks", [Blocks(32, 16, 4, 1), Blocks(16, 32, 4, 1)], ids=str)
@pytest.mark.parametrize(("rows", "window"), [(random_rows, None), (left_padded, None), (left_padded, 9)])
def test_no_other_blocks_are_visited(rows, window, blocks):
    """Each block with a key that a query sees, once; and none else."""
    for seed in range(20):
        layout = rows(seed)
        for visits_of in (visits_of_queries, visits_of_keys):
            for visits, seen in visits_of(layout, window, blocks):
                np.testing.assert_array_equal(visits, seen)


@pytest.mark.parametrize("blocks", [Blocks(32, 16, 4, 1), Blocks(16, 32, 4, 1)], ids=str)
def test_a_window_over_branches_visits_little_else(blocks):
    """Every block with a key that a query sees, once; a tenth more at most, of prompts far from an answer."""
    wanted = visited = 0
    for seed in range(20):
        for visits_of in (visits_of_queries, visits_of_keys):
            for visits, seen in visits_of(random_rows(seed), 9, blocks):
                assert (visits[seen] == 1).all()
                assert visits.max(initial=0) <= 1
                wanted, visited = wanted + seen.sum(), visited + visits.sum()
    assert visited <= 1.1 * wanted


def test_a_groups_company_changes_no_bit(small_blocks):
    """bfloat16: a group's output has the same bits alone and behind another, wherever in a row that ends."""

    def group(*lengths):
        prompt, *answers = (np.ones(n, np.int32) for n in lengths)
        return Group(prompt, tuple(answers))

    rng = np.random.default_rng(0)
    own = [rng.normal(size=(27, heads, 16)) for heads in (4, 2, 2)]
    outputs = []
    for before in (0, 28, 33, 48, 71):
        others = [group(8, before - 14, 6)] if before else []  # the longer group comes first
        groups = [group(9, 11, 7), *others]
        (rows,) = packed(groups, RowShape(1, T, 2))
        assert rows.layout.positions[0, before : before + 9].tolist() == list(range(9))
        arrays = [rng.normal(size=(1, T, *part.shape[1:])) for part in own]
        for whole, part in zip(arrays, own, strict=True):
            whole[0, before : before + 27] = part
        arrays = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
        out = attend(*arrays, jax.tree.map(jnp.asarray, rows.layout), window=None, kernel="flash")
        outputs.append(np.asarray(out[0, before : before + 27], np.float32))
    for out in outputs[1:]:
        np.testing.assert_array_equal(out, outputs[0])


# --- in a layer -----------------------------------------------------------------------------------


def layer_config(**options):
    defaults = {
        "model_type": "mistral",
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "norm_eps": 1e-5,
        "rope_theta": 1e4,
        "rope_scaling": None,
        "rotary_dim": 16,
        "windows": (None,),
        "activation": "silu",
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
        "initializer_range": 0.2,
    }
    return ModelConfig(**{**defaults, **options})


def layer_gradients(config, remat, length, mesh=None):
    """(a layer with its gradients as a function, its abstract arguments)."""
    block = Block(config, jnp.bfloat16, None, "flash")

    def arguments(placed):
        ids = jax.ShapeDtypeStruct((2, length), jnp.int32, sharding=placed)
        x = jax.ShapeDtypeStruct((2, length, config.hidden_size), jnp.bfloat16, sharding=placed)
        return x, Layout(ids, ids, ids)

    variables = sharding.unboxed(jax.eval_shape(block.init, jax.random.key(0), *arguments(None)))
    if mesh is not None:
        variables = sharding.laid_out(mesh, variables)

    def run(variables, x, layout):
        return block.apply(variables, x, layout)[0]

    if remat != "none":
        keep = jax.checkpoint_policies.save_only_these_names(*REMAT[remat])
        run = jax.checkpoint(run, policy=keep)

    def loss(variables, x, layout):
        return jnp.sum(run(variables, x, layout).astype(jnp.float32))

    placed = None if mesh is None else sharding.batch_layout(mesh)
    return jax.value_and_grad(loss, argnums=(0, 1)), (variables, *arguments(placed))


@pytest.mark.parametrize("remat", ["none", *REMAT])
def test_what_remat_keeps(remat):
    """The forward kernel is run again in the backward pass where attention is not kept, and only there.

    Counted in the program less what nothing depends on, which XLA leaves out as well.
    """
    gradient, arguments = layer_gradients(layer_config(), remat, T)
    program = jax.make_jaxpr(gradient)(*arguments).jaxpr
    live, _ = partial_eval.dce_jaxpr(program, [True] * len(program.outvars))
    counts = [str(live).count(f"name=flash_{kernel}") for kernel in ("forward", "dq", "dkv")]
    assert counts == [2 if remat == "full" else 1, 1, 1]


def test_a_layer_compiled_for_a_gpu():
    """Three kernels; no row is unshared (which takes scatters back), and no score leaves a kernel."""
    length = 640
    config = layer_config(head_dim=128, rotary_dim=128, hidden_size=512, intermediate_size=896)
    gradient, arguments = layer_gradients(config, "attention", length, mesh=gpu_mesh())
    program = for_gpu(gradient, *arguments)
    text = program.as_text()
    kernels = re.findall(r'custom_call_target="__gpu\$xla\.gpu\.triton".*?name *= *"(flash_\w+)"', text)
    assert sorted(kernels) == ["flash_dkv", "flash_dq", "flash_forward"]
    assert not re.findall(r"\b(?:scatter|gather|sort)\(", text)
    assert not re.findall(rf"\[(?:\d+,)*{length},{length}\]", text)


@pytest.mark.long
@pytest.mark.parametrize(
    ("dim", "dtype", "softcap"),
    [
        (64, "bfloat16", None),
        (80, "float16", None),
        (256, "bfloat16", 50.0),
        (256, "float32", 50.0),
        (512, "float32", None),
    ],
)
def test_whatever_the_heads_it_compiles_for_a_gpu(dim, dtype, softcap):
    """Blocks of every head dim fit a card's shared memory, with windows over branches as well."""
    batch = sharding.batch_layout(gpu_mesh())
    layout = Layout(*[jax.ShapeDtypeStruct((2, 700), jnp.int32, sharding=batch)] * 3)
    q, k, v = (jax.ShapeDtypeStruct((2, 700, n, dim), dtype, sharding=batch) for n in (4, 2, 2))

    def run(q, k, v, layout):
        return jnp.sum(attend(q, k, v, layout, window=300, softcap=softcap, kernel="flash").astype(jnp.float32))

    text = for_gpu(jax.grad(run, argnums=(0, 1, 2)), q, k, v, layout).as_text()
    assert len(re.findall(r'"flash_\w+"', text)) >= 3
