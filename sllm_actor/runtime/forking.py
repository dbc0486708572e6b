"""The node's end of the fork server: start it, ask it for children, learn of their ends."""

from __future__ import annotations

import array
import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence

import msgspec

from sllm_actor.errors import EngineStartFailed
from sllm_actor.runtime.fork_template import VARIABLE, Adopted, ask
from sllm_actor.runtime.forkserver import (
    MAX_DATAGRAM_BYTES,
    Declined,
    Fork,
    Forked,
    Kill,
    Ready,
    Refused,
    Report,
    import_path,
)

log = logging.getLogger(__name__)

# One thread in the fork server, whatever its libraries would like; and nothing fetched from anywhere.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # Compute threads that wait sleep instead of spinning: beside one other busy process on the same cores,
    # a spinning engine was 28 times slower (OPT-125M, two threads on two cores: 658 ms a token against 23).
    "OMP_WAIT_POLICY": "PASSIVE",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
BOOT = "import sys; from sllm_actor.runtime.forkserver import main; main(sys.argv[1:])"
START_TIMEOUT_S = 120.0
LEAVE_TIMEOUT_S = 5.0


class Child:
    """A forked process. `exited` resolves to its exit status, negative for a signal."""

    def __init__(self, server: ForkServer, call: int, pid: int) -> None:
        self.pid = pid
        self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._server = server
        self._call = call

    def kill(self) -> None:
        """End it at once; does nothing once it has ended."""
        if not self.exited.done():
            self._server.kill(self._call)


class ForkServer:
    """Owns the fork server process and knows its living children. Belongs to one event loop."""

    def __init__(self, module: str, environment: Mapping[str, str]) -> None:
        self._module = module
        self._environment = environment
        self._process: subprocess.Popen[bytes] | Adopted | None = None
        self._control: socket.socket | None = None
        self._ready: asyncio.Future[None] | None = None
        self._calls = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Child]] = {}
        self._children: dict[int, Child] = {}
        self._reports: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)

    @property
    def pid(self) -> int:
        """The process id, 0 while there is none. One that a template forks has one from when it is ready."""
        return self._process.pid if self._process is not None else 0

    async def start(self) -> None:
        """Start the process and wait until its imports are done; does nothing if it runs.

        Raises:
            EngineStartFailed: it ended or took longer than two minutes.
        """
        if self._control is None:
            self._launch()
        assert self._ready is not None
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await asyncio.shield(self._ready)
        except TimeoutError:
            self._lost()
            raise EngineStartFailed(f"the fork server was not ready in {START_TIMEOUT_S:.0f} s") from None

    def _launch(self, *, ask_template: bool = True) -> None:
        environment = {**os.environ, **ENVIRONMENT, **self._environment, "PYTHONPATH": os.pathsep.join(import_path())}
        template = os.environ.get(VARIABLE) if ask_template else None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with theirs:
            if not template or not ask(template, self._module, environment, theirs):
                try:
                    self._start_process(environment, theirs.fileno())
                except OSError as error:
                    ours.close()
                    raise EngineStartFailed(f"no fork server can be started: {error}") from error
        self._control = ours
        loop = asyncio.get_running_loop()
        if self._ready is None or self._ready.done():
            self._ready = loop.create_future()
        loop.add_reader(ours.fileno(), self._readable)

    def _start_process(self, environment: Mapping[str, str], control_fd: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", BOOT, str(control_fd), self._module],
            pass_fds=[control_fd],
            stdin=subprocess.DEVNULL,
            env=environment,
        )

    def _readable(self) -> None:
        while self._control is not None:
            try:
                data, fds, _, _ = socket.recv_fds(self._control, MAX_DATAGRAM_BYTES, 1)
            except BlockingIOError:
                return
            except ConnectionResetError:
                data, fds = b"", []
            if data:
                self._take(self._reports.decode(data), fds)
            else:
                self._lost()

    def _take(self, report: Report, fds: Sequence[int]) -> None:
        if isinstance(report, Ready):
            self._greet(report, fds)
        elif isinstance(report, Declined):
            self._declined(report)
        elif isinstance(report, Forked):
            child = Child(self, report.call, report.pid)
            self._children[report.call] = child
            waiter = self._waiting.pop(report.call)
            if waiter.done():
                child.kill()
            else:
                waiter.set_result(child)
        elif isinstance(report, Refused):
            waiter = self._waiting.pop(report.call)
            if not waiter.done():
                waiter.set_exception(EngineStartFailed(f"no process can be forked: {report.reason}"))
        else:
            _end(self._children.pop(report.call), report.status)

    def _greet(self, ready: Ready, fds: Sequence[int]) -> None:
        (pidfd,) = fds
        if self._process is None:
            os.set_inheritable(pidfd, False)
            self._process = Adopted(ready.pid, pidfd)
        else:
            os.close(pidfd)
        if ready.threads != 1:
            log.warning("the fork server has %d threads; its children may hang", ready.threads)
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(None)

    def _declined(self, declined: Declined) -> None:
        """Start a fork server as if there were no template."""
        log.info("the template forks no fork server for this node: %s", declined.reason)
        assert self._control is not None
        asyncio.get_running_loop().remove_reader(self._control.fileno())
        self._control.close()
        self._control = None
        try:
            self._launch(ask_template=False)
        except EngineStartFailed as error:
            if self._ready is not None and not self._ready.done():
                self._ready.set_exception(error)

    def _lost(self) -> asyncio.Future[int] | None:
        """Give up the process, or learn that it has ended; the kernel kills its children with it.

        The result is there once it has been collected, and every child has been told to end.
        """
        loop = asyncio.get_running_loop()
        if self._control is not None:
            loop.remove_reader(self._control.fileno())
            self._control.close()
            self._control = None
        for waiter in (self._ready, *self._waiting.values()):
            if waiter is not None and not waiter.done():
                waiter.set_exception(EngineStartFailed("the fork server has ended"))
                waiter.exception()
        self._waiting.clear()
        process, self._process = self._process, None
        children, self._children = self._children, {}
        if process is None:
            return None
        # It may be a moment from its end, or stuck; killed, it can be collected soon.
        process.kill()
        collected = loop.run_in_executor(None, process.wait)

        def end_all(_: asyncio.Future[int]) -> None:
            for child in children.values():
                _end(child, -signal.SIGKILL)

        collected.add_done_callback(end_all)
        return collected

    async def fork(self, entry: str, fds: Sequence[int]) -> Child:
        """Fork a child that runs `entry` with copies of `fds`; starts the server if it does not run.

        Raises:
            EngineStartFailed: the server can't be reached, or the machine gives no process.
        """
        await self.start()
        call = next(self._calls)
        waiter: asyncio.Future[Child] = asyncio.get_running_loop().create_future()
        self._send(Fork(call=call, entry=entry), fds)
        self._waiting[call] = waiter
        try:
            return await waiter
        except asyncio.CancelledError:
            # The child may have come in the same turn of the loop; nobody else would end it.
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                waiter.result().kill()
            raise

    def kill(self, call: int) -> None:
        """End the child that `call` asked for. A server that can't be told has ended, and its children with it."""
        with contextlib.suppress(EngineStartFailed):
            self._send(Kill(call=call), ())

    def _send(self, request: Fork | Kill, fds: Sequence[int]) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        if self._control is None:
            raise EngineStartFailed("the fork server has ended")
        try:
            self._control.sendmsg([msgspec.msgpack.encode(request)], ancillary)
        except OSError as error:
            raise EngineStartFailed(f"the fork server can't be reached: {error}") from error

    async def stop(self) -> None:
        """End the server and every child, and wait until they have gone."""
        children = list(self._children.values())
        for child in children:
            child.kill()
        if children:
            await asyncio.wait([child.exited for child in children], timeout=LEAVE_TIMEOUT_S)
        collected = self._lost()
        if collected is not None:
            await collected


def _end(child: Child, status: int) -> None:
    if not child.exited.done():
        child.exited.set_result(status)
