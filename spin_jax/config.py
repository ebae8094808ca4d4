"""Every config key, with its meaning above it and its default. Files in configs/ start from `default()`.

Any key can be set on the command line as --config.section.key=value. A key marked "per iteration" is a tuple:
one value holds for all iterations, a longer tuple has one value for each. A key with `placeholder(type)` is
unset until someone gives it a value of that type.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from spin_jax.config_values import check, nearest, typed
from spin_jax.errors import ConfigError


class Config(Mapping[str, Any]):
    """A resolved config, or a section of one. Its keys are attributes, and their values never change.

    `resolve` makes it from a ConfigDict. The rest of a run sees only this class.
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
    """The recipe of the paper, where the paper states it, without a model and without data."""
    c: Any = ConfigDict()

    # The seed decides the order of the data, the sampling, and the initialization of new weights.
    c.seed = 42
    # XLA gets the flags that are known to help: COMPILER_FLAGS in spin_jax/runtime/platforms.py.
    c.compiler_flags = True
    # On GPUs, XLA takes deterministic operations: a run then repeats to the bit, and is slower.
    c.deterministic = False
    # A run continues although its config, data, model or code has changed since it began.
    c.resume_anyway = False
    # The run reproduces the quirks of the authors' released code, which spin_jax/data/official.py lists.
    c.official = False

    # --- the model that training starts from ---
    c.model = ConfigDict()
    # The SFT model: a Hugging Face directory or a hub id.
    c.model.path = placeholder(str)
    # The branch, tag or commit of a hub id.
    c.model.revision = placeholder(str)
    # LoRA adapters in PEFT's format, which are merged into the weights of model.path when these are read: a directory,
    # a hub id, or OWNER/NAME@REVISION.
    c.model.adapters = placeholder(str)
    # The type of the computation and of exported models. The weights that are trained stay float32.
    c.model.dtype = "bfloat16"
    # The keys of a config.json. Without a path they describe a new model with random weights. With a path
    # the checkpoint's own values win, and a note names those that differ.
    c.model.architecture = ConfigDict()
    # How attention is computed: plain, splash (TPU) or flash (CUDA). Unset: platform and dtype decide.
    c.model.attention = placeholder(str)
    # The tokenizer of a model without a path: a directory, or module:function, which returns one.
    c.model.tokenizer = placeholder(str)

    # --- the prompts and their human answers ---
    c.data = ConfigDict()
    # A hub id, a .jsonl, .json or .parquet file, a directory of them, or module:function. 0.7*A+0.3*B mixes two, so
    # that 70% of the rows are of A. Several, separated by commas, give one dataset, or one mixture, to each iteration;
    # held-out rows then come from the first one.
    c.data.path = placeholder(str)
    # The configuration of a dataset of the hub, or of a clone of one (gsm8k has main and socratic).
    c.data.name = placeholder(str)
    # The branch, tag or commit of a hub dataset.
    c.data.revision = placeholder(str)
    # The split, in the syntax of the datasets library: train[:1000].
    c.data.split = "train"
    # At most this many rows of a dataset, or of a mixture, are used; the seed chooses them. Unset: all that there are.
    c.data.limit = placeholder(int)
    # The columns of prompt and answer. Unset: they are found by their usual names.
    c.data.prompt_column = placeholder(str)
    c.data.answer_column = placeholder(str)
    # Jinja text, or a file that has it. Unset: the tokenizer's own template.
    c.data.chat_template = placeholder(str)
    # A system message for conversations that have none.
    c.data.system_message = placeholder(str)
    # The date, YYYY-MM-DD, for templates that ask for it. Unset: the day on which the run began.
    c.data.today = placeholder(str)
    # What a row does that is no conversation: error ends the run, drop leaves the row out and counts it.
    c.data.bad_rows = "error"
    # The run ends if more than this share of the rows is dropped as bad or for an empty answer.
    c.data.max_bad = 0.1
    # The run ends if a smaller share of the human answers ends in a stop token: the model would not learn to end.
    # Answers that are cut at lengths.max_length do not count.
    c.data.min_ended = 0.5

    # --- lengths, in tokens ---
    c.lengths = ConfigDict()
    # Longer prompts are dropped and counted.
    c.lengths.max_prompt = 512
    # The most for a prompt with one answer. Longer answers are cut and counted.
    c.lengths.max_length = 1024
    # The lengths of prompt, human answer and generated answer that `benchmark` and `plan` assume.
    c.lengths.expected = (180, 300, 220)

    # --- an SFT stage before self-play, which is off unless epochs > 0 ---
    # It has the keys of train, which `_optimization` explains, and these.
    c.sft = _optimization(epochs=0, learning_rate=2e-5)
    c.sft.optimizer = "adamw"
    c.sft.decay = 0.999
    # The assistant's turns that SFT and its control train on: last or all. Self-play trains on the last one, and
    # held-out numbers are of the last one.
    c.sft.turns = "last"
    # A control continues the start's SFT for as many steps as self-play takes. Its numbers are reported as well.
    c.sft.control = False
    # The peak learning rate of the control. Unset: sft.learning_rate.
    c.sft.control_learning_rate = placeholder(float)

    # --- self-play ---
    c.selfplay = ConfigDict()
    # T of the paper: self-play runs the iterations start, …, T − 1.
    c.selfplay.iterations = 3
    # The first iteration. If it is not 0, model.path is the model of the iteration before.
    c.selfplay.start = 0
    # No further iteration begins once checkpoint.best has not improved for this many iterations. The start's
    # value counts as well. Unset: the run never stops early.
    c.selfplay.patience = placeholder(int)
    # The pairs of this many earlier iterations are trained on as well.
    c.selfplay.mix_previous = 1
    # The split of the pairs, given or added, if they are a dataset of the hub or a directory: train, train_prefs,
    # train+test.
    c.selfplay.pairs_split = "train"
    # Pairs to train on in place of sampled ones: path[,path…] for iterations start, start + 1, …; or k=path for k.
    c.selfplay.pairs = placeholder(str)
    # Pairs that join those of every iteration, sampled or given, in the forms of selfplay.pairs: their chosen answer
    # stands in the place of the human one, and their rejected one in that of the generated one.
    c.selfplay.add_pairs = placeholder(str)
    # This share of an iteration's own pairs are added ones, which the seed chooses; fewer where there are not enough,
    # because no iteration adds one twice. Pairs that selfplay.rows or selfplay.pairing leaves out count as well.
    c.selfplay.add_share = placeholder(float)
    # K: how many answers to a prompt are sampled; the prompt is read once.
    c.selfplay.samples = 1
    # Which two answers to a prompt make a row, as chosen/rejected: human/own is SPIN, with a row for each sampled
    # answer. Others are human/worst, human/best+worst, best/worst, best_with_human/worst, best/human, right/wrong,
    # and module:function, which configs/README.md explains ("Pairing").
    c.selfplay.pairing = "human/own"
    # Which rows of human/own are used: all, or those with an answer that eval.verifier accepts (right) or rejects
    # (wrong).
    c.selfplay.rows = "all"
    # What gives each answer a number, for losses that take a score and for selfplay.pairing: a reward model (a
    # directory, a hub id, or OWNER/NAME@REVISION of a model for sequence classification with one label), or
    # module:function(messages, answers), where the last message is the human answer.
    c.selfplay.scorer = placeholder(str)
    # Each token of an answer takes this much from its score.
    c.selfplay.length_penalty = 0.0
    # The opponent is a moving average of weights: the next one is opponent_decay × this one + the rest × the trained
    # weights. It answers and is the reference. Training goes on from the trained weights, and those are evaluated and
    # exported. With 0 they are the next opponent themselves.
    c.selfplay.opponent_decay = 0.0
    # Each iteration trains the start's weights, and not those of the iteration before (ReST-EM).
    c.selfplay.restart = False

    # --- sampling ---
    c.sampling = ConfigDict()
    # The most tokens of an answer.
    c.sampling.max_new_tokens = 256
    # 0 is greedy.
    c.sampling.temperature = 1.0
    # Tokens are drawn from the top_k most probable ones, or from the fewest that have the probability top_p
    # together. Unset: from all.
    c.sampling.top_k = placeholder(int)
    c.sampling.top_p = placeholder(float)
    # Slots: how many answers each copy of the weights has in progress at a time.
    c.sampling.batch_size = 64
    # Who answers for the opponent: ours, or http://HOST:PORT[,http://…] of servers such as vLLM and SGLang, which serve
    # the opponent's export and get batch_size requests at a time each, with the key in the environment variable
    # OPENAI_API_KEY. The answers by which a model is evaluated are always of our own engine. Unset: ours.
    c.sampling.engine = placeholder(str)
    # In place of it, a shell command that starts such a server for each iteration: vllm serve {model} --port {port}.
    # The run fills in the folder, which is on a disk, and a free port, and stops it; launch/README.md has more.
    c.sampling.command = placeholder(str)
    # A server that does not start, or does not answer, within this many seconds is given up.
    c.sampling.timeout_s = 1200
    # How many devices share one copy of the weights. Unset: as few as have room for it.
    c.sampling.tensor = placeholder(int)
    # How many prompts a file of pairs has. An interruption loses the work on one file, or on four times as
    # many prompts as there are slots where that is more.
    c.sampling.shard_size = 1024

    # --- the loss ---
    c.loss = ConfigDict()
    # A name in LOSSES of spin_jax/losses.py, where each is explained: logistic, hinge, ipo, simpo, …; or
    # module:function. A sum of several has a weight before each, as in 0.8*logistic+0.2*hinge.
    c.loss.name = "logistic"
    # Per iteration, and one for all losses of a sum. The λ of the paper: with a larger β a smaller margin is enough.
    c.loss.beta = (0.1,)
    # Values for further parameters of the loss: name=number[,name=number…]. In a sum, each loss gets those it has.
    c.loss.options = placeholder(str)
    # The answers that a row has for a loss of your own: generated, and with it real or start, which is the
    # start's answer. Unset: real,generated, or what the losses of spin_jax need that loss.name has.
    c.loss.answers = placeholder(str)
    # α of α-SPIN: the reference log-probs are α times the opponent's and 1 − α times the start's. With 0 they
    # are the start's alone, as in DPO.
    c.loss.reference_alpha = 1.0
    # The opponents of earlier iterations are references as well, each with so many times the weight of the next one: 0
    # leaves the last one alone, and 1 weighs all alike, as in fictitious play. Each scores all pairs.
    c.loss.reference_decay = 0.0
    # This many times −log p(human answer) is added to the loss; with selfplay.pairing, of the chosen answer.
    c.loss.nll_weight = 0.0

    # --- training; `_optimization` explains the other keys ---
    c.train = _optimization(epochs=(1,), learning_rate=(5e-7,))  # both per iteration
    # A step that is not finite is skipped. This many in a row end the run.
    c.train.most_skipped = 5
    # What the backward pass computes again: full (least memory), attention+mlp or attention, which keep the
    # results of the parts that they name, or none (most memory, a quarter less work).
    c.train.remat = "full"

    # --- devices: data × fsdp × context × tensor, where −1 takes the devices that are left (but not as context) ---
    c.mesh = ConfigDict()
    # Replicas of the weights. Unset: one for each TPU slice or GPU node, and 1 where there is only one.
    c.mesh.data = placeholder(int)
    # Splits the weights and the batch.
    c.mesh.fsdp = -1
    # Splits the tokens of a row, and the weights: for rows that are longer than one device has room for. Training and
    # scoring do this; the sampler has whole answers.
    c.mesh.context = 1
    # Splits heads, MLP and vocabulary, into at most as many parts as there are key/value heads. Unset: 1, or
    # more where a step has fewer than two pairs for each device.
    c.mesh.tensor = placeholder(int)

    # --- evaluation on held-out rows ---
    c.eval = ConfigDict()
    # A dataset that is held out, in the form of data.path: at most `limit` of its rows, and its prompts are left out
    # of training. Unset: a share of the rows of data.path is held out.
    c.eval.path = placeholder(str)
    # The split of eval.path, where it is a hub dataset or a directory.
    c.eval.split = "test"
    # This share of the rows of data.path is held out, and at most `limit` rows; rows with equal prompts go together.
    c.eval.fraction = 0.1
    c.eval.limit = 500
    # exact, gsm8k, or module:function(reference, answer) -> bool. It adds the accuracy of held-out answers,
    # greedy and at temperature 1.
    c.eval.verifier = placeholder(str)
    # How many answers at temperature 1 a held-out prompt gets.
    c.eval.samples = 1
    # Estimates, from those answers, how far an iteration has moved from its opponent and from the start, in
    # nats per answer. This loads the weights of both once more, and then the iteration's own again.
    c.eval.kl = True
    # task[,task…] of lm-evaluation-harness, for the start and after each iteration. summary.json has their
    # numbers as task/metric.
    c.eval.tasks = placeholder(str)
    # A directory with task files of your own.
    c.eval.include_path = placeholder(str)
    # The most documents of a task. Unset: all.
    c.eval.tasks_limit = placeholder(int)
    # samples.jsonl has the answers to this many held-out prompts.
    c.eval.fixed_prompts = 8

    # --- checkpoints and the final model ---
    c.checkpoint = ConfigDict()
    # The training steps between two checkpoints of an iteration.
    c.checkpoint.every_steps = 200
    # How many of these checkpoints are kept. When the iteration is done, they are deleted.
    c.checkpoint.keep = 2
    # The number of summary.json that says which iteration is best: nll, loss, margin, greedy_accuracy, …, or
    # task/metric. That iteration's model is copied to best/ and is the final model. Unset: the last one is.
    c.checkpoint.best = placeholder(str)

    # --- exported models ---
    c.export = ConfigDict()
    # Models that were trained with LoRA get a folder adapters/ with their adapters in PEFT's format. They stand on the
    # model that the training began from: the iteration before, the start, or model.path.
    c.export.adapters = False
    # owner/name on the Hugging Face hub. Each exported model goes to a branch there (start, iteration_0, …,
    # control), and main is the newest one, or the best by checkpoint.best.
    c.export.push_to = placeholder(str)
    # Whether the repository is private, if the run creates it.
    c.export.private = True

    # --- logs ---
    c.logging = ConfigDict()
    # Metrics are also written for TensorBoard.
    c.logging.tensorboard = True
    # Metrics are also logged to this project of Weights & Biases.
    c.logging.wandb_project = placeholder(str)
    # The first and the last step of training that are profiled: 10,13. The trace is of the first iteration that takes
    # these steps, and goes to WORKDIR/profile, which xprof and TensorBoard open; a workdir gets one. Unset: none.
    c.logging.profile_steps = placeholder(tuple)
    # The charts of summary.png are made at the end.
    c.logging.plot = True
    return c


def _optimization(epochs: Any, learning_rate: Any) -> Any:
    """The keys that `train` and `sft` share."""
    train: Any = ConfigDict()
    # A name in OPTIMIZERS of training/optimizer.py: rmsprop (in PyTorch's form), adamw or adafactor.
    train.optimizer = "rmsprop"
    # The peak of the schedule.
    train.learning_rate = learning_rate
    # linear, cosine or constant, each after the warm-up.
    train.schedule = "linear"
    # The warm-up's share of the steps of the schedule.
    train.warmup_ratio = 0.1
    train.weight_decay = 0.0
    # β1 of AdamW.
    train.momentum = 0.9
    # The decay of the mean squared gradient: α of RMSProp, β2 of AdamW.
    train.decay = 0.99
    # The ε of the optimizer.
    train.eps = 1e-8
    # Gradients are clipped to this norm. Unset: they are not clipped.
    train.clip_norm = placeholder(float)
    # The optimizer's state stays in the memory of the hosts between steps.
    train.offload = False
    # The pairs of an optimizer step; the conversations, in SFT.
    train.batch_size = 64
    # A device gets at most this many tokens at a time, or one row. Gradients are accumulated over a step.
    train.tokens_per_device = 8192
    # The tokens of a packed row. Unset: the length that wastes least on this data.
    train.row_length = placeholder(int)
    # Passes over the data.
    train.epochs = epochs
    # The length of the schedule in epochs. Unset: epochs.
    train.schedule_epochs = placeholder(int)
    # Adapters of this rank are trained, and the weights are frozen. Unset: the weights are trained.
    train.lora_rank = placeholder(int)
    # An adapter is multiplied by lora_alpha / lora_rank.
    train.lora_alpha = 16.0
    # The weights that get an adapter.
    train.lora_targets = ("wq", "wk", "wv", "wo", "gate", "up", "down")
    # int8 or nf4: what the frozen matrices of the layers are stored in, by qwix. Unset: model.dtype.
    train.frozen_dtype = placeholder(str)
    return train


def resolve(config: Mapping[str, Any] | ConfigDict) -> Config:
    """A complete, checked config: `config`, a ConfigDict or nested dict, laid over the defaults.

    Raises:
        ConfigError: a key is unknown (the error names the nearest one), or has a wrong type or an impossible value.
    """
    if not isinstance(config, Mapping | ConfigDict):
        raise ConfigError(f"the config is {config!r}, and should be a ConfigDict, such as config.default() returns")
    given = config.to_dict() if isinstance(config, ConfigDict | Config) else dict(config)
    resolved = default()
    _lay_over(resolved, given, "")
    frozen = Config(resolved.to_dict())
    check(frozen)
    return frozen


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
            value = typed(config, key, value, name)
            try:
                config[key] = value
            except (TypeError, ValueError, OverflowError) as error:  # 10**400 for a float
                raise ConfigError(f"{name}={value!r}: {error}") from error
