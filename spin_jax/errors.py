"""The exceptions of spin_jax, and the exit code of a command that ends with one.

A command prints such an error as one message, without a traceback. Exit code 2 means bad input, and 1 a failure.
"""

from typing import Any


class SpinJaxError(Exception):
    """An error of spin_jax; its message is written for the person who runs the command."""

    exit_code = 1


def exit_code(error: Exception, work_began: bool = False) -> int:
    """The exit code of an error. Until the work began, a ValueError or FileNotFoundError is a fault of the input."""
    bad_input = isinstance(error, ValueError | FileNotFoundError) and not work_began
    return getattr(error, "exit_code", 2 if bad_input else 1)


class BadInput(SpinJaxError):
    """The input of a command is bad, so the same command would fail again."""

    exit_code = 2


class ConfigError(BadInput, ValueError):
    """A config cannot run; the message names the key and says what to do."""


class BadRow(BadInput, ValueError):
    """A row of the data holds no conversation; the message says why, and the caller adds the row's number."""


class EmptyAnswer(BadRow):
    """The answer of a row is null, empty or white space."""


class BadTemplate(BadInput, ValueError):
    """A chat template renders no conversation or takes too long; the message says why."""


class Damaged(BadInput, ValueError):
    """Files differ from what was written; the message names each."""


class MissingInput(BadInput, FileNotFoundError):
    """An input of a phase is missing, for example because an earlier phase has not written it yet."""


class NothingToTrainOn(BadInput, RuntimeError):
    """An iteration has no pair, by selfplay.rows or selfplay.pairing, or too few for a step that learns."""


class HarnessNotInstalled(BadInput, ImportError, ValueError):
    """lm_eval is not installed; the message says how to install it."""


class NoCompiler(BadInput):
    """No compiler for the planned machine is installed; the message says what to install."""


class NoRoom(SpinJaxError, OSError):
    """The disk has too little room for a file; the message has the numbers."""

    def __str__(self) -> str:
        return str(self.strerror)


class NotFinite(SpinJaxError, RuntimeError):
    """Too many training steps in a row had a loss or gradient that is not finite."""

    def __init__(self, step: int, batch: Any):
        super().__init__(f"loss or gradient was not finite, step after step; the last was step {step}")
        self.step = step
        self.batch = batch


class JudgeFailed(SpinJaxError, RuntimeError):
    """A verifier, a scorer or a pairing function raised an error, or did not return what it should."""


class EngineFailed(SpinJaxError, RuntimeError):
    """The servers of sampling.engine, or the command of sampling.command, no longer answer; a later try may succeed."""


class EngineRefused(BadInput, RuntimeError):
    """A server of sampling.engine refuses a request, and would refuse it again."""


class EncodingKilled(SpinJaxError, RuntimeError):
    """A process that encoded rows was ended from outside; the message says what to do."""


class CompilerFailed(SpinJaxError):
    """The compiler failed on a program for a reason other than memory."""


class OutOfMemory(SpinJaxError):
    """A program needs more memory than a device has."""

    def __init__(self, needed: float):
        super().__init__(f"needs {needed / 2**30:.1f} GiB")
        self.needed = needed  # bytes


class OtherFailed(SpinJaxError, RuntimeError):
    """Another process failed, and prints why; this process exits with the same code."""

    def __init__(self, code: int):
        super().__init__("another process failed, and prints why")
        self.exit_code = code


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run between two units of work, and everything done so far is saved.

    It is no Exception, like KeyboardInterrupt, so that no `except Exception` catches it.
    """

    def __init__(self, number: int):
        super().__init__()
        self.exit_code = 128 + number  # the number of the signal
