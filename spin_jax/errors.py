"""Every exception that this package raises for a reason of its own, with the exit code that it means.

Exit code 2 says that the input is wrong, and 1 that the run failed; after 1 the same command continues the
run. Errors of other kinds (ValueError, OSError and so on) get their code from `spin_jax.cli.failed`.
"""

from typing import Any

_GIB = 2.0**30

# --- input ---------------------------------------------------------------------------------------


class ConfigError(ValueError):
    """The config cannot run. The message names the key and says what to do."""

    exit_code = 2


class BadRow(ValueError):
    """A row makes no conversation. The message says why; the caller adds file and row."""

    exit_code = 2


class EmptyAnswer(BadRow):
    """The answer of a row is null, empty or white space."""


class BadTemplate(ValueError):
    """A chat template serves for no conversation, or takes too long. The message says why."""

    exit_code = 2


class MissingAnswers(FileNotFoundError):
    """Files are missing that another phase of the iteration has to make first."""

    exit_code = 2


class MissingTasks(ImportError, ValueError):
    """lm_eval is not installed. The message says how to install it."""

    exit_code = 2


class NothingToTrainOn(RuntimeError):
    """`selfplay.rows` leaves nothing of an iteration's answers."""

    exit_code = 2


class Damaged(ValueError):
    """Files differ from what was written. The message names each of them."""

    exit_code = 2


# --- the run -------------------------------------------------------------------------------------


class NoRoom(OSError):
    """The disk has no room for what is to be written. The message has the numbers."""

    exit_code = 1

    def __str__(self) -> str:
        return str(self.strerror)


class JudgeFailed(RuntimeError):
    """A verifier or scorer raised an error, or returned something else than a number for each answer."""

    exit_code = 1


class NotFinite(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""

    exit_code = 1

    def __init__(self, step: int, batch: Any):
        super().__init__(f"loss or gradient was not finite, step after step; the last was step {step}")
        self.step = step
        self.batch = batch


class Interrupted(KeyboardInterrupt):
    """A signal stopped a phase between two units of work; everything done so far is saved."""

    def __init__(self, signal_number: int):
        super().__init__()
        self.exit_code = 128 + signal_number


class OtherFailed(RuntimeError):
    """Another process failed and has said why; this one exits with the same code."""

    def __init__(self, exit_code: int):
        super().__init__("another process failed: it says why")
        self.exit_code = exit_code


# --- compilation for machines that are not here ----------------------------------------------------


class NoCompiler(Exception):
    """No compiler for the machine is installed. The message says what would install it."""

    exit_code = 2


class CompilerFailed(Exception):
    """The compiler failed on a program that it should compile."""

    exit_code = 1


class OutOfMemory(Exception):
    """The compiler found no room for a program on the device."""

    exit_code = 1

    def __init__(self, needed: float):
        super().__init__(f"needs {needed / _GIB:.1f} GiB")
        self.needed = needed  # bytes
