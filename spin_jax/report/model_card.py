"""Model cards: the README.md of an exported model, as the Hugging Face hub reads it.

A card holds no times and no local paths, so that a run that was interrupted writes the same one. Its text is in
templates/model_card.md; this file computes what the template shows.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from importlib import resources
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from spin_jax.config_values import algorithm_notes, data_mixtures, per_iteration
from spin_jax.report.numbers import START, Row
from spin_jax.runtime import secrets

# Names of a summary's row that are no measurements, that differ between equal runs, or that the recipe tells already.
_LEFT_OUT = re.compile(r"iteration|beta|(added_)?pairs|steps|skipped|final|stopped|.*(minutes|seconds|_s|_stderr)")

Revisions = str | Mapping[str, str | None] | None


class Facts(NamedTuple):
    """What a card says about an export."""

    kind: str  # start, iteration or control
    iteration: int  # the last one; −1 of the start
    config: Mapping[str, Any]  # the run's, as config.json has it
    rows: Sequence[Row]  # of summary.json, to this iteration
    model_revision: str | None  # the commit of a base from the hub
    data_revision: Revisions  # the commit of a dataset from the hub; of several datasets by path
    fingerprints: Mapping[str, str]
    versions: Mapping[str, str]
    commit: str | None  # of the code
    license: Mapping[str, Any]  # what the base's card says of its license
    hub_names: Mapping[str, str] = {}  # OWNER/NAME@COMMIT of keys such as model.adapters, where they are on the hub
    adapters_base: str | None = None  # the model that the adapters in adapters/ stand on; None where there are none


def model_card(facts: Facts) -> str:
    """The whole README.md."""
    from huggingface_hub import ModelCard, ModelCardData

    config, t = facts.config, facts.iteration
    model, play, loss, train = (config[section] for section in ("model", "selfplay", "loss", "train"))
    now, earlier = max(t, 0), range(max(t - play["mix_previous"], 0), t)
    columns = [dict(_measurements(row)) for row in facts.rows]
    names = dict.fromkeys(name for column in columns for name in column)
    datasets = dataset_parts(config["data"]["path"], facts.data_revision, facts.fingerprints)
    on_hub = dict.fromkeys(path for path, revision, _, _ in datasets if revision)
    card = ModelCard.from_template(
        ModelCardData(
            base_model=model["path"] if facts.model_revision else None,
            datasets=list(on_hub) or None,
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=[*(["spin", "self-play"] if facts.kind == "iteration" else ["sft"]), "fine-tuning", "spin_jax"],
            **facts.license,
        ),
        template_str=resources.files("spin_jax.report").joinpath("templates/model_card.md").read_text("utf-8"),
        facts=facts,
        config=config,
        model_name=source_name(model["path"], None) if model["path"] else model["architecture"]["model_type"],
        adapters=facts.hub_names.get("model.adapters") or (model["adapters"] and source_name(model["adapters"], None)),
        adapters_base=facts.adapters_base and source_name(facts.adapters_base, None),
        datasets=[(path, source_name(path, revision), revision, t, share) for path, revision, t, share in datasets],
        loss=[loss["name"], f"β {per_iteration(loss['beta'], now):g}", *algorithm_notes(config)],
        earlier=[s for s in earlier if s >= play["start"] or f"given pairs {s}" in facts.fingerprints],
        steps=sum(row.get("steps", 0) for row in facts.rows),
        epochs=per_iteration(train["epochs"], now),
        learning_rate=per_iteration(train["learning_rate"], now),
        numbers={name: [column.get(name, "") for column in columns] for name in names},
        headings=["start" if row["iteration"] == START else f"iteration {row['iteration']}" for row in facts.rows],
    )
    return secrets.redacted(f"{card}\n")


def stated_license(readme: str | Path) -> dict[str, str]:
    """What the head of a README.md says of its model's license; {} where it says nothing."""
    from huggingface_hub.repocard import metadata_load

    try:
        head = metadata_load(readme) or {}
    except Exception:  # there is no file, or its head may be anything
        return {}
    keys = "license", "license_name", "license_link"
    stated = {key: head[key] for key in keys if isinstance(head.get(key), str)}
    return stated if "license" in stated else {}


def dataset_revisions(
    path: str | None, revisions: Revisions, fingerprints: Mapping[str, str]
) -> list[tuple[str, str | None]]:
    """(path, commit) of each dataset of the run; the commit is None for a dataset that is not on the hub.

    Only the run's own record counts, because the files that exist now may be others.
    """
    return [(path, revision) for path, revision, _, _ in dataset_parts(path, revisions, fingerprints)]


def dataset_parts(
    path: str | None, revisions: Revisions, fingerprints: Mapping[str, str]
) -> list[tuple[str, str | None, int, Fraction]]:
    """(path, commit, iteration, share of the iteration's rows) of each dataset, as `dataset_revisions`.

    The iteration is 0 where the dataset serves all of them.
    """

    def known(part: str) -> bool:
        return part in revisions if isinstance(revisions, Mapping) else "," not in part or "data 1" not in fingerprints

    return [
        (part, revisions.get(part) if isinstance(revisions, Mapping) else revisions, t, share)
        for t, shares in enumerate(data_mixtures(path, known))
        for part, share in shares.items()
    ]


def source_name(path: str, revision: str | None) -> str:
    """The hub's name of a model or dataset, or the last part of a local path: the rest is private.

    A run records the commit of what it takes from the hub, and of nothing else.
    """
    place = PurePath(path)
    exported = re.fullmatch(r"(?:.*/)?((start|iteration_\d+)/model)", place.as_posix())  # by a run
    return path if revision else exported[1] if exported else place.name


def _measurements(row: Row, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from _measurements(value, f"{prefix}{key}/")
        elif isinstance(value, int | float | None) and not _LEFT_OUT.fullmatch(key):
            finite = value is not None and math.isfinite(value)  # JSON has null where a number is not
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            yield f"{prefix}{key}", text if finite else "NaN"
