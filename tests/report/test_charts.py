"""Which charts there are, and the points of their curves."""

import numpy as np
import pytest
from example_run import write_run

from spin_jax.report import charts, workdir


def test_curves_are_means_with_gaps(finished):
    run = workdir.read(str(finished))
    assert run.first_steps == {0: 0, 1: 20}
    series = run.series("train", "margin")
    assert series[1][0].tolist() == list(range(20, 40))
    assert run.series("sft", "loss")[-1][0].tolist() == list(range(-20, 0))
    (curve,) = next(chart for chart in charts.learning_curves(run) if chart.title == "Margin").curves
    assert np.isnan(curve.y).tolist() == [n == 20 for n in range(41)]  # between the iterations
    np.testing.assert_array_equal(
        charts.mean_of_neighbors(np.array([1, 3, np.nan, 5, np.nan, np.nan, 7]), 2), [2, 5, np.nan, 7]
    )


@pytest.mark.parametrize(
    ("sections", "note"),
    [
        ({}, "Back at 0 with each new opponent."),
        ({"selfplay": {"restart": True}}, ""),
        ({"selfplay": {"opponent_decay": 0.5}}, ""),
        ({"loss": {"reference_alpha": 0.5}}, ""),
        ({"loss": {"reference_decay": 0.5}}, ""),
    ],
)
def test_where_the_margin_begins(sections, note, tmp_path):
    run = workdir.read(str(write_run(tmp_path, steps=2, **sections)))
    assert next(chart for chart in charts.learning_curves(run) if chart.title == "Margin").note == note


def test_numbers_that_are_null_are_not_drawn():
    rows = [
        {"iteration": t, "nll": None if t == 1 else 1.0, "gsm8k/acc": None, "control": {"nll": None}}
        for t in (-1, 0, 1, 2)
    ]
    (chart,) = charts.over_iterations(rows)
    (curve,) = chart.curves
    assert list(curve.x) == [-1, 0, 2]
    assert chart.ticks == {-1: "start", 0: "0", 1: "1", 2: "2"}


def test_of_many_iterations_a_few_have_ticks_and_histograms():
    (chart,) = charts.over_iterations([{"iteration": t, "nll": 1.0} for t in range(-1, 29)])
    assert [name for name in chart.ticks.values() if name] == ["start", *map(str, range(2, 29, 3))]
    assert charts._evenly_chosen(list(range(30))) == [0, 6, 12, 17, 23, 29]
