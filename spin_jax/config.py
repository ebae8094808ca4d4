"""Every config key, with its default and meaning. Files in configs/ start from `default()`.

Any key can be set on the command line as --config.section.key=value. Keys marked "per iteration" are
tuples: one value serves all iterations, a longer tuple gives one to each.
"""

import difflib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from spin_jax.errors import ConfigError


def default() -> Any:
    """The recipe of the paper where it has one, with nothing to train on yet."""
    c = _section()
    c.seed = 42  # of data order, sampling and initialization
    c.compiler_flags = True  # XLA flags that are known to help (COMPILER_FLAGS in spin_jax/command.py)
    c.deterministic = (
        False  # on GPUs: XLA's deterministic operations, so that a run repeats to the bit, slower
    )
    c.resume_anyway = False  # go on though config, data, model or code differ from what the run began with
    c.official = False  # reproduce the quirks of the authors' released code (spin_jax/official.py)

    c.model = m = _section()
    m.path = placeholder(str)  # Hugging Face directory or hub id: the SFT model
    m.revision = placeholder(str)  # branch, tag or commit of a hub id
    m.dtype = "bfloat16"  # of computation and exports; master weights are float32
    m.architecture = _section()  # config.json keys: without a path, of a model to initialize; with one,
    #                              where the checkpoint differs it counts, and a note says so
    m.attention = placeholder(str)  # plain, splash (TPU), flash (CUDA); unset: by platform and dtype
    m.tokenizer = placeholder(str)  # without a path: a directory, or module:function that makes one

    c.data = d = _section()
    d.path = placeholder(str)  # hub id, .jsonl/.json/.parquet, directory, or module:function; several, with
    #                            commas between: one an iteration (held-out rows are the first one's)
    d.name = placeholder(str)  # which configuration of a hub dataset (gsm8k has main and socratic)
    d.revision = placeholder(str)  # of a hub dataset
    d.split = "train"  # in the syntax of datasets: train[:1000] …
    d.limit = placeholder(int)  # use this many rows of a dataset, chosen by the seed
    d.prompt_column = placeholder(str)  # where columns are not found by themselves
    d.answer_column = placeholder(str)
    d.chat_template = placeholder(str)  # Jinja text or a file of it; unset: the tokenizer's
    d.system_message = placeholder(str)  # put before conversations that have none
    d.today = placeholder(str)  # what templates that ask for the date are told, YYYY-MM-DD; unset: the day
    #                             the run began
    d.bad_rows = "error"  # of rows that make no conversation; or drop, which counts them
    d.max_bad = 0.1  # of all rows: more that are dropped so, or for an empty answer, are an error

    c.lengths = n = _section()
    n.max_prompt = 512  # tokens; longer prompts are dropped and counted
    n.max_length = 1024  # tokens of prompt and answer; longer answers are cut and counted
    n.expected = (180, 300, 220)  # prompt, human answer, generated answer: what benchmark assumes

    # An SFT stage before self-play, off unless epochs > 0. Its keys are those of train.
    c.sft = s = _optimization(epochs=0, learning_rate=2e-5)
    s.optimizer = "adamw"
    s.decay = 0.999
    s.control = False  # also train the start on by SFT, for as many steps, and report it beside
    s.control_learning_rate = placeholder(float)  # its peak; unset: learning_rate

    c.selfplay = p = _section()
    p.iterations = 3  # T: self-play runs iterations start … T − 1
    p.start = 0  # begin at this iteration: model.path is then the model of the one before
    p.patience = placeholder(int)  # begin no further iteration once checkpoint.best has not improved for so
    #                                many, over the start's too; unset: never stop early
    p.mix_previous = 1  # how many earlier iterations' pairs are trained on as well
    p.pairs_split = "train"  # of a hub dataset of pairs
    p.pairs = placeholder(str)  # given pairs in place of sampling: path[,path…] for iterations
    #                             start, start + 1, …; or k=path for iteration k
    p.samples = 1  # answers a prompt (K), each a row to train on
    p.rows = "all"  # which of them: all, or those whose answer eval.verifier takes (right) or not (wrong)
    p.scorer = placeholder(str)  # module:function(messages, answers) -> a number for each answer, for losses
    #                              that take a score; messages end with the human answer
    p.restart = False  # an iteration trains the start's weights, not those of the last iteration (ReST-EM)

    c.sampling = a = _section()
    a.max_new_tokens = 256
    a.temperature = 1.0  # 0 is greedy
    a.top_k = placeholder(int)
    a.top_p = placeholder(float)
    a.batch_size = 64  # slots: answers in progress at a time, for every copy of the weights
    a.tensor = placeholder(int)  # devices that share one copy; unset: as few as have room for it
    a.shard_size = 1024  # prompts a file; an interruption costs a file, or four times the slots
    #                      where those are more

    c.loss = o = _section()
    o.name = "logistic"  # logistic, hinge, exponential, correlation, ipo, tspin, likelihood, sppo (see
    #                      spin_jax/losses.py), or module:function
    o.beta = (0.1,)  # per iteration; β of the paper's λ: how much margin is enough
    o.options = placeholder(str)  # other numbers that the loss takes: name=number[,name=number…]
    o.answers = placeholder(str)  # what a row of one's own loss has: generated, and real or start (which
    #                               start answered); unset: real,generated, or what spin_jax's losses want
    o.reference_alpha = 1.0  # α of α-SPIN: log-probs of the opponent's side are α times the opponent's and
    #                          1 − α times the start's; 0: the start's alone, as DPO would
    o.nll_weight = 0.0  # adds this times −log p(human answer)

    c.train = t = _optimization(epochs=(1,), learning_rate=(5e-7,))  # both per iteration
    t.most_skipped = 5  # a step that is not finite is skipped; so many in a row stop the run
    t.remat = "full"  # what the backward pass computes again: full (least memory), attention+mlp or
    #                   attention (which keep what those compute), none (most memory, a quarter less work)

    c.mesh = h = _section()  # devices: data × fsdp × tensor; −1 takes what is left
    h.data = placeholder(int)  # replicas; unset: one a TPU slice or GPU node, 1 where there is but one
    h.fsdp = -1  # splits parameters and batch
    h.tensor = placeholder(int)  # splits heads, MLP and vocabulary; at most the key/value heads;
    #                              unset: 1, or more where a step has not two pairs for each device

    c.eval = e = _section()
    e.fraction = 0.1  # of the rows kept from training …
    e.limit = 500  # … and at most this many
    e.verifier = placeholder(str)  # exact, gsm8k, or module:function(reference, answer) -> bool:
    #                                adds the accuracy of held-out answers, greedy and at temperature 1
    e.samples = 1  # answers a held-out prompt at temperature 1
    e.kl = True  # estimate how far an iteration has moved from its opponent and from the start, in nats an
    #              answer, on those answers: reads the weights of both once more, and then its own again
    e.tasks = placeholder(str)  # task[,task…] of lm-evaluation-harness, run on the start and after each
    #                             iteration; summary.json has their numbers as task/metric
    e.include_path = placeholder(str)  # a directory of task files of one's own
    e.tasks_limit = placeholder(int)  # this many documents a task; unset: all
    e.fixed_prompts = 8  # held-out prompts whose answers go to samples.jsonl

    c.checkpoint = k = _section()
    k.every_steps = 200  # training steps between checkpoints within an iteration
    k.keep = 2  # how many of those to keep, until the iteration is done
    k.best = placeholder(str)  # copy the model of the best iteration to best/, the final model then: by nll,
    #                            loss, margin, greedy_accuracy … or a number of eval.tasks (task/metric)

    c.export = x = _section()
    x.push_to = placeholder(str)  # owner/name on the Hugging Face hub: exported models go to branches there
    #                               (start, iteration_0, …, control); main is the newest, or checkpoint.best
    x.private = True  # whether the repository is private, where it is made for this

    c.logging = g = _section()
    g.tensorboard = True
    g.wandb_project = placeholder(str)  # log to this W&B project as well
    g.plot = True  # draw summary.png at the end
    return c


def _section() -> Any:  # type checkers know nothing of its keys
    return ConfigDict()


def _optimization(epochs: Any, learning_rate: Any) -> Any:
    """Keys that `train` and `sft` share."""
    o = _section()
    o.optimizer = "rmsprop"  # rmsprop (PyTorch's form), adamw, adafactor
    o.learning_rate = learning_rate  # its peak
    o.schedule = "linear"  # linear, cosine, constant; each after the warm-up
    o.warmup_ratio = 0.1  # of the schedule's steps
    o.weight_decay = 0.0
    o.momentum = 0.9  # AdamW's β1
    o.decay = 0.99  # of squared gradients: RMSProp's α, AdamW's β2
    o.eps = 1e-8
    o.clip_norm = placeholder(float)  # clip gradients to this norm; unset: not
    o.offload = False  # keep the optimizer's state in the hosts' memory between steps
    o.batch_size = 64  # pairs (SFT: conversations) an optimizer step
    o.tokens_per_device = 8192  # at most so many at a time (or one row); gradients are accumulated
    o.row_length = placeholder(int)  # of packed rows, in tokens; unset: what wastes least on this data
    o.epochs = epochs  # passes over the data
    o.schedule_epochs = placeholder(int)  # length of the schedule; unset: epochs
    o.lora_rank = placeholder(int)  # train adapters of this rank, with the weights frozen; unset: the weights
    o.lora_alpha = 16.0  # an adapter counts lora_alpha / lora_rank times
    o.lora_targets = ("wq", "wk", "wv", "wo", "gate", "up", "down")  # weights that get one
    return o


PER_ITERATION = ("loss.beta", "train.learning_rate", "train.epochs")


def resolve(config: Mapping[str, Any] | ConfigDict) -> Any:
    """A whole, checked config: `config` laid over the defaults.

    Args:
        config: a ConfigDict or nested dict; what it leaves out keeps its default.

    Raises:
        ConfigError: an unknown key (naming the nearest), a wrong type, an impossible value.
    """
    if not isinstance(config, Mapping | ConfigDict):
        raise ConfigError(
            f"the config is {config!r}, and should be a ConfigDict: start from config.default()"
        )
    given = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    resolved = default()
    _lay_over(resolved, given, "")
    _check(resolved)
    return resolved


def _lay_over(config: Any, given: Mapping[str, Any], prefix: str) -> None:
    for key, value in given.items():
        name = f"{prefix}{key}"
        if not isinstance(key, str) or "." in key:
            raise ConfigError(f"config has no key {name}: keys are names, and sections hold them")
        if prefix == "model.architecture.":
            with config.unlocked():
                config[key] = value
        elif key not in config:
            raise ConfigError(f"config has no key {name}{nearest(key, list(config), prefix)}")
        elif isinstance(config[key], ConfigDict):
            if not isinstance(value, Mapping):
                raise ConfigError(f"config.{name} is a section, and got {value!r}")
            _lay_over(config[key], value, f"{name}.")
        elif value is not None or config[key] is not None:
            if isinstance(config[key], tuple):
                value = tuple(value) if isinstance(value, list | tuple) else (value,)
                fits = all(_is(type(config[key][0]), one) for one in value)
            else:
                fits = _is(config.get_type(key), value)
            if not fits:
                raise ConfigError(f"{name}={value!r}: {wanted(config, key)}")
            try:
                config[key] = value
            except (TypeError, ValueError, OverflowError) as error:  # 10**400 for a float
                raise ConfigError(f"{name}={value!r}: {error}") from error


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _is(kind: type, value: Any) -> bool:
    """Whether a value is of a key's type: whole numbers are numbers, and truth values are not."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def wanted(section: Any, key: str) -> str:
    """What a key's values have to be, in words."""
    if isinstance(section[key], tuple):
        return f"{_KINDS[type(section[key][0])]} is wanted, or several: (1, 2)"
    return f"{_KINDS[section.get_type(key)]} is wanted"


def nearest(key: str, keys: list[str], prefix: str = "") -> str:
    """Names the closest key to a mistyped one, or lists them all; begins with a semicolon."""
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {prefix}{close[0]}?"
    return f"; there are {', '.join(sorted(keys))}"


def tree(config: Any, everything: bool = False) -> str:
    """The config for people: what is not the default, with the default beside it; or all, that marked."""
    rows = list(_branch(config.to_dict(), default().to_dict(), everything))
    if not rows:
        return "config: the defaults"
    widths = [min(max(len(row[column]) for row in rows), 32) for column in (0, 1)]
    lines = [f"{key:<{widths[0]}}  {value:<{widths[1]}}  {was}".rstrip() for key, value, was in rows]
    head = "(*: not the default, which follows)" if everything else "(what is not the default)"
    return "\n".join([f"config {head}", *lines])


def _branch(
    section: Mapping[str, Any], defaults: Mapping[str, Any], everything: bool, indent: str = ""
) -> Iterator[tuple[str, str, str]]:
    """(key, value, default) of a section's lines: its own keys, then the sections in it."""
    for key, value in sorted(section.items(), key=lambda item: isinstance(item[1], Mapping)):
        if isinstance(value, Mapping):
            below = list(_branch(value, defaults.get(key, {}), everything, f"{indent}  "))
            if below:
                yield f"  {indent}{key}", "", ""
                yield from below
        elif key not in defaults or value != defaults[key]:
            was = f"({_shown(defaults[key])})" if key in defaults else ""
            yield f"{'*' if everything else ' '} {indent}{key}", _shown(value), was
        elif everything:
            yield f"  {indent}{key}", _shown(value), ""


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return _shown(value[0]) if len(value) == 1 else ", ".join(map(_shown, value))
    text = "unset" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{section.key: value} of a config."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return result


def per_iteration(values: tuple, iteration: int) -> Any:
    """The value of a per-iteration key at `iteration`."""
    return values[min(iteration, len(values) - 1)]


# What numbers can be, by their key's whole name or its last part: [ and ] take the end in, ( and ) do not.
# Of a tuple, each. Floats stay clear of what float32 rounds to 0 or infinity.
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
    "[2, 2147483647]": ("max_length",),  # a prompt and an answer
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
    if float(high) < 1e6 or number >= float(high):  # an end far off goes without saying
        words += f" and at most {high}" if interval[-1] == "]" else f" and below {high}"
    return words


def _check(c: Any) -> None:
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
            f"{name} has {len(values)} values for {iterations} iterations: give one, or one each",
        )
    need(
        len(c.lengths.expected) == 3,
        f"lengths.expected={c.lengths.expected}: three numbers (prompt, human, generated)",
    )
    sizes = [c.mesh.data, c.mesh.fsdp, c.mesh.tensor]
    need(
        0 not in sizes and sizes.count(-1) < 2,
        f"mesh.data, mesh.fsdp, mesh.tensor = {', '.join(map(str, sizes))}: at least 1, and at most one of "
        "them -1 (what is left)",
    )
    need(
        bool(c.model.path) or bool(c.model.architecture),
        "model.path is not set, nor model.architecture: --config.model.path=DIRECTORY or a hub id",
    )
    need(
        bool(c.data.path) or bool(c.selfplay.pairs),
        "data.path is not set: --config.data.path=FILE, a directory or a hub id",
    )
    need(
        bool(c.data.prompt_column) == bool(c.data.answer_column),
        "data.prompt_column and data.answer_column go together: set both or neither",
    )
    need(
        not c.official or c.lengths.max_prompt < c.lengths.max_length,
        f"official: lengths.max_prompt={c.lengths.max_prompt} must be below "
        f"lengths.max_length={c.lengths.max_length}",
    )
    need(
        c.selfplay.patience is None or bool(c.checkpoint.best),
        f"selfplay.patience={c.selfplay.patience} needs checkpoint.best: the number that is to improve",
    )
    need(
        not c.eval.include_path or bool(c.eval.tasks),
        f"eval.include_path={c.eval.include_path!r} is of no use without eval.tasks",
    )
    need(
        c.selfplay.rows == "all" or bool(c.eval.verifier),
        f"selfplay.rows={c.selfplay.rows!r} needs eval.verifier, which says what is right",
    )
    need(
        c.selfplay.rows == "all" or not c.selfplay.scorer,
        f"selfplay.rows={c.selfplay.rows!r} and selfplay.scorer both judge answers: leave one of them out",
    )
    paths = data_paths(c.data.path)
    need(
        len(paths) < 2 or len(paths) >= iterations,
        f"data.path has {len(paths)} datasets for {iterations} iterations: give one, or one each",
    )
    given_pairs(c)
    task_names(c)


def data_paths(path: str | None) -> list[str]:
    """data.path as a list: nothing, one dataset for all iterations, or one each."""
    if path and os.path.exists(path):  # whatever commas are in its name
        return [path]
    return [part.strip() for part in (path or "").split(",") if part.strip()]


def beside_loss(c: Mapping[str, Any]) -> list[str]:
    """What makes the algorithm beside loss and β, where it is not SPIN's, in words."""
    loss, play = c["loss"], c["selfplay"]
    weight, options, alpha = (loss.get(key) for key in ("nll_weight", "options", "reference_alpha"))
    samples, rows, scorer, restart = (play.get(key) for key in ("samples", "rows", "scorer", "restart"))
    said = [
        weight and f"{weight:g} × NLL of the human answer",
        options,
        alpha not in (None, 1) and f"{alpha:g} of the reference the opponent's and {1 - alpha:g} the start's",
        samples not in (None, 1) and f"{samples} answers a prompt",
        rows not in (None, "all") and f"trained on those that {c['eval'].get('verifier')} takes for {rows}",
        scorer and f"scored by {scorer}",
        restart and "the start's weights trained anew each time",
    ]
    return [text for text in said if text]


def task_names(c: Any) -> list[str]:
    """eval.tasks as a list; ConfigError where it names none."""
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
            f"selfplay.pairs gives pairs for iteration {max(result)}, and "
            f"selfplay.iterations={c.selfplay.iterations}"
        )
    return result
