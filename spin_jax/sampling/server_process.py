"""A completion server that a command of the user starts."""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
from pathlib import Path

from spin_jax.errors import EngineFailed

_STOPS_WITHIN_S = 30
# The second line waits until the run closes the pipe, or is killed, and then ends the group. A server that outlived a
# killed run would keep the memory of the devices.
_SCRIPT = """
exec 3<&0 </dev/null
(trap '' TERM; read -r _ <&3; kill -s TERM -- -$$; sleep 30; kill -s KILL -- -$$) >/dev/null 2>&1 &
exec sh -c "$1" 3<&-
"""


class ServerProcess:
    """A server, in a group of processes of its own. It listens at `address` once it is up."""

    def __init__(self, command: str, model: str, log: Path):
        """Starts the command with {model} and {port} filled in; what it prints is added to the file `log`."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        self._log = log
        filled_in = command.replace("{model}", shlex.quote(model)).replace("{port}", str(port))
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                ["sh", "-c", _SCRIPT, "sampling.command", filled_in],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the run alone, which then stops the server
            )

    def check(self) -> None:
        """Raises EngineFailed, with the end of the log, where the server has ended."""
        if (code := self._process.poll()) is not None:
            end = "\n".join(self._log.read_text("utf-8", "replace").splitlines()[-20:])
            raise EngineFailed(f"sampling.command ended with exit code {code}. Its log {self._log} ends with\n{end}")

    def stop(self) -> None:
        """Ends the server and all processes that it has started: TERM first, and KILL for what is left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOPS_WITHIN_S)
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()  # closes the pipe
