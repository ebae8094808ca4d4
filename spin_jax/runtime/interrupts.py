"""Ctrl-C and SIGTERM: they are noticed at once, and the run stops between two units of work."""

import _thread
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """The number of the signal that asked the run to stop, or 0; asked between units of work.

    A thread receives the signals: the main thread may compile or wait for a device for minutes. A
    second Ctrl-C quits at once, and so does any signal before the first call, when no work has begun.
    Quitting at once does no harm, because the files on disk are complete at any moment.
    """

    def __init__(self, quit_now: Callable[[int], None] | None = None):
        """`quit_now` gets the signal's number, in the thread; None: KeyboardInterrupt, in the main one."""
        self.number = 0
        self.speaks = True  # of several processes, only one prints
        self._quit_now = quit_now
        self.asked = self._raises = False  # asked: the run is under way
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._fd_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        threading.Thread(target=self._watch, name="interrupts", daemon=True).start()
        os.register_at_fork(after_in_child=self._let_go)
        self.listen()

    def listen(self) -> None:
        """Installs the handlers; call it again after a library may have replaced them."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _let_go(self) -> None:
        """In a forked child, restores the default handlers: the parent's thread does not run there."""
        if signal.getsignal(signal.SIGTERM) == self._handle:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def close(self) -> None:
        """Restores the handlers that were there before."""
        signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._writer)  # the thread reads the end, and ends

    def __call__(self) -> int:
        self.asked = True
        return self.number

    def _handle(self, *_: Any) -> None:  # the thread reads the number from the pipe
        if self._raises:
            self._raises = False
            raise KeyboardInterrupt

    def _watch(self) -> None:
        echo = False  # whether the next signal is the one that this thread raised itself
        while received := os.read(self._reader, 1):
            number = received[0]
            if number not in SIGNALS or echo:
                echo = False
                continue
            if not self.asked or (self.number and number == signal.SIGINT):
                self.number = self.number or number
                if self._quit_now is not None:
                    self._quit_now(number)
                self._raises = echo = True
                _thread.interrupt_main()
            elif not self.number:
                self.number = number
                if self.speaks:
                    say("\nstopping after this step or batch; what is done is kept")
        os.close(self._reader)


def say(text: str) -> None:
    """Prints without waiting for another print, and ignores a closed output: Ctrl-C ends `tee`, too."""
    with contextlib.suppress(OSError, ValueError):
        if sys.stdout is sys.__stdout__:
            os.write(1, f"{text}\n".encode())
        else:  # a notebook's
            print(text, flush=True)


@contextlib.contextmanager
def listening() -> Iterator[Callable[[], int]]:
    """Provides Interrupts during a `with` block."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0  # signals are the main thread's
        return

    interrupts = Interrupts()
    try:
        yield interrupts
    finally:
        interrupts.close()
