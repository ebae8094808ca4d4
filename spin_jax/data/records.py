"""The records that rows of a dataset become: messages, examples and pairs; and the checks of their fields."""

import dataclasses
import itertools
import reprlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from spin_jax.errors import BadRow

Message = dict[str, str]

Ids = np.ndarray  # int32 [n]


def prompt_turns(messages: Sequence[Message]) -> tuple[tuple[str, str], ...]:
    """The turns before the last one, as tuples that can be compared."""
    return tuple((message["role"], message["content"]) for message in messages[:-1])


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt and its human answer."""

    prompt_id: int  # the row's number in its dataset
    messages: list[Message]  # ends with the answer
    prompt: Ids
    real: Ids


@dataclasses.dataclass(frozen=True)
class Pair:
    """A prompt, the human answer and the opponent's."""

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

    @property
    def identical(self) -> bool:
        return np.array_equal(self.real, self.generated)


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Limits in tokens. An answer is cut where prompt and answer together reach `max_length`."""

    max_prompt: int
    max_length: int


UNLIMITED = Lengths(max_prompt=2**31 - 1, max_length=2**31 - 1)


def check_messages(messages: Any, field: str) -> list[Message]:
    """Checks a conversation and cuts it after the assistant's last turn, which may be empty. BadRow names the field."""
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
        if role not in ("system", "user", "assistant"):
            raise BadRow(f"{name}.role is {reprlib.repr(role)}: expected system, user or assistant")
        no_answer = role == "assistant" and message.get("content") is None
        content = "" if no_answer else check_text(message.get("content"), f"{name}.content")
        result.append({"role": role, "content": content})
    while result and result[-1]["role"] != "assistant":
        result.pop()
    if len(result) < 2:
        raise BadRow(f"{field}: no assistant turn with a prompt before it")
    if any(a["role"] == b["role"] == "assistant" for a, b in itertools.pairwise(result)):
        raise BadRow(f"{field}: two assistant turns in a row")
    return result


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
