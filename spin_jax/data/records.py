"""The records that rows of a dataset become: messages, examples and pairs; and the checks of their fields."""

import dataclasses
import itertools
import json
import reprlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from spin_jax.errors import BadRow

# role and content, and any other field that a template may render: reasoning_content, tool_calls, name, … The first
# message of a conversation also has its tools. A turn that only calls tools has no content.
Message = dict[str, Any]

Ids = np.ndarray  # int32 [n]

HUMAN = -1  # the human answer, where sampled answers to the same prompt have sample_ids from 0 on


def prompt_turns(messages: Sequence[Message]) -> tuple[str, ...]:
    """The turns before the last one, with all their fields, as texts that can be compared."""
    return tuple(json.dumps(message, sort_keys=True, default=str) for message in messages[:-1])


PAIR_COLUMNS = (  # of a file of pairs: the first fields of a Pair, in its order
    *("prompt_id", "sample_id", "real", "generated"),
    *("prompt_tokens", "real_tokens", "generated_tokens", "truncated"),
)
MORE_FIELDS = "other_fields"  # in files of pairs: the fields of a message beside role and content, as JSON text


def fold(message: Message) -> Message:
    """A message of three texts, for a file of pairs."""
    more = {name: value for name, value in message.items() if name not in ("role", "content")}
    folded = {"role": message["role"], "content": message.get("content")}
    return {**folded, MORE_FIELDS: json.dumps(more, ensure_ascii=False, default=str) if more else None}


def unfold(message: dict[str, Any]) -> Message:
    """The message that `fold` had, and any other message, without its null fields; ValueError for a damaged text."""
    fields = {name: value for name, value in message.items() if value is not None}
    return {**json.loads(fields.pop(MORE_FIELDS, "{}")), **fields}


def tools_of(messages: Sequence[Message]) -> list[Any] | None:
    """The tools that a conversation describes to the model; None where it has none."""
    return next((message["tools"] for message in messages if message.get("tools")), None)


def is_empty(answer: Message) -> bool:
    """Whether an answer has neither text nor a call of a tool."""
    return not (answer.get("content", "").strip() or answer.get("tool_calls"))


def changed_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of a message, or of a part of one, in which `change` was applied to every text, however deep it is."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {changed_texts(key, change): changed_texts(item, change) for key, item in value.items()}
    return [changed_texts(item, change) for item in value] if isinstance(value, list | tuple) else value


def texts_of(value: Any) -> list[str]:
    """Every text in messages, or in a part of one, however deep it is; names of fields are among them."""
    texts: list[str] = []
    changed_texts(value, lambda text: texts.append(text) or text)
    return texts


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt and its human answer."""

    prompt_id: int  # the row's number in its dataset
    messages: list[Message]  # ends with the answer
    prompt: Ids
    real: Ids
    earlier: Ids | None = None  # with sft.turns=all: the places in `prompt` of the answers before, which SFT trains on


@dataclasses.dataclass(frozen=True)
class Pair:
    """A prompt, the human answer and the opponent's; with selfplay.pairing the chosen answer and the rejected one."""

    prompt_id: int
    sample_id: int
    real_messages: list[Message]
    generated_messages: list[Message]
    prompt: Ids
    real: Ids
    generated: Ids
    truncated: bool  # whether the generated answer ends without a stop token
    score: float | None = None  # the score of the generated answer by a verifier (1 or 0) or a scorer
    start: Ids | None = None  # the answer of the model that self-play began with, if the loss needs it
    real_score: float | None = None  # the scorer's score of the human answer, if selfplay.pairing compares it
    right: bool | None = None  # whether eval.verifier accepts the generated answer, if selfplay.pairing asks it
    chosen_id: int = HUMAN  # the sample_id of the answer in `real`, which selfplay.pairing may choose

    @property
    def identical(self) -> bool:
        return np.array_equal(self.real, self.generated)


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Limits in tokens. An answer is cut where prompt and answer together reach `max_length`."""

    max_prompt: int
    max_length: int


def has_more_fields(conversations: Iterable[Sequence[Message]]) -> bool:
    """Whether a message has another field than role and content, or lacks one of these."""
    return any(message.keys() != {"role", "content"} for messages in conversations for message in messages)


UNLIMITED = Lengths(max_prompt=2**31 - 1, max_length=2**31 - 1)


def check_messages(messages: Any, field: str) -> list[Message]:
    """Checks a conversation and cuts it after the assistant's last turn, which may be empty. BadRow names the field."""
    result = check_turns(messages, field)
    while result and result[-1]["role"] != "assistant":
        result.pop()
    if len(result) < 2:
        raise BadRow(f"{field}: no assistant turn with a prompt before it")
    if any(a["role"] == b["role"] == "assistant" for a, b in itertools.pairwise(result)):
        raise BadRow(f"{field}: two assistant turns in a row")
    return result


def check_turns(messages: Any, field: str) -> list[Message]:
    """Copies of messages with all their fields that are not null, and with text as content. BadRow names the field."""
    if not isinstance(messages, list | tuple) or not messages:
        found = "an empty list" if isinstance(messages, list | tuple) else type(messages).__name__
        parse = "; if the text is JSON, parse it first" if isinstance(messages, str) else ""
        raise BadRow(f"{field}: expected a list of messages, and found {found}{parse}")
    result = []
    for number, message in enumerate(messages):
        name = f"{field}[{number}]"
        if not isinstance(message, dict):
            raise BadRow(f"{name} is {type(message).__name__}: expected a role and content")
        role = message.get("role")
        if role not in ("system", "user", "assistant", "tool"):
            raise BadRow(f"{name}.role is {reprlib.repr(role)}: expected system, user, assistant or tool")
        if role == "tool" and not result:
            raise BadRow(f"{name}.role is 'tool': a conversation does not begin with what a tool returned")
        try:
            fields = unfold(message)
        except (ValueError, TypeError, RecursionError) as error:
            raise BadRow(f"{name}.{MORE_FIELDS} is no JSON text of fields: {error}") from error
        if role != "assistant" or "content" in fields:
            fields["content"] = _read_content(message.get("content"), f"{name}.content")
        elif not fields.get("tool_calls"):
            fields["content"] = ""
        for key, value in fields.items():
            for text in texts_of(value) if key != "content" else ():
                check_text(text, f"{name}.{key}")
        result.append({"role": role, **fields})
    return result


def _read_content(content: Any, field: str) -> str:
    """The text of a message. A list of parts of text is joined; BadRow names a part of another kind."""
    if not isinstance(content, list | tuple):
        return check_text(content, field)
    texts = []
    for number, part in enumerate(content):
        kind, text = (part.get("type", "text"), part.get("text")) if isinstance(part, dict) else (None, None)
        if kind != "text" or not isinstance(text, str):
            shown = f"of type {reprlib.repr(kind)}" if isinstance(part, dict) else f"no dict but {type(part).__name__}"
            raise BadRow(f"{field} is list: expected text, or parts of type 'text', and part {number} is {shown}")
        texts.append(check_text(text, f"{field}[{number}].text"))
    return "".join(texts)


def with_tools(messages: list[Message], row: dict[str, Any]) -> list[Message]:
    """The messages, the first one with the tools of their row; BadRow where these are no list, nor JSON text of one."""
    tools = row.get("tools")
    try:
        tools = json.loads(tools or "null") if isinstance(tools, str) else tools
        tools = [json.loads(tool) if isinstance(tool, str) else tool for tool in tools or []]
        if not all(isinstance(tool, dict) for tool in tools):
            raise ValueError("a tool is no object")
        for text in texts_of(tools):
            check_text(text, "a tool")
    except (ValueError, TypeError, RecursionError) as error:
        raise BadRow(f"tools: expected a list of JSON objects, or JSON text of one: {error}") from error
    return [{**messages[0], "tools": tools}, *messages[1:]] if tools else messages


def without_nulls(value: Any, feature: Any) -> Any:
    """A row of an Arrow table, or a part of it, without the null fields of structs, which others of its kind have.

    `feature` is its type in `datasets`. The null fields of a JSON type are its own, and stay.
    """
    if isinstance(value, dict) and isinstance(feature, dict):
        return {name: without_nulls(item, feature.get(name)) for name, item in value.items() if item is not None}
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    return [without_nulls(item, inner) for item in value] if isinstance(value, list) and inner else value


def check_text(value: Any, field: str) -> str:
    """Checks that `value` is text that can be tokenized, and returns it; otherwise it raises BadRow."""
    if not isinstance(value, str):
        raise BadRow(f"{field} is {type(value).__name__}: expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise BadRow(f"{field} has half a character ({half!a} at {error.start}): no UTF-8 text") from error
    return value


def list_names(names: Iterable[str]) -> str:
    """A list of names for a message. Long or unprintable names and long lists are shortened."""
    shown = [name if name.isprintable() and len(name) <= 40 else ascii(name[:40]) for name in map(str, names)]
    return ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "")


def read_integer(row: dict[str, Any], name: str, default: int, end: int) -> int:
    """The integer in a column, or `default` where it is none (some ids are text); BadRow if it is not in [0, end)."""
    value = row.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        return default
    if not 0 <= value < end:
        raise BadRow(f"{name} is {value}: expected 0 to {end - 1}")
    return value
