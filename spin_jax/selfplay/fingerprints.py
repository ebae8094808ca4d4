"""The fingerprints of a run in config.json, by which a run that continues knows whether anything has changed.

Only the same config, data, model, code and libraries give the same result to the bit. They are compared before anything
is computed, and config.json records every difference that a run goes on with.
"""

import dataclasses
import hashlib
import importlib
import importlib.metadata
import inspect
import json
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

import spin_jax
from spin_jax import config as config_lib
from spin_jax import config_values
from spin_jax.config_values import loss_parts
from spin_jax.data.records import Pair
from spin_jax.data.store import Examples
from spin_jax.models.architecture import Model
from spin_jax.runtime import platforms, secrets

Identity = Mapping[str, Mapping[str, str]]

# These sections, and these keys of others, may change when a run continues; any other change makes another run. The
# contents of data.path, eval.path, model.path, model.adapters, selfplay.pairs, selfplay.add_pairs and of a reward model
# are compared in place of their names.
_FREE_SECTIONS = ("mesh", "checkpoint", "export", "logging")
_FREE = {
    "": ("resume_anyway", "compiler_flags"),
    "data": ("path",),
    "model": ("path", "adapters"),
    "selfplay": ("pairs", "add_pairs", "iterations", "patience"),
    "sampling": ("batch_size", "tensor", "timeout_s"),
    "train": ("remat", "offload", "most_skipped"),
    "sft": ("offload", "control", "control_learning_rate"),
    "eval": ("path", "verifier", "samples", "fixed_prompts", "kl", "tasks", "include_path", "tasks_limit"),
}
# A run goes on although one of these has changed, says so, and records it.
_NOTED = ("versions.", "sampling.engine", "sampling.command")
_PACKAGES = ["jax", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "datasets", "grain"]


def digests(
    config: Any,
    model: Model,
    datasets: Sequence[Examples],
    held_out: Examples,
    given: Mapping[int, Sequence[Pair]],
    weights: Mapping[str, str],
    added: Sequence[Pair] = (),
) -> Identity:
    """The fingerprints of data, tokenizer, chat template, weights and code, and the versions of libraries.

    There is one dataset for all iterations, or one for each. `weights` has the digests of the checkpoint that the
    run starts from ("weights", or "") and of other models. `given` are the pairs of selfplay.pairs by iteration, and
    `added` those of selfplay.add_pairs.
    """
    tokenizer = model.tokenizer
    fingerprints = {
        **{f"data {t}" if t else "data": _data_digest(examples) for t, examples in enumerate(datasets)},
        "held-out data": _data_digest(held_out),
        "tokenizer": _digest([tokenizer.backend_tokenizer.to_str().encode()]),
        "chat template": _digest([_json(tokenizer.chat_template)]),
        "model": _digest([_json(dataclasses.asdict(model.config)), _json(list(model.stop_tokens))]),
        **weights,
        "code": _source_of_package(),
    }
    play, own = config.selfplay, dict[str, str | None]()
    own |= {f"loss {n}" if n else "loss": name for n, (_, name) in enumerate(loss_parts(config.loss.name))}
    own |= {"scorer": play.scorer, "pairing": play.pairing}
    if config_values.verifier_judges(play):
        own["verifier"] = config.eval.verifier
    fingerprints |= {kind: _source_digest(name) for kind, name in own.items() if name and ":" in name}
    all_given = {**{f"given pairs {t}": (t, given[t]) for t in sorted(given)}, "added pairs": (-1, added)}
    for name, (t, pairs) in all_given.items():
        parts = (part for pair in pairs for part in _pair_content(t, pair))
        fingerprints |= {name: f"{len(pairs)} pairs, {_digest(parts)}"} if pairs else {}
    return {"fingerprints": fingerprints, "versions": platforms.versions(*_PACKAGES)}


def _pair_content(t: int, pair: Pair) -> Iterator[bytes]:
    yield _json([t, pair.prompt_id, pair.sample_id])
    for score in (pair.score, pair.real_score):
        if score is not None:
            yield _json(score)
    for ids in (pair.prompt, pair.real, pair.generated):
        yield len(ids).to_bytes(8) + ids.tobytes()


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def _data_digest(examples: Examples) -> str:
    return f"{len(examples)} examples, {examples.digest}"


def _source_digest(path: str) -> str:
    """The digest of the file of `module:function`; in a notebook, which has no file, of the function."""
    module, _, name = path.partition(":")
    loaded = importlib.import_module(module)
    file = getattr(loaded, "__file__", None)
    try:
        return _digest([Path(file).read_bytes() if file else inspect.getsource(getattr(loaded, name)).encode()])
    except (OSError, TypeError):
        return "no source"


def _source_of_package() -> str:
    """The digest of every Python file of spin_jax, in all its packages, with its name."""
    root = Path(spin_jax.__file__).parent
    sources = sorted((path.relative_to(root).as_posix(), path) for path in root.rglob("*.py"))
    return _digest(part for name, path in sources for part in (name.encode(), path.read_bytes()))


def commit() -> str | None:
    """The git commit of the package's sources, and whether they differ from it; None where it is unknown."""

    def git(*arguments: str) -> str:
        command, folder = ["git", *arguments, "--", "."], Path(spin_jax.__file__).parent
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=60)
        return done.stdout.strip()

    try:
        if found := git("log", "-1", "--format=%H"):
            return f"{found}, changed" if git("status", "--porcelain") else found
    except (OSError, subprocess.SubprocessError):
        pass  # git is not installed, or the package is not in a clone
    try:
        installed = importlib.metadata.distribution("spin_jax").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    return json.loads(installed or "{}").get("vcs_info", {}).get("commit_id")


def differences(config: Any, found: Identity, began: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{name: (the value that the run began with, the value now)} of everything that may not change."""
    before, now = (config_values.flat(c) for c in (began["config"], recorded(config)))
    both = range(min(before.get("selfplay.iterations", 0), now["selfplay.iterations"]))
    result: dict[str, tuple[Any, Any]] = {}
    defaults = config_values.flat(recorded(config_lib.default()))
    for name, value in now.items():
        theirs, ours = before.get(name, defaults.get(name, value)), value
        if name in config_values.PER_ITERATION:
            theirs, ours = ([config_values.per_iteration(v, t) for t in both] for v in (theirs, ours))
        section, _, key = name.rpartition(".")
        judges = name == "eval.verifier" and config_values.verifier_judges(config.selfplay)
        may_change = not judges and (section in _FREE_SECTIONS or key in _FREE.get(section, ()))
        may_change |= name == "selfplay.scorer" and all(path and ":" not in path for path in (theirs, ours))
        if not may_change and theirs != ours:
            result[name] = before.get(name, defaults.get(name)), value
    for kind, values in found.items():
        theirs = dict(began.get(kind, {}))
        if "data" in theirs and "data 1" in values:  # the one dataset served all iterations before
            theirs |= {f"data {t}": theirs.get(f"data {t}", theirs["data"]) for t in both if t}
        # A new name is no difference: pairs may be given for an iteration to come.
        result |= {f"{kind}.{k}": (v, values.get(k)) for k, v in theirs.items() if values.get(k) != v}
    return result


def check(workdir: epath.Path, config: Any, found: Identity, began: Mapping[str, Any]) -> list[str]:
    """Notes on what has changed since the run began; none for a new run.

    Other versions of libraries only give notes, because a machine that was set up again often has some; so does another
    engine, because its address changes with the machine.

    Raises:
        ValueError: something else has changed, and `resume_anyway` is not set; the message lists it all.
    """
    if not began:
        return []
    changed = differences(config, found, began)
    serious = {name: values for name, values in changed.items() if not name.startswith(_NOTED)}
    if serious and not config.resume_anyway:
        listed = "; ".join(f"there {name} is {a!r}, and now {b!r}" for name, (a, b) in serious.items())
        raise ValueError(
            f"{workdir} holds another run: {listed}. Take a new --workdir, or the old values, or "
            "--config.resume_anyway=True, which continues all the same and is recorded in config.json"
        )
    return [f"continues although {name} was {a!r} and is {b!r} now" for name, (a, b) in changed.items()]


def recorded(config: Any) -> dict[str, Any]:
    """The config as config.json holds it: without secrets, and with lists for tuples."""

    def as_json(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: as_json(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [as_json(inner) for inner in value]
        return secrets.redacted(value) if isinstance(value, str) else value

    return as_json(config.to_dict())
