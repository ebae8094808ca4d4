"""The exports of a run: Hugging Face directories with a model card, the best model, the hub."""

import dataclasses
from collections.abc import Callable, Sequence

from etils import epath

from spin_jax.config_values import MERGED
from spin_jax.errors import MissingInput
from spin_jax.models import loading, saving
from spin_jax.models.architecture import Params
from spin_jax.report import model_card
from spin_jax.report.numbers import START
from spin_jax.runtime import processes
from spin_jax.selfplay import fingerprints
from spin_jax.selfplay.prepare import Prepared
from spin_jax.storage import files, hub, seals
from spin_jax.storage.metrics import Row


def model_of_opponent(run: Prepared, t: int, is_local: bool = False) -> str:
    """The folder or hub id of the model that answers in iteration t; with `is_local`, where it is on this disk.

    ValueError says that it is on no disk, and MissingInput that it is not there yet.
    """
    c = run.config
    if t == c.selfplay.start and not run.makes_start:
        if c.model.adapters:
            raise ValueError(f"another engine needs the opponent as a folder, and {MERGED}")
        return str(loading.resolve(c.model.path, run.model.revision)[0]) if is_local else c.model.path
    if t > c.selfplay.start and c.selfplay.opponent_decay:
        raise ValueError(
            "selfplay.opponent_decay: the average of models that answers is in no folder, so only ours can"
        )
    folder = run.folder(t - 1 if t > c.selfplay.start else START) / "model"
    if not seals.sealed(folder):
        raise MissingInput(
            f"{folder}, which will answer in iteration {t}, is not there yet: a run with "
            f"--config.selfplay.iterations={t} ends with it"
        )
    return str(folder)


class Exports:
    """Writes the directories model/ and best/, and pushes them."""

    def __init__(self, run: Prepared, stop_if_asked: Callable[[], None]):
        self._run = run
        self._stop_if_asked = stop_if_asked  # is called between two tensors, and raises to stop
        self._announced_best: int | None = None  # the iteration that was printed last

    def save(self, folder: epath.Path, params: Params, adapters: epath.Path | None = None) -> None:
        """Writes folder/model, with the adapters that are there already, or a copy of the folder `adapters`."""
        if not seals.sealed(folder / "model"):
            if adapters and seals.sealed(adapters):
                seals.copy(adapters, folder / "model" / "adapters")
            model = dataclasses.replace(self._run.model, params=params)
            saving.save(model, folder / "model", dtype=model.dtype, on_tensor=self._stop_if_asked)

    def describe(self, kind: str, folder: epath.Path, rows: Sequence[Row]) -> None:
        """Adds a model card to an export. It comes later than the weights, because its numbers do."""
        run = self._run
        adapters = files.read_agreed(folder / "model" / "adapters" / "adapter_config.json") or {}
        facts = model_card.Facts(
            kind=kind,
            iteration=rows[-1]["iteration"],
            config=fingerprints.recorded(run.config),
            rows=rows,
            model_revision=run.model.revision,
            data_revision=run.data_revision,
            commit=run.commit,
            hub_names=run.hub_names,
            adapters_base=adapters.get("base_model_name_or_path"),
            license=model_card.stated_license(hub.readme(run.config.model.path, run.model.revision)),
            **run.identity,
        )
        seals.add(folder / "model", "README.md", model_card.model_card(facts).encode())

    def keep_best(self, best: Row | None) -> None:
        """Copies the model of the best iteration so far to best/."""
        if best and seals.sealed(self._run.folder(best["iteration"]) / "model"):  # a user may have removed it
            wanted, t = self._run.config.checkpoint.best, best["iteration"]
            seals.copy(self._run.folder(t) / "model", self._run.workdir / "best")
            if t != self._announced_best:
                processes.say(f"best by {wanted}: iteration {t} ({best[wanted]:.4g}), in best/")
            self._announced_best = t

    def push(self, done: Sequence[int]) -> None:
        """Pushes what is not on the hub yet, where export.push_to is set; `done` are the iterations that have ended."""
        run, c = self._run, self._run.config
        if not c.export.push_to:
            return
        exports = {"start": run.folder(START) / "model"} if run.makes_start else {}
        exports |= {f"iteration_{t}": run.folder(t) / "model" for t in done}
        exports["control"] = run.workdir / "control" / "model"
        if c.checkpoint.best:
            exports["main"] = run.workdir / "best"
        elif done:
            exports["main"] = run.folder(done[-1]) / "model"
        whole = {branch: folder for branch, folder in exports.items() if seals.sealed(folder)}
        hub.push(run.workdir, c.export.push_to, whole, private=c.export.private)
