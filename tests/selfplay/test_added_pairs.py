"""Given preference pairs that join those of self-play."""

import itertools
import math
import runpy

import pytest
from dataset_rows import turn, write_jsonl
from etils import epath
from runs import ROOT, assert_same_run, read_metrics, read_pairs

from spin_jax import config, tiny
from spin_jax.errors import ConfigError
from spin_jax.selfplay import fingerprints
from spin_jax.selfplay.algorithm import PHASES, run
from spin_jax.selfplay.prepare import prepare

pytestmark = pytest.mark.usefixtures("one_device")


# The first 2 of 12 have prompts of held-out rows.
QUESTIONS = [*(row["question"] for row in tiny.problems()[30:32]), *(f"{n}*1" for n in range(10))]
PREFERENCES = [{"prompt": q, "chosen": [turn("assistant", "1")], "rejected": "20"} for q in QUESTIONS]


@pytest.fixture
def settings(tmp_path):
    """settings(**{"section.key": value}) → tiny.py:smoke on 30 prompts, and 6 held-out ones, with a share of 0.1."""

    def make(**keys):
        c = runpy.run_path(str(ROOT / "configs" / "tiny.py"))["get_config"]("smoke")
        c.data.path = write_jsonl(tmp_path / "train.jsonl", tiny.problems()[:30])
        c.eval.path = write_jsonl(tmp_path / "test.jsonl", tiny.problems()[30:36])
        pairs = write_jsonl(tmp_path / "preferences.jsonl", PREFERENCES)
        keys = {"selfplay.add_pairs": pairs, "selfplay.add_share": 0.1, "sft.control": False, **keys}
        keys = {"train.warmup_ratio": 0.0, "sft.warmup_ratio": 0.0, "train.batch_size": 16, "eval.kl": False, **keys}
        keys = {"logging.plot": False, "logging.tensorboard": False, "eval.fixed_prompts": 1, **keys}
        for name, value in keys.items():
            section, _, key = name.rpartition(".")
            (c[section] if section else c)[key] = value
        return c

    return make


def prepared(c):
    return prepare(config.resolve(c), None)


def test_iterations_of_different_sizes_take_turns(settings, tmp_path):
    """4 beside 36, then 2 beside 18: the second iteration goes on where the first one ended."""
    paths = [write_jsonl(tmp_path / f"{n}.jsonl", tiny.problems()[40:][:n]) for n in (36, 18)]
    found = prepared(settings(**{"data.path": ",".join(map(str, paths)), "selfplay.iterations": 2}))
    of_each = [questions(found.added_pairs(t)) for t in range(2)]
    assert list(map(len, of_each)) == [4, 2]
    assert len({*of_each[0], *of_each[1]}) == 6


def questions(pairs):
    return [pair.real_messages[0]["content"] for pair in pairs]


def test_a_share_of_the_pairs_by_hand(settings):
    """3 beside 30 are a tenth of 33; iterations take turns; a prompt that is held out is left out."""
    found = prepared(settings(**{"selfplay.iterations": 5}))
    of_each = [questions(found.added_pairs(t)) for t in range(5)]
    assert list(map(len, of_each)) == [3] * 5
    whole = list(itertools.chain(*of_each))
    assert set(whole[:10]) == {f"{n}*1" for n in range(10)}
    assert whole[10:] == whole[:5]  # from the beginning again
    assert [len(found.added_pairs(t)) for t in range(5)] == [3] * 5
    assert {pair.prompt_id for pair in found.added} == {*range(-12, 0)}  # −1 − the row
    assert "selfplay.add_pairs: 3 of 10 pairs join the 30 of an iteration" in found.notes
    assert "selfplay.add_pairs: 2 pairs are left out, because their prompts are held out" in found.notes
    (pair,) = [pair for pair in found.added if pair.prompt_id == -3]
    assert [m[-1]["content"] for m in (pair.real_messages, pair.generated_messages)] == ["1", "20"]
    assert questions([pair]) == ["0*1"]
    assert questions(prepared(settings(seed=1)).added_pairs(0)) != of_each[0]

    more = prepared(settings(**{"selfplay.add_share": 0.5}))  # 30 are asked for
    assert sorted(questions(more.added_pairs(0))) == sorted(questions(more.added_pairs(1))) == sorted({*whole})
    assert (
        "selfplay.add_pairs: 10 of 10 pairs join the 30 of an iteration, and selfplay.add_share asks for 30"
        in more.notes
    )
    many = prepared(settings(**{"selfplay.samples": 2}))
    assert len(many.added_pairs(0)) == 7  # 60/9 = 6.7


def test_another_share_or_content_is_another_run(settings, tmp_path):
    """The file may move. Without added pairs the fingerprints are those of before."""
    found, off = prepared(settings()), prepared(settings(**{"selfplay.add_pairs": None, "selfplay.add_share": None}))
    assert found.identity["fingerprints"].keys() - off.identity["fingerprints"].keys() == {"added pairs"}
    began = {"config": fingerprints.recorded(off.config), **off.identity}
    assert fingerprints.differences(found.config, found.identity, began).keys() == {"selfplay.add_share"}
    began = {"config": fingerprints.recorded(found.config), **found.identity}
    for count, different in ((12, set()), (11, {"fingerprints.added pairs"})):
        path = write_jsonl(tmp_path / f"{count}.jsonl", PREFERENCES[:count])
        now = prepared(settings(**{"selfplay.add_pairs": path}))
        assert fingerprints.differences(now.config, now.identity, began).keys() == different


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"selfplay.add_share": None}, r"add_pairs and selfplay\.add_share go together"),
        ({"selfplay.add_pairs": None}, r"add_pairs and selfplay\.add_share go together"),
        ({"selfplay.add_share": 1.0}, "above 0 and below 1"),
        ({"selfplay.add_share": 0.01}, r"add_share=0\.01 adds no pair to the 30 of iteration 0"),
        ({"loss.name": "tspin"}, "has an answer of the start, and these pairs have none"),
        ({"loss.name": "likelihood"}, "'likelihood' would read only the rejected answers"),
    ],
)
def test_what_cannot_be(keys, message, settings):
    with pytest.raises((ConfigError, ValueError), match=message):
        prepared(settings(**keys))


def test_all_prompts_held_out(settings, tmp_path):
    with pytest.raises(ValueError, match="the prompts of all its pairs are held out"):
        prepared(settings(**{"selfplay.add_pairs": write_jsonl(tmp_path / "held_out.jsonl", PREFERENCES[:2])}))


def test_rows_and_pairing_do_not_apply(settings):
    """They choose among sampled answers."""
    for name, value in (("rows", "right"), ("pairing", "right/wrong")):
        found = prepared(settings(**{f"selfplay.{name}": value, "selfplay.samples": 2}))
        assert found.pairing.pairs_of(found.added, epath.Path("added-00000-of-00001.parquet")) == (found.added, {})
        if name == "rows":
            assert found.pairing.pairs_of(found.added, epath.Path("train-00000-of-00001.parquet")) == ([], {})


def lengths(messages, answers):
    return [len(answer) for answer in answers]


def test_a_run_and_the_same_phase_by_phase(settings, tmp_path):
    """Two iterations: which pairs are scored and trained on, by whom, and to the bit the same in parts."""
    keys = {"selfplay.scorer": "test_added_pairs:lengths", "selfplay.mix_previous": 1}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    summary = run(settings(**keys), str(whole))
    found = prepared(settings(**keys))
    assert [row.get("pairs") for row in summary] == [None, 33, 66]
    assert [row.get("added_pairs") for row in summary] == [None, 3, 6]
    for t, sources in ((0, [0]), (1, [0, 1])):
        added = read_pairs(whole / f"iteration_{t}" / "added")
        assert [row["real"][0]["content"] for row in added] == questions(found.added_pairs(t))
        assert {row.get("score") for row in added} == {None}  # the logistic loss does not read it
        scores = read_pairs(whole / f"iteration_{t}" / "scores")
        keys_of = [(row["source_iteration"], row["prompt_id"]) for row in scores if row["prompt_id"] < 0]
        assert sorted(keys_of) == sorted((s, pair.prompt_id) for s in sources for pair in found.added_pairs(s))
        assert len(scores) == 33 * len(sources) + 6
        assert min(row["prompt_id"] for row in read_pairs(whole / f"iteration_{t}" / "pairs")) >= 0
        # Policy and opponent are equal in the first step, where all log-probs are right; float32 rounding apart.
        first = next(r for r in read_metrics(whole) if (r["phase"], r["iteration"]) == ("train", t))
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)

    for phase in (*PHASES, *PHASES):
        run(settings(**keys), str(parts), only=phase)
    run(settings(**keys), str(parts))
    assert_same_run(whole, parts)
    for t in (0, 1):
        assert read_pairs(whole / f"iteration_{t}" / "added") == read_pairs(parts / f"iteration_{t}" / "added")
