"""Model cards: the README.md of an exported model, as the Hugging Face hub reads it.

Pure text from plain data, without times and places: a run that was interrupted writes the same card.
"""

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from spin_jax import config_values
from spin_jax.losses import ROLES
from spin_jax.runtime import secrets

Row = Mapping[str, Any]

_CITATION = """@inproceedings{chen2024self,
  title     = {Self-Play Fine-Tuning Converts Weak Language Models to Strong Language Models},
  author    = {Chen, Zixiang and Deng, Yihe and Yuan, Huizhuo and Ji, Kaixuan and Gu, Quanquan},
  booktitle = {International Conference on Machine Learning},
  year      = {2024},
  url       = {https://arxiv.org/abs/2401.01335}
}"""
# Of a summary's row: what is no measurement, and what two equal runs have not in common.
# What a run that was interrupted might write another way, or that is told elsewhere.
_LEFT_OUT = re.compile(r"iteration|beta|pairs|steps|skipped|final|stopped|.*(minutes|seconds|_s)")


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a card tells of an export."""

    kind: str  # start, iteration or control
    iteration: int  # its last one; −1 of the start
    config: Mapping[str, Any]  # the run's, as config.json has it
    rows: Sequence[Row]  # of summary.json, to this iteration
    model_revision: str | None  # the commit of a base from the hub
    data_revision: str | Mapping[str, str | None] | None  # of several datasets by path
    fingerprints: Mapping[str, str]
    versions: Mapping[str, str]
    commit: str | None  # of the code
    license: Mapping[str, Any]  # what the base's card says of its license


def card(facts: Facts) -> str:
    """The whole README.md."""
    titles = {"start": "start", "iteration": f"SPIN iteration {facts.iteration}", "control": "SFT control"}
    model = facts.config["model"]
    name = PurePath(model["path"]).name if model["path"] else model["architecture"].get("model_type")
    sections = [
        _front_matter(facts),
        f"# {name}, {titles[facts.kind]}",
        _what(facts),
        f"## Made from\n\n{_table(_sources(facts))}",
        f"## Recipe\n\n{_table(_recipe(facts))}",
        f"## Numbers\n\n{_metrics(facts.rows)}",
        f"## Load it\n\n{_loading(facts)}",
        f"## Made with\n\n{_code(facts)}",
        f"## Citation\n\n```bibtex\n{_CITATION}\n```",
    ]
    return secrets.redacted("\n\n".join(sections) + "\n")


def stated_license(readme: str | Path) -> dict[str, str]:
    """What the head of a README.md says of its model's license; {} where that is nothing."""
    from huggingface_hub.repocard import metadata_load

    try:
        stated = metadata_load(readme) or {}
    except Exception:  # no file, or another's with anything in it
        return {}
    known = {key: stated.get(key) for key in ("license", "license_name", "license_link")}
    said = {key: value for key, value in known.items() if isinstance(value, str)}
    return said if "license" in said else {}


def hub_id(path: str | None) -> str | None:
    """The path, where it is that of a hub's model or dataset."""
    if path and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path, re.ASCII) and not os.path.exists(path):
        return None if path.endswith((".json", ".jsonl", ".parquet")) else path
    return None


# --- parts ---------------------------------------------------------------------------------------


def _front_matter(facts: Facts) -> str:
    from huggingface_hub import ModelCardData

    datasets = list(filter(None, map(hub_id, config_values.data_paths(facts.config["data"]["path"]))))
    method = ["spin", "self-play"] if facts.kind == "iteration" else ["sft"]
    data = ModelCardData(
        base_model=hub_id(facts.config["model"]["path"]),
        datasets=list(dict.fromkeys(datasets)) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*method, "fine-tuning", "spin_jax"],
        **facts.license,
    )
    return f"---\n{data.to_yaml()}\n---"


def _what(facts: Facts) -> str:
    if facts.kind == "start" and not facts.config["sft"]["epochs"]:
        return "The model that self-play starts from, as it was initialized: nothing has been learned."
    if facts.kind == "start":
        return "The model that self-play starts from, after supervised fine-tuning on the human answers."
    if facts.kind == "control":
        return (
            "A control for self-play: the start, trained on by supervised fine-tuning for as many steps as "
            f"self-play took to the end of iteration {facts.iteration}."
        )
    aim = "learned to prefer the human answers. There were no new labels."
    if facts.config["selfplay"]["restart"] or facts.config["loss"]["name"] in ROLES:
        aim = "was trained on those answers as the recipe says."
    return (
        f"Iteration {facts.iteration} of self-play fine-tuning "
        "([SPIN, arXiv 2401.01335](https://arxiv.org/abs/2401.01335)): the model of the iteration before "
        f"answered the prompts, and this one, which began as {_began_as(facts)}, {aim}"
    )


def _began_as(facts: Facts) -> str:
    return "the start" if facts.config["selfplay"]["restart"] else "the same"


def _sources(facts: Facts) -> Iterator[tuple[str, str]]:
    model, data = facts.config["model"], facts.config["data"]
    if model["path"]:
        yield "base", _place(model["path"], facts.model_revision, "", facts.fingerprints.get("weights"))
    else:
        yield "base", f"none: a new {model['architecture'].get('model_type')}, initialized by the seed"
    part = ", ".join(filter(None, [data["name"], f"split {data['split']}"]))
    revision = facts.data_revision
    for t, path in enumerate(config_values.data_paths(data["path"])):
        commit = revision.get(path) if isinstance(revision, Mapping) else revision
        content = facts.fingerprints.get(f"data {t}" if t else "data")
        yield (
            (f"data of iteration {t}" if t else "data"),
            f"{_place(path, commit, 'datasets/', content)}; {part}",
        )
    for name, content in facts.fingerprints.items():
        if name.startswith("given pairs ") and facts.kind == "iteration":
            yield f"given pairs of iteration {name.split()[-1]}", content


def _place(path: str, revision: str | None, kind: str, content: str | None) -> str:
    """A hub's model or dataset, or the name of a local one: where it stood is nobody's business."""
    content = f" ({content})" if content else ""
    if hub_id(path):
        at = f" at `{revision}`" if revision else ""
        return f"[{path}](https://huggingface.co/{kind}{path}){at}{content}"
    function = re.fullmatch(r"[\w.]+:\w+", path)
    return f"`{path if function else PurePath(path).name}`{content}"


def _recipe(facts: Facts) -> Iterator[tuple[str, str]]:
    c = facts.config
    if facts.kind == "iteration":
        yield from _self_play(facts, facts.rows[-1])
    elif facts.kind == "control":
        steps = sum(row.get("steps", 0) for row in facts.rows)
        rate = c["sft"]["control_learning_rate"] or c["sft"]["learning_rate"]
        yield from _optimization({**c["sft"], "learning_rate": rate}, f"{steps} steps, as self-play took")
    elif c["sft"]["epochs"]:
        yield from _optimization(c["sft"], f"{c['sft']['epochs']} × the data")
    limits = c["lengths"]
    yield "tokens", f"prompts to {limits['max_prompt']}, with their answers to {limits['max_length']}"
    yield "precision", f"float32 weights, {c['model']['dtype']} computation and export"
    yield "seed", str(c["seed"])
    if c["official"]:
        yield "official", "the quirks of the authors' released code are reproduced"


def _self_play(facts: Facts, row: Row) -> Iterator[tuple[str, str]]:
    c, t = facts.config, facts.iteration
    loss, sampling, play = c["loss"], c["sampling"], c["selfplay"]
    beta = f"β {config_values.per_iteration(loss['beta'], t):g}"
    yield "loss", ", ".join([loss["name"], beta, *config_values.beside_loss(c)])
    earlier = ", ".join(map(str, range(max(t - play["mix_previous"], play["start"]), t)))
    yield "pairs", f"{row['pairs']}{earlier and f', those of iteration {earlier} among them'}"
    if f"given pairs {t}" not in facts.fingerprints:
        keys = ("temperature", "top_k", "top_p", "max_new_tokens")
        yield "answers", ", ".join(f"{key} {sampling[key]:g}" for key in keys if sampling[key] is not None)
    epochs = config_values.per_iteration(c["train"]["epochs"], t)
    rate = config_values.per_iteration(c["train"]["learning_rate"], t)
    yield from _optimization(
        {**c["train"], "learning_rate": rate}, f"{epochs} × the pairs, {row['steps']} steps"
    )


def _optimization(c: Mapping[str, Any], length: str) -> Iterator[tuple[str, str]]:
    """Lines on keys that `train` and `sft` share."""
    clipped = f", gradients clipped at {c['clip_norm']:g}" if c["clip_norm"] else ""
    yield "optimizer", f"{c['optimizer']}, weight decay {c['weight_decay']:g}{clipped}"
    after = f"{c['schedule']} schedule after {c['warmup_ratio']:.0%} of warm-up"
    yield "learning rate", f"{c['learning_rate']:g} at its peak, {after}"
    yield "batch", f"{c['batch_size']} a step"
    yield "length", length
    if c["lora_rank"]:
        targets = ", ".join(c["lora_targets"])
        yield "LoRA", f"rank {c['lora_rank']}, α {c['lora_alpha']:g}, on {targets}; merged here"


def _metrics(rows: Sequence[Row]) -> str:
    """A line a number, a column an iteration; names are those of summary.json. The recipe has the others."""
    flat = [dict(_numbers(row)) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    head = ["", *("start" if row["iteration"] < 0 else f"iteration {row['iteration']}" for row in rows)]
    lines = [head, ["---"] * len(head)]
    lines += [[name, *(row.get(name, "") for row in flat)] for name in names]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _numbers(row: Row, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not _LEFT_OUT.fullmatch(key):
            yield f"{prefix}{key}", f"{value:.4g}" if isinstance(value, float) else str(value)


def _loading(facts: Facts) -> str:
    branch = facts.kind if facts.kind != "iteration" else f"iteration_{facts.iteration}"
    repo = facts.config["export"]["push_to"]
    place = f'"{repo}", revision="{branch}"' if repo else '"DIRECTORY OF THIS FILE"'
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({place})
tokenizer = AutoTokenizer.from_pretrained({place})
```

`spin_jax.load({place})` opens it in JAX. Prompts are rendered by the tokenizer's chat template."""


def _code(facts: Facts) -> str:
    others = [f"{name} {version}" for name, version in facts.versions.items() if name != "spin_jax"]
    commit = f"commit {facts.commit}" if facts.commit else "of no known commit"
    sources = f"(sources `{facts.fingerprints['code']}`)" if "code" in facts.fingerprints else ""
    return f"spin_jax {facts.versions.get('spin_jax', '')} {commit} {sources}; {', '.join(others)}."


def _table(lines: Iterator[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in lines)])
