"""SPIN's relatives on its engine: what rows they train on, against what reference, from which weights."""

import json
import runpy
import shutil

import numpy as np
import pytest
from dataset_rows import write_jsonl
from runs import ROOT, assert_same_run, read_metrics, read_pairs, weights
from torch_reference import torch_greedy, torch_score

from spin_jax import config as config_lib
from spin_jax import errors, tiny
from spin_jax.selfplay.algorithm import PHASES, run
from spin_jax.selfplay.prepare import prepare

ALGORITHMS = runpy.run_path(str(ROOT / "configs" / "algorithms.py"))


pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def settings(tmp_path_factory, one_device):
    """settings(algorithm, **{"section.key": value}) → the config over tiny.py:smoke, from one start."""
    base = ALGORITHMS["get_config"]("spin/tiny:smoke")
    base.update({"sft": {"control": False}, "selfplay": {"iterations": 0}, "eval": {"kl": False}})
    start = tmp_path_factory.mktemp("start")
    run(base, str(start))

    def make(algorithm="spin", **keys):
        c = ALGORITHMS["get_config"](f"{algorithm}/tiny:smoke")
        keys = {"data.limit": 80, "train.batch_size": 16, "eval.kl": False, "eval.verifier": "exact", **keys}
        keys = {"logging.plot": False, "logging.tensorboard": False, "eval.fixed_prompts": 1, **keys}
        keys = {"sft.control": False, "sft.epochs": 0, "model.path": str(start / "start" / "model"), **keys}
        for key, value in keys.items():
            section, _, last = key.partition(".")
            c[section][last] = value
        return c

    return make


def even(reference, answer):
    """A verifier that an untrained model's answers pass now and then."""
    return len(answer) % 2 == 0


def lengths(messages, answers):
    """A scorer."""
    assert messages[-1]["role"] == "assistant"
    return [len(answer) / 10 for answer in answers]


def scores_of(workdir, t):
    return read_pairs(workdir / f"iteration_{t}" / "scores")


def first_step(workdir, t):
    return next(row for row in read_metrics(workdir) if (row["phase"], row["iteration"]) == ("train", t))


# --- one engine ----------------------------------------------------------------------------------

RELATIVES = {
    "alpha_spin": {},
    "fictitious_spin": {
        "selfplay.iterations": 3,
        "selfplay.mix_previous": 0,
        "selfplay.samples": 2,
        "selfplay.pairing": "human/worst",
        "selfplay.scorer": "test_algorithms:lengths",
    },
    # In the last iteration the weights stay what they are.
    "ema_spin": {
        "selfplay.iterations": 3,
        "selfplay.mix_previous": 0,
        "sampling.temperature": 0.0,
        "train.learning_rate": (1e-3, 1e-3, 1e-30),
    },
    "tspin": {},
    "rest_em": {"eval.verifier": "test_algorithms:even"},
    "sppo": {"selfplay.scorer": "test_algorithms:lengths"},
    "dno": {"selfplay.scorer": "test_algorithms:lengths", "selfplay.mix_previous": 1},
    "xpo": {"selfplay.scorer": "test_algorithms:lengths", "selfplay.samples": 2},
}


@pytest.fixture(scope="module")
def runs(settings, tmp_path_factory):
    """{algorithm: workdir} of two iterations each, which are run when they are first asked for."""

    class Made(dict):
        def __missing__(self, name):
            self[name] = tmp_path_factory.mktemp(name)
            run(settings(name, **RELATIVES[name]), str(self[name]))
            return self[name]

    return Made()


def test_all_opponents_so_far_score(runs):
    folder = runs["fictitious_spin"] / "iteration_2" / "scores"
    names = {path.name for path in folder.glob("*train*")}
    assert names == {f"{by}iteration_2-train-00000-of-00001.parquet" for by in ("", "opponent_1-", "start-")}


def test_what_pairing_made_is_told_once_for_all_references(runs, settings, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(runs["fictitious_spin"], workdir)
    shutil.rmtree(workdir / "iteration_2" / "scores")
    summary = json.loads((workdir / "summary.json").read_text())
    (workdir / "summary.json").write_text(json.dumps([row for row in summary if row["iteration"] < 2]))
    capsys.readouterr()
    run(settings("fictitious_spin", **RELATIVES["fictitious_spin"]), str(workdir), only="score")
    said = [line for line in capsys.readouterr().out.splitlines() if "selfplay.pairing=human/worst makes" in line]
    assert said == ["iteration 2: score: selfplay.pairing=human/worst makes 72 pairs of the answers to 72 prompts"]
    scores = [row for row in read_metrics(workdir) if (row["phase"], row["iteration"]) == ("score", 2)]
    assert {row.get("reference") for row in scores} == {None, 0, 1}
    assert sum(row.get("prompts", 0) for row in scores) == 72


def test_the_opponent_of_ema_spin_is_an_average_of_weights(runs, settings):
    """It answers and scores as transformers does with that average; training goes on from the trained weights.

    The average is updated as TRL's SyncRefModelCallback does it. Log-probs are sums of float32 numbers.
    """
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    workdir = runs["ema_spin"]
    exports = [settings().model.path, *(workdir / f"iteration_{t}" / "model" for t in (0, 1))]
    average, *trained = map(AutoModelForCausalLM.from_pretrained, exports)
    for model in trained:
        for target, source in zip(average.parameters(), model.parameters(), strict=True):
            with torch.no_grad():
                target.mul_(1 - 0.5).add_(source, alpha=0.5)
    scores = {row["prompt_id"]: row for row in scores_of(workdir, 2)}
    pairs = read_pairs(workdir / "iteration_2" / "pairs")[:8]
    for pair in pairs:
        prompt = pair["prompt_tokens"]
        assert torch_greedy(average, prompt, len(pair["generated_tokens"]), [2]) == pair["generated_tokens"]
        for name in ("real", "generated"):
            ours = scores[pair["prompt_id"]][f"{name}_logp"]
            assert ours == pytest.approx(torch_score(average, prompt, pair[f"{name}_tokens"]), abs=1e-4)
            assert abs(ours - torch_score(trained[-1], prompt, pair[f"{name}_tokens"])) > 1e-3
    assert first_step(workdir, 0)["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert abs(first_step(workdir, 2)["loss"] - np.log(2)) > 1e-3
    before, after = (weights(workdir / f"iteration_{t}" / "model") for t in (1, 2))
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])


@pytest.mark.parametrize("name", RELATIVES)
def test_phase_by_phase(name, runs, settings, tmp_path):
    """Each phase by itself comes to the same, to the bit: what it needs of others is on disk."""
    for _ in range(2):
        for phase in PHASES:
            run(settings(name, **RELATIVES[name]), str(tmp_path), only=phase)
    run(settings(name, **RELATIVES[name]), str(tmp_path))
    assert_same_run(runs[name], tmp_path)


def test_rest_em_trains_on_what_the_verifier_takes(runs):
    """K answers a prompt with their verdicts; likelihood of the right ones; each time from the start."""
    workdir = runs["rest_em"]
    summary = json.loads((workdir / "summary.json").read_text())
    for t in (0, 1):
        pairs = read_pairs(workdir / f"iteration_{t}" / "pairs")
        train = [
            row for path in sorted((workdir / f"iteration_{t}" / "pairs").glob("train*")) for row in files_rows(path)
        ]
        assert {row["sample_id"] for row in train} == {0, 1}
        answers = {row["prompt_id"]: [] for row in train}
        for row in train:
            answers[row["prompt_id"]].append(tuple(row["generated_tokens"]))
        assert any(len(set(of)) > 1 for of in answers.values())  # drawn apart
        for row in pairs:
            text = row["generated"][-1]["content"]
            assert row["score"] == float(even(None, text))
        right = {(row["prompt_id"], row["sample_id"]) for row in train if row["score"] == 1}
        held_out = {(row["prompt_id"], row["sample_id"]) for row in pairs if row not in train}
        scored = {(row["prompt_id"], row["sample_id"]) for row in scores_of(workdir, t)}
        assert scored == right | held_out
        assert 0 < len(right) < len(train)
        assert summary[t + 1]["pairs"] == sum(row["score"] == 1 for row in train)
        step = first_step(workdir, t)
        assert step["loss"] == pytest.approx(-step["generated_logp"], rel=1e-6)
        assert "margin" not in step
    assert first_step(workdir, 0)["generated_reward"] == pytest.approx(0, abs=1e-4)
    assert abs(first_step(workdir, 1)["generated_reward"]) > 1e-4  # the opponent is not what is trained


def files_rows(path):
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pylist()


def test_alpha_spin_mixes_references(runs, settings, tmp_path):
    """The reference's log-probs are half the opponent's, half the start's, which are those of iteration 0."""
    workdir = runs["alpha_spin"]
    names = {path.name for path in (workdir / "iteration_1" / "scores").iterdir()}
    own = {name for name in names if not name.startswith("start-")}
    assert names == own | {f"start-{name}" for name in own}
    assert not list((workdir / "iteration_0" / "scores").glob("start-*"))

    def by_id(folder, name):
        return {(r["prompt_id"], r["sample_id"]): r for r in files_rows(folder / name)}

    name = next(name for name in own if name.startswith("iteration_0-train"))
    folder = workdir / "iteration_1" / "scores"
    before, start = by_id(workdir / "iteration_0" / "scores", name), by_id(folder, f"start-{name}")
    opponent = by_id(folder, name)
    assert start.keys() == before.keys()
    for key, row in start.items():  # the start was the opponent of iteration 0
        assert row["real_logp"] == pytest.approx(before[key]["real_logp"], abs=1e-4)
    held_out = {(r["prompt_id"], r["sample_id"]): r for r in files_rows(workdir / "iteration_1" / "held_out.parquet")}
    (test,) = (path for path in folder.glob("iteration_1-test*"))
    opponent, start = by_id(folder, test.name), by_id(folder, f"start-{test.name}")
    for key, row in held_out.items():
        for role in ("real", "generated"):
            mixed = (opponent[key][f"{role}_logp"] + start[key][f"{role}_logp"]) / 2
            assert row[f"{role}_reference"] == pytest.approx(mixed, abs=1e-4)
        reward = 10 * (row["real_logp"] - row["real_reference"])
        assert row["real_reward"] == pytest.approx(reward, abs=1e-3)


def test_tspin_sees_what_the_start_answered(runs):
    workdir = runs["tspin"]
    for t in (0, 1):
        assert all("start_logp" in row for row in scores_of(workdir, t))
    first = {(r["prompt_id"], r["source_iteration"]): r for r in scores_of(workdir, 0)}
    assert all(row["start_logp"] == pytest.approx(row["generated_logp"], abs=1e-4) for row in first.values())
    later = scores_of(workdir, 1)
    assert any(abs(row["start_logp"] - row["generated_logp"]) > 0.1 for row in later)
    same = [row for row in later if row["source_iteration"] == 0]
    assert all(row["start_logp"] == pytest.approx(row["generated_logp"], abs=1e-4) for row in same)


def test_sppo_gets_the_scores(runs):
    """At its start the log-ratio is 0 and the loss the mean of ((P − ½)/β)², of what the scorer gave."""
    workdir = runs["sppo"]
    pairs = read_pairs(workdir / "iteration_0" / "pairs")
    assert all(row["score"] == pytest.approx(len(row["generated"][-1]["content"]) / 10) for row in pairs)
    row = next(r for r in read_metrics(workdir) if (r["phase"], r["iteration"]) == ("train", 0))
    losses = [((row["score"] - 0.5) / 0.25) ** 2 for row in pairs]
    assert min(losses) <= row["loss"] <= max(losses)
    held_out = files_rows(workdir / "iteration_0" / "held_out.parquet")
    assert {row["sample_id"] for row in held_out} == {0, 1}  # who compares answers, compares these as well
    scores = {(row["prompt_id"], row["sample_id"]): row["score"] for row in pairs}
    for row in held_out:
        wanted = (scores[row["prompt_id"], row["sample_id"]] - 0.5) / 0.25
        gap = row["generated_logp"] - row["generated_reference"] - wanted
        assert row["loss"] == pytest.approx(gap**2, rel=1e-3, abs=1e-3)


def test_dno_trains_on_the_best_and_the_worst(runs, settings):
    """The highest score of all answers and the lowest of sampled ones; log-probs of both are those of transformers."""
    workdir, summary = runs["dno"], json.loads((runs["dno"] / "summary.json").read_text())
    made = {}
    for t in (0, 1):
        expected, train, asked = {}, {}, {}
        for path in sorted((workdir / f"iteration_{t}" / "pairs").glob("train*")):
            for row in files_rows(path):
                train.setdefault(row["prompt_id"], []).append(row)
        for prompt_id, rows in train.items():
            texts = [row["generated"][-1]["content"] for row in rows]
            scores = [len(text) / 10 for text in texts]
            human = len(rows[0]["real"][-1]["content"]) / 10
            assert [(row["score"], row["real_score"]) for row in rows] == [(score, human) for score in scores]
            best = -1 if human >= max(scores) else scores.index(max(scores))
            asked[prompt_id] = rows
            if max(human, *scores) > min(scores):
                expected[prompt_id] = scores.index(min(scores)), best
        made[t] = expected, asked
        assert len({best for _, best in expected.values()}) > 1  # human answers are the best ones, and others are
        assert len(expected) > 8
    for t, sources in ((0, (0,)), (1, (0, 1))):
        scored = {}
        for path in (workdir / f"iteration_{t}" / "scores").glob("*-train*"):
            scored |= {(r["source_iteration"], r["prompt_id"]): r for r in files_rows(path)}
        found = {key: (row["sample_id"], row.get("chosen_id", -1)) for key, row in scored.items()}
        assert found == {(s, p): pair for s in sources for p, pair in made[s][0].items()}
        assert summary[t + 1]["pairs"] == len(found)
        held_out = files_rows(workdir / f"iteration_{t}" / "held_out.parquet")
        assert {row["sample_id"] for row in held_out} == {0, 1, 2, 3}  # a human answer and a sampled one, each
        assert first_step(workdir, t)["loss"] == pytest.approx(np.log(2), abs=1e-3)
    rows = [row for row in read_metrics(workdir) if row["phase"] == "score" and row["iteration"] == 0]
    assert sum(row.get("prompts", 0) for row in rows) == len(made[0][1])
    assert sum(row.get("ties", 0) for row in rows) == len(made[0][1]) - len(made[0][0])

    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(settings().model.path)
    sampled = [(p, worst, best) for p, (worst, best) in made[0][0].items() if best >= 0][:5]
    for prompt_id, worst, best in sampled:
        answers = made[0][1][prompt_id]
        scores = [row for row in scores_of(workdir, 0) if row["prompt_id"] == prompt_id]
        for name, place in (("real_logp", best), ("generated_logp", worst)):
            prompt, answer = answers[place]["prompt_tokens"], answers[place]["generated_tokens"]
            with torch.no_grad():
                logps = torch.log_softmax(model(torch.tensor([prompt + answer])).logits[0].float(), -1)
            total = sum(float(logps[len(prompt) - 1 + n, token]) for n, token in enumerate(answer))
            assert scores[0][name] == pytest.approx(total, abs=1e-4)


def test_given_answers_are_paired_as_in_the_run_that_sampled_them(runs, settings, tmp_path):
    """In whatever order they come; scores that are given are not asked for again, and the log-probs are the same."""
    path, workdir = tmp_path / "pairs.jsonl", runs["dno"]
    rows = sorted(read_pairs(workdir / "iteration_0" / "pairs"), key=lambda row: (row["sample_id"], row["prompt_id"]))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"selfplay.pairs": str(path), "selfplay.scorer": "test_algorithms:broken", "selfplay.iterations": 1}
    keys |= {"sampling.shard_size": 16}  # several files, none of which has all answers to its prompts in that order
    for phase in ("sample", "score"):
        run(settings("dno", **keys), str(tmp_path / "run"), only=phase)
    assert len(list((tmp_path / "run" / "iteration_0" / "pairs").iterdir())) == 6

    def scores(folder):
        keys = ("prompt_id", "sample_id", "chosen_id")
        return {tuple(row.get(key, -1) for key in keys): row for row in read_pairs(folder / "iteration_0" / "scores")}

    ours, theirs = scores(tmp_path / "run"), scores(workdir)
    assert ours.keys() == theirs.keys()
    for key, row in theirs.items():  # other rows stand beside each other in a micro-batch: float32 rounding
        for name in ("real_logp", "generated_logp"):
            assert ours[key][name] == pytest.approx(row[name], abs=1e-4)


def test_answers_to_two_prompts_under_one_id(settings, tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"1+2+{n}", "chosen": str(3 + n), "rejected": "9", "prompt_id": 5} for n in (1, 2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"selfplay.pairs": str(path), "selfplay.scorer": "test_algorithms:lengths"}
    with pytest.raises(ValueError, match=r"iteration 0 with prompt_id 5 have .* give each prompt its own prompt_id"):
        run(settings("dno", **keys), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_xpo_adds_what_the_start_answers(runs):
    """Rows of the best and the worst, with the start's answer that has the worst one's sample_id."""
    workdir = runs["xpo"]
    answers = {(r["prompt_id"], r["sample_id"]): r for r in read_pairs(workdir / "iteration_0" / "pairs")}
    later = {(r["prompt_id"], r["sample_id"]): r for r in read_pairs(workdir / "iteration_1" / "pairs")}
    names = {path.name for path in (workdir / "iteration_1" / "scores").iterdir()}
    assert all(name.startswith("start-") for name in names)  # the reference is the start alone
    rows = [row for row in scores_of(workdir, 1) if row["source_iteration"] == 1 and row.get("chosen_id", -1) >= 0]
    assert rows
    same = 0
    for row in rows:
        key = row["prompt_id"], row["sample_id"]
        if answers[key]["generated_tokens"] == later[key]["generated_tokens"]:
            same += 1
            assert row["start_logp"] == pytest.approx(row["generated_logp"], abs=1e-4)
    assert same < len(rows)  # some of the answers have changed since
    step = first_step(workdir, 0)
    assert step["loss"] == pytest.approx(np.log(2) + 1e-5 * step["start_logp"], abs=1e-6)


def test_a_fixed_reference_is_the_start(settings, tmp_path):
    """loss.reference_alpha=0: nobody scores by the opponent after the first iteration."""
    run(settings(**{"loss.reference_alpha": 0.0, "selfplay.mix_previous": 0}), str(tmp_path))
    names = [path.name for path in (tmp_path / "iteration_1" / "scores").iterdir()]
    assert names
    assert all(name.startswith("start-") for name in names)
    assert first_step(tmp_path, 0)["real_reward"] == pytest.approx(0, abs=1e-3)
    assert abs(first_step(tmp_path, 1)["real_reward"]) > 1e-3


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"selfplay.rows": "right", "eval.verifier": None}, "selfplay.rows='right' needs eval.verifier"),
        ({"selfplay.rows": "some"}, "selfplay.rows='some': one of all, right, wrong"),
        ({"selfplay.rows": "right", "selfplay.scorer": "a:b"}, "both judge answers"),
        (
            {"selfplay.scorer": "exact"},
            "selfplay.scorer='exact', as a reward model: reward model path 'exact' is no directory here",
        ),
        (
            {"loss.name": "likelihood", "selfplay.pairing": "right/wrong", "selfplay.samples": 2},
            "'likelihood' reads one answer of a row, which with selfplay.pairing='right/wrong' is the rejected one",
        ),
        ({"selfplay.pairing": "test_algorithms:absent"}, "'test_algorithms:absent' cannot be imported"),
        ({"loss.name": "sppo"}, "'sppo' takes a score: set selfplay.scorer"),
        ({"loss.name": "likelihood", "loss.nll_weight": 1.0}, "rows with a human answer"),
        ({"loss.answers": "real"}, "loss.answers='real': generated"),
        ({"loss.answers": "real,generated,final"}, "loss.answers"),
        ({"loss.options": "alpha"}, "loss.options='alpha': numbers by name"),
        ({"loss.options": "alpha=1"}, r"has no option alpha .*it has none"),
        ({"loss.name": "tspin", "loss.options": "alhpa=1"}, r"has no option alhpa .*there are alpha"),
        ({"loss.reference_alpha": 1.5}, "loss.reference_alpha=1.5"),
        (
            {"loss.answers": "generated"},
            "'logistic': it wants real, generated, and loss.answers='generated' leaves",
        ),
        ({"loss.name": "tspin", "loss.options": "alpha=nan"}, "loss.options='alpha=nan': numbers"),
        ({"loss.name": "likelihood", "checkpoint.best": "margin"}, "checkpoint.best='margin': rows of loss"),
        ({"selfplay.restart": True, "selfplay.start": 1}, "selfplay.restart trains the start anew"),
        ({"loss.reference_alpha": 0.5, "selfplay.start": 1}, "loss.reference_alpha needs the start"),
        ({"loss.reference_decay": 0.5, "selfplay.start": 1}, "loss.reference_decay needs the start"),
        ({"selfplay.opponent_decay": 0.5, "selfplay.start": 1}, "selfplay.opponent_decay needs the start"),
        ({"selfplay.opponent_decay": 1.0}, "selfplay.opponent_decay=1.0: at least 0 and below 1"),
        (
            {"loss.name": "tspin", "selfplay.start": 1},
            "which after selfplay.start selfplay.pairs=0=PATH gives",
        ),
        ({"data.path": "a,b,c", "selfplay.iterations": 4}, "data.path has 3 datasets for 4 iterations"),
        (
            {"loss.name": "tspin", "data.path": "spin_jax.tiny:problems,test_algorithms:others"},
            "loss.answers has the role start",
        ),
    ],
)
def test_what_cannot_be(keys, message, settings, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(settings(**keys), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_pairing_that_makes_no_pair(settings, tmp_path):
    keys = {"selfplay.pairing": "right/wrong", "selfplay.samples": 2, "eval.verifier": "exact"}
    message = (
        r"iteration 0: .*right/wrong makes 0 pairs of .* 72 prompts; no pair of 72 where no answer is right\. More"
    )
    with pytest.raises(errors.NothingToTrainOn, match=message):
        run(settings(**keys), str(tmp_path))


ASKED = []


def restless(messages, answers, scores):
    """A pairing function that rejects the first answer to each of the 72 prompts, and when asked again the second."""
    ASKED.append(messages)
    return [(-1, 0 if len(ASKED) <= 72 else 1)]


def test_a_pairing_that_changes(settings, tmp_path):
    keys = {"selfplay.pairing": "test_algorithms:restless", "selfplay.samples": 2}
    with pytest.raises(errors.MissingInput, match=r"as chosen and 1 as rejected\. selfplay\.pairing has to"):
        run(settings(**keys), str(tmp_path))


def test_nothing_right(settings, tmp_path):
    keys = {"selfplay.rows": "right", "eval.verifier": "exact"}
    with pytest.raises(errors.NothingToTrainOn, match="iteration 0: no answer is right"):
        run(settings(**keys), str(tmp_path))


EASY = [False]


def easy(reference, answer):
    return EASY[0]


def mostly(reference, answer):
    return EASY[0] and not reference.endswith("3")


@pytest.mark.parametrize(
    ("verifier", "why"),
    [("easy", "no answer is wrong"), ("mostly", "train: the learning rate is 0 in the only optimizer step")],
)
def test_nothing_left_to_learn_from(verifier, why, settings, tmp_path, monkeypatch):
    """A model that errs no more, or hardly, ends self-play on mistakes as a run that is done."""
    keys = {"selfplay.rows": "wrong", "eval.verifier": f"test_algorithms:{verifier}", "selfplay.mix_previous": 0}
    keys["train.warmup_ratio"] = 0.1
    for phase in PHASES:
        run(settings(**keys), str(tmp_path), only=phase)
    monkeypatch.setattr("test_algorithms.EASY", [True])
    for _ in range(2):
        rows = run(settings(**keys), str(tmp_path))
        assert [row["iteration"] for row in rows] == [-1, 0]
        assert rows[-1]["final"]
        assert f"iteration 1: {why}" in rows[-1]["stopped"]


def nonsense(messages, answers):
    return [float("nan")] * len(answers)


def broken(messages, answers):
    raise KeyError("no such server")


def late(messages, answers):
    """A scorer that serves until its second prompt."""
    ASKED.append(messages)
    return [0.5 / (len(ASKED) < 3)] * len(answers)


@pytest.mark.parametrize(("scorer", "said"), [("nonsense", "a finite number for each"), ("broken", "KeyError")])
def test_a_scorer_that_fails_is_found_before_the_run(scorer, said, settings, tmp_path):
    keys = {"selfplay.scorer": f"test_algorithms:{scorer}"}
    with pytest.raises(errors.ConfigError, match=f"copies of a human answer .*prompt_id .*{said}"):
        run(settings("sppo", **keys), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_scorer_that_fails_on_the_way(settings, tmp_path):
    ASKED.clear()
    with pytest.raises(errors.JudgeFailed, match=r"prompt_id .* ZeroDivisionError"):
        run(settings("sppo", **{"selfplay.scorer": "test_algorithms:late"}), str(tmp_path))


def test_the_starts_answers_are_found_by_prompt(settings, runs, tmp_path):
    """Given pairs number their prompts as they like."""
    rows, path = read_pairs(runs["tspin"] / "iteration_1" / "pairs")[40:20:-1], tmp_path / "pairs.jsonl"
    columns = ("real", "generated", "prompt_tokens", "real_tokens", "generated_tokens")
    path.write_text("".join(json.dumps({name: row[name] for name in columns}) + "\n" for row in rows))
    keys = {"selfplay.pairs": f"1={path}", "selfplay.mix_previous": 0}
    run(settings("tspin", **keys), str(tmp_path / "run"), only="sample")
    for phase in ("score", "train", "sample", "score"):
        run(settings("tspin", **keys), str(tmp_path / "run"), only=phase)
    found = {row["prompt_id"]: row["start_logp"] for row in scores_of(tmp_path / "run", 1)}
    theirs = {r["prompt_id"]: r["start_logp"] for r in scores_of(runs["tspin"], 1) if r["source_iteration"] == 1}
    assert len(found) == len(rows)
    for number, row in enumerate(rows):
        assert found[number] == pytest.approx(theirs[row["prompt_id"]], abs=1e-4)


def test_prompts_that_the_start_does_not_answer(settings, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "3*3*3", "chosen": "27", "rejected": "9"}) + "\n")
    with pytest.raises(ValueError, match="the start does not answer the prompt with prompt_id 0 of iteration 1"):
        run(settings("tspin", **{"selfplay.pairs": f"1={path}"}), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_more_answers_than_the_start_gives(settings, tmp_path):
    """The start answers each prompt as often as selfplay.samples says, and later pairs may have more answers."""
    row = {"prompt": tiny.problems()[0]["question"], "chosen": "27", "prompt_id": 3}
    rows = [{**row, "rejected": "9" * (n + 1)} for n in range(4)]
    path = write_jsonl(tmp_path / "four.jsonl", rows)
    keys = {"selfplay.pairs": f"1={path}", "selfplay.iterations": 2, "data.limit": None}
    message = "prompt with prompt_id 3 of iteration 1 under sample_id 1, .*selfplay.samples"
    with pytest.raises(ValueError, match=message):
        prepare(config_lib.resolve(settings("tspin", **keys)), None)
    prepare(config_lib.resolve(settings("tspin", **keys, **{"selfplay.samples": 4})), None)


# --- preferences ---------------------------------------------------------------------------------


def test_preferences_are_pairs(settings, tmp_path):
    """The forms that TRL documents, whole or with the prompt apart, are the same pairs."""
    asked, good, bad = (
        {"role": r, "content": c} for r, c in (("user", "1+2+3"), ("assistant", "6"), ("assistant", "7"))
    )
    forms = {
        "pairs": {"real": [asked, good], "generated": [asked, bad]},
        "whole": {"chosen": [asked, good], "rejected": [asked, bad]},
        "both": {"prompt": "1+2+3", "chosen": [asked, good], "rejected": [asked, bad]},
        "messages": {"prompt": [asked], "chosen": [good], "rejected": [bad]},
        "text": {"prompt": "1+2+3", "chosen": "6", "rejected": "7"},
    }
    found = {}
    for name, row in forms.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text((json.dumps(row) + "\n") * 12)
        c = settings("dpo", **{"selfplay.pairs": str(path), "data.path": None, "eval.limit": 0})
        found[name] = prepare(config_lib.resolve(c), None).given[0]
    for pairs in found.values():
        assert len(pairs) == 12
        for pair, other in zip(pairs, found["pairs"], strict=True):
            assert pair.real_messages == other.real_messages
            assert pair.generated_messages == other.generated_messages
            np.testing.assert_array_equal(pair.generated, other.generated)


def test_a_preference_without_its_prompt(settings, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"chosen": "6", "rejected": "7"}) + "\n")
    with pytest.raises(ValueError, match=r"pairs.jsonl.*1: chosen is text, and there is no field prompt"):
        run(settings("dpo", **{"selfplay.pairs": str(path)}), str(tmp_path / "run"))


def test_given_scores(settings, tmp_path, runs):
    """Prompts whose pairs bring their scores keep them; the others are judged here."""
    rows = read_pairs(runs["sppo"] / "iteration_0" / "pairs")
    rows = [
        {
            "real": r["real"],
            "generated": r["generated"],
            "prompt_id": r["prompt_id"],
            "sample_id": r["sample_id"],
            **({"score": 0.75} if r["prompt_id"] % 2 else {}),
        }
        for r in rows
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {
        "selfplay.pairs": str(path),
        "selfplay.scorer": "test_algorithms:lengths",
        "selfplay.iterations": 1,
    }
    run(settings("sppo", **keys), str(tmp_path / "run"), only="sample")
    stored = {(r["prompt_id"], r["sample_id"]): r for r in read_pairs(tmp_path / "run" / "iteration_0" / "pairs")}
    kept = [row for row in rows if (row["prompt_id"], row["sample_id"]) in stored]  # but for empty answers
    assert len(kept) > len(rows) / 2
    for row in kept:
        pair = stored[row["prompt_id"], row["sample_id"]]
        own = len(pair["generated"][-1]["content"]) / 10
        assert pair["score"] == pytest.approx(row.get("score", own))


# --- data that changes ---------------------------------------------------------------------------


def sums():
    return [{"question": f"{a}+{b}", "answer": str(a + b)} for a in range(8) for b in range(8)]


def others():
    """Some of the same prompts, and new ones."""
    return [
        *sums()[:32],
        *({"question": f"{a}*{b}", "answer": str(a * b)} for a in range(8) for b in range(8)),
    ]


def test_a_dataset_an_iteration(settings, tmp_path):
    """Prompts of each iteration are its dataset's; held-out rows are the first's, and in no other."""
    path = "test_algorithms:sums,test_algorithms:others"
    keys = {"data.path": path, "data.limit": None, "selfplay.mix_previous": 0}
    run(settings(**keys), str(tmp_path))

    def asked(kind, t):
        paths = sorted((tmp_path / f"iteration_{t}" / "pairs").glob(f"{kind}*"))
        return {row["real"][0]["content"]: row["prompt_id"] for path in paths for row in files_rows(path)}

    held_out = set(asked("test", 0))
    assert len(held_out) == 6
    assert set(asked("test", 1)) == held_out
    assert set(asked("train", 0)) == {row["question"] for row in sums()} - held_out
    assert set(asked("train", 1)) == {row["question"] for row in others()} - held_out
    ids = [*asked("train", 0).values(), *asked("train", 1).values(), *asked("test", 0).values()]
    assert len(set(ids)) == len(ids)
    recorded = json.loads((tmp_path / "config.json").read_text())
    assert {"data", "data 1"} <= recorded["fingerprints"].keys()


def test_a_dataset_that_comes_later(settings, tmp_path):
    """A run on one dataset goes on with another; one that has been used cannot change."""
    keys = {"data.path": "test_algorithms:sums", "data.limit": None, "selfplay.iterations": 1}
    run(settings(**keys), str(tmp_path))
    before = weights(tmp_path / "iteration_0" / "model")
    two = {"data.path": "test_algorithms:sums,test_algorithms:others", "selfplay.iterations": 2}
    run(settings(**{**keys, **two}), str(tmp_path))
    after = weights(tmp_path / "iteration_0" / "model")
    assert all(np.array_equal(before[name], after[name]) for name in before)
    swapped = {**two, "selfplay.iterations": 3, "data.path": ",".join(["test_algorithms:sums"] * 3)}
    with pytest.raises(ValueError, match=r"fingerprints\.data 1 is"):
        run(settings(**{**keys, **swapped}), str(tmp_path))
    with pytest.raises(ValueError, match=r"fingerprints\.data is"):
        run(
            settings(**{**keys, **two, "data.path": "test_algorithms:others,test_algorithms:others"}),
            str(tmp_path),
        )


# --- configs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALGORITHMS["ALGORITHMS"])
def test_each_is_a_config(name):
    for base in ("", "/tiny:smoke", "/zephyr"):
        c = ALGORITHMS["get_config"](name + base)
        if base == "/zephyr":
            c.eval.verifier, c.selfplay.scorer = ("gsm8k", None) if name == "rest_em" else (None, "some:scorer")
        resolved = config_lib.resolve(c)
        for key, value in ALGORITHMS["ALGORITHMS"][name].items():
            section, _, last = key.partition(".")
            assert base != "/zephyr" or resolved[section][last] == value


def test_a_config_that_is_none():
    with pytest.raises(ValueError, match="spin, hinge"):
        ALGORITHMS["get_config"]("spinn")
