"""The page of a report: computes what templates/run.html and templates/comparison.html show.

The page is one file, which needs no script and asks for nothing outside. All that comes from data is escaped, and
secrets in it are replaced.
"""

import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from etils import epath
from markupsafe import Markup, escape

from spin_jax import config as config_lib
from spin_jax import config_values
from spin_jax.report import charts, comparison, drawing, numbers, workdir
from spin_jax.report.comparison import SeedGroup
from spin_jax.report.drawing import Chart
from spin_jax.report.model_card import dataset_revisions, source_name
from spin_jax.report.numbers import START, Number, Row, finite
from spin_jax.report.workdir import Run
from spin_jax.runtime import secrets
from spin_jax.storage import files

_MAX_PROMPTS = 24
_SHORT = 60  # characters of an answer that fits on a line
_LOG_PROBS = (
    Number("real_reward", "reward of the human answer", "{:.3f}"),
    Number("generated_reward", "reward of the opponent's", "{:.3f}"),
    Number("real_logp", "log p of the human answer, nats", "{:.2f}"),
    Number("generated_logp", "log p of the opponent's, nats", "{:.2f}"),
)


def write(workdirs: Sequence[str], output: str, png: str | None = None) -> list[str]:
    """Writes the page of one run, or of several beside one another, and every chart as PNG to the folder `png`.

    Returns a line on the page, and one on the PNG files. ValueError, FileNotFoundError: a workdir holds no run, or a
    file in it is damaged; OSError: no file can be written.
    """
    runs = dict(zip(comparison.run_names(workdirs), map(workdir.read, workdirs), strict=True))
    if len(runs) == 1:
        template, content = "run.html", _run_content(*runs.popitem())
    else:
        template, content = "comparison.html", _comparison_content(comparison.seed_groups(runs))
    page = _environment().get_template(template).render(content).encode(errors="replace")  # lone surrogates
    files.write_here(output, page)
    lists = [part for part in content.values() if isinstance(part, list)]
    shown = [chart for part in lists for chart in part if isinstance(chart, Chart)]
    lines = [f"{output}: {len(shown)} charts, {len(page) / 1e6:.2g} MB"]
    if png:
        for chart in shown:
            files.write_here(epath.Path(png) / f"{chart.name}.png", drawing.png(chart))
        lines.append(f"{png}: {len(shown)} charts as PNG")
    return lines


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("spin_jax.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # What is Markup comes from our own templates and filters.
        finalize=lambda value: value if isinstance(value, Markup) else secrets.redacted(str(value)),
    )
    environment.filters.update(breakable=_breakable, cell=_cell, redacted=secrets.redacted)
    environment.filters.update(image_url=drawing.svg_url, as_json=functools.partial(json.dumps, ensure_ascii=False))
    return environment


def _breakable(name: str) -> Markup:
    """A name that may go on in the next line after /, _ and full stop."""
    return Markup(re.sub("[/_.](?=.)", r"\g<0><wbr>", str(escape(secrets.redacted(name)))))


# --- the page of one run -------------------------------------------------------------------------


def _run_content(name: str, run: Run) -> dict[str, Any]:
    model, data = _sources(run)
    return {
        "title": name,
        "run": run,
        "model": model,
        "data": data,
        "data_size": _data_size(run),
        "algorithm": _algorithm(run),
        "betas": _of_iterations(run, "loss.beta"),
        "learning_rates": _of_iterations(run, "train.learning_rate"),
        "tiles": _tiles(run),
        "over_iterations": charts.over_iterations(run.rows),
        "numbers": _number_tables(run),
        "learning": charts.learning_curves(run),
        "margins": charts.held_out_margins(run),
        "lengths": charts.answer_lengths(run),
        "prompts": _prompts(run),
        "optimization": charts.optimization_curves(run),
        "config": _config_table(run),
    }


def _sources(run: Run) -> tuple[tuple[str, str | None], list[tuple[str, str | None]]]:
    """(name, commit) of the model, and of each dataset."""
    c, record = run.config, run.record
    revision, path = record.get("model_revision"), c.get("model.path")
    model = source_name(path, revision) if path else f"A new {c.get('model.architecture.model_type', 'model')}"
    datasets = dataset_revisions(c.get("data.path"), record.get("data_revision"), record.get("fingerprints", {}))
    data = dict.fromkeys((source_name(*dataset), dataset[1]) for dataset in datasets)
    return (model, revision), list(data) or [("given pairs", None)]


def _data_size(run: Run) -> str:
    examples = str(run.record.get("fingerprints", {}).get("data", "")).partition(",")[0]
    held_out = f", {run.held_out_prompts} prompts held out" if run.held_out_prompts else ""
    return f"{examples}{held_out}" if examples else ""


def _of_iterations(run: Run, key: str) -> str:
    """The value of a key as text; a list has one value for each iteration."""
    values = run.config.get(key)
    values = values if isinstance(values, list) else [values]
    shown = values[: max(run.config.get("selfplay.iterations") or 1, 1)]
    return ", ".join(f"{value:g}" for value in shown if isinstance(value, int | float))


def _algorithm(run: Run) -> str:
    """Loss, β, what else the algorithm consists of, and the seed."""
    c = run.config
    sections = {"loss": {}, "selfplay": {}, "eval": {}, **run.record["config"]}
    loss = f"{c.get('loss.name', 'loss')} loss", f"β {_of_iterations(run, 'loss.beta')}"
    return ", ".join([*loss, *config_values.algorithm_notes(sections), f"seed {c.get('seed', '?')}"])


def _tiles(run: Run) -> list[Number]:
    """The numbers of the final model that come first: at most four that it has."""
    final, tasks = run.final, numbers.task_names([run.final])
    known = {number.key: number for section in numbers.SECTIONS.values() for number in section}
    known |= {name: _task_number([final, run.start], name) for name in tasks}
    for keys in (("sampled_accuracy", "greedy_accuracy", "nll", *tasks), ("accuracy", "margin", "loss")):
        if tiles := [known[key] for key in keys if math.isfinite(finite(final, key))]:
            return tiles[:4]
    return []


def _prompts(run: Run) -> dict[str, Any]:
    """The fixed prompts: for each its number, and each model's row of samples.jsonl."""
    by_number: dict[int, dict[str, Row]] = {}
    for t, rows in run.samples.items():
        for row in rows:
            by_number.setdefault(row["prompt_id"], {})["start" if t == START else f"iteration {t}"] = row
    shown = dict(list(by_number.items())[:_MAX_PROMPTS])
    answers = [row[key] for rows in shown.values() for row in rows.values() for key in ("real", "generated")]
    return {
        "shown": shown,
        "count": len(by_number),
        "of_start": START in run.samples,
        "short": max(map(len, answers), default=0) <= _SHORT,
    }


# --- tables --------------------------------------------------------------------------------------


class _Line(NamedTuple):
    label: str
    cells: Sequence[tuple[str, str]]  # a value, and what is small beside it
    below: bool = False  # it belongs to the line above


class _Tables(NamedTuple):
    """Tables with the same columns, which scroll together where they are wide."""

    corner: str  # what the columns are
    headings: Sequence[str]
    parts: Mapping[str, Sequence[_Line]]  # {title: lines}, a table each
    final: int | None = None  # the column of the final model
    is_config: bool = False


def _cell(row: Row, number: Number) -> str:
    return _value_and_error(row, number)[0]


def _value_and_error(row: Row, number: Number) -> tuple[str, str]:
    value, error = numbers.value_and_error(row, number)
    return value.replace("-", "−"), error


def _plain_line(label: str, values: Sequence[Any]) -> _Line:
    return _Line(label, [(_setting(value), "") for value in values])


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_setting, value))
    text = "unset" if value is None else str(value)
    return text if len(text) <= 300 else f"{text[:299]}…"


def _task_number(rows: Sequence[Row], name: str) -> Number:
    """Shares have four decimals, other numbers four digits."""
    largest = max((value for row in rows if math.isfinite(value := finite(row, name))), default=0)
    return Number(name, name, "{:.4f}" if largest <= 1 else "{:.4g}")


def _sections(rows: Sequence[Row]) -> Iterator[tuple[str, list[Number]]]:
    """The numbers that any row has, in sections; those with no section of their own come last."""
    answers, pairs, kl, (training, trained) = numbers.SECTIONS.items()
    sections = [
        answers,
        ("tasks", [_task_number(rows, name) for name in numbers.task_names(rows)]),
        pairs,
        ("held-out pairs, log-probs and rewards", _LOG_PROBS),
        kl,
        (training, [Number("beta", "β", "{:g}"), *trained]),
    ]
    named = {"iteration", "final", "stopped", "control"}.union(number.key for _, known in sections for number in known)
    others = dict.fromkeys(key for row in rows for key in row if key not in named and "_stderr" not in key)
    sections.append(("other numbers", [Number(key, key, "{:.4g}") for key in others]))
    every = [*rows, *(row.get("control") or {} for row in rows)]
    for title, known in sections:
        if shown := [number for number in known if any(numbers.is_shown(row, number.key) for row in every)]:
            yield title, shown


def _number_lines(rows: Sequence[Row], sources: Mapping[str, Sequence[Any]], cell: Callable) -> dict[str, list[_Line]]:
    """{title: lines} of the numbers that any row has.

    `sources` has what `cell` makes a number's own line of, under "", and the lines below it, under their names.
    """
    parts: dict[str, list[_Line]] = {}
    for title, shown in _sections(rows):
        parts[title] = []
        for number, (name, source) in itertools.product(shown, sources.items()):
            cells = [cell(part, number) for part in source]
            if not name or any(value != "–" for value, _ in cells):
                parts[title].append(_Line(name or number.label, cells, below=bool(name)))
    return parts


def _number_tables(run: Run) -> _Tables | None:
    """The start and the iterations side by side; None while there are none."""
    if not run.rows:
        return None
    sources = {"": run.rows, "SFT control": [row.get("control") or {} for row in run.rows]}
    final = next((n for n, row in enumerate(run.rows) if row.get("final")), None)
    lines = _number_lines(run.rows, sources, _value_and_error)
    return _Tables("iteration", list(map(numbers.heading, run.rows)), lines, final)


def _config_table(run: Run) -> _Tables:
    """The keys that have another value than the default."""
    defaults = config_values.flat(json.loads(json.dumps(config_lib.default().to_dict())))
    lines = [
        _plain_line(key, [value, defaults.get(key, "")])
        for key, value in run.config.items()
        if key not in defaults or defaults[key] != value
    ]
    return _Tables("key", ["this run", "default"], {"": lines}, is_config=True)


# --- the page of several runs --------------------------------------------------------------------


def _comparison_content(groups: Sequence[SeedGroup]) -> dict[str, Any]:
    return {
        "title": "Comparison of runs",
        "run_count": sum(len(group.runs) for group in groups),
        "groups": [group.name for group in groups],
        "has_seeds": any(len(group.runs) > 1 for group in groups),
        "differences": _differences(groups),
        "over_iterations": charts.compared_iterations(groups),
        "final_models": _final_models(groups),
        "learning": charts.compared_learning(groups),
    }


def _differences(groups: Sequence[SeedGroup]) -> _Tables | None:
    """The settings in which the groups differ; None where there are none."""
    columns = [comparison.settings(group.runs[0]) for group in groups]
    seeds = [sorted({_setting(run.config.get("seed")) for run in group.runs}) for group in groups]
    names = dict.fromkeys(name for column in columns for name in column)
    lines = [
        _plain_line(name, [column.get(name) for column in columns])
        for name in names
        if len({json.dumps(column.get(name), sort_keys=True) for column in columns}) > 1
    ]
    if any(seed != seeds[0] or len(seed) > 1 for seed in seeds):
        lines.insert(0, _plain_line("seed", seeds))
    return _Tables("run", [group.name for group in groups], {"": lines}, is_config=True) if lines else None


def _final_models(groups: Sequence[SeedGroup]) -> _Tables | None:
    """The final models side by side, each number with the start's and the control's below it."""
    finals = [[run.final for run in group.runs] for group in groups]
    sources = {
        "": finals,
        "start": [[run.start for run in group.runs] for group in groups],
        "SFT control": [[row.get("control") or {} for row in column] for column in finals],
    }
    rows = [row for column in finals for row in column if row]
    if not rows:
        return None
    iterations = [sorted({str(row["iteration"]) for row in column if row}) or "–" for column in finals]
    parts = {"final model": [_plain_line("iteration", iterations)], **_number_lines(rows, sources, _mean_and_range)}
    return _Tables("run", [group.name for group in groups], parts)


def _mean_and_range(rows: Sequence[Row], number: Number) -> tuple[str, str]:
    values = [value for row in rows if math.isfinite(value := finite(row, number.key))]
    if not values:
        return _cell(next((row for row in rows if number.key in row), {}), number), ""
    form = number.form.replace("d", ".0f")
    three = sum(values) / len(values), min(values), max(values)
    mean, low, high = (form.format(value).replace("-", "−") for value in three)
    return mean, "" if low == high else f"{low} to {high}"
