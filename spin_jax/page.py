"""The report as one HTML page: nothing in it asks for anything outside, and it needs no script.

All that comes from data goes through `_text`, which escapes it and leaves secrets out.
"""

import dataclasses
import html
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from spin_jax import config as config_lib
from spin_jax import config_values, figures, panels
from spin_jax.card import hub_id
from spin_jax.figures import Curve, Panel
from spin_jax.panels import Group
from spin_jax.runtime import secrets
from spin_jax.stylesheet import STYLE
from spin_jax.table import GROUPS, IF_ANY, tasks_of
from spin_jax.workdir import START, Run, number

Row = Mapping[str, Any]

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # what a browser may load
_MOST_CHARACTERS = 4000  # of an answer: the rest is where the samples are
_MOST_PROMPTS = 24
_SHORT = 60  # characters of an answer that stands in a line

# Numbers of summary.json beside those of table.GROUPS.
_MORE = (
    "held-out pairs, log-probs and rewards",
    (
        ("real_reward", "reward of the human answer", "{:.3f}"),
        ("generated_reward", "reward of the opponent's", "{:.3f}"),
        ("real_logp", "log p of the human answer, nats", "{:.2f}"),
        ("generated_logp", "log p of the opponent's, nats", "{:.2f}"),
    ),
)
_FIRST = ("sampled_accuracy", "greedy_accuracy", "nll")  # what a run is asked for first
_FIRST_ELSE = ("accuracy", "margin", "loss")
_MARKS = {"iteration", "final", "stopped", "control"}


def _text(value: Any) -> str:
    return html.escape(secrets.redacted(str(value)))


# --- pages ---------------------------------------------------------------------------------------


def of_run(name: str, run: Run) -> tuple[str, list[Panel]]:
    """The page of a run, and its figures."""
    over = panels.of_iterations(run.rows)
    learned, optimized = panels.learning(run), panels.optimization(run)
    lengths, margins = panels.lengths(run), panels.margins(run)
    spread = [margins] if margins else []
    sections = [
        _section("Over iterations", _figures(over, "Nothing has been evaluated yet.")),
        _section("All numbers", _results(run)),
        _section("Learning curves", _figures(learned, "No iteration has been trained yet.")),
        _section(
            "Margins and lengths of answers",
            ""
            if margins
            else _note("No held-out margins are stored: iteration_N/held_out.parquet has none."),
            "" if lengths else _note("No answers have been sampled yet."),
            _figures([*spread, *lengths]),
        ),
        _section("Fixed prompts", _samples(run)),
        _section("Optimization", _figures(optimized, "Nothing has been trained yet.")),
        _section("What was run", _facts(run), _config(run)),
    ]
    drawn = [*over, *learned, *spread, *lengths, *optimized]
    return _page(name, _lead(run), sections), drawn


def of_runs(groups: Sequence[Group]) -> tuple[str, list[Panel]]:
    """The page that compares runs, and its figures."""
    over, learned = panels.compared_iterations(groups), panels.compared_steps(groups)
    count = sum(len(group.runs) for group in groups)
    several = [group.name for group in groups if len(group.runs) > 1]
    seeds = _note("Runs that differ in nothing but the seed are one: their mean, and from lowest to highest.")
    sections = [
        _section("What differs", _differences(groups)),
        _section(
            "Over iterations", seeds if several else "", _figures(over, "Nothing has been evaluated yet.")
        ),
        _section("Final models", _final_rows(groups)),
        _section(
            "Learning curves",
            _note("Of the first run of each.") if several else "",
            _figures(learned, "No iteration has been trained yet."),
        ),
    ]
    lead = f"{count} runs" + (f", {len(groups)} of them apart from the seed" if several else "")
    return _page(
        "Comparison of runs", f"<p>{lead}: {_text(', '.join(g.name for g in groups))}.</p>", sections
    ), [
        *over,
        *learned,
    ]


def _page(title: str, lead: str, sections: Sequence[tuple[str, str]]) -> str:
    links = "".join(f'<a href="#{_anchor(name)}">{name}</a>' for name, _ in sections)
    body = "".join(
        f'<section id="{_anchor(name)}"><h2>{name}</h2>{text}</section>' for name, text in sections
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_text(title)} – self-play fine-tuning</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<header><h1>{_text(title)}</h1>{lead}<nav aria-label="Sections">{links}</nav></header>
<main>{body}</main>
<footer>Made by <code>python -m spin_jax.report</code> from what the run left in its workdir.</footer>
</body>
</html>
"""


def _section(title: str, *parts: str) -> tuple[str, str]:
    return title, "".join(parts)


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _note(text: str) -> str:
    return f'<p class="note">{_text(text)}</p>'


# --- the head ------------------------------------------------------------------------------------


def _lead(run: Run) -> str:
    """What was run, in a line; how far it has come; and the numbers that it was run for."""
    c = run.config
    betas = ", ".join(f"{beta:g}" for beta in _listed(c.get("loss.beta")))
    sections = {
        section: {key.partition(".")[2]: value for key, value in c.items() if key.startswith(f"{section}.")}
        for section in ("loss", "selfplay", "eval")
    }
    beside = "".join(f", {text}" for text in config_values.beside_loss(sections))
    loss = f"{c.get('loss.name', 'loss')} loss, β {betas}{beside}"
    said = f"{_model(c)} on {_data(run)}: {loss}, seed {c.get('seed', '?')}."
    return f"<p>{_text(said)}</p><p>{_text(_state(run))}</p>{_tiles(run)}"


def _state(run: Run) -> str:
    c, made = run.config, run.made
    wanted = (c.get("selfplay.iterations") or 0) - (c.get("selfplay.start") or 0)
    done = f"{len(made)} of {wanted} iterations are done"
    stopped = next((row["stopped"] for row in made if row.get("stopped")), None)
    if stopped:
        return f"Stopped early: {stopped}. Final model: iteration {run.final['iteration']}."
    if run.final.get("final"):
        return f"Finished: {done}. Final model: iteration {run.final['iteration']}."
    at = run.last
    where = f"; last heard of in {at['phase']}, iteration {at['iteration']}, step {at['step']}" if at else ""
    return f"Not finished, or still going on: {done}{where.replace('iteration -1', 'before self-play')}."


def _model(c: Mapping[str, Any]) -> str:
    path = c.get("model.path")
    if path:
        return hub_id(path) or PurePath(path).name
    return f"A new {c.get('model.architecture.model_type', 'model')}"


def _data(run: Run) -> str:
    """The dataset, by its last name where it is a local one."""
    path = run.config.get("data.path")
    if not path:
        return "given pairs"
    count = str(run.record.get("fingerprints", {}).get("data", "")).partition(",")[0]
    name = hub_id(path) or PurePath(path).name
    held_out = f", {run.held_out} prompts held out" if run.held_out else ""
    return f"{name} ({count}{held_out})" if count else name


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _tiles(run: Run) -> str:
    """The first numbers of the final model, with those of the start and the control beside."""
    final, start, control = run.final, run.start, run.final.get("control") or {}
    known = {key: (label, form) for _, wanted in GROUPS for key, label, form in wanted}
    known |= {name: (name, _form([final, start], name)) for name in tasks_of([final])} if final else {}
    first = (
        [key for key in (*_FIRST, *tasks_of([final])) if math.isfinite(number(final, key))] if final else []
    )
    first = first or [key for key in _FIRST_ELSE if math.isfinite(number(final, key))]
    tiles = []
    for key in first[:4]:
        label, form = known[key]
        beside = [
            f"<dd>{name} {_cell(row.get(key), form)}</dd>"
            for name, row in (("start", start), ("SFT control", control))
            if math.isfinite(number(row, key))
        ]
        tiles.append(
            f"<div><dt>{_breakable(label)}</dt><dd>{_cell(final[key], form)}</dd>{''.join(beside)}</div>"
        )
    return f'<dl class="tiles">{"".join(tiles)}</dl>' if tiles else ""


# --- tables --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Line:
    label: str
    cells: Sequence[str]  # HTML
    kind: str = ""  # class of its row


def _tables(
    corner: str, head: Sequence[str], parts: Mapping[str, Sequence[_Line]], kind: str = "", final: int = -1
) -> str:
    """Tables of the same columns, which scroll together where they are wide.

    Args:
        corner: what the heads of columns are.
        parts: {title: lines}, a table each.
        final: the column to look at.
    """

    def cells(tag: str, contents: Sequence[str]) -> str:
        marks = [' class="final"' if column == final else "" for column in range(len(contents))]
        pairs = zip(marks, contents, strict=True)
        return "".join(f"<{tag}{mark}>{content}</{tag.split()[0]}>" for mark, content in pairs)

    def table(title: str, lines: Sequence[_Line]) -> str:
        rows = ""
        for line in lines:
            first = f'<th scope="row">{_breakable(line.label)}</th>'
            rows += f'<tr class="{line.kind}">{first}{cells("td", line.cells)}</tr>'
        heads = cells('th scope="col"', list(map(_text, head)))
        caption = f"<caption>{_text(title)}</caption>" if title else ""
        top = f'<thead><tr><th scope="col">{_text(corner)}</th>{heads}</tr></thead>'
        return f"<table>{caption}{top}<tbody>{rows}</tbody></table>"

    kind = f"{kind} few" if len(head) <= 5 and len(parts) > 1 else kind
    inside = "".join(table(title, lines) for title, lines in parts.items())
    return (
        f'<div class="scroll" role="region" aria-label="Table" tabindex="0">'
        f'<div class="tables {kind}" style="--columns: {len(head)}">{inside}</div></div>'
    )


def _breakable(name: str) -> str:
    """A name that may go on in the next line after / and _."""
    return re.sub("[/_.](?=.)", r"\g<0><wbr>", _text(name))


def _cell(value: Any, form: str) -> str:
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    text = form.format(int(value) if form == "{:d}" else value)
    return text.replace("-", "−")


def _groups(rows: Sequence[Row]) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """(title, its numbers that any row has), the ones nobody told of last."""
    tasks = [(name, name, _form(rows, name)) for name in tasks_of(rows)]  # pyright: ignore[reportArgumentType]
    training = ("training", (("beta", "β", "{:g}"), *GROUPS[-1][1]))
    named = [GROUPS[0], ("tasks", tasks), GROUPS[1], _MORE, *GROUPS[2:-1], training]
    told = {key for _, wanted in named for key, *_ in wanted} | _MARKS
    others = dict.fromkeys(key for row in rows for key in row if key not in told and "_stderr" not in key)
    named.append(("other numbers", [(key, key, "{:.4g}") for key in others]))
    every = [*rows, *(row.get("control") or {} for row in rows)]

    def shown(key: str) -> bool:
        values = [number(row, key) for row in every]
        return any(math.isfinite(value) and (value or key not in IF_ANY) for value in values)

    for title, wanted in named:
        if there := [one for one in wanted if shown(one[0])]:
            yield title, there


def _form(rows: Sequence[Row], task: str) -> str:
    """How a task's number is written: shares alike, others as they are."""
    return "{:.4f}" if max(number(row, task) for row in rows) <= 1 else "{:.4g}"


def _results(run: Run) -> str:
    """The table of the run: the start and the iterations side by side."""
    rows = run.rows
    if not rows:
        return _note("Nothing has been evaluated yet.")
    controls = [row.get("control") or {} for row in rows]
    parts: dict[str, list[_Line]] = {}
    for title, wanted in _groups(rows):
        lines = parts[title] = []
        for key, label, form in wanted:
            lines.append(_Line(label, [_with_error(row, key, form) for row in rows]))
            if any(key in control for control in controls):
                lines.append(_Line("SFT control", [_with_error(row, key, form) for row in controls], "sub"))
    head = ["start" if row["iteration"] == START else str(row["iteration"]) for row in rows]
    final = next((n for n, row in enumerate(rows) if row.get("final")), -1)
    head = [f"{name} *" if n == final else name for n, name in enumerate(head)]
    notes = ["* The final model." if final >= 0 else "", _chance(run), _without(run)]
    return _tables("iteration", head, parts, final=final) + "".join(_note(note) for note in notes if note)


def _with_error(row: Row, key: str, form: str) -> str:
    """A number, and its standard error where lm-eval gave one."""
    task, _, metric = key.partition("/")
    metric, slash, rest = metric.partition("/")
    error = number(row, f"{task}/{metric}_stderr{slash}{rest}")
    return _cell(row.get(key), form) + (f" <small>± {error:.2g}</small>" if math.isfinite(error) else "")


def _chance(run: Run) -> str:
    share = number(run.final, "greedy_accuracy") if run.final else math.nan
    if not run.held_out or not math.isfinite(share):
        return ""
    error = 2 * math.sqrt(max(share * (1 - share), 0) / run.held_out)
    return (
        f"The final model's greedy share of right answers is known to ±{error:.3f} (two standard errors, "
        f"{run.held_out} held-out prompts)."
    )


def _without(run: Run) -> str:
    if run.made and not any(row.get("control") for row in run.made):
        return (
            "There is no SFT control, which would tell what more SFT had gained: --config.sft.control=True."
        )
    return ""


def _final_rows(groups: Sequence[Group]) -> str:
    """The final models side by side, each number with the start's and the control's below."""
    finals = [[run.final for run in group.runs] for group in groups]
    starts = [[run.start for run in group.runs] for group in groups]
    controls = [[run.final.get("control") or {} for run in group.runs] for group in groups]
    every = [row for rows in finals for row in rows if row]
    if not every:
        return _note("No iteration is done yet.")
    iterations = [sorted({str(row["iteration"]) for row in rows if row}) for rows in finals]
    chosen = [_Line("iteration", [_text(", ".join(numbers) or "–") for numbers in iterations])]
    parts: dict[str, list[_Line]] = {"final model": chosen}
    for title, wanted in _groups(every):
        lines = parts[title] = []
        for key, label, form in wanted:
            lines.append(_Line(label, [_mean(rows, key, form) for rows in finals]))
            for name, source in (("start", starts), ("SFT control", controls)):
                if any(key in row for rows in source for row in rows):
                    lines.append(_Line(name, [_mean(rows, key, form) for rows in source], "sub"))
    return _tables("run", [group.name for group in groups], parts)


def _mean(rows: Sequence[Row], key: str, form: str) -> str:
    values = [value for row in rows if math.isfinite(value := number(row, key))]
    if not values:
        return "–"
    exact = form.replace("d", ".0f")
    mean = _cell(sum(values) / len(values), exact)
    low, high = _cell(min(values), exact), _cell(max(values), exact)
    return mean if low == high else f"{mean} <small>{low} to {high}</small>"


def _differences(groups: Sequence[Group]) -> str:
    columns = [differing_of(group.runs[0]) for group in groups]
    names = dict.fromkeys(name for column in columns for name in column)
    seeds = [", ".join(sorted({_value(run.config.get("seed")) for run in group.runs})) for group in groups]
    lines = [
        _Line(name, [_text(_value(column.get(name))) for column in columns])
        for name in names
        if len({json.dumps(column.get(name), sort_keys=True) for column in columns}) > 1
    ]
    if len(set(seeds)) > 1 or any(len(group.runs) > 1 for group in groups):
        lines = [_Line("seed", list(map(_text, seeds))), *lines]
    if not lines:
        return _note("Nothing of the config.")
    return _tables("run", [group.name for group in groups], {"": lines}, "code")


def differing_of(run: Run) -> dict[str, Any]:
    """What runs are told apart by, but the seed: their config, what they were made from, and the commit."""
    free = ("mesh.", "checkpoint.", "export.", "logging.")
    kept = {key: value for key, value in run.config.items() if key != "seed" and not key.startswith(free)}
    made = {f"{name} (fingerprint)": digest for name, digest in run.record.get("fingerprints", {}).items()}
    if kept.get("data.limit"):
        made.pop("data (fingerprint)", None)  # the seed chooses
    return {**kept, **made, "commit": run.record.get("commit")}


# --- figures -------------------------------------------------------------------------------------


def _figures(drawn: Sequence[Panel], none: str = "") -> str:
    """Figures side by side; without any, what there is to say."""
    if not drawn:
        return _note(none) if none else ""
    return f'<div class="figures">{"".join(map(_figure, drawn))}</div>'


def _figure(panel: Panel) -> str:
    legend = "".join(f"<li>{_swatch(curve)}{_text(curve.label)}</li>" for curve in panel.curves)
    legend = f"<ul>{legend}</ul>" if len(panel.curves) > 1 else ""
    note = f"<p>{_text(panel.note)}</p>" if panel.note else ""
    drawing = secrets.redacted(figures.svg(panel))
    return f"<figure><figcaption><b>{_text(panel.title)}</b>{legend}</figcaption>{drawing}{note}</figure>"


def _swatch(curve: Curve) -> str:
    color = f"var(--c{curve.color % len(figures.PALETTE)})"
    if curve.filled:
        shape = f'<rect x="1" y="1" width="24" height="8" fill="{color}" fill-opacity="0.35"/>'
    else:
        dashes = " ".join(f"{1.6 * part:g}" for part in figures.DASHES[curve.dash % len(figures.DASHES)])
        shape = (
            f'<path d="M1 5H25" stroke="{color}" stroke-width="2.4" stroke-dasharray="{dashes or "none"}"/>'
        )
    return f'<svg class="key" viewBox="0 0 26 10" aria-hidden="true">{shape}</svg>'


# --- answers -------------------------------------------------------------------------------------


def _samples(run: Run) -> str:
    """Each fixed prompt, with the human answer and that of each model, greedy."""
    if not run.samples:
        return _note("No samples.jsonl is there yet: each iteration writes its own when it is done.")
    by_prompt: dict[int, dict[int, Row]] = {}
    for t, rows in sorted(run.samples.items()):
        for row in rows:
            by_prompt.setdefault(row["prompt_id"], {})[t] = row
    shown = list(by_prompt.items())[:_MOST_PROMPTS]
    answers = [row[key] for _, of in shown for row in of.values() for key in ("real", "generated")]
    kind = "short" if max(map(len, answers), default=0) <= _SHORT else "long"
    notes = ["Greedy answers to prompts that were kept from training, the human one first."]
    if START not in run.samples:
        notes.append("None of the start are stored.")
    if len(by_prompt) > len(shown):
        notes.append(f"The first {len(shown)} of {len(by_prompt)} prompts.")
    cards = "".join(_card(prompt_id, of) for prompt_id, of in shown)
    return f'{_note(" ".join(notes))}<div class="samples {kind}">{cards}</div>'


def _card(prompt_id: int, of: Mapping[int, Row]) -> str:
    first = next(iter(of.values()))
    several = len(first["prompt"]) > 1
    turns = ""
    for message in first["prompt"]:
        role = f"<b>{_text(message['role'])}</b> " if several else ""
        turns += f"<p>{role}{_cut(message['content'])}</p>"
    answers = [_answer("human", first["real"], "human")]
    for t, row in of.items():
        same = row["generated"].strip() == first["real"].strip()
        name = "start" if t == START else f"iteration {t}"
        answers.append(_answer(name, row["generated"], "same" if same else ""))
    inside = f'<div class="prompt" tabindex="0">{turns}</div><dl>{"".join(answers)}</dl>'
    return f'<article aria-label="Prompt {prompt_id}">{inside}</article>'


def _answer(who: str, text: str, kind: str) -> str:
    mark = ' <span class="mark">= human</span>' if kind == "same" else ""
    content = _cut(text) if text else "<i>(empty)</i>"
    reach = ' tabindex="0"' if len(text) > _SHORT else ""  # it scrolls
    return f'<div class="{kind}"><dt>{_text(who)}</dt><dd{reach}>{content}{mark}</dd></div>'


def _cut(text: str) -> str:
    left = len(text) - _MOST_CHARACTERS
    if left <= 0:
        return _text(text)
    return f"{_text(text[:_MOST_CHARACTERS])}… <i>({left:,} more characters are in samples.jsonl)</i>"


# --- what was run --------------------------------------------------------------------------------


def _facts(run: Run) -> str:
    c, record = run.config, run.record

    def joined(key: str) -> str:
        """A value, or one an iteration."""
        values = _listed(c.get(key))[: max(c.get("selfplay.iterations") or 1, 1)]
        return ", ".join(f"{value:g}" for value in values if isinstance(value, int | float))

    versions = record.get("versions", {})
    rank, peak = c.get("train.lora_rank"), joined("train.learning_rate")
    facts = {
        "model": _at(_model(c), record.get("model_revision")),
        "data": _at(_data(run), record.get("data_revision")),
        "loss": f"{c.get('loss.name')}, β {joined('loss.beta')}",
        "optimizer": f"{c.get('train.optimizer')}, learning rate {peak}",
        "batch": f"{c.get('train.batch_size')} a step",
        "LoRA": f"rank {rank}" if rank else "",
        "sampling": f"temperature {c.get('sampling.temperature')}, {c.get('sampling.max_new_tokens')} tokens",
        "seed": c.get("seed"),
        "commit": record.get("commit") or "not known",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    for override in record.get("overrides", []):
        facts[f"changed {override.get('at')}"] = ", ".join(override.get("differences", {}))
    lines = "".join(
        f"<dt>{_text(name)}</dt><dd>{_text(fact)}</dd>"
        for name, fact in facts.items()
        if fact not in ("", None)
    )
    return f'<dl class="facts">{lines}</dl>'


def _at(name: str, revision: str | None) -> str:
    return f"{name} at {revision}" if revision else name


def _config(run: Run) -> str:
    defaults = config_values.flat(json.loads(json.dumps(config_lib.default().to_dict())))
    changed = {
        key: value for key, value in run.config.items() if key not in defaults or defaults[key] != value
    }
    lines = [
        _Line(key, [_text(_value(value)), _text(_value(defaults[key]) if key in defaults else "")])
        for key, value in changed.items()
    ]
    table = _tables("key", ["this run", "default"], {"": lines}, "code")
    return f"<details><summary>Config that is not the default: {len(lines)} keys</summary>{table}</details>"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    text = "unset" if value is None else str(value)
    return text if len(text) <= 300 else f"{text[:299]}…"
