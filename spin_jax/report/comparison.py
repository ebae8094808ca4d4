"""Runs beside one another: their names, which of them differ only in the seed, and what else differs."""

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from spin_jax.report.model_card import dataset_parts
from spin_jax.report.numbers import finite
from spin_jax.report.workdir import Run

_NOT_COMPARED = ("mesh.", "checkpoint.", "export.", "logging.")  # they do not change what is learned


class SeedGroup(NamedTuple):
    """Runs that differ in nothing but their seed."""

    name: str
    runs: Sequence[Run]

    def values(self, iteration: int, key: str) -> np.ndarray:
        """The number `key` of this iteration, from each run that has it."""
        rows = [row for run in self.runs for row in run.rows if row["iteration"] == iteration]
        values = np.array([finite(row, key) for row in rows])
        return values[np.isfinite(values)]


def settings(run: Run) -> dict[str, Any]:
    """What tells runs apart, except for the seed: config, fingerprints of data and model, and commit."""
    config = {k: v for k, v in run.config.items() if k != "seed" and not k.startswith(_NOT_COMPARED)}
    fingerprints, chosen = run.record.get("fingerprints", {}), _chosen_by_seed(run)
    named = {f"{name} (fingerprint)": digest for name, digest in fingerprints.items() if name not in chosen}
    return {**config, **named, "commit": run.record.get("commit")}


def _chosen_by_seed(run: Run) -> set[str]:
    """The names of the fingerprints of data whose rows the seed chose."""
    c, fingerprints = run.config, run.record.get("fingerprints", {})
    parts = dataset_parts(c.get("data.path"), run.record.get("data_revision"), fingerprints)
    chosen = {f"data {t}" if t else "data" for _, _, t, share in parts if c.get("data.limit") or share < 1}
    held_out, dropped = fingerprints.get("held-out data", "0 examples").split()[0], c.get("data.max_bad", 0.1)
    return chosen | {"held-out data"} if int(held_out) >= (1 - dropped) * c.get("eval.limit", 500) else chosen


def seed_groups(runs: Mapping[str, Run]) -> list[SeedGroup]:
    """Groups the runs; runs that differ only in their seed form one group."""
    groups: dict[str, dict[str, Run]] = {}
    for name, run in runs.items():
        groups.setdefault(json.dumps(settings(run), sort_keys=True), {})[name] = run
    names = [_group_name(list(group)) for group in groups.values()]
    return [
        SeedGroup(name if names.count(name) == 1 else ", ".join(group), list(group.values()))
        for name, group in zip(names, groups.values(), strict=True)
    ]


def _group_name(names: list[str]) -> str:
    """What the names of a group's runs have in common at their beginning, if that says something."""
    if len(names) == 1:
        return names[0]
    start = _common_start(names).rstrip("0123456789_-./= ").removesuffix("seed").rstrip("_-./ ")
    return f"{start or names[0]} ({len(names)} seeds)"


def run_names(workdirs: Sequence[str]) -> list[str]:
    """A short name for each workdir: its path without the folders that all workdirs share."""
    paths = [os.path.abspath(path) if path.endswith(".") else path for path in workdirs]
    parts = [path.rstrip("/").split("/") for path in paths]
    shared = len(_common_start([part[:-1] for part in parts]))
    return ["/".join(part[shared:]) for part in parts]


def _common_start(sequences: Sequence[Any]) -> Any:
    """What all of the strings, or lists, begin with."""
    first, columns = sequences[0], zip(*sequences, strict=False)
    return first[: sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))]
