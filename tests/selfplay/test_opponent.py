"""Files of answers: given pairs are judged file by file, and log-probs of answers that are lost do not stay."""

import runpy
import types

import pytest
import reward_models
from dataset_rows import write_jsonl
from runs import ROOT, read_pairs

from spin_jax import config as config_lib
from spin_jax.errors import Interrupted
from spin_jax.selfplay.opponent import Opponent
from spin_jax.selfplay.prepare import prepare

pytestmark = pytest.mark.usefixtures("one_device")

ASKED = []


def lengths(messages, answers):
    ASKED.append((messages[0]["content"], answers))
    return [float(len(answer)) for answer in answers]


@pytest.fixture
def opponent(tmp_path):
    """opponent(workdir, rows, stops, **{"section.key": value}) → an Opponent that is given pairs, four in a file.

    `stops` says for each call of `stop_if_asked` whether the run ends there.
    """

    def make(workdir, rows, stops=(), **keys):
        c = runpy.run_path(str(ROOT / "configs" / "tiny.py"))["get_config"]("smoke")
        path = write_jsonl(tmp_path / "pairs.jsonl", rows)
        keys = {"selfplay.pairs": path, "selfplay.iterations": 1, "eval.limit": 0, "sampling.shard_size": 4, **keys}
        keys = {"lengths.max_prompt": 250, "lengths.max_length": 300, "data.path": None, "sft.control": False, **keys}
        keys = {"train.warmup_ratio": 0.0, "sft.epochs": 1, "sft.warmup_ratio": 0.0, **keys}
        for name, value in keys.items():
            section, _, key = name.partition(".")
            c[section][key] = value
        answers = iter([*stops, *[False] * 100])

        def stop_if_asked():
            if next(answers):
                raise Interrupted(15)

        ASKED.clear()
        run = prepare(config_lib.resolve(c), str(workdir))
        return Opponent(run, types.SimpleNamespace(stop_if_asked=stop_if_asked), None, None)

    return make


def preferences(*prompts):
    """A pair for each (number, letters of the prompt); the rejected answer has one letter more than the number."""
    return [{"prompt": f"{n}" + "x" * long, "chosen": "yes", "rejected": "n" * (n + 1)} for n, long in prompts]


def test_a_run_that_continues_gets_the_same_scores_of_a_reward_model(opponent, tmp_path):
    """In bfloat16 the length of the rows shows in the numbers: it may not depend on the files that are there."""
    reward_models.write(tmp_path / "model", "llama")
    rows = preferences(*enumerate([200, 150, 5, 170, 7, 3, 11, 5, 140, 9, 9, 1]))
    keys = {"selfplay.scorer": str(tmp_path / "model"), "loss.name": "sppo", "model.dtype": "bfloat16"}
    opponent(tmp_path / "whole", rows, **keys)._write_given(0)
    for number in range(3):
        with pytest.raises(Interrupted):
            opponent(tmp_path / "parts", rows, [True], **keys)._write_given(0)
        assert len(list((tmp_path / "parts" / "iteration_0" / "pairs").iterdir())) == number + 1
    whole, parts = (read_pairs(tmp_path / name / "iteration_0" / "pairs") for name in ("whole", "parts"))
    assert len({row["score"] for row in whole}) == 12
    assert whole == parts


def test_answers_to_a_prompt_are_judged_together_and_a_file_at_a_time(opponent, tmp_path):
    """With the first file that has one of them. A prompt that brings its scores is left alone."""
    rows = [{**row, "prompt_id": n % 5} for n, row in enumerate(preferences(*((n, 1) for n in range(10))))]
    for row in rows:
        row["prompt"] = f"{row['prompt_id']}+1"
        row |= {"score": 9.0} if row["prompt_id"] == 1 else {}
    keys = {"selfplay.scorer": "test_opponent:lengths", "loss.name": "sppo"}
    tried = ("0+1", ["yes"])  # a copy of the human answer, before anything is computed
    of_files = [[(f"{n}+1", ["n" * (n + 1), "n" * (n + 6)]) for n in prompts] for prompts in ((0, 2, 3), (4,))]
    with pytest.raises(Interrupted):
        opponent(tmp_path / "run", rows, [True], **keys)._write_given(0)
    assert [tried, *of_files[0]] == ASKED
    opponent(tmp_path / "run", rows, **keys)._write_given(0)
    assert [tried, *of_files[0], *of_files[1]] == ASKED
    found = read_pairs(tmp_path / "run" / "iteration_0" / "pairs")
    assert [row["score"] for row in found] == [9.0 if n % 5 == 1 else n + 1 for n in range(10)]


@pytest.mark.parametrize(("loss", "kept"), [("logistic", {"b", "c", "e"}), ("tspin", set())])
def test_log_probs_of_answers_that_are_made_again_are_removed(loss, kept, opponent, tmp_path):
    """Those of one file, in all iterations that train on it; where a row has the start's answer, all of them."""
    found = opponent(tmp_path / "run", preferences((1, 2)), **{"loss.name": loss, "selfplay.iterations": 1})
    name = "train-00000-of-00001.parquet"
    paths = {
        "a": f"iteration_0/scores/iteration_0-{name}",
        "b": f"iteration_0/scores/iteration_10-{name}",
        "c": "iteration_0/scores/iteration_0-test-00000-of-00001.parquet",
        "d": f"iteration_0/scores/opponent_1-iteration_0-{name}",
        "e": f"iteration_0/scores/iteration_1-{name}",
    }
    for path in paths.values():
        (tmp_path / "run" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / path).write_bytes(b"")
    found._write_given(0)
    assert {key for key, path in paths.items() if (tmp_path / "run" / path).exists()} == kept
    (row,) = read_pairs(tmp_path / "run" / "iteration_0" / "pairs")
    assert row["generated"][-1]["content"] == "nn"
