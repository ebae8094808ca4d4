"""Which values a config key may have, and how values are read that have several parts in one text.

`check` has the rules for single values and for keys that depend on each other.
"""

import difflib
import os
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from spin_jax.errors import ConfigError

PER_ITERATION = ("loss.beta", "train.learning_rate", "train.epochs")

_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def is_of_kind(kind: type, value: Any) -> bool:
    """Whether a value has a key's type. A whole number is a number too; True and False are not numbers."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def wanted(section: Any, key: str) -> str:
    """A sentence on the type that the values of a key must have."""
    if isinstance(section[key], tuple):
        return f"{_KINDS[type(section[key][0])]} is wanted, or several: (1, 2)"
    return f"{_KINDS[section.get_type(key)]} is wanted"


def nearest(key: str, keys: list[str], prefix: str = "") -> str:
    """The end of a message, from its semicolon on: the key nearest to a mistyped one, or all keys."""
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {prefix}{close[0]}?"
    return f"; there are {', '.join(sorted(keys))}"


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config as {"section.key": value}."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return result


def per_iteration(values: tuple, iteration: int) -> Any:
    """The value that a per-iteration key has for an iteration."""
    return values[min(iteration, len(values) - 1)]


# The interval of each key with a number, under the key's whole name or its last part. [ and ] include the
# end, ( and ) exclude it. In a tuple each number is checked. The intervals of floats leave out what float32
# would round to 0 or infinity.
_RANGES = {
    "[0, 2147483647]": ("seed", "fixed_prompts"),
    "[1, 2147483647]": (
        "data.limit",
        "eval.tasks_limit",
        "expected",
        "every_steps",
        "lora_rank",
        "keep",
        "max_new_tokens",
        "max_prompt",
        "most_skipped",
        "row_length",
        "selfplay.samples",
        "sampling.tensor",
        "shard_size",
        "top_k",
    ),
    "[2, 2147483647]": ("max_length",),  # one token for the prompt and one for the answer
    "[1, 1048576]": ("batch_size", "tokens_per_device"),
    "[-1, 1048576]": ("mesh.data", "mesh.fsdp", "mesh.tensor"),
    "[0, 10000]": ("iterations", "start", "mix_previous", "sft.epochs"),
    "[1, 10000]": ("train.epochs", "eval.samples", "patience", "schedule_epochs"),
    "[0, 500]": ("eval.limit",),
    "[0, 0.1]": ("eval.fraction",),
    "[0, 1]": ("max_bad", "reference_alpha", "warmup_ratio"),
    "[0, 1)": ("momentum", "decay"),
    "(0, 1]": ("top_p",),
    "[1e-37, 1]": ("eps",),
    "[0, 1e30]": ("nll_weight", "temperature", "weight_decay"),
    "(0, 1e30]": ("beta", "clip_norm", "control_learning_rate", "learning_rate", "lora_alpha"),
}
_RANGE_OF = {name: interval for interval, names in _RANGES.items() for name in names}
_CHOICES = {
    "train.remat": ("none", "attention", "attention+mlp", "full"),
    "model.attention": ("plain", "splash", "flash"),
    "model.dtype": ("float32", "bfloat16", "float16"),
    "data.bad_rows": ("error", "drop"),
    "selfplay.rows": ("all", "right", "wrong"),
}


def _check_ranges(section: Any, prefix: str = "") -> None:
    for key, value in section.items():
        name = f"{prefix}{key}"
        interval = _RANGE_OF.get(name, _RANGE_OF.get(key))
        if isinstance(value, ConfigDict):
            if name != "model.architecture":
                _check_ranges(value, f"{name}.")
        elif interval and value is not None:
            low, high = map(float, interval[1:-1].split(","))
            for number in value if isinstance(value, tuple) else (value,):
                above = low <= number if interval[0] == "[" else low < number
                if not (above and (number <= high if interval[-1] == "]" else number < high)):
                    raise ConfigError(f"{name}={value}: {_in_words(interval, number)}")
        if name in _CHOICES and value is not None and value not in _CHOICES[name]:
            raise ConfigError(f"{name}={value!r}: one of {', '.join(_CHOICES[name])}")


def _in_words(interval: str, number: float) -> str:
    low, high = interval[1:-1].split(", ")
    words = f"at least {low}" if interval[0] == "[" else f"above {low}"
    if float(high) < 1e6 or number >= float(high):  # a very large end is named only if it was exceeded
        words += f" and at most {high}" if interval[-1] == "]" else f" and below {high}"
    return words


def check(c: Any) -> None:
    """Raises ConfigError for the first value, or pair of values, that is impossible."""

    def need(condition: bool, message: str) -> None:
        if not condition:
            raise ConfigError(message)

    _check_ranges(c)
    iterations = c.selfplay.iterations
    need(
        c.selfplay.start <= iterations,
        f"selfplay.start={c.selfplay.start}: at most selfplay.iterations={iterations}",
    )
    for name in PER_ITERATION:
        section, key = name.split(".")
        values = c[section][key]
        need(
            len(values) == 1 or len(values) >= max(iterations, 1),
            f"{name} has {len(values)} values for {iterations} iterations: give one, or one for each",
        )
    need(
        len(c.lengths.expected) == 3,
        f"lengths.expected={c.lengths.expected}: three numbers (prompt, human, generated)",
    )
    sizes = [c.mesh.data, c.mesh.fsdp, c.mesh.tensor]
    need(
        0 not in sizes and sizes.count(-1) < 2,
        f"mesh.data, mesh.fsdp, mesh.tensor = {', '.join(map(str, sizes))}: at least 1, and at most one of "
        "them -1, which takes the devices that are left",
    )
    need(
        bool(c.model.path) or bool(c.model.architecture),
        "model.path is not set, and neither is model.architecture: give --config.model.path=DIRECTORY, or a hub id",
    )
    need(
        bool(c.data.path) or bool(c.selfplay.pairs),
        "data.path is not set: give --config.data.path=FILE, a directory or a hub id",
    )
    need(
        bool(c.data.prompt_column) == bool(c.data.answer_column),
        "data.prompt_column and data.answer_column go together: set both or neither",
    )
    need(
        not c.official or c.lengths.max_prompt < c.lengths.max_length,
        f"official: lengths.max_prompt={c.lengths.max_prompt} must be below lengths.max_length={c.lengths.max_length}",
    )
    need(
        c.selfplay.patience is None or bool(c.checkpoint.best),
        f"selfplay.patience={c.selfplay.patience} needs checkpoint.best, the number that must improve",
    )
    need(
        not c.eval.include_path or bool(c.eval.tasks),
        f"eval.include_path={c.eval.include_path!r} is of no use without eval.tasks",
    )
    need(
        c.selfplay.rows == "all" or bool(c.eval.verifier),
        f"selfplay.rows={c.selfplay.rows!r} needs eval.verifier, which says which answers are right",
    )
    need(
        c.selfplay.rows == "all" or not c.selfplay.scorer,
        f"selfplay.rows={c.selfplay.rows!r} and selfplay.scorer both judge answers: leave one of them out",
    )
    paths = data_paths(c.data.path)
    need(
        len(paths) < 2 or len(paths) >= iterations,
        f"data.path has {len(paths)} datasets for {iterations} iterations: give one, or one for each",
    )
    given_pairs(c)
    task_names(c)


def data_paths(path: str | None) -> list[str]:
    """data.path as a list: empty, one dataset for all iterations, or one for each."""
    if path and os.path.exists(path):  # also if there is a comma in its name
        return [path]
    return [part.strip() for part in (path or "").split(",") if part.strip()]


def algorithm_notes(c: Mapping[str, Any]) -> list[str]:
    """Phrases on how the algorithm differs from SPIN, apart from the loss and β."""
    loss, play = c["loss"], c["selfplay"]
    weight, options, alpha = (loss.get(key) for key in ("nll_weight", "options", "reference_alpha"))
    samples, rows, scorer, restart = (play.get(key) for key in ("samples", "rows", "scorer", "restart"))
    phrases = [
        weight and f"{weight:g} × NLL of the human answer",
        options,
        alpha not in (None, 1) and f"reference {alpha:g} × the opponent's and {1 - alpha:g} × the start's",
        samples not in (None, 1) and f"{samples} answers per prompt",
        rows not in (None, "all") and f"only answers that {c['eval'].get('verifier')} finds {rows}",
        scorer and f"scores of {scorer}",
        restart and "each iteration trains the start's weights",
    ]
    return [phrase for phrase in phrases if phrase]


def task_names(c: Any) -> list[str]:
    """eval.tasks as a list without duplicates; ConfigError for an empty name."""
    names = [name.strip() for name in (c.eval.tasks or "").split(",")]
    if c.eval.tasks is None:
        return []
    if not all(names):
        raise ConfigError(f"eval.tasks={c.eval.tasks!r}: task names, separated by commas")
    return list(dict.fromkeys(names))


def given_pairs(c: Any) -> dict[int, str]:
    """selfplay.pairs as {iteration: path}."""
    result: dict[int, str] = {}
    position = c.selfplay.start
    for entry in filter(None, (part.strip() for part in (c.selfplay.pairs or "").split(","))):
        number, equals, path = entry.partition("=")
        if equals and number.isdigit():
            result[int(number)] = path
        else:
            result[position] = entry
            position += 1
    if result and max(result) >= c.selfplay.iterations:
        raise ConfigError(
            f"selfplay.pairs gives pairs for iteration {max(result)}, which does not exist: "
            f"selfplay.iterations={c.selfplay.iterations}"
        )
    return result
