"""The table of the leaderboard, against the averages that the paper prints."""

from spin_jax.evaluate.leaderboard import COLUMNS, leaderboard_table


def test_the_leaderboard():
    """The paper's averages follow from its six numbers, and ours stand below."""
    metrics = {f"{task}/{column.metric}": n / 10 for n, (task, column) in enumerate(COLUMNS.items())}
    lines = leaderboard_table(metrics, "us").splitlines()
    assert lines[0].startswith("| | ARC | TruthfulQA | Winogrande | GSM8K | HellaSwag | MMLU | average |")
    assert lines[-1] == "| us | 0.00 | 10.00 | 20.00 | 30.00 | 40.00 | 50.00 | 25.00 |"
    averages = [line.split("|")[-2].strip() for line in lines[2:-1]]
    assert averages == ["58.14", "61.31", "60.80", "62.12", "62.97", "63.16"]
