"""Every config key, with its default and meaning. Files in configs/ start from `default()`.

Any key can be set on the command line as --config.section.key=value. Keys marked "per iteration" are
tuples: one value serves all iterations, a longer tuple gives one to each.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from spin_jax.config_values import check, is_of_kind, nearest, wanted
from spin_jax.errors import ConfigError


class Config(Mapping[str, Any]):
    """A resolved config, or a section of one: its keys are attributes, and nothing changes them.

    `resolve` makes it of a ConfigDict, and no other part of a run sees one.
    """

    def __init__(self, values: Mapping[str, Any]):
        frozen = {k: Config(v) if isinstance(v, Mapping) else v for k, v in values.items()}
        object.__setattr__(self, "_values", frozen)

    def __getattr__(self, key: str) -> Any:
        if key.startswith("_") or key not in self._values:
            raise AttributeError(f"config has no key {key}")
        return self._values[key]

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __setattr__(self, key: str, value: Any) -> None:
        raise AttributeError(f"{key}={value!r}: a resolved config does not change; see Config.changed")

    def __repr__(self) -> str:
        return repr(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The same as nested dicts."""
        return {k: v.to_dict() if isinstance(v, Config) else v for k, v in self._values.items()}

    def changed(self, values: Mapping[str, Any]) -> "Config":
        """A resolved copy with other values of some keys, as {"section.key": value}."""
        other = self.to_dict()
        for name, value in values.items():
            section, key = name.split(".")
            other[section][key] = value
        return resolve(other)


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
    o.optimizer = "rmsprop"  # a name in OPTIMIZERS of training/optimizer.py: rmsprop, adamw, …
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


def resolve(config: Mapping[str, Any] | ConfigDict) -> Config:
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
    given = config.to_dict() if isinstance(config, ConfigDict | Config) else dict(config)
    resolved = default()
    _lay_over(resolved, given, "")
    check(resolved)
    return Config(resolved.to_dict())


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
                fits = all(is_of_kind(type(config[key][0]), one) for one in value)
            else:
                fits = is_of_kind(config.get_type(key), value)
            if not fits:
                raise ConfigError(f"{name}={value!r}: {wanted(config, key)}")
            try:
                config[key] = value
            except (TypeError, ValueError, OverflowError) as error:  # 10**400 for a float
                raise ConfigError(f"{name}={value!r}: {error}") from error
