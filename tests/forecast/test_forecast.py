"""Times and bytes of a 7B model, by hand."""

import dataclasses

import pytest
from architectures import SMALL
from plan_examples import planned, zephyr

from spin_jax.forecast import sizes
from spin_jax.forecast.job import Amounts, Rates, Work, assumed_work
from spin_jax.forecast.times import phase_seconds, speeds
from spin_jax.plan import machine
from spin_jax.plan.planned_run import planned_run
from spin_jax.runtime import chips
from spin_jax.sampling import placement
from spin_jax.selfplay import from_config

P = 7_241_732_096  # parameters of zephyr()
GIB = 2**30


def test_the_work_of_a_run():
    """1,000 pairs of two answers to 500 prompts: 50 are held out, and a fifth of all pairs are added."""
    c = zephyr(selfplay__samples=2, selfplay__add_pairs="x", selfplay__add_share=0.2, selfplay__iterations=3)
    work = assumed_work(c, 1000)
    assert (work.examples, work.held_out) == (500, 50)
    assert work.iterations[0] == Amounts(answers=1050, written=1300, pairs=1250)
    assert work.iterations[2] == Amounts(answers=1050, written=1300, pairs=2500)
    given = assumed_work(zephyr(selfplay__pairs="1=x", selfplay__iterations=2), 1000)
    assert [amounts.answers for amounts in given.iterations.values()] == [1100, 0]


def test_files_are_written_at_the_stated_rate():
    """782 steps save three times. A checkpoint has weights and second moments in float32, an export bfloat16."""
    answer = planned(zephyr(selfplay__iterations=1), "h200:1", write_gb_s=2.0, read_gb_s=1.0, compile_s=7.0)
    phases = answer["run"]["phases_s"]
    # No model.path: the start is made here, and so there are two final checkpoints and two exports.
    assert phases["checkpoint"] == pytest.approx((3 * 8 + 4 + 4) * P / 2e9)
    assert phases["export"] == pytest.approx(2 * 2 * P / 2e9)
    # KL needs the opponent's weights. Nothing needs those of the last iteration after it.
    assert phases["load"] == pytest.approx(4 * P / 1e9)
    # Two samplers of two programs, human answers, pairs, the step.
    assert phases["compile"] == 7 * 7
    written = {name: size * GIB for name, size in answer["run"]["written_gib"].items()}
    assert written["checkpoint"] == 4 * P
    assert written["export"] == 2 * P
    assert written["start"] == 6 * P
    assert written["step checkpoints"] == 3 * 8 * P  # two are kept, and the third one is removed when it is there
    # The text of a prompt stands in a row twice, its ids once.
    row = 1.5 * (180 + 300 + 220) + 1.25 * (2 * 180 + 300 + 220)
    assert written["pairs"] == pytest.approx(50_500 * row, rel=0.01)
    assert written["scores"] == 50_500 * 4 * 4
    assert answer["run"]["chip_hours"] == answer["run"]["hours"] == pytest.approx(sum(phases.values()) / 3600)


def test_evaluation_samples_scores_and_compares():
    """Of 500 held-out prompts: sampled and greedy answers, human answers, pairs, and KL from one or two models."""
    c = zephyr(selfplay__iterations=2, eval__verifier="exact", eval__samples=3)
    run = planned_run(c, "h200:1", compiles=False)
    chip, rates = chips.CHIPS["NVIDIA H200"], Rates()
    speed = speeds(run.job, chip, rates)
    pair, token = speed["score"].seconds / speed["score"].items, speed["sample"].seconds
    work = Work({0: Amounts(64, 0, 64), 1: Amounts(0, 0, 64)}, 0, 500, 500)
    seconds = phase_seconds(run.job, work, chip, rates, speed)
    # Eight answers are shown for reading; 64 slots compute them.
    answers = (500 * (3 + 1) + 64) * 220 * token
    alone = answers + 500 * pair * 480 / 700
    assert seconds[-1]["evaluation"] == pytest.approx(alone)
    assert seconds[0]["evaluation"] == pytest.approx(alone + 500 * pair + 2 * 1500 * pair)
    assert seconds[1]["evaluation"] == pytest.approx(alone + 500 * pair + 3 * 1500 * pair)
    assert seconds[0]["train"] == pytest.approx(speed["train"].seconds)


def test_the_control_and_the_start_are_trained():
    """Three forward passes of an example are a step's; the control takes as many steps as the iteration."""
    c = zephyr(selfplay__iterations=1, sft__epochs=2, sft__control=True, sft__batch_size=32)
    run = planned_run(c, "h200:1", compiles=False)
    chip, rates = chips.CHIPS["NVIDIA H200"], Rates()
    speed = speeds(run.job, chip, rates)
    seconds = phase_seconds(run.job, Work({0: Amounts(64, 0, 640)}, 320, 0, 0), chip, rates, speed)
    step = 3 * 32 * 480 / 700 * speed["score"].seconds / speed["score"].items
    assert seconds[-1]["sft"] == pytest.approx(10 * 2 * step)
    assert seconds[0]["control"] == pytest.approx(10 * step)
    shown = 64 * 220 * speed["sample"].seconds  # samples.jsonl, though there is no held-out prompt
    assert seconds[0]["evaluation"] == pytest.approx(shown)


def test_memory_of_a_host():
    """Four chips of 64, of which 32 share the weights: an eighth of them. Second moments wait there where offloaded."""
    run = planned_run(zephyr(train__offload=True), "v5e:8x8", compiles=False)
    assert run.topology.hosts == 16
    parts = sizes.host_memory(run.job, Work({}, 1000, 0, 0))
    shards = 32 * 2 if run.model.mesh.shape["tensor"] == 2 else 64
    assert parts["optimizer"] == pytest.approx(4 * 4 * P / shards)
    assert parts["checkpoint"] == pytest.approx(4 * 8 * P / shards)
    assert parts["loading"] == pytest.approx(4 * 4 * 32 * 4096 * 14336 / shards)  # the largest weight of all layers
    assert parts["export"] == 4 * GIB
    assert parts["examples"] == 240_000
    most = sum(parts[name] for name in ("process", "examples", "optimizer", "export"))
    assert parts["most"] == pytest.approx(most)


def test_a_reward_model_takes_memory_and_time(tiny_dir):
    """One on the hub counts as one as large as the model. It reads prompt and answer once."""
    without = planned(zephyr(selfplay__iterations=1), "h200:1")
    answer = planned(zephyr(selfplay__iterations=1, selfplay__scorer="owner/reward"), "h200:1")
    assert answer["phases"]["sample"]["parts_gib"]["reward model"] * GIB == 2 * P
    assert "reward model" not in without["phases"]["sample"]["parts_gib"]
    # 14.2 GFLOP a token without the head.
    judged = 50_500 * 400 * 14.2e9 / (989e12 * 0.45)
    assert answer["run"]["phases_s"]["judge"] == pytest.approx(judged, rel=0.03)
    loaded = answer["run"]["phases_s"]["load"] - without["run"]["phases_s"]["load"]
    assert loaded == pytest.approx(2 * P / 0.6e9)
    c = zephyr(selfplay__scorer=str(tiny_dir))
    run = planned_run(c, "h200:1", compiles=False)
    assert run.job.judge.hidden_size == SMALL["hidden_size"] == 32
    assert from_config.judge_architecture(zephyr(selfplay__scorer="module:function"), run.model) is None


def test_the_sampler_makes_room_for_the_reward_model():
    """On v5e 0.8 × 16 GiB hold a half of the copy and its cache; beside 6 GiB of a reward model they hold a quarter."""
    mesh = machine.planning_mesh(machine.parse_topology("v5e:8x8"), {"data": 1, "fsdp": 64, "context": 1, "tensor": 1})
    model = dataclasses.replace(planned_run(zephyr(), "v5e:8x8", compiles=False).model, mesh=mesh)
    # Float32 weights: 0.42 GiB a device. A copy and 16 caches of 512 tokens: 13.5 + 1 GiB.
    alone = placement.devices_per_copy(model, 16, 512)
    beside = placement.devices_per_copy(model, 16, 512, beside=64 * 6 * GIB)
    assert (alone, beside) == (2, 4)
