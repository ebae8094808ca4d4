"""Which iteration is best, by the number of summary.json that checkpoint.best names."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

# Numbers that iterations can be compared by, beside those of tasks: 1 where higher is better, −1 where lower is better.
# Length and KL are missing because neither end of them is the better one.
DIRECTIONS = dict(nll=-1, loss=-1, margin=1, accuracy=1, greedy_accuracy=1, sampled_accuracy=1, response_identical=1)


def direction(name: str, tasks: Sequence[str], include_path: str | None = None) -> int:
    """1 where a higher value of that number is better, −1 where a lower one is.

    Args:
        name: a key of DIRECTIONS, or task/metric, whose direction the task itself states.
        tasks: those that the run evaluates. The one that `name` belongs to is loaded, with its data.
        include_path: a directory of task files.

    Raises:
        ValueError: summary.json has no number of that name.
    """
    if name in DIRECTIONS:
        return DIRECTIONS[name]
    if not tasks or "/" not in name:
        more = f" or a number of {', '.join(tasks)}: task/metric" if tasks else ""
        raise ValueError(f"checkpoint.best={name!r}: choose from {', '.join(DIRECTIONS)}{more}")
    from spin_jax.evaluate.tasks import metric_directions  # it needs lm_eval, which is optional

    owners = [task for task in tasks if name.startswith(f"{task}/")] or tasks
    directions = metric_directions(owners, include_path)
    for metric, sign in directions.items():
        if name == metric or name.startswith(f"{metric}/"):  # the name of a filter may follow
            return sign
    raise ValueError(f"checkpoint.best={name!r}: the tasks have {', '.join(directions)}")


def best_row(rows: Sequence[Mapping[str, Any]], name: str, direction: int) -> Any:
    """The row of summary.json with the best value of that number; of equals, the first.

    A `direction` of 1 says that higher is better, −1 that lower is. None where no row has a finite value.
    """
    finite = [row for row in rows if isinstance(row.get(name), int | float) and math.isfinite(row[name])]
    return max(finite, key=lambda row: direction * row[name], default=None)
