"""The answer of `plan` by arithmetic: memory, suggestions, times, and the command that prints it."""

import json
import runpy

import jax
import pytest
from plan_examples import planned, zephyr
from runs import ROOT

from spin_jax import config
from spin_jax.plan import __main__, machine
from spin_jax.plan.__main__ import table
from spin_jax.plan.answer import plan
from spin_jax.plan.estimate import estimated_phases
from spin_jax.plan.planned_run import fits, planned_run
from spin_jax.runtime import chips


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
    phases = sum(phase["iteration_s"] for phase in answer["phases"].values())
    assert phases < answer["iteration_s"] < 1.1 * phases  # with the evaluation and what is written


def test_several_answers_to_a_prompt_read_it_once():
    """By hand: each answer takes a quarter of the prompt's time above, and the cache of 8,192 tokens is kept."""
    one, four = (planned(zephyr(selfplay__samples=K), "h200:1")["phases"]["sample"] for K in (1, 4))
    seconds = [1 / phase["tokens_per_s"] for phase in (one, four)]
    assert seconds[0] - seconds[1] == pytest.approx(0.75 * 180 * 14.5e9 / (989e12 * 0.45) / 220, rel=0.1)
    assert four["parts_gib"]["prompts"] * 2**30 == 8192 * 131072
    assert four["hbm_gib"] == pytest.approx(one["hbm_gib"])


def test_what_would_fit_is_suggested():
    """One H100 has no room for training 10B parameters, however it is done; two have."""
    architecture = zephyr().model.architecture.to_dict()
    larger = zephyr(model__architecture={**architecture, "num_hidden_layers": 48})
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
    assert "it does not fit" in table(answer)


def test_devices_are_told_to_share_a_row_that_is_too_long_for_one():
    """Rows of 32k tokens on chips of 16 GB: by hand, the inputs of 32 layers alone take 16 GiB of float32."""
    long = {"lengths__max_prompt": 2048, "lengths__max_length": 31744, "train__row_length": 32768}
    keys = {**long, "sampling__max_new_tokens": 1024, "sampling__batch_size": 8, "mesh__tensor": 1}
    answer = planned(zephyr(**keys), "v5e:4x8")
    assert answer["phases"]["train"]["parts_gib"]["temporary"] > 16
    assert not answer["fits"]
    assert answer["suggestion"]["flags"] == ["--config.mesh.context=4"]


def test_links_bind_where_they_are_slow(monkeypatch):
    quick = planned(zephyr(), "h100:8")
    assert quick["phases"]["train"]["bottleneck"] == "compute"
    assert quick["phases"]["train"]["collective_gib"]["all-gather"] == pytest.approx(2 * 13.5, rel=0.01)
    slow = {kind: chip.__class__(chip.flops, chip.bandwidth, chip.memory, 1e9) for kind, chip in chips.CHIPS.items()}
    monkeypatch.setattr(chips, "CHIPS", slow)
    assert planned(zephyr(), "h100:8")["phases"]["train"]["bottleneck"] == "collectives"


def test_the_run_trains_on_the_pairs_before_as_well():
    """Three iterations of two sets of pairs but for the first; the last for twice the epochs."""
    answer = planned(zephyr(selfplay__iterations=3, train__epochs=(1, 1, 2)), "h100:8")
    train, score, sample = (answer["phases"][name]["iteration_s"] for name in ("train", "score", "sample"))
    phases = answer["run"]["phases_s"]
    # The 500 held-out pairs are scored in each iteration, and a last step may be short: both to a thousandth.
    expected = {"sample": 3 * sample, "score": 5 * score - 2 * 500 / 50_500 * score, "train": (1 + 2 + 4) * train}
    assert {name: phases[name] for name in expected} == pytest.approx(expected, rel=1e-3)
    assert answer["run"]["hours"] * 3600 == pytest.approx(sum(phases.values()))
    assert answer["run"]["device_hours"] == 8 * answer["run"]["hours"]


def test_offloaded_state_is_told_and_takes_its_time():
    answer = planned(zephyr(train__offload=True), "h200:1")
    train = answer["phases"]["train"]
    assert train["parts_gib"]["optimizer"] == 0
    assert train["offloaded_gib"] * 2**30 == 4 * 7_241_732_096
    assert "26.98 GiB of each device's optimizer state" in table(answer)
    slow = planned(zephyr(train__offload=True), "h200:1", host_gb_s=1.0)["phases"]["train"]
    assert slow["bottleneck"] == "host memory"
    assert slow["unit_s"] == pytest.approx(2 * 4 * 7.241732096)


def test_nodes_exchange_gradients_over_their_network():
    """Two nodes are two replicas: each GPU exchanges its share of the gradients with another."""
    answer = planned(zephyr(), "h100:8*2")
    assert answer["mesh"] == {"data": 2, "fsdp": 8, "context": 1, "tensor": 1}
    across = answer["phases"]["train"]["collective_gib"]["between slices"]
    assert across == pytest.approx(2 * 7.24e9 / 8 / 2**30, rel=0.01)
    assert answer["phases"]["train"]["bottleneck"] == "compute"
    slow = planned(zephyr(), "h100:8*2", dcn_gbit_s=10.0)["phases"]["train"]
    assert slow["bottleneck"] == "network between slices"


def test_the_command(capsys):
    code = __main__.main(["plan", "--config=configs/zephyr.py", "--topology=h200:1", "--json", "--nocompile"])
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == 0
    assert (answer["by"], answer["uncompiled"]) == ("arithmetic", "--nocompile")
    assert answer["fits"] is True
    assert answer["host_gib"].keys() >= {"process", "examples", "checkpoint", "most"}
    assert {"iterations", "hours", "chip_hours", "phases_s", "iteration_gib", "written_gib"} <= answer["run"].keys()
    assert answer["assumed"]["write_gb_s"] == 0.6
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
    machine.topology_devices.cache_clear()
    try:
        run = planned_run(zephyr(), "h100:4")
    finally:
        machine.topology_devices.cache_clear()
    answer = plan(run, 1000)
    assert answer["by"] == "arithmetic"
    assert f"pip install jax-cuda13-plugin=={jax.__version__}" in answer["uncompiled"]
    assert "memory by arithmetic (to compile: pip install jax-cuda13-plugin" in table(answer)


def config_file(name, variant=""):
    path = ROOT / "configs" / name
    module = runpy.run_path(str(path))
    return module["get_config"](*[variant] * bool(variant)), module.get("MACHINES", {})


def test_each_machine_of_the_recipe_has_room():
    """By arithmetic, which compilation agrees with to a quarter; the 70B on 64 chips of v5p too."""
    _, machines = config_file("zephyr.py")
    cases = [("zephyr.py", name, name.replace("-", ":")) for name in machines]
    for file, variant, topology in [*cases, ("tulu2_70b.py", "", "v5p:4x4x4")]:
        run = planned_run(config.resolve(config_file(file, variant)[0]), topology, compiles=False)
        assert fits(run, estimated_phases(run)), topology
    with pytest.raises(ValueError, match="no variant 'v5e'"):
        config_file("zephyr.py", "v5e")


def test_this_machine_can_be_planned_for(capsys):
    """Its rates are measured; a GiB is what a chip takes of its memory, and 0.01 is a matrix product's share here."""
    flags = ["--topology=cpu:1", "--json", "--nocompile", "--config.eval.tasks=arc_easy"]
    assert __main__.main(["plan", "--config=configs/tiny.py:smoke", *flags]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["devices"] == "1 × cpu"
    assert answer["assumed"]["mfu"] == 0.6
    assert answer["host_gib"]["devices"] == pytest.approx(max(p["hbm_gib"] for p in answer["phases"].values()))
    assert set(answer["run"]["phases_s"]) >= {"compile", "sft", "sample", "score", "train", "control", "evaluation"}
    assert answer["run"]["not_counted"] == ["eval.tasks=arc_easy"]
    assert 1e9 < chips.chip_of(jax.devices()[:1]).flops < 1e14
