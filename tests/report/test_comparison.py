"""Several runs beside one another."""

import json
import re

import numpy as np
import pytest
from example_run import Page, change, only_generated, write_run, written
from runs import ROOT

from spin_jax.report import charts, comparison, workdir


def test_runs_beside_one_another(several, tmp_path):
    text = written(several, tmp_path / "page.html")
    page = Page(text)
    for said in (
        "3 runs, 2 of them apart from the seed: logistic (2 seeds), hinge.",
        "run logistic (2 seeds) hinge seed 0, 1 42 loss.beta 0.1 0.1, 0.5 loss.name logistic hinge",
        "NLL of the human's, nats a token 0.7500 0.7000 to 0.8000 0.7000",
        "start 0.9500 0.9000 to 1.0000 0.9000",
        "SFT control 0.8500 0.8500",
    ):
        assert said in page.words, said
    assert "Fixed prompts" not in page.text
    groups = comparison.seed_groups({path.name: workdir.read(str(path)) for path in several})
    nll = next(chart for chart in charts.compared_iterations(groups) if chart.name == "by_nll_0")
    assert [curve.label for curve in nll.curves] == ["logistic (2 seeds)", "hinge"]
    assert nll.curves[0].band is not None
    np.testing.assert_allclose(
        [nll.curves[0].y, *nll.curves[0].band], [[0.95, 0.85, 0.75], [0.9, 0.8, 0.7], [1, 0.9, 0.8]]
    )
    assert nll.curves[1].band is None


def test_runs_at_different_points_and_with_other_numbers(several, tmp_path):
    other = write_run(tmp_path / "other", iterations=1)
    change(other / "metrics.jsonl", only_generated)
    (other / "summary.json").unlink()
    words = Page(written([several[0], other], tmp_path / "page.html")).words
    assert re.search(r"final model run \S+/logistic_0 \S+/other iteration 1 – ", words)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/a/b/run/"], ["run"]),
        (["/a/b/x", "/a/b/y"], ["x", "y"]),
        (["/a/x/run", "/a/y/run"], ["x/run", "y/run"]),
        (["gs://bucket/a", "gs://bucket/b/c"], ["a", "b/c"]),
        (["a/b", "a/b/c"], ["b", "b/c"]),
        (["x", "/a/x"], ["x", "/a/x"]),
        ([f"{ROOT}/tests/.."], [ROOT.name]),
    ],
)
def test_names_are_short(paths, names):
    assert comparison.run_names(paths) == names


@pytest.mark.parametrize(
    ("sections", "differing", "count"),
    [
        ({"data": {"path": "a,b", "limit": 60}}, "data 1", 1),
        ({"data": {"path": "a,b"}}, "data 1", 2),
        ({"data": {"path": "a,0.5*b+0.5*c"}}, "data 1", 1),
        ({"data": {"path": "a,0.5*b+0.5*c"}}, "data", 2),
        ({"eval": {"path": "d", "limit": 60}}, "held-out data", 1),
        ({"eval": {"path": "d", "limit": 64}}, "held-out data", 1),  # 4 of 64 rows had no answer
        ({"eval": {"path": "d", "limit": 100}}, "held-out data", 2),  # all rows of the file
    ],
)
def test_rows_that_the_seed_chose_are_no_difference(sections, differing, count, tmp_path):
    runs = {}
    for seed in (0, 1):
        folder = write_run(tmp_path / str(seed), iterations=0, steps=1, seed=seed, **sections)
        record = json.loads((folder / "config.json").read_text())
        record["data_revision"] = dict.fromkeys("abc") if "," in record["config"]["data"]["path"] else None
        record["fingerprints"] = {"data": "60 examples, 77", "data 1": "60 examples, 77"}
        record["fingerprints"][differing] = f"60 examples, {seed}"
        (folder / "config.json").write_text(json.dumps(record))
        runs[str(seed)] = workdir.read(str(folder))
    assert len(comparison.seed_groups(runs)) == count


def test_names_of_groups(several):
    runs = [workdir.read(str(path)) for path in several]

    def named(*names):
        pairs = zip(names, [runs[0], runs[1], runs[2], runs[2]], strict=False)
        return [group.name for group in comparison.seed_groups(dict(pairs))]

    assert named("a/spin_seed0", "a/spin_seed1", "a/b") == ["a/spin (2 seeds)", "a/b"]
    assert named("0", "1", "x") == ["0 (2 seeds)", "x"]
    assert named("a0", "a1", "a2", "a3") == ["a0, a1", "a2, a3"]
