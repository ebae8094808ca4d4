"""Turns conversations into token ids and back, with a chat template and a tokenizer.

A conversation is rendered by the template and tokenized once, as a whole; the response is cut out of these
ids. Everything after this uses the ids, and does not tokenize the text again.
"""

import dataclasses
import datetime
import functools
import itertools
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from spin_jax.data.chat_template import Template, with_objects
from spin_jax.data.records import (
    UNLIMITED,
    Example,
    Ids,
    Lengths,
    Message,
    Pair,
    changed_texts,
    check_messages,
    is_empty,
    prompt_turns,
    texts_of,
    with_tools,
)
from spin_jax.errors import BadRow, EmptyAnswer

# What `Chat.encode` notes of the boundary between prompt and answer, as `Chat.example` counts it.
ACROSS = "tokens across the boundary"
SPACE_LOST = "answers whose leading white space a control token takes in, so that it is lost"
READ_OTHERWISE = "prompts with a control token that is read otherwise when the answer follows"


class Chat:
    """A tokenizer and its chat template. It encodes and decodes conversations, and makes examples and pairs.

    Control tokens that the template writes become their ids. The same strings inside a message stay text.
    """

    unattended: int | None = None  # a token id that no token attends to (only for `config.official`)

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
            raise ValueError("neither generation_config.json nor config.json nor the tokenizer names an EOS token")
        tokenizer.backend_tokenizer.no_truncation()  # some tokenizer.json come with limits switched on
        tokenizer.backend_tokenizer.no_padding()
        self.tokenizer = tokenizer
        template = Template(tokenizer, today)
        self.render, self._names, self._template = template.render, template.names, template
        self.stop_tokens = tuple(stop_tokens)
        self.lengths = lengths
        self.system_message = system_message
        self._today = today
        self._added: Mapping[int, Any] = tokenizer.added_tokens_decoder
        # Where such a token ends, and whether there is one, depends on the text beside it.
        self._depends = any(t.lstrip or t.rstrip or t.single_word for t in self._added.values())
        self._control_texts = {t.content for i, t in self._added.items() if t.special or i in self.stop_tokens}
        ordered = sorted(self._control_texts, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, ordered)) or "(?!)")  # without any, it never matches

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process gets the arguments, and compiles the template itself."""
        options = {"lengths": self.lengths, "system_message": self.system_message, "today": self._today}
        return functools.partial(type(self), **options), (self.tokenizer, self.stop_tokens)

    def identity(self) -> str:
        """A text that stays the same as long as equal conversations are encoded to equal ids."""
        t, dated = self.tokenizer, "strftime_now" in self._names
        parts = type(self), type(t), t.chat_template, t.special_tokens_map, self.stop_tokens, self.lengths
        today = (self._today or datetime.date.today()) if dated else None
        return f"{parts} {self.system_message!r} {today} {t.backend_tokenizer.to_str()}"

    # --- conversations ---

    def as_rendered(self, messages: list[Message]) -> list[Message]:
        """The conversation that the template gets.

        The configured system message stands in front if the conversation has none. Arguments of tools' calls that are
        JSON text become objects where the template wants these.
        """
        if any("tool_calls" in message for message in messages) and self._template.wants_objects:
            messages = with_objects(messages)
        if self.system_message is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.system_message}, *messages]

    def with_fields(self, messages: list[Message], row: dict[str, Any]) -> tuple[list[Message], set[str]]:
        """The messages of a row, with its tools and the fields that the template names; and the names of other fields.

        Many datasets keep dates, weights and ids in messages. BadRow says that the template cannot render tool calls.
        """
        messages = with_tools(messages, row)
        others = {name for message in messages for name in message if name not in self._names}
        if "tool_calls" in others:
            raise BadRow(
                "a turn calls tools, and the chat template renders no tool_calls: set data.chat_template to another"
            )
        return [{name: value for name, value in each.items() if name not in others} for each in messages], others

    def encode(self, messages: list[Message]) -> tuple[Ids, Ids, str]:
        """The token ids of the prompt and of the answer, and a note on the boundary between them, or "".

        A token of text that lies across the boundary belongs to the answer. A control token never does: where one takes
        in the white space beside it, the prompt has the ids that `encode_prompt` gives the sampler. The answer ends
        with its first stop token; what the template writes after that is left out.

        It raises BadRow where the rendered conversation does not begin with the rendered prompt, where no boundary
        can be drawn, and where nothing of an answer but a stop token is left.
        """
        messages = self.as_rendered(messages)
        guard = self._needs_guard(messages)
        text = self._text(messages, guard, prompt=False)
        prompt, rest, note = self._split(text, self._tokenize(text, guard), messages[:-1], guard)
        return prompt, self._ended(rest, messages[-1]), _left_out(messages, text) or note

    def with_earlier_answers(self, example: Example) -> Example:
        """The example with the places of the assistant's turns before the last one, for `sft.turns=all`.

        They are cut by the rules of `encode` out of the whole conversation, as it is rendered for the last answer.
        Empty turns, and one that begins the conversation, are left out. BadRow names the turn whose beginning or stop
        token is not found. The text of the turn after it is never searched for a stop token.
        """
        messages = self.as_rendered(example.messages)
        guard, mark = self._needs_guard(messages), chr(0xFFFFC)  # a private character, beside that of `_text`
        text = self._text(messages, guard, prompt=False)
        ids, (starts, _) = encoding = self._tokenize(text, guard)
        places = [np.zeros(0, np.int32)]
        for number, (turn, following) in enumerate(itertools.pairwise(messages)):
            if not number or turn["role"] != "assistant" or is_empty(turn):
                continue
            marked = [*messages[: number + 1], {**following, "content": mark + following["content"]}]
            head, found, _ = self._text([*marked, *messages[number + 2 :]], guard, prompt=False).partition(mark)
            try:
                first = len(ids) - len(self._split(text, encoding, messages[:number], guard)[1])
                end = np.searchsorted(np.maximum.accumulate(starts), len(head))
                answer = self._ended(ids[first:end], turn)
                if not found or not text.startswith(head) or not self.stopped(answer):
                    raise BadRow("no stop token ends it before the text of the turn that follows")
                if not np.array_equal(example.prompt[: first + len(answer)], ids[: first + len(answer)]):
                    raise BadRow("the tokenizer reads it otherwise in the prompt of the last answer")
            except BadRow as error:
                raise BadRow(
                    f"the assistant's turn {turn.get('content', '')!r:.40}, which sft.turns=all trains on: {error}; "
                    "set sft.turns to last, or data.bad_rows to drop"
                ) from error
            places.append(np.arange(max(first, 1), first + len(answer), dtype=np.int32))
        return dataclasses.replace(example, earlier=np.concatenate(places))

    def _ended(self, answer: Ids, message: Message) -> Ids:
        """The ids of an answer up to its first stop token; BadRow where its text is left out."""
        stops = np.flatnonzero((answer[:, None] == self.stop_tokens).any(axis=1))
        answer = answer[: stops[0] + 1] if len(stops) else answer
        if len(stops) and len(answer) == 1 and not is_empty(message):
            raise BadRow(
                "nothing but a stop token is left of the answer: the chat template or the tokenizer leaves out "
                f"{message.get('content', '')!r:.60}"
            )
        return answer

    def _split(
        self, text: str, encoding: tuple[Ids, np.ndarray], turns: list[Message], guard: bool
    ) -> tuple[Ids, Ids, str]:
        """The ids of a text and its `_tokenize`, cut where the prompt of these turns ends, and the note of `encode`.

        What follows the cut is always an end of the text's own ids.
        """
        before = self._text(turns, guard, prompt=True)
        if not text.startswith(before):
            raise BadRow(
                "the chat template renders the prompt otherwise when the answer follows it: "
                f"…{before[-60:]!r} does not begin {text[:200]!r}"
            )
        ids, (starts, ends) = encoding
        size = len(before)
        cut = int(np.searchsorted(np.maximum.accumulate(ends), size, side="right"))
        straddles = cut < len(ids) and starts[cut] < size
        token = self._added.get(int(ids[cut])) if straddles else None
        if not self._depends and not (token and token.special):
            return ids[:cut], ids[cut:], ACROSS if straddles else ""
        asked = self._tokenize(before, guard)[0]
        if np.array_equal(ids[: len(asked)], asked):
            lost = len(asked) and ends[len(asked) - 1] > size
            return asked, ids[len(asked) :], SPACE_LOST if lost else ""
        takes_in_prompt = token and token.lstrip and not text[starts[cut] : size].strip()
        if not straddles or takes_in_prompt:
            return asked, ids[cut:], READ_OTHERWISE
        if (token and token.special) or not np.array_equal(ids[:cut], asked[:cut]):
            name = self.tokenizer.convert_ids_to_tokens(int(ids[cut]))
            raise BadRow(f"the tokenizer makes one token {name!r} of the prompt's end and the answer's beginning")
        return ids[:cut], ids[cut:], ACROSS

    def encode_checked(self, messages: list[Message], number: int) -> tuple[Ids, Ids]:
        """The token ids (prompt, response) of a user's conversation; ValueError names its `number`."""
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
        messages = self.as_rendered(messages)
        guard = self._needs_guard(messages)
        return self._tokenize(self._text(messages, guard, prompt=True), guard)[0]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of an answer, without special tokens, and without the control token that stops it."""
        ids = list(map(int, ids))
        stop = ids and ids[-1] in self.stop_tokens and ids[-1] in self._added
        return self.tokenizer.decode(ids[:-1] if stop else ids, skip_special_tokens=True)

    def stopped(self, response: Ids) -> bool:
        """Whether a response ends with a stop token, which means that the model finished it."""
        return len(response) > 0 and int(response[-1]) in self.stop_tokens

    def _needs_guard(self, messages: list[Message]) -> bool:
        """Whether a message has a control token's text; BadRow if it also has characters that the guard needs."""
        if not any(map(self._control.search, texts_of(messages))):
            return False
        if any(max(text, default="") >= _PRIVATE for text in texts_of(messages)):
            raise BadRow("a message has a control token's text and characters for private use (plane 15 or 16)")
        return True

    def _text(self, messages: list[Message], guard: bool, *, prompt: bool) -> str:
        """The rendered conversation. With `guard`, the template's control tokens have private names in it.

        A mark is put into every control token's string in the messages, so that after rendering all whole
        strings are the template's. These get private names, and the marks are removed. The twin tokenizer
        takes the private names for control tokens, and the strings of the messages for plain text.
        """
        if not guard:
            return self.render(messages, prompt=prompt)
        mark = chr(0xFFFFD)  # a private character, at the end of its plane

        def insert_mark(match: re.Match) -> str:
            return match[0][0] + mark + match[0][1:]

        safe = changed_texts(messages, functools.partial(self._control.sub, insert_mark))
        text = self._control.sub(lambda match: _private_name(match[0]), self.render(safe, prompt=prompt))
        return text.replace(mark, "")

    def _tokenize(self, text: str, guard: bool) -> tuple[Ids, np.ndarray]:
        """The ids of the tokens, and where in `text` they start and end: [2, tokens]."""
        backend = self._twin_tokenizer if guard else self.tokenizer.backend_tokenizer
        encoding = backend.encode(text, add_special_tokens=False)
        return np.asarray(encoding.ids, np.int32), np.asarray(encoding.offsets, np.int64).reshape(-1, 2).T

    @functools.cached_property
    def _twin_tokenizer(self) -> Any:
        """The same tokenizer, in which the control tokens have private names that nobody types."""
        from tokenizers import Tokenizer

        state = json.loads(self.tokenizer.backend_tokenizer.to_str())

        def rename(piece: str) -> str:
            return _private_name(piece) if piece in self._control_texts else piece

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

        It raises EmptyAnswer where there is no answer, and BadRow for a malformed conversation.
        """
        if is_empty(messages[-1]):
            raise EmptyAnswer("the answer is empty")
        if self._far_too_long(messages):
            counts["dropped: prompt too long"] += 1
            return None
        prompt, response, note = self.encode(messages)
        if not len(prompt):
            raise BadRow("the chat template makes no token of the prompt: an answer needs one before it")
        if not len(response):
            raise EmptyAnswer("the answer has no token")
        room = self.lengths.max_length - len(prompt)
        if len(prompt) > self.lengths.max_prompt or room < 1:
            counts["dropped: prompt too long"] += 1
            return None
        if note:
            counts[note] += 1
        counts["cut: answer too long"] += len(response) > room
        return Example(prompt_id, messages, prompt, response[:room])

    def _far_too_long(self, messages: list[Message]) -> bool:
        """Whether the first part of a prompt alone has twice as many tokens as are allowed.

        Tokenizing the whole of a prompt of megabytes would take seconds, only to drop it.
        """
        limit = self.lengths.max_prompt
        if sum(map(len, texts_of(messages[:-1]))) <= 100 * limit:
            return False
        beginning = self.render(self.as_rendered(messages)[:-1], prompt=True)[: 100 * limit]
        return len(self.tokenizer.backend_tokenizer.encode(beginning, add_special_tokens=False)) > 2 * limit

    def sampling_prompt(self, example: Example) -> Ids:
        """The token ids that the opponent answers."""
        return example.prompt

    def pair(self, example: Example, sample_id: int, generated: Ids) -> Pair:
        """The pair of an example and the token ids that the sampler generated for it."""
        messages = [*example.messages[:-1], {"role": "assistant", "content": self.decode(generated)}]
        ids, truncated = (example.prompt, example.real, generated), not self.stopped(generated)
        return Pair(example.prompt_id, sample_id, example.messages, messages, *ids, truncated)

    def given_pair(
        self, prompt_id: int, sample_id: int, real: list[Message], generated: list[Message], counts: Counter
    ) -> Pair | None:
        """A pair that came as text. It returns None for one that is too long, and notes this in `counts`.

        Where the two prompts tokenize differently at their end, the pair's prompt is the tokens they share.
        It raises EmptyAnswer where there is no answer, and BadRow for a malformed conversation.
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
        shorter = min(len(first.prompt), len(second.prompt))
        shared = int(np.logical_and.accumulate(first.prompt[:shorter] == second.prompt[:shorter]).sum())
        if not shared:
            raise BadRow("the prompts of real and generated share no token: an answer needs one before it")
        real_ids, generated_ids = (np.concatenate([each.prompt[shared:], each.real]) for each in (first, second))
        truncated = not self.stopped(second.real)
        return Pair(prompt_id, sample_id, real, generated, first.prompt[:shared], real_ids, generated_ids, truncated)


def end_of_turn(tokenizer: Any, stop_tokens: Collection[int]) -> int | None:
    """The added token that the chat template writes after every answer, where it writes no stop token there.

    A model that is trained on such answers ends with this token. The result is None where there is no such token, and
    where a template renders no conversation.
    """
    if tokenizer is None or tokenizer.chat_template is None:
        return None
    found, added = set(), tokenizer.added_tokens_decoder
    try:
        render = Template(tokenizer).render
        for answer in ("Yes, it is", "No: 7"):
            messages = [{"role": "user", "content": "Is it"}, {"role": "assistant", "content": answer}]
            text = render(messages, prompt=False)
            encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
            begin = text.rindex(answer) + len(answer)
            after = [token for token, (_, end) in zip(encoding.ids, encoding.offsets, strict=True) if end > begin]
            control = next((token for token in after if token in added and added[token].content.strip()), None)
            blank = control is None or not tokenizer.decode(after[: after.index(control)]).strip()
            found.add(control if blank and not {*after} & {*stop_tokens} else None)
    except ValueError:  # the template refuses this conversation, leaves the answer out, or is broken
        return None
    return found.pop() if len(found) == 1 else None


def unprompted_header(tokenizer: Any) -> str:
    """What a chat template that ignores add_generation_prompt writes between a question and its answer, or ""."""
    turns = [{"role": "user", "content": "Is it"}, {"role": "assistant", "content": "Yes, it is"}]
    try:
        render = Template(tokenizer).render
        asked, text = render(turns[:1], prompt=True), render(turns, prompt=False)
        ignores = asked == render(turns[:1], prompt=False) and text.startswith(asked)
        return text[len(asked) : text.rindex("Yes, it is")].strip() if ignores else ""
    except ValueError:  # the template refuses this conversation, leaves the answer out, or is broken
        return ""


def _left_out(messages: list[Message], text: str) -> str:
    """A note on a turn whose text is not in the rendered conversation, or ""; white space does not count."""
    shown = "".join(text.split())
    for message in reversed(messages):
        # Some templates quote what a tool returned.
        if message["role"] != "tool" and "".join(message.get("content", "").split()) not in shown:
            which = "answers" if message is messages[-1] else f"conversations with {message['role']} turns"
            return f"{which} of which the chat template leaves out text"
    return ""


_PRIVATE = chr(0xF0000)  # the first character of planes 15 and 16, which are for private use


def _private_name(token: str) -> str:
    """A control token's string moved to the private plane 16, which no text uses."""
    return "".join(chr(0x100000 + ord(character) % 0xFFFD) for character in token)
