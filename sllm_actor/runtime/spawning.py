"""A program of its own as a child: started, known by its end, and ended with all that it has started itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence

from sllm_actor.errors import EngineStartFailed


class Spawned:
    """A child in a session of its own. `exited` resolves to its exit status, negative for a signal.

    What it has started and left in its session ends with it. Belongs to one event loop.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        loop = asyncio.get_running_loop()
        self.pid = process.pid
        self.exited: asyncio.Future[int] = loop.create_future()
        self._process = process
        self._pidfd = os.pidfd_open(process.pid)
        loop.add_reader(self._pidfd, self._ended)

    def kill(self) -> None:
        """End it at once; does nothing once it has ended."""
        if not self.exited.done():
            self._kill_session()

    def _kill_session(self) -> None:
        # Until it is waited for, nobody else can have its number.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def _ended(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._kill_session()
        self.exited.set_result(self._process.wait())


def spawn(command: Sequence[str], fds: Sequence[int], environment: Mapping[str, str]) -> Spawned:
    """Start a program that has `fds` under the numbers that they have here, and nothing else of this process.

    Raises:
        EngineStartFailed: it can't be started.
    """
    try:
        process = subprocess.Popen(
            command, pass_fds=fds, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
        )
    except OSError as error:
        raise EngineStartFailed(f"{command[0]} can't be started: {error}") from error
    return Spawned(process)
