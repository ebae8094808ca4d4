"""Turns conversations into token ids and back, with a chat template and a tokenizer.

A conversation is rendered by the template and tokenized once, as a whole; the response is cut out of these
ids. Everything after this uses the ids, and does not tokenize the text again.
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
    straddled: bool  # whether a token contains the boundary; it then belongs to the response


class _Tokenized(NamedTuple):
    text: str
    ids: Ids
    starts: np.ndarray  # the index of each token's first character in text
    ends: np.ndarray  # the index after its last character; these never decrease


class Chat:
    """A tokenizer and its chat template. It encodes and decodes conversations, and makes examples and pairs.

    Control tokens that the template writes become their ids. The same strings inside a message stay text.
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
        """A token id that no token attends to (only for `config.official`)."""
        return None

    # --- conversations ---

    def with_system(self, messages: list[Message]) -> list[Message]:
        """The conversation, with the configured system message in front if it has no system message."""
        if self.system_message is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.system_message}, *messages]

    def render(self, messages: list[Message], *, prompt: bool) -> str:
        """The text that the template makes of a conversation.

        Args:
            prompt: whether the text ends with the generation prompt.

        Raises:
            BadRow: the template refuses the conversation.
            BadTemplate: the template takes too long.
        """
        return self._template.render(messages, prompt=prompt)

    def encode(self, messages: list[Message]) -> Encoded:
        """The token ids of a conversation that ends with an answer, split into prompt and response.

        The response ends with its first stop token. What the template writes after that is left out.

        Raises:
            BadRow: the rendered conversation does not begin with the rendered prompt.
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
        """The token ids (prompt, response) of conversation `number` of a user.

        Raises:
            ValueError: the conversation is malformed.
        """
        try:
            valid = check_messages(messages, "messages")
            if len(valid) < len(messages):
                raise BadRow("messages: the last turn is not the assistant's")
            prompt, response, _ = self.encode(valid)
        except BadRow as error:
            raise ValueError(f"conversation {number}: {error}") from error
        return prompt, response

    def encode_prompt(self, messages: list[Message]) -> Ids:
        """The token ids of a conversation whose next turn is the answer."""
        messages = self.with_system(messages)
        return self._tokenize(messages, prompt=True, guard=self._needs_guard(messages)).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode(list(map(int, ids)), skip_special_tokens=True)

    def stopped(self, response: Ids) -> bool:
        """Whether a response ends with a stop token, which means that the model finished it."""
        return len(response) > 0 and int(response[-1]) in self.stop_tokens

    def _until_stop(self, ids: Ids) -> Ids:
        stops = np.flatnonzero(np.isin(ids, self.stop_tokens))
        return ids[: stops[0] + 1] if len(stops) else ids

    def _needs_guard(self, messages: list[Message]) -> bool:
        """Whether a message contains the string of a control token.

        Raises:
            BadRow: it contains such a string, and also private characters, which the guard needs for itself.
        """
        control = self._control
        if control is None or not any(control.search(m["content"]) for m in messages):
            return False
        if any(max(m["content"], default="") >= _PRIVATE for m in messages):
            raise BadRow("a message has a control token's text and characters for private use (plane 15 or 16)")
        return True

    def _text(self, messages: list[Message], *, prompt: bool, guard: bool) -> str:
        """The rendered conversation. With `guard`, the template's control tokens have private names in it.

        A mark is put into every control token's string in the messages, so that after rendering all whole
        strings are the template's. These get private names, and the marks are removed. The twin tokenizer
        takes the private names for control tokens, and the strings of the messages for plain text.
        """
        if not guard:
            return self.render(messages, prompt=prompt)
        assert self._control is not None
        mark = chr(0xFFFFD)  # a private character, at the end of its plane

        def insert_mark(match: re.Match) -> str:
            return match[0][0] + mark + match[0][1:]

        safe = [{**m, "content": self._control.sub(insert_mark, m["content"])} for m in messages]
        text = self._control.sub(lambda match: _private_name(match[0]), self.render(safe, prompt=prompt))
        return text.replace(mark, "")

    def _tokenize(self, messages: list[Message], *, prompt: bool, guard: bool) -> _Tokenized:
        text = self._text(messages, prompt=prompt, guard=guard)
        backend = self._twin_tokenizer if guard else self.tokenizer.backend_tokenizer
        encoding = backend.encode(text, add_special_tokens=False)
        starts, ends = np.asarray(encoding.offsets, np.int64).reshape(-1, 2).T
        return _Tokenized(text, np.asarray(encoding.ids, np.int32), starts, np.maximum.accumulate(ends))

    @functools.cached_property
    def _twin_tokenizer(self) -> Any:
        """The same tokenizer, in which the control tokens have private names that nobody types."""
        from tokenizers import Tokenizer

        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        control = {token["content"] for token in state["added_tokens"] if token["special"]}

        def rename(piece: str) -> str:
            return _private_name(piece) if piece in control else piece

        for token in state["added_tokens"]:
            token["content"] = rename(token["content"])
        model = state["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {rename(piece): id for piece, id in model["vocab"].items()}
        else:  # unigram models list [piece, score]
            model["vocab"] = [[rename(piece), score] for piece, score in model["vocab"]]
        if model.get("unk_token"):
            model["unk_token"] = rename(model["unk_token"])
        state["post_processor"] = None
        return Tokenizer.from_str(json.dumps(state))

    # --- examples and pairs ---

    def example(self, prompt_id: int, messages: list[Message], counts: Counter) -> Example | None:
        """Encodes one conversation. It returns None for one that is too long, and notes this in `counts`.

        Raises:
            EmptyAnswer, BadRow: the conversation has no answer, or is malformed.
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
        """Whether the first part of a prompt alone has twice as many tokens as are allowed.

        Tokenizing the whole of a prompt of megabytes would take seconds, only to drop it.
        """
        limit = self.lengths.max_prompt
        if sum(len(m["content"]) for m in messages[:-1]) <= 100 * limit:
            return False
        beginning = self.render(self.with_system(messages)[:-1], prompt=True)[: 100 * limit]
        return len(self.tokenizer.backend_tokenizer.encode(beginning, add_special_tokens=False)) > 2 * limit

    def sampling_prompt(self, example: Example) -> Ids:
        """The token ids that the opponent answers."""
        return example.prompt

    def pair(self, example: Example, sample_id: int, generated: Ids) -> Pair:
        """The pair of an example and the token ids that the sampler generated for it."""
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
        """A pair that came as text. It returns None for one that is too long, and notes this in `counts`.

        Where the two prompts tokenize differently at their end, the pair's prompt is the tokens they share.

        Raises:
            EmptyAnswer, BadRow: a conversation has no answer, or is malformed.
        """
        if prompt_turns(real) != prompt_turns(generated):
            raise BadRow("real and generated do not answer the same prompt")
        first = self.example(prompt_id, real, counts)
        if first is None:
            return None
        generated_counts: Counter = Counter()
        try:
            second = self.example(prompt_id, generated, generated_counts)
        except EmptyAnswer as error:
            raise EmptyAnswer(f"generated: {error}") from error
        counts.update({f"generated: {what}": number for what, number in generated_counts.items()})
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


_PRIVATE = chr(0xF0000)  # the first character of planes 15 and 16, which are for private use


def _private_name(token: str) -> str:
    """A control token's string moved to the private plane 16, which no text uses."""
    return "".join(chr(0x100000 + ord(character) % 0xFFFD) for character in token)


def _common_prefix(a: Ids, b: Ids) -> int:
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
