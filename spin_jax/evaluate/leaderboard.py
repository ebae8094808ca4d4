"""The six tasks of the first Open LLM Leaderboard, with the numbers that the SPIN paper reports on them."""

from collections.abc import Mapping
from typing import NamedTuple

LEADERBOARD = "leaderboard_v1"  # a name for all six in --tasks


class Column(NamedTuple):
    title: str  # on the leaderboard
    num_fewshot: int
    metric: str


COLUMNS = {
    "arc_challenge": Column("ARC", 25, "acc_norm"),
    "truthfulqa_mc2": Column("TruthfulQA", 0, "acc"),
    "winogrande": Column("Winogrande", 5, "acc"),
    "gsm8k": Column("GSM8K", 5, "exact_match/strict-match"),
    "hellaswag": Column("HellaSwag", 10, "acc_norm"),
    "mmlu": Column("MMLU", 5, "acc"),
}
# arXiv 2401.01335, measured with lm-evaluation-harness v0.4.0.
PUBLISHED = {
    "paper: SFT": (60.41, 43.73, 74.19, 26.76, 82.85, 60.92),
    "paper: DPO, 62k preferences": (63.65, 55.19, 72.61, 33.43, 84.44, 58.52),
    "paper: SPIN iteration 0": (63.40, 49.18, 72.69, 35.10, 84.38, 60.03),
    "paper: SPIN iteration 1": (65.19, 55.17, 72.30, 35.78, 84.96, 59.34),
    "paper: SPIN iteration 2": (65.96, 54.91, 73.56, 38.06, 85.41, 59.93),
    "paper: SPIN iteration 3": (65.87, 54.90, 73.72, 38.97, 85.54, 59.99),
}


def leaderboard_table(metrics: Mapping[str, float], model_name: str) -> str:
    """A Markdown table of the six tasks and their mean, in percent: the paper's rows, then the model's.

    `metrics` are numbers between 0 and 1 by task/metric.
    """
    own = tuple(100 * metrics[f"{task}/{column.metric}"] for task, column in COLUMNS.items())
    titles = [column.title for column in COLUMNS.values()]
    lines = [f"| | {' | '.join(titles)} | average |", "|---" * (len(titles) + 2) + "|"]
    for name, values in {**PUBLISHED, model_name: own}.items():
        cells = [f"{value:.2f}" for value in (*values, sum(values) / len(values))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
