"""What a run takes of a machine that is not there: by arithmetic, by libtpu's compiler, by XLA's for GPUs.

Without libtpu, or JAX's plugin for CUDA, what needs the compiler is skipped.
"""

import json
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from runs import ROOT

from spin_jax import config
from spin_jax.plan import __main__, collectives, compiled, estimate, time
from spin_jax.plan import machine as machines
from spin_jax.plan.collectives import Collective
from spin_jax.runtime import chips
from spin_jax.selfplay import from_config

# Mistral's shape, small enough to be compiled in half a minute, large enough that weights exceed a MiB.
SMALL = {
    "model_type": "mistral",
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
}

HLO = """\
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (input: bf16[1024,64]) -> bf16[128,64] {
  %all-reduce.9 = bf16[1024,64]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=3, to_apply=%add
  ROOT %slice = bf16[128,64]{1,0} dynamic-slice(%all-reduce.9, %x)
}

%started (p: bf16[128,64]) -> bf16[1024,64] {
  ROOT %all-gather.1 = bf16[1024,64]{1,0} all-gather(%p), channel_id=4, dimensions={0}
}

%ended (p: bf16[128,64]) -> bf16[1024,64] {
  ROOT %all-gather.2 = bf16[1024,64]{1,0} all-gather(%p), channel_id=4, dimensions={0}
}

%body (state: (s32[], bf16[128,64])) -> (s32[], bf16[128,64]) {
  %s = bf16[1024,64]{1,0} fusion(%w), kind=kCustom, calls=%started
  %e = bf16[1024,64]{1,0} fusion(%w), kind=kCustom, calls=%ended
  %g = bf16[128,64]{1,0} fusion(%e), kind=kCustom, calls=%all-reduce-scatter.1
}

%condition (state: (s32[], bf16[128,64])) -> pred[] {
  %n = s32[]{:T(128)} constant(32)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (w: bf16[128,64]) -> f32[] {
  %loop = (s32[], bf16[128,64]{1,0}) while(%start), condition=%condition, body=%body
  %norms = (f32[]{:T(128)}, f32[256]{0}) all-reduce(%x, %y), channel_id=7, to_apply=%add
}
"""


def test_collectives_of_a_tpu_program_by_hand():
    """Loops count, asynchronous halves are one, and a fusion called all-reduce-scatter is what it says."""
    found = collectives.collectives(HLO)
    assert sorted(found) == [
        Collective("all-gather", 1024 * 64 * 2, 32),
        Collective("all-reduce", 4 + 256 * 4, 1),
        Collective("reduce-scatter", 1024 * 64 * 2, 32),
    ]
    sums = collectives.totals(found)
    assert sums["all-gather"] == 32 * 1024 * 64 * 2
    assert collectives.received(sums) == 2 * sums["all-gather"] + 2 * sums["all-reduce"]


# What XLA writes for GPUs: ((operands), (results)) of what ends elsewhere, and groups in three ways.
GPU_HLO = """\
HloModule jit_step, is_scheduled=true

ENTRY %main (w: bf16[128,64]) -> bf16[128,64] {
  %g = (bf16[128,64]{1,0}, bf16[1024,64]{1,0}) all-gather-start(%w), channel_id=1, replica_groups=mesh['data'=2,'fsdp'=8,'tensor'=1] {'fsdp'}, dimensions={0}
  %gd = bf16[1024,64]{1,0} all-gather-done(%g)
  %s = ((bf16[1024,64]{1,0}, bf16[512,64]{1,0}), (bf16[128,64]{1,0}, bf16[64,64]{1,0})) reduce-scatter-start(%a, %b), channel_id=2, replica_groups=[2,8]<=[16], dimensions={0}, to_apply=%add
  %sd = (bf16[128,64]{1,0}, bf16[64,64]{1,0}) reduce-scatter-done(%s)
  %n = ((bf16[128,64]{1,0}), bf16[128,64]{1,0}) all-reduce-start(%x), channel_id=3, replica_groups=[8,2]<=[2,8]T(1,0), to_apply=%add
  %nd = bf16[128,64]{1,0} all-reduce-done(%n)
  %all = bf16[1024,64]{1,0} all-reduce(%y), channel_id=4, replica_groups={{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}}, to_apply=%add
}
"""  # noqa: E501


def test_collectives_of_a_gpu_program_by_hand():
    """Two nodes of eight. A sum over both crosses the network once each way, divided among a node's GPUs."""
    found = collectives.collectives(GPU_HLO, node=8)
    part = 128 * 64 * 2
    between = collectives.BETWEEN_SLICES
    assert sorted(found) == [
        Collective("all-gather", 8 * part, 1),
        Collective(
            "all-reduce", 8 * part, 1
        ),  # within the nodes; the other one's groups have one GPU in each
        Collective(between, 2 * 8 * part // 16, 1),  # of all 16
        Collective(between, 2 * part // 2, 1),  # of pairs of GPUs, one in each node
        Collective("reduce-scatter", 8 * (128 + 64) * 64 * 2, 1),
    ]
    # One node: nothing crosses.
    assert between not in collectives.totals(collectives.collectives(GPU_HLO))


def test_collectives_of_a_compiled_program(mesh8):
    """XLA's CPU compiler gathers and sums in the shapes asked for, once for every turn of a loop."""

    def on_each(x):
        def turn(_, mine):
            whole = jax.lax.all_gather(mine, "data", tiled=True)
            return mine + jax.lax.psum(jnp.sin(whole), "fsdp").sum(0)

        return jax.lax.fori_loop(0, 5, turn, x)

    split = PartitionSpec("data")
    x = jax.ShapeDtypeStruct((16, 128), jnp.float32, sharding=jax.sharding.NamedSharding(mesh8, split))
    run = jax.shard_map(on_each, mesh=mesh8, in_specs=split, out_specs=split, check_vma=False)
    program = jax.jit(run).lower(x).compile()
    sums = collectives.totals(collectives.collectives(program.as_text()))
    assert sums == {"all-gather": 5 * 16 * 128 * 4, "all-reduce": 5 * 16 * 128 * 4}


def zephyr(**changes):
    c = config.default()
    c.data.path = "planned"
    c.model.architecture = dict(
        SMALL,
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        sliding_window=4096,
    )
    for key, value in changes.items():
        section, name = key.split("__")
        c[section][name] = value
    return config.resolve(c)


def planned(c, topology, **assumed):
    """By arithmetic."""
    work = compiled.workload(c, topology, compiles=False)
    return __main__.plan(work, time.Assumed(pairs=50_000, **assumed))


def test_one_h200_holds_a_7b():
    """87 GB of weights, second moments and gradients, in float32: by hand, and less than 130 GiB in all."""
    answer = planned(zephyr(), "h200:1")
    assert answer["fits"]
    assert answer["suggestion"] is None
    train = answer["phases"]["train"]
    parameters = 7_241_732_096
    assert train["parts_gib"]["weights"] * 2**30 == parameters * 4
    assert train["parts_gib"]["optimizer"] * 2**30 == parameters * 4
    assert 3 * parameters * 4 / 2**30 < train["hbm_gib"] < 130
    # 42.7 GFLOP a token and attention; a step has about 64 × 700.
    assert train["tflops"] == pytest.approx(64 * 700 * 42.7e9 / 1e12, rel=0.1)
    assert train["bottleneck"] == "compute"
    # A token each for 64 answers reads 14.5 GB of weights and 290 tokens of each cache, 131 kB a token, at
    # half of what the memory could do; a prompt of 180 tokens is read at 45% MFU for 220 new ones.
    token = (14.5e9 + 64 * 290 * 131e3) / 4.8e12 / 0.5 / 64 + 180 * 14.5e9 / (989e12 * 0.45) / 220
    assert answer["phases"]["sample"]["tokens_per_s"] == pytest.approx(1 / token, rel=0.05)
    assert answer["iteration_s"] == pytest.approx(
        sum(phase["iteration_s"] for phase in answer["phases"].values())
    )


def test_what_would_fit_is_suggested():
    """One H100 has no room for training 10B parameters, however it is done; two have."""
    larger = zephyr()
    larger.model.architecture.num_hidden_layers = 48
    answer = planned(larger, "h100:1")
    assert not answer["fits"]
    (machine, *_) = answer["suggestion"]["flags"]
    assert machine == "--topology=h100:2"
    # A 7B has some there, once the optimizer's state waits in the host's memory.
    answer = planned(zephyr(), "h100:1")
    assert not answer["fits"]
    assert "--config.train.offload=true" in answer["suggestion"]["flags"]
    assert not any("topology" in flag for flag in answer["suggestion"]["flags"])
    # A card that is only short of activations is told to compute more of them again.
    answer = planned(zephyr(train__remat="none", train__tokens_per_device=32768), "h200:1")
    assert not answer["fits"]
    assert any("train.remat" in flag for flag in answer["suggestion"]["flags"])
    assert not any("topology" in flag for flag in answer["suggestion"]["flags"])
    assert "it does not fit" in __main__.table(answer)


def test_links_bind_where_they_are_slow(monkeypatch):
    quick = planned(zephyr(), "h100:8")
    assert quick["phases"]["train"]["bottleneck"] == "compute"
    assert quick["phases"]["train"]["collective_gib"]["all-gather"] == pytest.approx(2 * 13.5, rel=0.01)
    slow = {
        kind: chip.__class__(chip.flops, chip.bandwidth, chip.memory, 1e9)
        for kind, chip in __main__.roofline.CHIPS.items()
    }
    monkeypatch.setattr(__main__.roofline, "CHIPS", slow)
    assert planned(zephyr(), "h100:8")["phases"]["train"]["bottleneck"] == "collectives"


def test_the_run_trains_on_the_pairs_before_as_well():
    """Three iterations of two sets of pairs but for the first; the last for twice the epochs."""
    c = zephyr()
    c.selfplay.iterations, c.train.epochs = 3, (1, 1, 2)
    answer = planned(c, "h100:8")
    train, score, sample = (answer["phases"][name]["iteration_s"] for name in ("train", "score", "sample"))
    assert answer["run"]["hours"] * 3600 == pytest.approx(3 * sample + 5 * score + (1 + 2 + 4) * train)
    assert answer["run"]["device_hours"] == 8 * answer["run"]["hours"]


def test_offloaded_state_is_told_and_takes_its_time():
    answer = planned(zephyr(train__offload=True), "h200:1")
    train = answer["phases"]["train"]
    assert train["parts_gib"]["optimizer"] == 0
    assert train["offloaded_gib"] * 2**30 == 4 * 7_241_732_096
    assert "26.98 GiB of each device's optimizer state" in __main__.table(answer)
    slow = planned(zephyr(train__offload=True), "h200:1", host_gb_s=1.0)["phases"]["train"]
    assert slow["bottleneck"] == "host memory"
    assert slow["unit_s"] == pytest.approx(2 * 4 * 7.241732096)


def test_nodes_exchange_gradients_over_their_network():
    """Two nodes are two replicas: each GPU exchanges its share of the gradients with another."""
    answer = planned(zephyr(), "h100:8*2")
    assert answer["mesh"] == {"data": 2, "fsdp": 8, "tensor": 1}
    across = answer["phases"]["train"]["collective_gib"]["between slices"]
    assert across == pytest.approx(2 * 7.24e9 / 8 / 2**30, rel=0.01)
    assert answer["phases"]["train"]["bottleneck"] == "compute"
    slow = planned(zephyr(), "h100:8*2", dcn_gbit_s=10.0)["phases"]["train"]
    assert slow["bottleneck"] == "network between slices"


@pytest.mark.parametrize(
    ("topology", "changes", "message"),
    [
        ("v9:2x2", {}, "--topology=v9:2x2: a machine such as"),
        ("h100", {}, "--topology=h100: a machine such as"),
        ("h100:8*0", {}, "--topology=h100:8\\*0: a machine such as"),
        ("h100:8", {"mesh__tensor": 3}, "asks for 6 devices and there are 8"),
        ("h100:8", {"sampling__tensor": 3}, "sampling.tensor=3 does not divide"),
    ],
)
def test_impossible_machines(topology, changes, message):
    with pytest.raises(ValueError, match=message):
        planned(zephyr(**changes), topology)


def test_the_command(capsys):
    code = __main__.main(["plan", "--config=configs/zephyr.py", "--topology=h200:1", "--json", "--nocompile"])
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == 0
    assert (answer["by"], answer["uncompiled"]) == ("arithmetic", "--nocompile")
    assert answer["fits"] is True
    assert {name: phase["hbm_gib"] > 0 for name, phase in answer["phases"].items()} == {
        "train": True,
        "score": True,
        "sample": True,
    }


def test_without_the_compiler_arithmetic_says_so(monkeypatch):
    """And what to install."""

    def absent(*arguments, **options):
        raise NotImplementedError("topology not implemented for cuda")  # JAX's words

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", absent)
    machines.devices.cache_clear()
    try:
        work = compiled.workload(zephyr(), "h100:4")
    finally:
        machines.devices.cache_clear()
    answer = __main__.plan(work, time.Assumed(pairs=1000))
    assert answer["by"] == "arithmetic"
    assert f"pip install jax-cuda13-plugin=={jax.__version__}" in answer["uncompiled"]
    assert "memory by arithmetic (to compile: pip install jax-cuda13-plugin" in __main__.table(answer)


@pytest.mark.parametrize(
    ("topology", "devices"),
    [("v4:2x2x1", 4), ("v5e:2x2", 4), ("v5p:2x2x1", 4), ("v6e:2x2", 4), ("tpu7x:2x2x1", 8), ("v5e:2x2*2", 8)],
)
def test_tpus_are_what_libtpu_says(topology, devices):
    """A v4's and a v5p's two cores are one device, Ironwood's two chiplets are two."""
    pytest.importorskip("libtpu", reason="needs jax[tpu], though no TPU")
    machine = machines.parsed(topology)
    found = machines.devices(machine)
    assert len(found) == machine.devices == devices
    assert {device.device_kind for device in found} == {machines.FAMILIES[machine.family].device_kind}


def test_each_machine_has_a_chip():
    """Whose memory is that of the description which is compiled for, to half a percent."""
    for family in machines.FAMILIES.values():
        chip = chips.chip(family.device_kind)
        assert chip
        assert not family.gpu or chip.memory == pytest.approx(family.gpu.memory, rel=5e-3)


def config_file(name, variant=""):
    path = ROOT / "configs" / name
    module = runpy.run_path(str(path))
    return module["get_config"](*[variant] * bool(variant)), module.get("MACHINES", {})


def test_each_machine_of_the_recipe_has_room():
    """By arithmetic, which compilation agrees with to a quarter; the 70B on 64 chips of v5p too."""
    _, machines = config_file("zephyr.py")
    cases = [("zephyr.py", name, name.replace("-", ":")) for name in machines]
    for file, variant, topology in [*cases, ("tulu2_70b.py", "", "v5p:4x4x4")]:
        work = compiled.workload(config.resolve(config_file(file, variant)[0]), topology, compiles=False)
        assert compiled.fits(work, estimate.estimated_phases(work)), topology
    with pytest.raises(ValueError, match="no variant 'v5e'"):
        config_file("zephyr.py", "v5e")


@pytest.fixture(scope="module")
def tpu():
    """A small model on eight chips of v5e that are not there."""
    pytest.importorskip("libtpu", reason="needs jax[tpu], though no TPU")
    c = zephyr()
    c.model.architecture = dict(SMALL)
    return compiled.workload(config.resolve(c), "v5e:2x4")


def test_a_tpu_program_moves_what_fsdp_must(tpu):
    """Above a MiB: gathered weights and scattered gradients, each of either dtype's size and no more.

    The step donates its state, all of it.
    """
    step, arguments = compiled.train_program(tpu)
    program = compiled.compiled(tpu.model.mesh, step, arguments, effort=-1.0)  # in a third of the time
    found = [one for one in collectives.collectives(program.as_text()) if one.bytes > 2**20]
    sums = collectives.totals(found)
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

    state = sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * 4 for leaf in jax.tree.leaves(arguments[0])
    )
    assert program.memory_analysis().alias_size_in_bytes == pytest.approx(state, rel=0.01)  # padded scales
    guess = estimate.estimated_phases(tpu)["train"].memory
    # Within a quarter of a 7B's; here the arithmetic's fixed parts weigh more.
    assert 0.8 < guess / sum(compiled.taken(program)) < 2


@pytest.mark.long
def test_slices_exchange_gradients_alone():
    """Two slices of four chips, compiled: a chip sends the quarter that it keeps, once."""
    pytest.importorskip("libtpu", reason="needs jax[tpu], though no TPU")
    c = zephyr()
    c.model.architecture = dict(SMALL)
    work = compiled.workload(config.resolve(c), "v5e:2x2*2")
    assert dict(work.model.mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    step, arguments = compiled.train_program(work)
    program = compiled.compiled(work.model.mesh, step, arguments, effort=-1.0)
    sums = collectives.totals(collectives.collectives(program.as_text()))
    assert sums[collectives.BETWEEN_SLICES] == pytest.approx(sums["reduce-scatter"] / 4, rel=0.01)


def test_sampling_shares_weights_only_where_it_must(tpu):
    """A small model is copied to every chip; a 7B needs several of v5e's, and one H200 holds it."""
    assert from_config.sampling_tensor(tpu.config, tpu.model) == 1
    large = compiled.workload(zephyr(), "v5e:2x4")
    assert from_config.sampling_tensor(large.config, large.model) > 1
    card = compiled.workload(zephyr(), "h200:1", compiles=False)
    assert from_config.sampling_tensor(card.config, card.model) == 1


# --- GPUs, compiled ------------------------------------------------------------------------------


def small_on(topology):
    pytest.importorskip("jax_cuda13_plugin", reason="needs jax-cuda13-plugin, though no GPU")
    c = zephyr()
    c.model.architecture = dict(SMALL)
    work = compiled.workload(config.resolve(c), topology)
    assert work.compiles, work.uncompiled
    return work


def test_a_gpu_plan_is_compiled():
    """Eight GPUs: the state is that by hand, weights are gathered for both passes, gradients scattered."""
    work = small_on("h100:8")
    answer = __main__.plan(work, time.Assumed(pairs=1000))
    assert answer["by"] == "compilation"
    assert "memory by compilation" in __main__.table(answer)
    assert answer["fits"]
    train = answer["phases"]["train"]
    state = compiled.train_program(work)[1][0]
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
    assert 0.5 < train["hbm_gib"] * 2**30 / estimate.estimated_phases(work)["train"].memory < 2


@pytest.mark.long
def test_gpu_nodes_exchange_gradients_alone():
    """Between two nodes of two goes what arithmetic says: no weights, each gradient there and back."""
    work = small_on("h100:2*2")
    assert dict(work.model.mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 1}
    program = compiled.compiled(work.model.mesh, *compiled.train_program(work))
    sums = collectives.totals(collectives.collectives(program.as_text(), node=2))
    guess = estimate.estimated_phases(work)["train"].traffic
    # The tables' gradients may travel in float32.
    assert 0.9 < sums[collectives.BETWEEN_SLICES] / guess[collectives.BETWEEN_SLICES] < 1.5
