"""Models of several runs beside one another, in Markdown: means over the seeds, and differences with their errors."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from spin_jax.data import parquet
from spin_jax.report.numbers import Row
from spin_jax.storage import files

START, CONTROL = "start", "SFT control"  # the names of models that are no variant's
NOTE = """\
Differences to {0}, seed by seed: their mean ± its standard error over the seeds, and in brackets its standard error
over the held-out prompts. The first says how other seeds would change it, the second how other prompts would."""

Numbers = dict[str, float]


class Model(NamedTuple):
    """What is known of a model of a run."""

    numbers: Numbers  # of summary.json
    prompts: Mapping[str, Mapping[int, float]] = {}  # from `prompt_values`


Results = Mapping[str, Mapping[int, Model]]  # {name of a model: {seed: the model}}


def read_models(workdir: epath.Path, variant: str, numbers: Sequence[str]) -> dict[str, Model]:
    """The models of a finished run by name, with those of the numbers that they have. Damaged names a damaged file."""
    models = {}
    for name, (row, folder) in rows_of_models(files.read_json(workdir / "summary.json"), variant).items():
        path = workdir / folder / "held_out_prompts.parquet"  # workdirs of earlier versions have none
        columns = parquet.prompts_from_parquet(path.read_bytes(), path) if path.exists() else {}
        if values := {number: row[number] for number in numbers if row.get(number) is not None}:
            models[name] = Model(values, prompt_values(columns))
    return models


def rows_of_models(rows: Sequence[Row], variant: str) -> dict[str, tuple[Row, str]]:
    """{name: (row of summary.json, folder in the workdir)} of start, SFT control and final model."""
    last = rows[-1]
    final = next((row for row in rows if row.get("final")), last)
    folder = f"iteration_{final['iteration']}" if final["iteration"] >= 0 else "start"
    control = f"control/iteration_{last['iteration']}"
    return {START: (rows[0], "start"), CONTROL: (last.get("control") or {}, control), variant: (final, folder)}


def prompt_values(columns: Mapping[str, np.ndarray]) -> dict[str, dict[int, float]]:
    """{number: {prompt_id: value}} of the columns of held_out_prompts.parquet. The mean of the values is the number.

    The NLL is a ratio, −Σ log p / Σ tokens. A prompt's value is the NLL plus what the prompt adds to it, to first
    order, so that the error of a difference is that of a ratio.
    """
    if not columns:
        return {}
    values = {name: column for name, column in columns.items() if name not in ("prompt_id", "real_logp", "real_tokens")}
    logps, tokens = columns["real_logp"].astype(np.float64), columns["real_tokens"]
    nll = -logps.sum() / tokens.sum()
    values["nll"] = nll - (logps + nll * tokens) / tokens.mean()
    return {name: dict(zip(columns["prompt_id"].tolist(), x.tolist(), strict=True)) for name, x in values.items()}


def by_model(runs: Sequence[tuple[int, Mapping[str, Model]]]) -> Results:
    """The models of runs, (seed, {name: model}), by name and seed. All runs of a seed have the same start."""
    results: dict[str, dict[int, Model]] = {}
    for seed, models in runs:
        for name, model in models.items():
            results.setdefault(name, {}).setdefault(seed, model)
    return results


def means(results: Results, numbers: Sequence[str]) -> str:
    """A table with a line for each model: the mean of each number over the seeds, and (smallest, largest)."""

    def cell(name: str, number: str) -> str:
        values = [model.numbers[number] for model in results[name].values() if number in model.numbers]
        if not values:
            return ""
        spread = f" ({min(values):.4g}, {max(values):.4g})" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.4g}{spread}"

    return _markdown("", numbers, {name: [cell(name, number) for number in numbers] for name in results})


def differences(results: Results, numbers: Sequence[str], baseline: str) -> str:
    """A table with a line for each other model: its numbers minus those of the baseline, as the NOTE says.

    It is "" where no model can be compared.
    """

    def cell(name: str, number: str) -> str:
        pairs = [(results[name][seed], results[baseline][seed]) for seed in results[name] if seed in results[baseline]]
        pairs = [(a, b) for a, b in pairs if number in a.numbers and number in b.numbers]
        values = [a.numbers[number] - b.numbers[number] for a, b in pairs]
        if not values:
            return ""
        over_seeds = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.2g}" if len(values) > 1 else ""
        error = error_over_prompts([(a.prompts.get(number, {}), b.prompts.get(number, {})) for a, b in pairs])
        return f"{statistics.fmean(values):+.3g}{over_seeds}{'' if error is None else f' [± {error:.2g}]'}"

    others = [name for name in results if name != baseline and baseline in results]
    lines = {name: [cell(name, number) for number in numbers] for name in others}
    return _markdown(f"minus {baseline}", numbers, lines) if any(map(any, lines.values())) else ""


def error_over_prompts(pairs: Sequence[tuple[Mapping[int, float], Mapping[int, float]]]) -> float | None:
    """The standard error, over held-out prompts, of the mean difference between two models; None if it is unknown.

    Args:
        pairs: for each seed the values of both models, {prompt_id: value}. What several seeds say of the same prompt is
            added up before it is squared, because it is not independent.
    """
    shares: dict[int, float] = {}  # of each prompt in the deviation of the mean
    for ours, theirs in pairs:
        if len(ours) < 2 or ours.keys() != theirs.keys():
            return None
        mean = statistics.fmean(ours[prompt] - theirs[prompt] for prompt in ours)
        for prompt in ours:
            share = (ours[prompt] - theirs[prompt] - mean) / len(ours) / len(pairs)
            shares[prompt] = shares.get(prompt, 0.0) + share
    count = len(shares)
    return math.sqrt(count / (count - 1) * math.fsum(share**2 for share in shares.values()))


def _markdown(corner: str, numbers: Sequence[str], lines: Mapping[str, Sequence[str]]) -> str:
    head = [f"| {corner} | {' | '.join(numbers)} |", "|---" * (len(numbers) + 1) + "|"]
    return "\n".join([*head, *(f"| {name} | {' | '.join(cells)} |" for name, cells in lines.items())])
