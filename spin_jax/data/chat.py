"""A chat template and a tokenizer: conversations to ids and back.

Token ids are the truth. A conversation is rendered by the template and tokenized once; the response is
cut out of those ids.
"""

import datetime
import functools
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from spin_jax.data.chat_template import Template
from spin_jax.data.records import (
    UNLIMITED,
    Example,
    Ids,
    Lengths,
    Message,
    Pair,
    check_messages,
    prompt_turns,
)
from spin_jax.errors import BadRow, EmptyAnswer


class Encoded(NamedTuple):
    prompt: Ids
    response: Ids
    straddled: bool  # a token stood across the boundary; it went to the response


class _Tokenized(NamedTuple):
    text: str
    ids: Ids
    starts: np.ndarray  # each token's first character in text
    ends: np.ndarray  # and the one after its last, never decreasing


class Chat:
    """A tokenizer and its chat template: conversations to ids and back, examples and pairs.

    Control tokens that the template writes become ids; the same strings inside a message stay text.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop_tokens: Sequence[int],
        *,
        lengths: Lengths = UNLIMITED,
        system_message: str | None = None,
        today: datetime.date | None = None,
    ):
        if tokenizer.chat_template is None:
            raise ValueError(
                "the tokenizer has no chat template: give one with --config.data.chat_template=FILE "
                "(Jinja text or a file of it)"
            )
        if not stop_tokens:
            raise ValueError("neither generation_config.json nor the tokenizer names an EOS token")
        tokenizer.backend_tokenizer.no_truncation()  # some tokenizer.json come with limits switched on
        tokenizer.backend_tokenizer.no_padding()
        self.tokenizer = tokenizer
        self._template = Template(tokenizer, today)
        self.stop_tokens = tuple(stop_tokens)
        self.lengths = lengths
        self.system_message = system_message
        special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        ordered = sorted(special, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, ordered))) if ordered else None

    @property
    def unattended(self) -> int | None:
        """A token id that attention shall not see (`official` only)."""
        return None

    # conversations

    def with_system(self, messages: list[Message]) -> list[Message]:
        """The conversation with the configured system message in front, where it has none."""
        if self.system_message is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.system_message}, *messages]

    def render(self, messages: list[Message], *, prompt: bool) -> str:
        """The template's text; with `prompt`, it ends in the generation prompt.

        Raises:
            BadRow: the template refuses the conversation.
            BadTemplate: it takes too long.
        """
        return self._template.render(messages, prompt=prompt)

    def encode(self, messages: list[Message]) -> Encoded:
        """Ids of a conversation that ends with an answer, cut at the answer.

        The response ends with its first stop token; what the template writes after is left out.

        Raises:
            BadRow: the template's text for the prompt does not begin the text for the whole.
        """
        messages = self.with_system(messages)
        guard = self._needs_guard(messages)
        whole = self._tokenize(messages, prompt=False, guard=guard)
        before = self._text(messages[:-1], prompt=True, guard=guard)
        if not whole.text.startswith(before):
            raise BadRow(
                "the chat template renders the prompt otherwise when the answer follows it: "
                f"…{before[-60:]!r} does not begin {whole.text[:200]!r}"
            )
        boundary = len(before)
        cut = int(np.searchsorted(whole.ends, boundary, side="right"))
        straddled = cut < len(whole.ids) and whole.starts[cut] < boundary
        return Encoded(whole.ids[:cut], self._until_stop(whole.ids[cut:]), bool(straddled))

    def encode_checked(self, messages: list[Message], number: int) -> tuple[Ids, Ids]:
        """(prompt, response) of a user's conversation; ValueError says what is wrong with it."""
        try:
            valid = check_messages(messages, "messages")
            if len(valid) < len(messages):
                raise BadRow("messages: the last turn is not the assistant's")
            prompt, response, _ = self.encode(valid)
        except BadRow as error:
            raise ValueError(f"conversation {number}: {error}") from error
        return prompt, response

    def encode_prompt(self, messages: list[Message]) -> Ids:
        """Ids of a conversation that waits for an answer."""
        messages = self.with_system(messages)
        return self._tokenize(messages, prompt=True, guard=self._needs_guard(messages)).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode(list(map(int, ids)), skip_special_tokens=True)

    def stopped(self, response: Ids) -> bool:
        """Whether a response ends in a stop token: the model finished it."""
        return len(response) > 0 and int(response[-1]) in self.stop_tokens

    def _until_stop(self, ids: Ids) -> Ids:
        stops = np.flatnonzero(np.isin(ids, self.stop_tokens))
        return ids[: stops[0] + 1] if len(stops) else ids

    def _needs_guard(self, messages: list[Message]) -> bool:
        """Whether a message contains the string of a control token.

        Raises:
            BadRow: and characters too by which the guard tells control tokens from text.
        """
        control = self._control
        if control is None or not any(control.search(m["content"]) for m in messages):
            return False
        if any(max(m["content"], default="") >= _PRIVATE for m in messages):
            raise BadRow(
                "a message has a control token's text and characters for private use (plane 15 or 16)"
            )
        return True

    def _text(self, messages: list[Message], *, prompt: bool, guard: bool) -> str:
        """The rendering; guarded, the template's control tokens stand in it under private names.

        Such strings in messages are broken before rendering, so that all whole ones after it are the
        template's. Those are renamed, and the broken ones mended: plain text to the twin tokenizer.
        """
        if not guard:
            return self.render(messages, prompt=prompt)
        assert self._control is not None
        mend = chr(0xFFFFD)  # a private character, at the end of its plane

        def broken(match: re.Match) -> str:
            return match[0][0] + mend + match[0][1:]

        safe = [{**m, "content": self._control.sub(broken, m["content"])} for m in messages]
        text = self._control.sub(lambda match: _private(match[0]), self.render(safe, prompt=prompt))
        return text.replace(mend, "")

    def _tokenize(self, messages: list[Message], *, prompt: bool, guard: bool) -> _Tokenized:
        text = self._text(messages, prompt=prompt, guard=guard)
        backend = self._twin if guard else self.tokenizer.backend_tokenizer
        encoding = backend.encode(text, add_special_tokens=False)
        starts, ends = np.asarray(encoding.offsets, np.int64).reshape(-1, 2).T
        return _Tokenized(text, np.asarray(encoding.ids, np.int32), starts, np.maximum.accumulate(ends))

    @functools.cached_property
    def _twin(self) -> Any:
        """The same tokenizer, its control tokens under names that nobody types."""
        from tokenizers import Tokenizer

        described = json.loads(self.tokenizer.backend_tokenizer.to_str())
        control = {token["content"] for token in described["added_tokens"] if token["special"]}

        def renamed(piece: str) -> str:
            return _private(piece) if piece in control else piece

        for token in described["added_tokens"]:
            token["content"] = renamed(token["content"])
        model = described["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {renamed(piece): id for piece, id in model["vocab"].items()}
        else:  # unigram models list [piece, score]
            model["vocab"] = [[renamed(piece), score] for piece, score in model["vocab"]]
        if model.get("unk_token"):
            model["unk_token"] = renamed(model["unk_token"])
        described["post_processor"] = None
        return Tokenizer.from_str(json.dumps(described))

    # examples and pairs

    def example(self, prompt_id: int, messages: list[Message], counts: Counter) -> Example | None:
        """Encodes one conversation; None when it is dropped as too long, and `counts` says so.

        Raises:
            EmptyAnswer, BadRow: what is wrong with the conversation.
        """
        if not messages[-1]["content"].strip():
            raise EmptyAnswer("the answer is empty")
        if self._far_too_long(messages):
            counts["dropped: prompt too long"] += 1
            return None
        encoded = self.encode(messages)
        if not len(encoded.prompt):
            raise BadRow("the chat template makes no token of the prompt: an answer needs one before it")
        if not len(encoded.response):
            raise EmptyAnswer("the answer has no token")
        room = self.lengths.max_length - len(encoded.prompt)
        if len(encoded.prompt) > self.lengths.max_prompt or room < 1:
            counts["dropped: prompt too long"] += 1
            return None
        counts["tokens across the boundary"] += encoded.straddled
        counts["cut: answer too long"] += len(encoded.response) > room
        return Example(prompt_id, messages, encoded.prompt, encoded.response[:room])

    def _far_too_long(self, messages: list[Message]) -> bool:
        """Whether a prompt's first part alone has twice the tokens that are allowed.

        A tokenizer takes seconds for megabytes, which would come to nothing.
        """
        limit = self.lengths.max_prompt
        if sum(len(m["content"]) for m in messages[:-1]) <= 100 * limit:
            return False
        beginning = self.render(self.with_system(messages)[:-1], prompt=True)[: 100 * limit]
        return len(self.tokenizer.backend_tokenizer.encode(beginning, add_special_tokens=False)) > 2 * limit

    def sampling_prompt(self, example: Example) -> Ids:
        """What the opponent is asked."""
        return example.prompt

    def pair(self, example: Example, sample_id: int, generated: Ids) -> Pair:
        """The pair of an example and the sampler's ids for it."""
        answer = {"role": "assistant", "content": self.decode(generated)}
        return Pair(
            prompt_id=example.prompt_id,
            sample_id=sample_id,
            real_messages=example.messages,
            generated_messages=[*example.messages[:-1], answer],
            prompt=example.prompt,
            real=example.real,
            generated=generated,
            truncated=not self.stopped(generated),
        )

    def given_pair(
        self, prompt_id: int, sample_id: int, real: list[Message], generated: list[Message], counts: Counter
    ) -> Pair | None:
        """A pair that came as text; None when it is dropped as too long.

        Where the two prompts tokenize differently at their end, the prompt is what they share.

        Raises:
            EmptyAnswer, BadRow: what is wrong with the two conversations.
        """
        if prompt_turns(real) != prompt_turns(generated):
            raise BadRow("real and generated do not answer the same prompt")
        first = self.example(prompt_id, real, counts)
        if first is None:
            return None
        of_generated: Counter = Counter()
        try:
            second = self.example(prompt_id, generated, of_generated)
        except EmptyAnswer as error:
            raise EmptyAnswer(f"generated: {error}") from error
        counts.update({f"generated: {what}": number for what, number in of_generated.items()})
        if second is None:
            return None
        shared = _common_prefix(first.prompt, second.prompt)
        if not shared:
            raise BadRow("the prompts of real and generated share no token: an answer needs one before it")
        return Pair(
            prompt_id=prompt_id,
            sample_id=sample_id,
            real_messages=real,
            generated_messages=generated,
            prompt=first.prompt[:shared],
            real=np.concatenate([first.prompt[shared:], first.real]),
            generated=np.concatenate([second.prompt[shared:], second.real]),
            truncated=not self.stopped(second.real),
        )


_PRIVATE = chr(0xF0000)  # planes 15 and 16, for private use, begin here


def _private(token: str) -> str:
    """A control token's string in the private plane 16, where no text is."""
    return "".join(chr(0x100000 + ord(character) % 0xFFFD) for character in token)


def _common_prefix(a: Ids, b: Ids) -> int:
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
