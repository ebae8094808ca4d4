"""The programs of a run, compiled for TPUs and GPUs that are not there.

A test that needs libtpu, or JAX's plugin for CUDA, is skipped where that is not installed.
"""

import jax
import numpy as np
import pytest
from plan_examples import SMALL, zephyr

from spin_jax.forecast.times import BETWEEN_SLICES
from spin_jax.plan import compiled
from spin_jax.plan.__main__ import table
from spin_jax.plan.answer import plan
from spin_jax.plan.collectives import bytes_by_kind, find_collectives
from spin_jax.plan.estimate import estimated_phases
from spin_jax.plan.planned_run import planned_run
from spin_jax.selfplay import from_config


@pytest.fixture(scope="module")
def tpu():
    """A small model on eight chips of v5e that are not there."""
    pytest.importorskip("libtpu", reason="needs jax[tpu], though no TPU")
    return planned_run(zephyr(model__architecture=SMALL), "v5e:2x4")


def test_a_tpu_program_moves_what_fsdp_must(tpu):
    """Above a MiB: gathered weights and scattered gradients, each of either dtype's size and no more.

    The step donates its state, all of it.
    """
    step, arguments = compiled.train_program(tpu)
    program = compiled.compiled(tpu.model.mesh, step, arguments, effort=-1.0)  # in a third of the time
    found = [one for one in find_collectives(program.as_text()) if one.bytes > 2**20]
    sums = bytes_by_kind(found)
    matrices = 2 * sum(leaf.size for leaf in jax.tree.leaves(arguments[0].params) if leaf.ndim > 2)
    tables = 2 * 2 * 8192 * 1024
    # Each weight is gathered for the forward and for the backward pass, the tables once, all in bfloat16.
    assert 2 * matrices <= sums["all-gather"] <= 2 * matrices + 2 * tables
    # Gradients in bfloat16, the embedding's in float32. The compiler may write a reduce-scatter as an
    # all-reduce of which each device keeps its part: on square topologies, and of small combined ones.
    scattered = sums.pop("reduce-scatter") + sums.pop("all-reduce", 0)
    assert scattered == pytest.approx(matrices + 1.5 * tables, rel=0.1)
    # Halos between neighbours, where a combined scatter does not divide evenly.
    assert sums.pop("collective-permute", 0) < 0.05 * scattered
    assert set(sums) == {"all-gather"}

    state = sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * 4 for leaf in jax.tree.leaves(arguments[0]))
    assert program.memory_analysis().alias_size_in_bytes == pytest.approx(state, rel=0.01)  # padded scales
    guess = estimated_phases(tpu)["train"].memory
    # Within a quarter of a 7B's; here the arithmetic's fixed parts weigh more.
    assert 0.8 < guess / sum(compiled.memory_of(program)) < 2


@pytest.mark.long
def test_slices_exchange_gradients_alone():
    """Two slices of four chips, compiled: a chip sends the quarter that it keeps, once."""
    pytest.importorskip("libtpu", reason="needs jax[tpu], though no TPU")
    run = planned_run(zephyr(model__architecture=SMALL), "v5e:2x2*2")
    assert dict(run.model.mesh.shape) == {"data": 2, "fsdp": 4, "context": 1, "tensor": 1}
    step, arguments = compiled.train_program(run)
    program = compiled.compiled(run.model.mesh, step, arguments, effort=-1.0)
    sums = bytes_by_kind(find_collectives(program.as_text()))
    assert sums[BETWEEN_SLICES] == pytest.approx(sums["reduce-scatter"] / 4, rel=0.01)


def test_sampling_shares_weights_only_where_it_must(tpu):
    """A small model is copied to every chip; a 7B needs several of v5e's, and one H200 holds it."""
    assert from_config.sampling_tensor(tpu.config, tpu.model) == 1
    large = planned_run(zephyr(), "v5e:2x4")
    assert from_config.sampling_tensor(large.config, large.model) > 1
    card = planned_run(zephyr(), "h200:1", compiles=False)
    assert from_config.sampling_tensor(card.config, card.model) == 1


# --- GPUs ------------------------------------------------------------------------------------------


def small_on(topology):
    pytest.importorskip("jax_cuda13_plugin", reason="needs jax-cuda13-plugin, though no GPU")
    run = planned_run(zephyr(model__architecture=SMALL), topology)
    assert run.compiles, run.uncompiled
    return run


def test_a_gpu_plan_is_compiled():
    """Eight GPUs: the state is that by hand, weights are gathered for both passes, gradients scattered."""
    run = small_on("h100:8")
    answer = plan(run, 1000)
    assert answer["by"] == "compilation"
    assert "memory by compilation" in table(answer)
    assert answer["fits"]
    train = answer["phases"]["train"]
    state = compiled.train_program(run)[1][0]
    mine = sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * 4 for leaf in jax.tree.leaves(state))
    held = train["parts_gib"]["weights"] + train["parts_gib"]["optimizer"]
    assert held * 2**30 == pytest.approx(mine, rel=0.02)  # and the batch
    matrices = 2 * sum(leaf.size for leaf in jax.tree.leaves(state.params) if leaf.ndim > 2)
    tables = 2 * 2 * 8192 * 1024
    sums = {kind: size * 2**30 for kind, size in train["collective_gib"].items()}
    assert 2 * matrices <= sums["all-gather"] <= 1.01 * (2 * matrices + 2 * tables)  # norms' scales besides
    # The tables' gradients may travel in float32.
    assert matrices + tables <= sums["reduce-scatter"] + sums["all-reduce"] <= matrices + 2.1 * tables
    # A 7B's is told to a tenth; here what does not grow with the model weighs more.
    assert 0.5 < train["hbm_gib"] * 2**30 / estimated_phases(run)["train"].memory < 2


@pytest.mark.long
def test_gpu_nodes_exchange_gradients_alone():
    """Between two nodes of two goes what arithmetic says: no weights, each gradient there and back."""
    run = small_on("h100:2*2")
    assert dict(run.model.mesh.shape) == {"data": 2, "fsdp": 2, "context": 1, "tensor": 1}
    program = compiled.compiled(run.model.mesh, *compiled.train_program(run))
    sums = bytes_by_kind(find_collectives(program.as_text(), node=2))
    guess = estimated_phases(run)["train"].traffic
    # The tables' gradients may travel in float32.
    assert 0.9 < sums[BETWEEN_SLICES] / guess[BETWEEN_SLICES] < 1.5
