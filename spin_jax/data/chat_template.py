"""A chat template, rendered in a sandbox and within limits of time and memory.

Templates come with checkpoints, from anyone: what one can reach, and how long it may take, is bounded here.
"""

import ctypes
import datetime
import functools
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any, TypeVar

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from spin_jax.data.records import Message
from spin_jax.errors import BadRow, BadTemplate

RENDER_SECONDS = 5.0  # for one conversation, which takes microseconds
RENDER_BYTES = 4 << 30  # that the process may grow by meanwhile
_LARGEST = 10**8  # characters or items that one operation may make

Made = TypeVar("Made")


class Template:
    """A tokenizer's chat template: compiled once, in a sandbox, and rendered within limits.

    Renders what `tokenizer.apply_chat_template` does, in a fraction of its time. What a template can do is
    bounded by a watchdog, which stops it between two of its operations, and by bounds on what a single
    one may make.
    """

    def __init__(self, tokenizer: Any, today: datetime.date | None = None):
        """`today` is what a template that asks for the date is told; None: the day it is."""
        text = tokenizer.get_chat_template()
        now = datetime.datetime.combine(today or datetime.date.today(), datetime.time())
        told = {"tools": None, "documents": None, "strftime_now": now.strftime}
        self._variables = {**tokenizer.special_tokens_map, **told}
        try:
            self._compiled = _WATCHDOG.run(lambda: _sandbox().from_string(text))
        except BadTemplate:
            raise
        except jinja2.TemplateSyntaxError as error:
            raise BadTemplate(f"the chat template, line {error.lineno}: {error.message}") from error
        except Exception as error:  # whatever Python's compiler and parser say
            raise BadTemplate(f"the chat template does not compile: {_described(error)}") from error
        self._try()

    def render(self, messages: list[Message], *, prompt: bool) -> str:
        try:
            return self._rendered(messages, prompt)
        except BadTemplate:
            raise
        except jinja2.TemplateError as error:
            raise BadRow(f"the chat template refuses the conversation: {error}") from error
        except Exception as error:  # whatever a template can do wrong
            raise BadRow(f"the chat template fails on the conversation: {_described(error)}") from error

    def _rendered(self, messages: list[Message], prompt: bool) -> str:
        render, variables = self._compiled.render, self._variables
        return _WATCHDOG.run(lambda: render(variables, messages=messages, add_generation_prompt=prompt))

    def _try(self) -> None:
        """Raises BadTemplate where nothing can be rendered; a template may refuse, in its own words."""
        question = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        for messages in (question, [{"role": "system", "content": "c"}, *question]):
            try:
                self._rendered(messages, False)
                self._rendered(messages[:-1], True)
                return
            except _Refused:
                return
            except BadTemplate:
                raise
            except Exception as error:  # whatever a template can do wrong
                failure = error
        raise BadTemplate(f"the chat template fails: {_described(failure)}") from failure


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


class _TimeIsUp(BaseException):
    """Raised in a thread by the watchdog; no `except Exception` on its way keeps it."""


class _Watchdog:
    """A thread that interrupts what takes too long or too much memory, in whichever thread it runs."""

    def __init__(self) -> None:
        self._running: dict[object, tuple[int, float]] = {}  # thread, and when its time is up
        self._thread: threading.Thread | None = None

    def run(self, action: Callable[[], Made]) -> Made:
        """`action()`; BadTemplate where it is stopped."""
        if self._thread is None or not self._thread.is_alive():  # none yet, or none in a forked process
            self._thread = threading.Thread(target=self._watch, name="chat template watchdog", daemon=True)
            self._thread.start()
        key = object()
        try:
            try:
                self._running[key] = threading.get_ident(), time.monotonic() + RENDER_SECONDS
                return action()
            finally:
                # Who takes the entry decides. Where the watchdog has, its exception is on the way, and must
                # arrive here, not in what this thread does next.
                if self._running.pop(key, None) is None and not isinstance(sys.exception(), _TimeIsUp):
                    while True:
                        time.sleep(0.001)
        except _TimeIsUp:
            limits = f"{RENDER_SECONDS:g} s or {RENDER_BYTES / 2**30:g} GiB"
            raise BadTemplate(f"the chat template was stopped: it took more than {limits}") from None

    def _watch(self) -> None:
        before: dict[object, int] = {}  # the process's memory when an entry was first seen
        while True:
            time.sleep(min(RENDER_SECONDS, 1) / 10)
            if not self._running:  # most of a run's time
                before = {}
                continue
            running, now, memory = self._running.copy(), time.monotonic(), _resident()
            before = {key: before.get(key, memory) for key in running}
            for key, (thread, end) in running.items():
                too_much = now > end or memory > before[key] + RENDER_BYTES
                if too_much and self._running.pop(key, None) is not None:
                    raised = ctypes.py_object(_TimeIsUp)
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), raised)


def _resident() -> int:
    """Bytes of memory that this process holds; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096
    except OSError:
        return 0


_WATCHDOG = _Watchdog()


class _Refused(jinja2.TemplateError):
    """A template's own `raise_exception`."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which some templates have around an answer: it changes no text."""

    tags = frozenset({"generation"})  # pyright: ignore[reportAssignmentType]

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Names(jinja2.utils.Namespace):
    """Jinja's namespace without names that begin with an underscore: those lead out of the sandbox."""

    def __init__(self, *args: Any, **kwargs: Any):
        given = dict(*args, **kwargs)
        for name in given:
            _check_name(name)
        super().__init__(given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r}")


class _Dict:
    """What templates know as `dict`: it makes dicts, and has no methods that change one."""

    __call__ = staticmethod(dict)
    fromkeys = staticmethod(dict.fromkeys)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with bounds on single operations that could go on for hours or fill the memory."""

    intercepted_binops = frozenset({"*", "**", "%"})
    growing = ("center", "expandtabs", "format", "format_map", "join", "ljust", "replace", "rjust")
    growing += ("translate", "zfill")  # methods of strings
    growing_filters = ("batch", "center", "format", "indent", "join", "replace", "round", "slice", "string")
    growing_filters += ("sum", "tojson", "wordwrap", "xmlattr")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length()
            size = {"*": bits + right.bit_length(), "**": bits * abs(right), "%": 0}[operator]
            if size > 10_000:
                raise jinja2.exceptions.SecurityError(f"a number of {size} bits")
        elif operator != "%" or isinstance(left, str):
            _check_growth((left, right), pattern=left if operator == "%" else "")
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str | bytes) and method.__name__ in __self.growing:
            args = _materialized(args)
            pattern = owner if method.__name__.startswith("format") else ""
            _check_growth((owner, *args, *kwargs.values()), pattern=pattern)
        return super().call(__context, __obj, *args, **kwargs)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """Says at once what Jinja says when the value is used."""
        raise jinja2.exceptions.SecurityError(f"{attribute!r} of {type(obj).__name__} is out of bounds")


def _bounded(function: Callable) -> Callable:
    """A filter that refuses to make too much."""

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        args = _materialized(args)
        texts = [arg for arg in args if isinstance(arg, str)]
        pattern = texts[0] if function.__name__ == "do_format" and texts else ""
        _check_growth((*args, *kwargs.values()), pattern=pattern)
        return function(*args, **kwargs)

    return bounded


def _materialized(args: tuple) -> tuple:
    return tuple(list(arg) if isinstance(arg, Generator) else arg for arg in args)


def _check_growth(values: Iterable[Any], *, pattern: Any = "") -> None:
    """Raises SecurityError where an operation on these could make more than `_LARGEST`.

    At worst something of the largest comes for each part of the second largest. A width is as good as a
    text of that width; `pattern` may have some written out.
    """
    sizes = sorted((_size(value) for value in values), reverse=True)
    possible = sizes[0] * max(sizes[1] if len(sizes) > 1 else 1, 1)
    if possible > _LARGEST or re.search(r"\d{7}", str(pattern)):
        raise jinja2.exceptions.SecurityError(f"an operation that could make more than {_LARGEST} characters")


def _size(value: Any) -> int:
    if isinstance(value, int):
        return abs(value) if abs(value) <= 10**6 else _LARGEST + 1
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_size(key) + _size(item) + 1 for key, item in value.items())
    if isinstance(value, list | tuple):
        return sum(_size(item) + 1 for item in value)
    return 1


def _sandbox() -> _Sandbox:
    """What transformers offers to chat templates."""
    sandbox = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    sandbox.filters["tojson"] = _to_json
    sandbox.filters.update({name: _bounded(sandbox.filters[name]) for name in _Sandbox.growing_filters})
    sandbox.globals.update(raise_exception=_refuse, dict=_Dict(), namespace=_Names)
    return sandbox


def _refuse(message: str) -> None:
    raise _Refused(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
