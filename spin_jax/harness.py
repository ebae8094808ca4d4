"""lm-evaluation-harness on a model in memory: its requests, answered by our programs on the model's mesh.

    harness.check_tasks(["gsm8k"])
    harness.run_tasks(model, ["gsm8k"], limit=100)  # {"gsm8k/exact_match/strict-match": 0.37, …}

The model is asked what the harness's own `hf` backend asks it, token for token: special tokens, the space
between context and continuation, left truncation, stop strings. How it is computed is our own. A context is
read once for all its continuations, packed rows are padded hardly at all, and a generated answer makes room
for the next one as soon as it ends.

Importing this raises `Missing` where lm_eval is not installed. Axes: N rows, R response tokens, A answers.
"""

import dataclasses
import logging
import os
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np

from spin_jax import config as config_lib
from spin_jax import config_values
from spin_jax.data.chat_template import Template
from spin_jax.data.records import Ids
from spin_jax.errors import BadRow, HarnessNotInstalled
from spin_jax.models.architecture import Model
from spin_jax.models.decoder import Decoder
from spin_jax.runtime import processes, sharding
from spin_jax.runtime.console import progress
from spin_jax.runtime.sharding import bucket
from spin_jax.sampling.generate import BATCH_SIZE, answer, counting
from spin_jax.sampling.next_token import Sampling, prompt_keys
from spin_jax.selfplay import from_config
from spin_jax.training.log_probs import score_tokens
from spin_jax.training.packing import Group, Rows, RowShape, group_sizes, packed

try:
    import lm_eval.api.task
    from lm_eval import evaluator
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise HarnessNotInstalled(
        f"evaluation tasks need lm-evaluation-harness ({error}): pip install 'spin_jax[eval]'"
    ) from error

os.environ.setdefault("DISABLE_MULTIPROC", "1")  # it would fork for its error bars, and JAX has threads
logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of much that is as it should be

_TOKENS = 256  # of a sequence, as batch sizes count
_TOGETHER = 16  # continuations that share one reading of their context
_AT_ONCE = 4096  # groups in memory as rows
_TRIED = 256  # groups that a shape is chosen by
_SEEDS = {"random": 0, "numpy": 1234, "fewshot": 1234}  # the harness's own: numbers compare with others'


# --- tasks ---------------------------------------------------------------------------------------


def check_tasks(tasks: Sequence[str], include_path: str | None = None) -> None:
    """Raises ValueError for a task, group or tag that the harness does not know, naming the nearest."""
    processes.together(lambda: _manager(tuple(tasks), include_path))


def _manager(names: tuple[str, ...], include_path: str | None) -> TaskManager:
    if not names:
        raise ValueError("no task is named")
    if include_path is not None:
        if not os.path.isdir(include_path):
            raise ValueError(f"include_path={include_path!r}: no such directory")
        own = _index(include_path, False)
        if set(names) <= set(own.all_subtasks):
            return own  # the thousands that come with the harness need not be read
    manager = _index(include_path, True)
    for name in names:
        if name not in manager.task_index:
            hint = config_values.nearest(name, manager.all_tasks)
            hint = hint if "did you mean" in hint else "; `lm-eval ls tasks` lists those that come with it"
            raise ValueError(f"no evaluation task {name!r}{hint}")
    return manager


@lru_cache(maxsize=4)
def _index(include_path: str | None, defaults: bool) -> TaskManager:
    return TaskManager(include_path=include_path, include_defaults=defaults)


class Tasks(NamedTuple):
    """Tasks with their data, ready to be asked."""

    names: tuple[str, ...]  # as they were asked for
    loaded: Any  # the harness's dict of tasks and groups


def load_tasks(
    names: Sequence[str],
    *,
    include_path: str | None = None,
    num_fewshot: int | Mapping[str, int] | None = None,
) -> Tasks:
    """Reads tasks and their data.

    Args:
        names: of tasks, groups or tags.
        include_path: a directory of task files (YAML), which come before the harness's own.
        num_fewshot: examples before each question, or those of each name; None, and a task that says 0,
            keep the task's own.

    Raises:
        ValueError: a task is unknown, its data cannot be read, or it asks for a way of generating that is
            not to be had here.
    """
    random.seed(_SEEDS["random"])
    np.random.seed(_SEEDS["numpy"])
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    manager = processes.together(lambda: _manager(tuple(names), include_path))
    for name in dict.fromkeys(names):
        found = processes.together(lambda name=name: _loaded(manager, name))
        wanted = num_fewshot.get(name) if isinstance(num_fewshot, Mapping) else num_fewshot
        for task in found["tasks"].values():
            _set_fewshot(task, wanted)
        for part in loaded:
            loaded[part].update(found.get(part, {}))
    return Tasks(tuple(names), loaded)


def _loaded(manager: TaskManager, name: str) -> Any:
    try:
        found = manager.load([name])
        for task in found["tasks"].values():
            if task.get_config("output_type") == "generate_until":
                Generation.of(task.get_config("generation_kwargs") or {})
    except Exception as error:  # of any kind: YAML's, the hub's, what a task's own code raises
        raise ValueError(f"evaluation task {name}: {type(error).__name__}: {error}") from error
    return found


def _set_fewshot(task: Any, wanted: int | None) -> None:
    own = task.get_config("num_fewshot")
    if own is None or (wanted is not None and own != 0):
        task.set_config(key="num_fewshot", value=wanted or 0)
    task.set_fewshot_seed(seed=_SEEDS["fewshot"])


def check_asked(tasks: Tasks, model: Model, apply_chat_template: bool = False) -> None:
    """Raises ValueError for what tasks ask of a model that it cannot give."""
    if model.tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer names no EOS token")
    if apply_chat_template and model.tokenizer.chat_template is None:
        raise ValueError("apply_chat_template: the tokenizer has no chat template")
    most = model.config.max_position_embeddings
    for name, task in tasks.loaded["tasks"].items():
        if task.get_config("output_type") == "generate_until":
            limit = Generation.of(task.get_config("generation_kwargs") or {}).limit
            if limit >= most:
                raise ValueError(
                    f"evaluation task {name}: answers of {limit} tokens (max_gen_toks) leave no room for a "
                    f"question, for the model takes {most} (max_position_embeddings)"
                )


def evaluate(
    model: Model,
    tasks: Tasks,
    *,
    limit: int | None = None,
    apply_chat_template: bool = False,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    stderr: bool = False,
    should_stop: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """What the harness makes of a model's answers: its own dict of results, in every process.

    Args:
        tasks: from `load_tasks`.
        limit: questions of each task, from the first on.
        apply_chat_template: ask in the model's chat format, few-shot examples as turns.
        batch_size: answers in progress at a time for every copy of the weights; of what is only scored a
            device takes 256 tokens in place of each.
        seed: of what is drawn, where a task does not ask for the likeliest.
        stderr: also estimate standard errors.
        should_stop: asked between batches; may raise.

    Raises:
        ValueError: the model cannot be asked that.
    """
    check_asked(tasks, model, apply_chat_template)
    if (penalty := model.generation_config.get("repetition_penalty") or 1.0) != 1.0:
        processes.say(f"generation_config.json has repetition_penalty={penalty}: it is not applied")
    asked = HarnessModel(model, batch_size=batch_size, seed=seed, should_stop=should_stop)
    # Its own bars, one for each task, come while requests are made: a moment, and 57 of them for MMLU.
    with mock.patch.object(lm_eval.api.task, "tqdm", lambda docs, **options: docs):
        results = evaluator.evaluate(
            asked,
            tasks.loaded,
            limit=limit,
            bootstrap_iters=1000 if stderr else 0,
            log_samples=False,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=True,
        )
    assert results is not None  # each process is of rank 0 to the harness
    return dict(results)


def run_tasks(
    model: Model,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    should_stop: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Runs tasks, groups or tags on a model, with the few-shot examples that they state themselves.

    Returns:
        what `numbers` makes of the results, the same in every process.

    Raises:
        ValueError: as `load_tasks` does, before anything is computed.
    """
    loaded = load_tasks(tasks, include_path=include_path)
    return numbers(evaluate(model, loaded, limit=limit, seed=seed, should_stop=should_stop), loaded)


def numbers(
    results: Mapping[str, Any], tasks: Tasks | None = None, *, stderr: bool = False
) -> dict[str, float]:
    """The harness's results as flat numbers: task/metric, and task/metric/filter where a filter has a name.

    Args:
        results: from `evaluate`.
        tasks: leave out the tasks within groups that have numbers of their own; None: all are there.
        stderr: the standard errors in place of the numbers.
    """
    groups = tasks.loaded["groups"].values() if tasks else ()
    within = {
        part
        for group in groups
        if group.has_aggregation
        for part in (*(t.task_name for t in group.get_all_tasks()), *(g.name for g in group.get_all_groups()))
        if part != group.name and part not in (tasks.names if tasks else ())
    }
    flat = {}
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            metric, comma, filtered = key.partition(",")
            plain = metric.removesuffix("_stderr")
            wanted = comma and task not in within and (plain != metric) == stderr
            if wanted and isinstance(value, int | float):
                flat["/".join([task, plain, *([] if filtered == "none" else [filtered])])] = float(value)
    return flat


# --- how a task wants to be answered -------------------------------------------------------------

_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first one counts
# What other backends know, at the values that change nothing.
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "use_cache": True}


@dataclasses.dataclass(frozen=True)
class Generation:
    """A request's generation_kwargs, read as the `hf` backend reads them."""

    limit: int  # tokens
    until: tuple[str, ...]
    temperature: float  # 0 is greedy
    top_k: int | None
    top_p: float | None

    @classmethod
    def of(cls, kwargs: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> "Generation":
        """`defaults` are the model's own, from generation_config.json: they count where tokens are drawn.

        Raises:
            ValueError: naming what is not known here, or is impossible.
        """
        rest, defaults = dict(kwargs), defaults or {}
        until = rest.pop("until", None) or []
        until = [until] if isinstance(until, str) else until
        limits = [rest.pop(name, None) for name in _LIMITS]
        do_sample, temperature = rest.pop("do_sample", None), float(rest.pop("temperature", None) or 0.0)
        drawn = temperature > 0 if do_sample is None else bool(do_sample)
        top_k = rest.pop("top_k", defaults.get("top_k", 50))  # transformers' default
        top_p = rest.pop("top_p", defaults.get("top_p"))
        unknown = [name for name, value in rest.items() if _NEUTRAL.get(name, rest) != value]
        if unknown:
            raise ValueError(
                f"generation_kwargs: {unknown[0]}={rest[unknown[0]]!r} is not to be had here; known are "
                f"until, do_sample, temperature, top_k, top_p, {', '.join(_LIMITS)}"
            )
        if drawn and temperature <= 0:
            raise ValueError(f"generation_kwargs: do_sample needs temperature above 0, not {temperature:g}")
        limit = int(next((n for n in limits if n is not None), 256))
        how = (temperature, top_k or None, top_p) if drawn else (0.0, None, None)
        made = cls(limit, tuple(until), *how)
        made.sampling()
        return made

    def sampling(self) -> Sampling:
        return Sampling(self.limit, self.temperature, self.top_k, self.top_p)


# --- the model -----------------------------------------------------------------------------------


class HarnessModel(TemplateLM):
    """A model as the harness sees it.

    Every process answers all requests with all devices; to the harness there is one process.
    """

    def __init__(
        self,
        model: Model,
        *,
        batch_size: int = BATCH_SIZE,
        seed: int = 0,
        should_stop: Callable[[], object] = lambda: None,
    ):
        super().__init__()
        self.model = model
        self.tokenizer = model.tokenizer
        self.max_length = model.config.max_position_embeddings
        self.batch_size = batch_size
        self._seed = seed
        self._should_stop = should_stop
        self._known: dict[str, list[int]] = {}

    # text

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The template's text; without a generation prompt, up to the end of the last message.

        A template that refuses system messages is given none.
        """

        def render(messages: list[dict[str, str]]) -> str:
            if add_generation_prompt:
                return self._template.render(messages, prompt=True)
            return _continued(self._template, messages)

        try:
            return render(chat_history)
        except BadRow:
            return render([m for m in chat_history if m["role"] != "system"])

    @cached_property
    def _template(self) -> Template:
        return Template(self.tokenizer)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None and string in self._known:
            return self._known[string]
        return self._encoded([string], self.tokenizer.decode(self.prefix_token_id), add_special_tokens)[0]

    def _encoded(
        self, strings: Sequence[str], bos: str | None, add_special_tokens: bool | None = None
    ) -> list[list[int]]:
        """Ids of many strings; one that begins with `bos` is given no special tokens."""

        def wants(string: str) -> bool:
            if add_special_tokens is None:
                return not (bos and string.startswith(bos))
            return add_special_tokens

        ids: list[list[int]] = [[] for _ in strings]
        for special in (True, False):
            chosen = [number for number, string in enumerate(strings) if wants(string) == special]
            if chosen:
                texts = [strings[number] for number in chosen]
                encoded = self.tokenizer(texts, add_special_tokens=special, return_attention_mask=False)
                for number, row in zip(chosen, encoded["input_ids"], strict=True):
                    ids[number] = row
        return ids

    # log-likelihoods

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p of the continuation after the context, whether it is the likeliest), in nats."""
        del disable_tqdm
        pairs = [request.args for request in requests]
        # What the harness is about to encode one by one: a fraction of the time when encoded together.
        texts = {text: None for c, k in pairs if c for text in (c + k, c.rstrip())}
        bos = self.tokenizer.decode(self.prefix_token_id)
        self._known = dict(zip(texts, self._encoded(list(texts), bos), strict=True))
        try:
            return super().loglikelihood(list(requests), disable_tqdm=True)
        finally:
            self._known = {}

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, in windows of the model's length; each token is predicted once."""
        del disable_tqdm
        bos = self.tokenizer.decode(self.prefix_token_id)
        texts = self._encoded([request.args[0] for request in requests], bos)
        windows, owners = [], []
        for number, ids in enumerate(texts):
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        logps = [logp for logp, _ in self._loglikelihood_tokens(windows)]
        return np.bincount(np.array(owners, int), logps, len(requests)).tolist()

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        del kwargs
        groups, members = _sharing([self._fitted(c, k) for _, c, k in requests], self.max_length)
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        with progress("log-likelihoods", len(requests), unit="request") as bar:
            sizes = np.array([len(prompt) + sum(map(len, answers)) for prompt, answers in groups])
            for chosen in _classes(sizes, self._config().train.tokens_per_device * self._shards()):
                own = [groups[g] for g in chosen]
                logps, greedy = self._scored(
                    own, on_batch=lambda done, of=chosen: bar.update(sum(len(members[of[i]]) for i in done))
                )
                for row, g in enumerate(chosen):
                    for answer, number in enumerate(members[g]):
                        answers[number] = float(logps[row, answer]), bool(greedy[row, answer])
        return answers

    def _fitted(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """The context cut on the left, so that all but the last token have room in the model."""
        if not 0 < len(continuation) <= self.max_length:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens: {self.tokenizer.decode(continuation)!r:.80}; "
                f"from 1 to {self.max_length} (max_position_embeddings) can be scored"
            )
        return context[-(self.max_length + 1 - len(continuation)) :] or [self.prefix_token_id], continuation

    def _scored(
        self, groups: list[Group], on_batch: Callable[[list[int]], object]
    ) -> tuple[np.ndarray, np.ndarray]:
        """(Σ log p, whether all tokens are the likeliest) of the groups' answers, [groups, A]."""
        A = max(len(group.answers) for group in groups)
        nothing = np.zeros(0, np.int32)
        groups = [g._replace(answers=g.answers + (nothing,) * (A - len(g.answers))) for g in groups]
        sums, misses = np.zeros(len(groups) * A), np.zeros(len(groups) * A)

        def collect(first: int, rows: Rows, scored: Any) -> None:
            self._should_stop()
            logps, greedy = map(sharding.to_host, scored)
            where = np.nonzero(rows.owners[:, : logps.shape[1]])
            group, answer = np.divmod(rows.owners[where] - 1, A)
            index = (first + rows.items[where[0], group] - 1) * A + answer
            np.add.at(sums, index, logps[where])
            np.add.at(misses, index, ~greedy[where])
            on_batch((first + rows.items[rows.items > 0] - 1).tolist())

        with jax.set_mesh(self.model.mesh):
            before = None  # what the devices are at while the next rows are filled
            for dispatched in self._dispatched(groups):
                if before is not None:
                    collect(*before)
                before = dispatched
            if before is not None:
                collect(*before)
        return sums.reshape(-1, A), misses.reshape(-1, A) == 0

    def _dispatched(self, groups: list[Group]) -> Iterator[tuple[int, Rows, Any]]:
        """(number of the first group, rows, what becomes of them), of one shape but for rare exceptions."""
        mesh, shape = self.model.mesh, self._shape(groups)
        decoder, R = Decoder(self.model.config, dtype=self.model.dtype), 1
        for first in range(0, len(groups), _AT_ONCE):
            parts = packed(groups[first : first + _AT_ONCE], shape)
            most = max(np.count_nonzero(rows.owners, axis=1).max() for rows in parts)
            R = min(max(R, bucket(int(most))), shape.length)  # few of a row's tokens are asked about
            for rows in parts:
                asked = rows._replace(
                    predictors=rows.predictors[:, :R],
                    targets=rows.targets[:, :R],
                    owners=rows.owners[:, :R],
                    lengths=None,
                    items=None,
                )
                placed = sharding.put_batch(mesh, asked)
                yield first, rows, score_tokens(decoder, self.model.params, placed)

    def _shape(self, groups: list[Group]) -> RowShape:
        c = self._config()
        sizes = group_sizes(groups)
        some = sizes[np.random.default_rng(0).permutation(len(sizes))[:_TRIED]]
        c.train.batch_size = len(some)
        return from_config.row_shape(c.train, c, self.model, some, sizes.max(axis=0))

    def _config(self) -> Any:
        """A config, as `programs` asks for one."""
        c = config_lib.default()
        c.model.attention = "plain"  # which alone reads a context once for many answers
        c.train.tokens_per_device = _TOKENS * self.batch_size
        return c

    def _shards(self) -> int:
        return sharding.batch_shards(self.model.mesh)

    # generation

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, each up to its first stop string."""
        del disable_tqdm
        asked = [Generation.of(request.args[1], self.model.generation_config) for request in requests]
        texts = [request.args[0] for request in requests]
        prompts = [
            # Cut on the left, so that an answer as long as it may be has room.
            np.array(ids[-(self.max_length - how.limit) :] or [self.prefix_token_id], np.int32)
            for ids, how in zip(self._encoded(texts, self.tokenizer.bos_token), asked, strict=True)
        ]
        return self._answers(prompts, asked)

    def _answers(self, prompts: Sequence[Ids], asked: Sequence[Generation]) -> list[str]:
        """Answers to prompts, by continuous batching; those that are drawn alike share a program."""
        alike: dict[Any, list[int]] = defaultdict(list)
        for number, how in enumerate(asked):
            alike[how.sampling(), self._stop_tokens(how)].append(number)
        texts = [""] * len(prompts)
        with progress("answers", len(prompts), unit="request") as bar:
            for (sampling, stop_tokens), chosen in alike.items():
                own = [asked[number] for number in chosen]
                keys = prompt_keys(self._seed, 0, chosen)  # a request that is repeated draws anew
                answered = self._answered(
                    [prompts[number] for number in chosen], own, sampling, stop_tokens, keys, bar.update
                )
                for number, how, tokens in zip(chosen, own, answered, strict=True):
                    texts[number] = self._text(tokens, how.until, stop_tokens)
        return texts

    def _answered(
        self,
        prompts: Sequence[Ids],
        asked: Sequence[Generation],
        sampling: Sampling,
        stop_tokens: tuple[int, ...],
        keys: Any,
        on_done: Callable[[int], object],
    ) -> list[Ids]:
        """Answers that are all drawn alike, and stop where each one wants."""

        def stopped(number: int, tokens: list[int]) -> bool:
            until = asked[number].until
            return bool(until) and _cut(self._decoded(tokens), until) is not None

        return answer(
            self.model,
            prompts,
            keys,
            sampling,
            stop_tokens=stop_tokens,
            limits=[how.limit for how in asked],
            batch_size=self.batch_size,
            stopped=stopped,
            on_chunk=counting(on_done, self._should_stop),
        )

    def _stop_tokens(self, how: Generation) -> tuple[int, ...]:
        """The model's, and stop strings that are special tokens: no text shows those."""
        added = self.tokenizer.added_tokens_decoder.items()
        asked = {i for i, token in added if token.special and token.content in how.until}
        return tuple(sorted(asked.union(self.model.stop_tokens)))

    def _text(self, tokens: Ids, until: Sequence[str], stop_tokens: tuple[int, ...]) -> str:
        ended = len(tokens) and int(tokens[-1]) in stop_tokens
        text = self._decoded((tokens[:-1] if ended else tokens).tolist())
        cut = _cut(text, (*until, self.tokenizer.decode(self.eot_token_id)))
        return text if cut is None else cut

    def _decoded(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def _cut(text: str, until: Sequence[str]) -> str | None:
    """The text before its first stop string; None where it has none."""
    cut = text
    for stop in filter(None, until):
        cut = cut.split(stop)[0]
    return None if cut == text else cut


def _continued(template: Template, messages: list[dict[str, str]]) -> str:
    """The rendering up to where the last message ends, for the model to go on with it."""
    mark = "CONTINUE_FINAL_MESSAGE_TAG "
    *before, last = messages
    text = template.render([*before, {**last, "content": last["content"] + mark}], prompt=False)
    end = text.rfind(mark.strip())
    if end < 0:
        raise BadRow("the chat template leaves the last message out")
    kept = text[end : end + len(mark)] == mark  # else the template strips messages
    return text[:end] if kept else text[:end].rstrip()


def _sharing(
    requests: Sequence[tuple[list[int], list[int]]], longest: int
) -> tuple[list[Group], list[list[int]]]:
    """(groups of continuations that share a context, the requests that each one's answers belong to)."""
    by_context: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, (context, _) in enumerate(requests):
        by_context[tuple(context)].append(number)
    groups, members = [], []
    for context, own in by_context.items():
        prompt = np.array(context, np.int32)
        # Long ones after a short context gain little, and attention costs the square of a row's length.
        room = min(2 * len(context), longest - len(context))
        for together in _portions(own, [len(requests[i][1]) for i in own], room):
            answers = tuple(np.array(requests[i][1], np.int32) for i in together)
            groups.append(Group(prompt, answers))
            members.append(together)
    return groups, members


def _portions(own: list[int], lengths: list[int], room: int) -> Iterator[list[int]]:
    """`own` in portions of few members, whose lengths together have room; one alone may have none."""
    portion, taken = [], 0
    for number, length in zip(own, lengths, strict=True):
        if portion and (len(portion) == _TOGETHER or taken + length > room):
            yield portion
            portion, taken = [], 0
        portion.append(number)
        taken += length
    yield portion


def _classes(sizes: np.ndarray, least: int) -> list[list[int]]:
    """Groups by size, the longest first: a program each, for rows that suit them.

    A class spans a factor of four, or more where it has less than `least` tokens: attention costs the square
    of a row's length, but short groups fill long rows as well.
    """
    scales = np.ceil(np.log2(sizes) / 2)
    classes: list[list[int]] = []
    waiting: list[int] = []
    for scale in np.unique(scales):
        waiting += np.flatnonzero(scales == scale).tolist()
        if sizes[waiting].sum() >= least or scale == scales.max():
            classes.append(sorted(waiting, key=lambda i: -sizes[i]))
            waiting = []
    return classes[::-1]
