"""Renders chat templates in a sandbox, within limits of time and memory.

Templates come with checkpoints, which anybody may publish, so a template is treated as hostile.
"""

import contextlib
import ctypes
import datetime
import functools
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any, TypeVar

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from spin_jax.data.records import Message, tools_of
from spin_jax.errors import BadRow, BadTemplate

RENDER_SECONDS = 5.0  # for one conversation, which usually takes microseconds
RENDER_BYTES = 4 << 30  # by which the process may grow in that time
_LARGEST = 10**8  # characters or items that one operation may make

Result = TypeVar("Result")


class Template:
    """A tokenizer's chat template, compiled once in transformers' own sandbox.

    It renders the same text as `tokenizer.apply_chat_template`, in a fraction of the time. A watchdog stops
    a template between two of its operations, and `_Sandbox` bounds what a single operation may make.
    """

    def __init__(self, tokenizer: Any, today: datetime.date | None = None):
        """Compiles the template and tries it; `today` is the date that it may print, by default today's."""
        texts = [tokenizer.get_chat_template(tools=tools) for tools in (None, [])]  # some have another one with tools
        now = datetime.datetime.combine(today or datetime.date.today(), datetime.time())
        self.names = {"role", "content", *re.findall(r"\w+", " ".join(texts))}  # the fields that it may read, and more
        if not self.names.isdisjoint(_REASONING):
            self.names.update(_REASONING)
        self._variables = dict(tokenizer.special_tokens_map, documents=None, strftime_now=now.strftime)
        try:
            plain = _WATCHDOG.run(lambda: _Sandbox().from_string(texts[0]))
            with_tools = _WATCHDOG.run(lambda: _Sandbox().from_string(texts[1])) if texts[1] != texts[0] else plain
            self._compiled = {False: plain, True: with_tools}
        except BadTemplate:
            raise
        except jinja2.TemplateSyntaxError as error:
            raise BadTemplate(f"the chat template, line {error.lineno}: {error.message}") from error
        except Exception as error:  # Python's own parser and compiler raise many kinds
            raise BadTemplate(f"the chat template does not compile: {_described(error)}") from error
        self._try()

    def render(self, messages: list[Message], *, prompt: bool) -> str:
        """The text of a conversation; with `prompt`, the beginning of an answer follows it.

        It raises BadRow where the template refuses the conversation, and BadTemplate where it takes too long.
        """
        variants, failure = [messages], None
        if any("content" not in message for message in messages):
            # transformers leaves out the null content of a turn that calls tools. Some templates want null, some "".
            variants += [[{"content": content, **message} for message in messages] for content in (None, "")]
        for variant in variants:
            try:
                text = self._rendered(variant, prompt)
            except BadTemplate:
                raise
            except Exception as error:  # a template can raise any kind
                failure = error
                continue
            if not self._leaves_out_calls(variant, prompt, text):
                return text
            failure = failure or jinja2.TemplateError("it leaves out the tool_calls of a turn without text")
        if isinstance(failure, jinja2.TemplateError):
            raise BadRow(f"the chat template refuses the conversation: {failure}") from failure
        raise BadRow(f"the chat template fails on the conversation: {_described(failure)}") from failure

    @functools.cached_property
    def wants_objects(self) -> bool:
        """Whether the arguments of a tool's call should be objects: as JSON text, they are not shown as they are.

        Some templates write such text as JSON once more, some put braces around it, and some fail.
        """
        as_text, as_object = (self._show_call(arguments) for arguments in (_ARGUMENTS, json.loads(_ARGUMENTS)))
        right = as_text is not None and _ARGUMENTS in as_text and f"{{{_ARGUMENTS}" not in as_text
        return not right and as_object is not None

    def _show_call(self, arguments: Any) -> str | None:
        """The text of a conversation that calls a tool; None where the template refuses it."""
        call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": arguments}}
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]
        try:
            return self.render(messages, prompt=False)
        except ValueError:
            return None

    def _rendered(self, messages: list[Message], prompt: bool) -> str:
        tools, variables = tools_of(messages), self._variables
        render, messages = self._compiled[tools is not None].render, list(map(_with_reasoning, messages))
        return _WATCHDOG.run(lambda: render(variables, messages=messages, tools=tools, add_generation_prompt=prompt))

    def _leaves_out_calls(self, messages: list[Message], prompt: bool, text: str) -> bool:
        """Whether turns that only call tools render to the same text without the calls: they would be empty."""
        if not any("tool_calls" in message for message in messages):
            return False
        bare = [
            {name: value for name, value in m.items() if name != "tool_calls" or (m.get("content") or "").strip()}
            for m in messages
        ]
        try:
            return bare != messages and self._rendered(bare, prompt) == text
        except BadTemplate:
            raise
        except Exception:  # a template can raise any kind
            return False

    def _try(self) -> None:
        """Raises BadTemplate where no conversation renders; a template may refuse by raise_exception."""
        question = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        for messages in (question, [{"role": "system", "content": "c"}, *question]):
            try:
                self._rendered(messages, False)
                self._rendered(messages[:-1], True)
                return
            except BadTemplate:
                raise
            except Exception as error:  # a template can raise any kind
                if type(error) is jinja2.TemplateError:  # from raise_exception
                    return
                failure = error
        raise BadTemplate(f"the chat template fails: {_described(failure)}") from failure


_ARGUMENTS = '{"x": "y"}'


def with_objects(messages: list[Message]) -> list[Message]:
    """Messages whose calls have the object itself as arguments, where they had the JSON text of one."""

    def parsed(call: Any) -> Any:
        if not isinstance(call, dict):
            return call
        call = {name: parsed(value) if name == "function" else value for name, value in call.items()}
        if isinstance(call.get("arguments"), str):
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(call["arguments"])
                return {**call, "arguments": value} if isinstance(value, dict) else call
        return call

    return [
        {**m, "tool_calls": list(map(parsed, m["tool_calls"]))} if isinstance(m.get("tool_calls"), list) else m
        for m in messages
    ]


_REASONING = ("reasoning_content", "thinking", "reasoning")  # its names in datasets and in templates


def _with_reasoning(message: Message) -> Message:
    """The message with its reasoning under each name that a template reads, as transformers hands it over."""
    reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _described(error: Exception | None) -> str:
    return f"{type(error).__name__}: {error}"[:500]


class _TimeIsUp(BaseException):
    """The watchdog raises it in a thread. It is no Exception, so that no `except Exception` catches it."""


class _Watchdog:
    """A thread that interrupts an action of any thread that takes too much time or memory."""

    def __init__(self) -> None:
        self._running: dict[object, tuple[int, float]] = {}  # the thread and deadline of each action
        self._thread: threading.Thread | None = None

    def run(self, action: Callable[[], Result]) -> Result:
        """Returns the result of `action`; raises BadTemplate where the action was stopped."""
        if self._thread is None or not self._thread.is_alive():  # the first call, or a forked process
            self._thread = threading.Thread(target=self._watch, name="chat template watchdog", daemon=True)
            self._thread.start()
        key = object()
        try:
            try:
                self._running[key] = threading.get_ident(), time.monotonic() + RENDER_SECONDS
                return action()
            finally:
                # Where the watchdog has removed the entry, its exception is on the way. It must arrive here,
                # and not in what this thread does next.
                if self._running.pop(key, None) is None and not isinstance(sys.exception(), _TimeIsUp):
                    while True:
                        time.sleep(0.001)
        except _TimeIsUp:
            limits = f"{RENDER_SECONDS:g} s or {RENDER_BYTES / 2**30:g} GiB"
            raise BadTemplate(f"the chat template was stopped: it took more than {limits}") from None

    def _watch(self) -> None:
        before: dict[object, int] = {}  # the memory of the process when an entry was first seen
        while True:
            time.sleep(min(RENDER_SECONDS, 1) / 10)
            if not self._running:  # so it is for most of a run
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
    """The bytes of memory that this process holds; 0 where the system does not say."""
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
    return 0


_WATCHDOG = _Watchdog()


class _Sandbox(ImmutableSandboxedEnvironment):
    """Transformers' sandbox for chat templates, with bounds on single operations.

    The watchdog cannot stop an operation that runs in C, as 'x' * 10**10 or 10**10**9 does: no other Python
    code runs until it ends. So the operations that can make something much larger than their operands are
    checked before they begin. One gap remains: the text of a list that is nested in itself many times, as
    after thirty steps of l = [l, l], is made in C wherever it is printed, and can take minutes.
    """

    intercepted_binops = frozenset({"*", "**", "%"})
    growing = ("batch", "center", "expandtabs", "format", "format_map", "indent", "join", "ljust", "replace", "rjust")
    growing += ("round", "slice", "string", "sum", "tojson", "translate", "wordwrap", "xmlattr", "zfill")

    def __init__(self) -> None:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        theirs = _compile_jinja_template("").environment
        extensions = [type(extension) for extension in theirs.extensions.values()]
        super().__init__(trim_blocks=theirs.trim_blocks, lstrip_blocks=theirs.lstrip_blocks, extensions=extensions)
        self.globals.update(theirs.globals)
        if self.globals["dict"] is dict:  # transformers before 5.23: with dict.update a template changes the messages
            self.globals.update(dict=lambda *items, **named: dict(*items, **named), namespace=_Namespace)
        self.filters.update(theirs.filters)
        self.filters.update({name: _bounded(name, f) for name, f in theirs.filters.items() if name in self.growing})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            bits = max(left.bit_length(), right.bit_length()) * (abs(right) if operator == "**" else 1)
            if bits > 10_000:
                raise SecurityError(f"a number of {bits} bits")
        elif isinstance(left, str | bytes) or not (isinstance(left, float) or isinstance(right, float)):
            _check_growth(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str | bytes) and method.__name__ in __self.growing:
            args = _without_generators(args)
            _check_growth(method.__name__, owner, *args, *kwargs.values())
        return super().call(__context, __obj, *args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """A namespace without private names, which could lead a template into the internals of Python."""

    def __init__(*args: Any, **named: Any):  # `self` may be one of the names
        jinja2.utils.Namespace.__init__(args[0])
        for name, value in dict(*args[1:], **named).items():
            args[0][name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace takes no private name such as {name!r}")
        super().__setitem__(name, value)


def _bounded(name: str, function: Callable) -> Callable:
    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        args = _without_generators(args)
        _check_growth(name, *args, *kwargs.values())
        return function(*args, **kwargs)

    return bounded


def _without_generators(values: tuple) -> tuple:
    return tuple(list(value) if isinstance(value, Generator) else value for value in values)


def _check_growth(operation: str, *operands: Any) -> None:
    """Raises SecurityError where an operation could make more than `_LARGEST`.

    At worst it makes a copy of the largest operand for each part of the second largest. A number counts as
    a text of that length, since it may be a width; the first operand of a format may have widths in it.
    """
    sizes = sorted((_size(operand) for operand in operands), reverse=True)
    wide = operation in ("%", "format", "format_map") and re.search(r"\d{7}", str(operands[0]))
    if wide or sizes[0] * max([1, *sizes[1:2]]) > _LARGEST:
        raise SecurityError(f"an operation that could make more than {_LARGEST} characters")


def _size(value: Any) -> int:
    if isinstance(value, int):
        return abs(value) if abs(value) <= 10**6 else _LARGEST + 1
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, Mapping):
        return _size(list(value.items()))
    if isinstance(value, list | tuple):
        return sum(_size(item) + 1 for item in value)
    return 1
