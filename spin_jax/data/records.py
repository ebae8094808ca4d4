"""What the rows of a dataset become: messages, examples (a prompt and its human answer) and pairs."""

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
    """What the last turn of a conversation answers, as something to compare."""
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
    truncated: bool  # the generated answer met no stop token
    score: float | None = None  # what a verifier (1 or 0) or scorer makes of the generated answer
    start: Ids | None = None  # what the model that self-play began with answered, where a loss asks for it

    @property
    def identical(self) -> bool:
        return np.array_equal(self.real, self.generated)


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Limits in tokens. An answer is cut to what its prompt leaves of `max_length`."""

    max_prompt: int
    max_length: int


UNLIMITED = Lengths(max_prompt=2**31 - 1, max_length=2**31 - 1)


def check_messages(messages: Any, field: str) -> list[Message]:
    """A conversation that ends with the assistant's last turn, whose content may be empty.

    Raises:
        BadRow: naming the field.
    """
    if not isinstance(messages, list | tuple) or not messages:
        found = "an empty list" if isinstance(messages, list | tuple) else type(messages).__name__
        parse = ", and JSON in a string is to be parsed first" if isinstance(messages, str) else ""
        raise BadRow(f"{field}: expected a list of messages, and found {found}{parse}")
    result = []
    for number, message in enumerate(messages):
        name = f"{field}[{number}]"
        if not isinstance(message, dict):
            raise BadRow(f"{name} is {type(message).__name__}: expected a role and content")
        role = message.get("role")
        if role not in ("system", "user", "assistant"):
            raise BadRow(f"{name}.role is {reprlib.repr(role)}: expected system, user or assistant")
        nothing = role == "assistant" and message.get("content") is None
        content = "" if nothing else check_text(message.get("content"), f"{name}.content")
        result.append({"role": role, "content": content})
    while result and result[-1]["role"] != "assistant":
        result.pop()
    if len(result) < 2:
        raise BadRow(f"{field}: no assistant turn with a prompt before it")
    if any(a["role"] == b["role"] == "assistant" for a, b in itertools.pairwise(result)):
        raise BadRow(f"{field}: two assistant turns in a row")
    return result


def check_text(value: Any, field: str) -> str:
    """`value`, which a tokenizer will take; else BadRow."""
    if not isinstance(value, str):
        raise BadRow(f"{field} is {type(value).__name__}: expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise BadRow(f"{field} has half a character ({half!a} at {error.start}): no UTF-8 text") from error
    return value


def list_names(names: Iterable[str]) -> str:
    """Names for an error or a note, whatever they are made of."""
    shown = [name if name.isprintable() and len(name) <= 40 else ascii(name[:40]) for name in map(str, names)]
    return ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "")


def read_prompt_id(row: dict[str, Any], number: int) -> int:
    """The row's own where it is an integer (some datasets have texts there), else its number."""
    return read_integer(row, "prompt_id", number, 2**63)


def read_integer(row: dict[str, Any], name: str, default: int, end: int) -> int:
    value = row.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        return default
    if not 0 <= value < end:
        raise BadRow(f"{name} is {value}: expected 0 to {end - 1}")
    return value
