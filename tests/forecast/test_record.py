"""What a run takes, beside what was expected."""

import json

from spin_jax.forecast.record import Record, comparison
from spin_jax.runtime import stopwatch


def test_all_attempts_of_a_run_are_added_up(tmp_path, monkeypatch):
    """Also after a kill, which loses what was not written yet. The iterations come one after the other."""
    path, now = tmp_path / "times.json", [0.0]
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now[0])

    def train(seconds):
        with stopwatch.phase("train"):
            now[0] += seconds

    with Record(path) as record:
        train(1)
        for t in record.each((0, 1)):
            train(60 * (t + 1))
            if t == 0:
                record.flush()
    assert json.loads(path.read_text()) == {
        "-1": {"train": 1, "other": 0},
        "0": {"train": 60, "other": 0},
        "1": {"train": 120, "other": 0},
    }
    killed = Record(path)
    killed.__enter__()
    assert [*zip(killed.each((0, 1)), "ab", strict=False)][-1] == (1, "b")
    train(30)
    killed.flush()
    train(1000)  # lost
    with Record(path) as record:
        *_, last = record.each((0, 1))
        train(3)
        assert record.minutes(last) == (120 + 30 + 3) / 60
        assert record.total((-1, 0, 1)) == {"train": 1 + 60 + 153}
        assert record.total((0,)) == {"train": 60}


def test_what_is_off_by_more_than_30_percent_is_named():
    expected = {"train": 100.0, "score": 13.0, "sample": 10.0, "export": 0.2}
    took = {"train": 129.0, "score": 10.0, "sample": 14.0, "export": 0.9, "load": 3.0, "other": 5.0}
    assert comparison(expected, took).splitlines() == [
        "time          expected      took",
        "load               0 s       3 s",
        "sample            10 s      14 s",
        "score             13 s      10 s",
        "train         1.67 min  2.15 min",
        "export          200 ms    900 ms",
        "other              0 s       5 s",
        "all           2.05 min   2.7 min",
        "plan is off by more than 30%: load was not expected, sample takes 1.4 times as long",
    ]
    assert "off" not in comparison({"train": 100.0}, {"train": 78.0, "other": 90.0})
