"""Which values a config key may have, and how values are read that have several parts in one text.

`check` has the rules for single values and for keys that depend on each other.
"""

import contextlib
import difflib
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any

from ml_collections import ConfigDict

from spin_jax.errors import ConfigError

PER_ITERATION = ("loss.beta", "train.learning_rate", "train.epochs")

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", ConfigDict: "a section"}


def typed(section: Any, key: str, value: Any, name: str) -> Any:
    """`value` as a key holds it: in a tuple, where its default is a tuple. ConfigError if the type is another one.

    A whole number is a number too; True and False are not numbers.
    """
    several = section.get_type(key) is tuple
    kind = type((section[key] or (0,))[0]) if several else section.get_type(key)  # unset: whole numbers
    values = tuple(value) if several and isinstance(value, list | tuple) else (value,)
    result = values if several else value
    accepted = int | float if kind is float else kind
    if not all(isinstance(one, accepted) and isinstance(one, bool) == (kind is bool) for one in values):
        raise ConfigError(f"{name}={result!r}: {KINDS[kind]} is wanted{', or several: (1, 2)' if several else ''}")
    return result


def nearest(key: str, keys: list[str], prefix: str = "") -> str:
    """The end of a message, from its semicolon on: the key nearest to a mistyped one, or all keys."""
    if not keys:
        return ""
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{close[0]}?" if close else f"; there are {', '.join(sorted(keys))}"


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config as {"section.key": value}."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return result


def per_iteration(values: tuple, iteration: int) -> Any:
    """The value that a per-iteration key has for an iteration."""
    return values[min(iteration, len(values) - 1)]


# The interval of each key with a number, under the key's whole name or its last part. [ and ] include the end, ( and )
# exclude it. In a tuple each number is checked. The intervals of floats leave out what float32 would round to 0 or
# infinity.
_RANGES = {
    "[0, 2147483647]": "seed fixed_prompts profile_steps",
    "[1, 2147483647]": "data.limit eval.tasks_limit expected every_steps keep lora_rank max_new_tokens max_prompt "
    "most_skipped row_length selfplay.samples sampling.tensor shard_size top_k",
    "[2, 2147483647]": "max_length",  # one token for the prompt and one for the answer
    "[1, 1048576]": "batch_size mesh.context timeout_s tokens_per_device",
    "[-1, 1048576]": "mesh.data mesh.fsdp mesh.tensor",
    "[0, 10000]": "iterations start mix_previous sft.epochs",
    "[1, 10000]": "train.epochs eval.samples patience schedule_epochs",
    "[0, 500]": "eval.limit",
    "[0, 0.1]": "eval.fraction",
    "[0, 1]": "max_bad min_ended reference_alpha reference_decay warmup_ratio",
    "[0, 1)": "momentum decay opponent_decay",
    "(0, 1)": "add_share",
    "(0, 1]": "top_p",
    "[1e-37, 1]": "eps",
    "[0, 1e30]": "length_penalty nll_weight temperature weight_decay",
    "(0, 1e30]": "beta clip_norm control_learning_rate learning_rate lora_alpha",
}
_RANGE_OF = {name: interval for interval, names in _RANGES.items() for name in names.split()}
_CHOICES = {
    "train.remat": ("none", "attention", "attention+mlp", "full"),
    "model.attention": ("plain", "splash", "flash"),
    "model.dtype": ("float32", "bfloat16", "float16"),
    "data.bad_rows": ("error", "drop"),
    "sft.turns": ("last", "all"),
    "train.frozen_dtype": ("int8", "nf4"),
    "sft.frozen_dtype": ("int8", "nf4"),
    "selfplay.rows": ("all", "right", "wrong"),
}


# The values of selfplay.pairing beside module:function, chosen/rejected.
PAIRINGS = ("human/own", "human/worst", "human/best+worst", "best/worst")
PAIRINGS += ("best_with_human/worst", "best/human", "right/wrong")


def rows_of_a_prompt(play: Any) -> int:
    """The most rows that the answers to a prompt give; of a user's pairing function nobody knows, and K is assumed."""
    counts = {"human/own": play.samples, "human/best+worst": 2}
    return counts.get(play.pairing, play.samples if ":" in play.pairing else 1)


def answers_wanted(play: Any, held_out: bool) -> int:
    """How many answers a prompt gets. A held-out one gets a single answer, unless a scorer compares them."""
    return play.samples if play.scorer or not held_out else 1


def verifier_judges(play: Any) -> bool:
    """Whether eval.verifier says which answers are trained on."""
    return play.rows != "all" or play.pairing == "right/wrong"


def _check_each(c: Mapping[str, Any]) -> None:
    for name, value in flat(c).items():
        if value is None or name.startswith("model.architecture."):
            continue
        if name in _CHOICES and value not in _CHOICES[name]:
            raise ConfigError(f"{name}={value!r}: one of {', '.join(_CHOICES[name])}")
        if interval := _RANGE_OF.get(name, _RANGE_OF.get(name.rpartition(".")[2])):
            low, high = map(float, interval[1:-1].split(","))
            for number in value if isinstance(value, tuple) else (value,):
                above = low <= number if interval[0] == "[" else low < number
                if not (above and (number <= high if interval[-1] == "]" else number < high)):
                    raise ConfigError(f"{name}={value}: {_in_words(interval, number)}")


def _in_words(interval: str, number: float) -> str:
    low, high = interval[1:-1].split(", ")
    words = f"at least {low}" if interval[0] == "[" else f"above {low}"
    if float(high) < 1e6 or number >= float(high):  # a very large end is named only if it was exceeded
        words += f" and at most {high}" if interval[-1] == "]" else f" and below {high}"
    return words


def check(c: Any) -> None:
    """Raises ConfigError for the first value, or pair of values, of a Config that is impossible."""
    _check_each(c)
    if problem := next(_contradictions(c), None):
        raise ConfigError(problem)
    given_pairs(c)
    task_names(c)


def _contradictions(c: Any) -> Iterator[str]:
    """What is wrong with values that depend on each other."""
    play, lengths, iterations, values = c.selfplay, c.lengths, c.selfplay.iterations, flat(c)
    if play.start > iterations:
        yield f"selfplay.start={play.start}: at most selfplay.iterations={iterations}"
    for name in PER_ITERATION:
        count = len(values[name])
        if count != 1 and count < max(iterations, 1):
            yield f"{name} has {count} values for {iterations} iterations: give one, or one for each"
    if len(lengths.expected) != 3:
        yield f"lengths.expected={lengths.expected}: three numbers (prompt, human, generated)"
    sizes = [c.mesh.data, c.mesh.fsdp, c.mesh.tensor]
    if 0 in sizes or sizes.count(-1) > 1:
        shown = f"mesh.data, mesh.fsdp, mesh.tensor = {', '.join(map(str, sizes))}"
        yield f"{shown}: at least 1, and at most one of them -1, which takes the devices that are left"
    if not c.model.path and not c.model.architecture:
        missing = "model.path is not set, and neither is model.architecture"
        yield f"{missing}: give --config.model.path=DIRECTORY, or a hub id"
    yield from _adapter_contradictions(c)
    if not c.data.path and not play.pairs:
        yield "data.path is not set: give --config.data.path=FILE, a directory or a hub id"
    if bool(c.data.prompt_column) != bool(c.data.answer_column):
        yield "data.prompt_column and data.answer_column go together: set both or neither"
    if c.official and lengths.max_prompt >= lengths.max_length:
        yield f"official: lengths.max_prompt={lengths.max_prompt} must be below lengths.max_length={lengths.max_length}"
    if c.official and play.pairing != "human/own":  # it cuts a prompt by the answer, and pairing moves answers
        yield f"official goes with selfplay.pairing=human/own only, and it is {play.pairing!r}"
    if c.sft.turns == "all" and (c.official or not c.data.path):
        yield "sft.turns='all' needs the conversations of data.path, and official has one answer of each"
    if play.patience is not None and not c.checkpoint.best:
        yield f"selfplay.patience={play.patience} needs checkpoint.best, the number that must improve"
    if c.eval.include_path and not c.eval.tasks:
        yield f"eval.include_path={c.eval.include_path!r} is of no use without eval.tasks"
    if play.rows != "all" and not c.eval.verifier:
        yield f"selfplay.rows={play.rows!r} needs eval.verifier, which says which answers are right"
    if c.loss.reference_decay and not c.loss.reference_alpha:
        yield "loss.reference_decay weighs earlier opponents, and with loss.reference_alpha=0 none counts: unset one"
    if play.length_penalty and not play.scorer:
        yield "selfplay.length_penalty lowers scores, and there are none: set selfplay.scorer"
    if play.rows != "all" and play.scorer:
        yield f"selfplay.rows={play.rows!r} and selfplay.scorer both judge answers: leave one of them out"
    yield from _pairing_problems(c)
    if bool(play.add_pairs) != bool(play.add_share):
        yield "selfplay.add_pairs and selfplay.add_share go together: which pairs are added, and what share they are"
    if (traced := c.logging.profile_steps) and (len(traced) != 2 or traced[0] > traced[1]):
        yield f"logging.profile_steps={traced}: the first and the last step of the trace, as in 10,13"
    yield from _engine_problems(c)
    datasets = data_mixtures(c.data.path)
    if 2 <= len(datasets) < iterations:
        yield f"data.path has {len(datasets)} datasets for {iterations} iterations: give one, or one for each"


MERGED = (
    "model.path with model.adapters merged is on no disk: save it, "
    "spin_jax.save(spin_jax.load(PATH, adapters=ADAPTERS), FOLDER), and give FOLDER as model.path"
)


def _adapter_contradictions(c: Any) -> Iterator[str]:
    if c.model.adapters and not c.model.path:
        yield "model.adapters needs model.path, the model that the adapters were trained on"
    for name in ("train", "sft"):
        if c[name].frozen_dtype and not c[name].lora_rank:
            yield f"{name}.frozen_dtype needs {name}.lora_rank: without LoRA no weights are frozen"
        if c[name].frozen_dtype and c.train.remat == "none":
            yield f"{name}.frozen_dtype with train.remat='none' would keep all weights as floats: set train.remat=full"
    if not c.export.adapters:
        return
    if not (c.train.lora_rank or c.sft.lora_rank):
        yield "export.adapters needs train.lora_rank or sft.lora_rank: without LoRA there are no adapters"
    if trains_on_path(c) and not c.model.path:
        yield "export.adapters with sft.lora_rank needs model.path: new weights are written nowhere as a base"
    if trains_on_path(c) and c.model.adapters:
        yield f"export.adapters needs a base that PEFT can open, and {MERGED}"


def engine_addresses(sampling: Any) -> list[str]:
    """The servers of sampling.engine, without a final /v1; none where our own engine answers."""
    addresses = [] if sampling.engine in (None, "ours") else sampling.engine.split(",")
    return list(dict.fromkeys(re.sub("(/v1)?/?$", "", address.strip()) for address in addresses))


def _engine_problems(c: Any) -> Iterator[str]:
    command, addresses = c.sampling.command, engine_addresses(c.sampling)
    for address in addresses:
        if not re.fullmatch(r"https?://(\[[\da-fA-F:]+\]|[\w.-]+)(:\d{1,5})?(/[\w./-]+)?", address):
            wanted = "ours, or addresses such as http://HOST:8000, a comma between"
            yield f"sampling.engine has {address!r}: {wanted}. A key is read from the variable OPENAI_API_KEY"
    if command and addresses:
        yield "sampling.engine and sampling.command are both set: leave one of them out"
    if command and not all(name in command for name in ("{model}", "{port}")):
        yield f"sampling.command={command!r} needs {{model}} and {{port}}, which the run fills in"
    if (command or addresses) and c.model.adapters and not c.sft.epochs:
        yield f"an outside engine needs the opponent as a folder, and {MERGED}"
    if (command or addresses) and c.selfplay.opponent_decay:
        yield "selfplay.opponent_decay: an outside engine needs the opponent as a folder, and the average is in none"


def trains_on_path(c: Any) -> bool:
    """Whether adapters are trained on the model of model.path itself, and not on one that the run exports before."""
    return bool(c.sft.lora_rank) if c.sft.epochs else bool(c.model.path)


def _pairing_problems(c: Any) -> Iterator[str]:
    play, said = c.selfplay, f"selfplay.pairing={c.selfplay.pairing!r}"
    if play.pairing not in PAIRINGS and ":" not in play.pairing:
        yield f"{said}: one of {', '.join(PAIRINGS)}, or module:function"
    if play.rows != "all" and play.pairing != "human/own":
        yield f"{said} and selfplay.rows={play.rows!r} both choose answers: leave one of them out"
    if play.pairing == "right/wrong" and not c.eval.verifier:
        yield f"{said} needs eval.verifier, which says which answers are right"
    if play.pairing in PAIRINGS and re.search("best|worst", play.pairing) and not play.scorer:
        yield f"{said} needs selfplay.scorer, which says which answers are better"
    if play.pairing in ("best/worst", "human/best+worst", "right/wrong") and play.samples < 2 and not play.pairs:
        yield f"{said} compares sampled answers to a prompt: set selfplay.samples to 2 or more"


def data_mixtures(path: str | None, known: Callable[[str], bool] = os.path.exists) -> list[dict[str, Fraction]]:
    """The datasets of data.path: none, one for all iterations, or one for each.

    Each is {path: its share of the rows}, of one path or of several that are mixed. What is `known` is one path, also
    if there is a comma or a star in it.

    Raises:
        ConfigError: a mixture has a malformed weight, a single path, or a path twice.
    """
    entries = [path] if path and known(path) else _parts(path)
    return [_mixture(entry) if "*" in entry and not known(entry) else {entry: Fraction(1)} for entry in entries]


def _mixture(entry: str) -> dict[str, Fraction]:
    parts: list[tuple[Fraction, str]] = []
    with contextlib.suppress(ValueError):
        parts = _weighted(entry)
    weights = {path: weight for weight, path in parts}
    if not 2 <= len(weights) == len(parts) or not all(weights):
        raise ConfigError(
            f"data.path has {entry!r}, and there is no such file: a mixture of datasets is 0.7*PATH+0.3*PATH, where "
            "each path stands once and has a weight above 0"
        )
    return {path: weight / sum(weights.values()) for path, weight in weights.items()}


def loss_parts(name: str) -> list[tuple[float, str]]:
    """The (weight, name) of each loss in loss.name, which is a loss, or WEIGHT*LOSS+WEIGHT*LOSS….

    Raises:
        ConfigError: a weight is not a number above 0.
    """
    try:
        return [(float(weight), loss) for weight, loss in _weighted(name, "1")]
    except ValueError as error:
        raise ConfigError(f"loss.name={name!r}: {error}; 0.8*logistic+0.2*hinge is a sum") from error


def _weighted(text: str, default: str = "") -> list[tuple[Fraction, str]]:
    """The (weight, name) of each part of WEIGHT*NAME+WEIGHT*NAME…; a name alone has the weight `default`."""
    found = []
    for part in text.split("+"):
        weight, name = part.split("*", 1) if "*" in part else (default, part)
        try:
            number = Fraction(weight.strip())
        except (ValueError, ZeroDivisionError):
            number = Fraction(0)
        if not 1e-30 <= number <= 1e30:
            raise ValueError(f"{weight!r} is no weight above 0")
        found.append((number, name.strip()))
    return found


def data_paths(path: str | None) -> list[str]:
    """Every path in data.path, once."""
    return list(dict.fromkeys(itertools.chain(*data_mixtures(path))))


def _parts(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def algorithm_notes(c: Mapping[str, Any]) -> list[str]:
    """Phrases on how the algorithm differs from SPIN, apart from the loss and β."""
    loss, play = c["loss"], c["selfplay"]
    weight, options, alpha = (loss.get(key) for key in ("nll_weight", "options", "reference_alpha"))
    samples, rows, scorer, restart = (play.get(key) for key in ("samples", "rows", "scorer", "restart"))
    pairing, decay, average = play.get("pairing"), loss.get("reference_decay"), play.get("opponent_decay")
    added, penalty, frozen = play.get("add_share"), play.get("length_penalty"), c["train"].get("frozen_dtype")
    phrases = [
        weight
        and f"{weight:g} × NLL of the {'human' if (pairing or 'human').startswith('human/') else 'chosen'} answer",
        options,
        alpha not in (None, 1) and f"reference {alpha:g} × the opponent's and {1 - alpha:g} × the start's",
        decay and f"earlier opponents are references, each with {decay:g} × the weight of the next",
        samples not in (None, 1) and f"{samples} answers per prompt",
        pairing not in (None, "human/own") and f"pairing {pairing}",
        rows not in (None, "all") and f"only answers that {c['eval'].get('verifier')} finds {rows}",
        scorer and f"scores of {scorer if ':' in scorer or not os.path.isabs(scorer) else os.path.basename(scorer)}",
        penalty and f"{penalty:g} off a score for each token of an answer",
        frozen and f"frozen weights in {frozen}",
        added and f"given pairs added, a share of {added:g}",
        average and f"the opponent is {average:g} × the one before and {1 - average:g} × the trained weights",
        restart and "each iteration trains the start's weights",
    ]
    return [phrase for phrase in phrases if phrase]


def task_names(c: Any) -> list[str]:
    """eval.tasks as a list without duplicates; ConfigError for an empty name."""
    if c.eval.tasks is None:
        return []
    names = [name.strip() for name in c.eval.tasks.split(",")]
    if not all(names):
        raise ConfigError(f"eval.tasks={c.eval.tasks!r}: task names, separated by commas")
    return list(dict.fromkeys(names))


def given_pairs(c: Any) -> dict[int, str]:
    """selfplay.pairs as {iteration: path}; ConfigError for an iteration that does not exist or comes twice."""
    result: dict[int, str] = {}
    position = c.selfplay.start
    for entry in _parts(c.selfplay.pairs):
        number, equals, path = entry.partition("=")
        if equals and number.isdecimal():
            t = int(number)
        else:
            t, path, position = position, entry, position + 1
        if t in result:
            raise ConfigError(f"selfplay.pairs gives pairs for iteration {t} twice, {result[t]} and {path}: give one")
        result[t] = path
    if result and max(result) >= c.selfplay.iterations:
        said = f"selfplay.pairs gives pairs for iteration {max(result)}, which does not exist"
        raise ConfigError(f"{said}: selfplay.iterations={c.selfplay.iterations}")
    return result
