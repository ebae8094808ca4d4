"""Runs lm-evaluation-harness on a model in memory; our own programs answer its requests on the model's mesh.

    tasks.check_tasks(["gsm8k"])
    harness.run_tasks(model, ["gsm8k"], limit=100)  # {"gsm8k/exact_match/strict-match": 0.37, …}

The model gets the same tokens as from the harness's own `hf` backend: special tokens, the space between context and
continuation, left truncation and stop strings agree. The computation is our own: a context is read once for all its
continuations, several requests share a row, and as soon as a generated answer ends, the next one takes its place.

Importing this module raises `HarnessNotInstalled` where lm_eval is not installed.
Axes: N rows, R response tokens, A answers.
"""

# This import comes first because its error says how to install lm_eval.
from spin_jax.evaluate.tasks import GenerationOptions, Tasks, check_model, flat_metrics, load_tasks

# isort: split

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any
from unittest import mock

import jax
import lm_eval.api.task
import numpy as np
from lm_eval import evaluator
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from spin_jax.data.chat_template import Template
from spin_jax.errors import BadRow
from spin_jax.evaluate.request_groups import classes_by_size, group_by_context
from spin_jax.models.architecture import Model
from spin_jax.models.decoder import Decoder
from spin_jax.runtime import processes, sharding
from spin_jax.runtime.console import progress
from spin_jax.runtime.sharding import bucket
from spin_jax.sampling.generate import BATCH_SIZE, answer, counting
from spin_jax.sampling.next_token import prompt_keys
from spin_jax.training.batch_shape import row_shape
from spin_jax.training.log_probs import score_tokens
from spin_jax.training.packing import Group, Rows, group_sizes, packed

_TOKENS = 256  # tokens scored at a time, per answer of the batch size
_GROUPS_IN_MEMORY = 4096  # groups that are packed together
_SHAPE_SAMPLE = 256  # groups from which the shape of rows is chosen


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
    """The harness's own dict of results of a model with weights, in every process.

    Args:
        tasks: from `load_tasks`.
        limit: the number of questions of each task; the first ones are taken, None takes all.
        apply_chat_template: asks in the model's chat format, with few-shot examples as turns.
        batch_size: answers in progress at a time for each copy of the weights; where requests are only scored, a
            device takes 256 tokens in place of each answer.
        seed: of the random numbers, where a task samples its answers.
        stderr: also estimates standard errors.
        should_stop: is called between batches, and may raise to stop.

    Raises:
        ValueError: the model cannot answer the tasks.
    """
    check_model(tasks, model, apply_chat_template)
    if (penalty := model.generation_config.get("repetition_penalty") or 1.0) != 1.0:
        processes.say(f"generation_config.json has repetition_penalty={penalty}, which is not applied")
    harness_model = HarnessModel(model, batch_size=batch_size, seed=seed, should_stop=should_stop)
    # The harness shows a progress bar for each task while it builds requests: MMLU has 57, of a moment each.
    with mock.patch.object(lm_eval.api.task, "tqdm", lambda docs, **options: docs):
        results = evaluator.evaluate(
            harness_model,
            tasks.loaded,
            limit=limit,
            bootstrap_iters=1000 if stderr else 0,
            log_samples=False,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=True,
        )
    assert results is not None  # the harness takes each process for the first one
    return dict(results)


def run_tasks(
    model: Model,
    names: Sequence[str],
    *,
    include_path: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    should_stop: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """`flat_metrics` of tasks, groups or tags on a model, with as many few-shot examples as they state.

    Raises:
        ValueError: as in `load_tasks`, before anything is computed.
    """
    tasks = load_tasks(names, include_path=include_path)
    return flat_metrics(evaluate(model, tasks, limit=limit, seed=seed, should_stop=should_stop), tasks)


class HarnessModel(TemplateLM):
    """A model as the harness sees it: in one process. Every process answers all requests with all devices."""

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
        self._tokens_per_device = _TOKENS * batch_size
        self._seed = seed
        self._should_stop = should_stop
        self._encodings: dict[str, list[int]] = {}  # of texts that the harness is about to encode

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

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as text; without a generation prompt, it ends where the last message ends.

        Where the template refuses system messages, they are left out.
        """

        def render(messages: list[dict[str, str]]) -> str:
            if add_generation_prompt:
                return self._template.render(messages, prompt=True)
            return _render_unfinished(self._template, messages)

        try:
            return render(chat_history)
        except BadRow:
            return render([m for m in chat_history if m["role"] != "system"])

    @cached_property
    def _template(self) -> Template:
        return Template(self.tokenizer)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None and string in self._encodings:
            return self._encodings[string]
        return self._encode([string], self.tokenizer.decode(self.prefix_token_id), add_special_tokens)[0]

    def _encode(
        self, strings: Sequence[str], bos: str | None, add_special_tokens: bool | None = None
    ) -> list[list[int]]:
        """Token ids of many strings; a string that begins with `bos` gets no special tokens by default."""
        specials = [add_special_tokens] * len(strings)
        if add_special_tokens is None:
            specials = [not (bos and string.startswith(bos)) for string in strings]
        ids: list[list[int]] = [[] for _ in strings]
        for special in set(specials):
            numbers = [number for number, own in enumerate(specials) if own == special]
            texts = [strings[number] for number in numbers]
            encoded = self.tokenizer(texts, add_special_tokens=special, return_attention_mask=False)
            for number, row in zip(numbers, encoded["input_ids"], strict=True):
                ids[number] = row
        return ids

    # log-likelihoods

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p of the continuation given the context, in nats; whether greedy decoding would write it)."""
        pairs = [request.args for request in requests]
        # The harness encodes these texts one by one. Encoding them together takes a fraction of the time.
        texts = {text: None for c, k in pairs if c for text in (c + k, c.rstrip())}
        bos = self.tokenizer.decode(self.prefix_token_id)
        self._encodings = dict(zip(texts, self._encode(list(texts), bos), strict=True))
        try:
            return super().loglikelihood(list(requests), disable_tqdm=True)
        finally:
            self._encodings = {}

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, read in windows of the model's length; each token is predicted once."""
        bos = self.tokenizer.decode(self.prefix_token_id)
        texts = self._encode([request.args[0] for request in requests], bos)
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
        fitted = [self._fit(context, continuation) for _, context, continuation in requests]
        groups, members = group_by_context(fitted, self.max_length)
        sizes = np.array([len(group.prompt) + sum(map(len, group.answers)) for group in groups])
        tokens = self._tokens_per_device * sharding.batch_shards(self.model.mesh)
        logps, misses = np.zeros(len(requests)), np.zeros(len(requests))
        with progress("log-likelihoods", len(requests), unit="request") as bar, jax.set_mesh(self.model.mesh):
            for numbers in classes_by_size(sizes, tokens):
                # [groups, A]: the request that each answer belongs to; −1 where a group has fewer answers than others.
                asked = np.array([*itertools.zip_longest(*(members[n] for n in numbers), fillvalue=-1)]).T
                batches: Any = itertools.chain(self._dispatch([groups[n] for n in numbers]), [None])
                for (first, rows, scores), _ in itertools.pairwise(batches):  # the devices compute the next one
                    self._should_stop()
                    token_logps, greedy = map(sharding.to_host, scores)
                    where = np.nonzero(rows.owners[:, : greedy.shape[1]])
                    group, column = np.divmod(rows.owners[where] - 1, asked.shape[1])
                    request = asked[first + rows.items[where[0], group] - 1, column]
                    np.add.at(logps, request, token_logps[where])
                    np.add.at(misses, request, ~greedy[where])
                    bar.update(int(np.sum(asked[first + rows.items[rows.items > 0] - 1] >= 0)))
        return list(zip(logps.tolist(), (misses == 0).tolist(), strict=True))

    def _fit(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Cuts the context on the left, so that the model can read all tokens but the last."""
        if not 0 < len(continuation) <= self.max_length:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens: {self.tokenizer.decode(continuation)!r:.80}; "
                f"from 1 to {self.max_length} (max_position_embeddings) can be scored"
            )
        return context[-(self.max_length + 1 - len(continuation)) :] or [self.prefix_token_id], continuation

    def _dispatch(self, groups: list[Group]) -> Iterator[tuple[int, Rows, Any]]:
        """Starts the scoring of packed rows, all of one shape with rare exceptions.

        Yields:
            the number of the first group that was packed with these rows, the rows, and their scores on the devices.
        """
        A, empty = max(len(group.answers) for group in groups), np.zeros(0, np.int32)
        groups = [group._replace(answers=(*group.answers, *[empty] * (A - len(group.answers)))) for group in groups]
        sizes = group_sizes(groups)
        sample = sizes[np.random.default_rng(0).permutation(len(sizes))[:_SHAPE_SAMPLE]]
        shape = row_shape(
            self.model,
            sample,
            sizes.max(axis=0),
            kernel="plain",  # no other kernel reads a context once for many answers
            batch_size=len(sample),
            tokens_per_device=self._tokens_per_device,
        )
        decoder, R = Decoder(self.model.config, dtype=self.model.dtype), 1
        for first in range(0, len(groups), _GROUPS_IN_MEMORY):
            parts = packed(groups[first : first + _GROUPS_IN_MEMORY], shape)
            most = max(np.count_nonzero(rows.owners, axis=1).max() for rows in parts)
            R = min(max(R, bucket(int(most))), shape.length)  # only few tokens of a row are scored
            for rows in parts:
                few = {name: getattr(rows, name)[:, :R] for name in ("predictors", "targets", "owners")}
                placed = sharding.put_batch(self.model.mesh, rows._replace(**few, lengths=None, items=None))
                yield first, rows, score_tokens(decoder, self.model.params, placed)

    # generation

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, each up to its first stop string."""
        defaults = self.model.generation_config
        options = [GenerationOptions.from_kwargs(request.args[1], defaults) for request in requests]
        encoded = self._encode([request.args[0] for request in requests], self.tokenizer.bos_token)
        prompts = [
            # Cut on the left, so that there is room for the longest answer that is allowed.
            np.array(ids[-(self.max_length - option.limit) :] or [self.prefix_token_id], np.int32)
            for ids, option in zip(encoded, options, strict=True)
        ]
        alike: dict[Any, list[int]] = defaultdict(list)  # requests that share a compiled program
        for number, option in enumerate(options):
            alike[option.sampling, self._stop_tokens(option)].append(number)
        texts = [""] * len(prompts)
        with progress("answers", len(prompts), unit="request") as bar:
            for (sampling, stop_tokens), numbers in alike.items():

                def stopped(place: int, tokens: list[int], numbers: list[int] = numbers) -> bool:
                    until = options[numbers[place]].until
                    return bool(until) and _text_before_stop(self._decode(tokens), until) is not None

                answers = answer(
                    self.model,
                    [prompts[number] for number in numbers],
                    prompt_keys(self._seed, 0, numbers),  # by number: equal requests get different answers
                    sampling=sampling,
                    stop_tokens=stop_tokens,
                    limits=[options[number].limit for number in numbers],
                    batch_size=self.batch_size,
                    stopped=stopped,
                    on_chunk=counting(bar.update, self._should_stop),
                )
                for number, tokens in zip(numbers, answers, strict=True):
                    texts[number] = self._answer_text(tokens.tolist(), options[number].until, stop_tokens)
        return texts

    def _stop_tokens(self, options: GenerationOptions) -> tuple[int, ...]:
        """The model's stop tokens, and stop strings that are special tokens: no decoded text shows those."""
        added = self.tokenizer.added_tokens_decoder.items()
        special = {i for i, token in added if token.special and token.content in options.until}
        return tuple(sorted(special.union(self.model.stop_tokens)))

    def _answer_text(self, tokens: list[int], until: Sequence[str], stop_tokens: tuple[int, ...]) -> str:
        ended = tokens and tokens[-1] in stop_tokens
        text = self._decode(tokens[:-1] if ended else tokens)
        before = _text_before_stop(text, (*until, self.tokenizer.decode(self.eot_token_id)))
        return text if before is None else before

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def _text_before_stop(text: str, until: Sequence[str]) -> str | None:
    """The text before its first stop string; None where it has none."""
    before = text
    for stop in filter(None, until):
        before = before.split(stop)[0]
    return None if before == text else before


def _render_unfinished(template: Template, messages: list[dict[str, str]]) -> str:
    """The chat up to the end of its last message, which the model continues."""
    mark = "CONTINUE_FINAL_MESSAGE_TAG "
    *before, last = messages
    text = template.render([*before, {**last, "content": last["content"] + mark}], prompt=False)
    end = text.rfind(mark.strip())
    if end < 0:
        raise BadRow("the chat template leaves the last message out")
    keeps_spaces = text[end : end + len(mark)] == mark  # otherwise the template strips messages
    return text[:end] if keeps_spaces else text[:end].rstrip()
