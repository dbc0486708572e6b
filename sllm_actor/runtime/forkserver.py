"""A process that has imported what children need, and forks them in milliseconds.

Run as `main([FD, MODULE])` in a fresh interpreter. `MODULE.preload()` does the imports;
`MODULE.ENTRIES` maps an entry's name to a function that takes the passed descriptors and gives an
exit status. The process never starts a thread, because a fork copies only the one that forks.

Children die with this process (PR_SET_PDEATHSIG), and this process leaves when its socket closes, so
that a node killed with SIGKILL leaves nobody behind.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import gc
import importlib
import os
import selectors
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

MAX_DATAGRAM_BYTES = 65536
MAX_FDS = 8
PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15


class Fork(msgspec.Struct, frozen=True, tag="fork", forbid_unknown_fields=True):
    """Ask for a child that runs `entry`; descriptors travel beside it."""

    call: int
    entry: str


class Kill(msgspec.Struct, frozen=True, tag="kill", forbid_unknown_fields=True):
    """Kill the child that `call` asked for. Sent here because only its parent knows that its pid is still its own."""

    call: int


class Ready(msgspec.Struct, frozen=True, tag="ready", forbid_unknown_fields=True):
    """The imports are done. `threads` must be 1. Beside it comes a pidfd of `pid`, for who is not its parent."""

    threads: int
    pid: int


class Declined(msgspec.Struct, frozen=True, tag="declined", forbid_unknown_fields=True):
    """A template can't fork what was asked of it; another fork server is to be started."""

    reason: str


class Forked(msgspec.Struct, frozen=True, tag="forked", forbid_unknown_fields=True):
    call: int
    pid: int


class Refused(msgspec.Struct, frozen=True, tag="refused", forbid_unknown_fields=True):
    """The machine gives no process or descriptor for this fork just now."""

    call: int
    reason: str


class Exited(msgspec.Struct, frozen=True, tag="exited", forbid_unknown_fields=True):
    """A child has ended; `status` as in `subprocess`: negative for a signal."""

    call: int
    status: int


Request = Fork | Kill
Report = Ready | Declined | Forked | Refused | Exited
Entry = Callable[[Sequence[int]], int]

_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(parent_pid: int) -> None:
    """Be killed when the parent ends, also if it already has."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)


def name_process(name: str) -> None:
    """Show `name` in ps and top (15 characters of it)."""
    _libc.prctl(PR_SET_NAME, name.encode()[:15], 0, 0, 0)


def count_threads() -> int:
    return len(os.listdir("/proc/self/task"))


class _Child(NamedTuple):
    pid: int
    pidfd: int


class _Server:
    def __init__(self, control: socket.socket, entries: Mapping[str, Entry]) -> None:
        self._control = control
        self._entries = entries
        self._children: dict[int, _Child] = {}
        self._selector = selectors.DefaultSelector()
        self._requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)

    def serve(self, threads: int) -> None:
        """Answer requests until the node closes the socket."""
        self._selector.register(self._control, selectors.EVENT_READ, 0)
        pidfd = os.pidfd_open(os.getpid())
        socket.send_fds(self._control, [msgspec.msgpack.encode(Ready(threads=threads, pid=os.getpid()))], [pidfd])
        os.close(pidfd)
        while True:
            for key, _ in self._selector.select():
                if key.data:
                    self._reap(key.data)
                elif not self._answer():
                    return

    def _report(self, report: Report) -> None:
        self._control.send(msgspec.msgpack.encode(report))

    def _answer(self) -> bool:
        data, ancillary, flags, _ = self._control.recvmsg(MAX_DATAGRAM_BYTES, socket.CMSG_SPACE(MAX_FDS * 4))
        fds = array.array("i")
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        if not data:
            return False
        request = self._requests.decode(data)
        if isinstance(request, Kill):
            if request.call in self._children:
                signal.pidfd_send_signal(self._children[request.call].pidfd, signal.SIGKILL)
        elif flags & socket.MSG_CTRUNC:
            self._report(Refused(call=request.call, reason="its descriptors did not arrive"))
        else:
            self._fork(request, fds)
        for fd in fds:
            os.close(fd)
        return True

    def _fork(self, request: Fork, fds: Sequence[int]) -> None:
        parent_pid = os.getpid()
        try:
            # A descriptor is set aside first: a child that exists must be one that can be watched.
            os.close(os.dup(self._control.fileno()))
            pid = os.fork()
        except OSError as error:
            self._report(Refused(call=request.call, reason=str(error)))
            return
        if pid == 0:
            self._become(request.entry, parent_pid, fds)
        child = _Child(pid, os.pidfd_open(pid))
        self._children[request.call] = child
        self._selector.register(child.pidfd, selectors.EVENT_READ, request.call)
        self._report(Forked(call=request.call, pid=pid))

    def _become(self, entry: str, parent_pid: int, fds: Sequence[int]) -> None:
        """Run the entry in the new child. Never returns."""
        status = 1
        try:
            die_with_parent(parent_pid)
            name_process(f"sllm-{entry}")
            self._selector.close()
            self._control.close()
            for child in self._children.values():
                os.close(child.pidfd)
            status = self._entries[entry](fds)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _reap(self, call: int) -> None:
        child = self._children.pop(call)
        _, status = os.waitpid(child.pid, 0)
        self._selector.unregister(child.pidfd)
        os.close(child.pidfd)
        self._report(Exited(call=call, status=os.waitstatus_to_exitcode(status)))


def preload(name: str) -> Any:
    """Import the module and let it warm up what children inherit."""
    module: Any = importlib.import_module(name)
    module.preload()
    # What is alive now stays alive: without this a child's first collection would copy every page of it.
    gc.collect()
    gc.freeze()
    return module


def serve(control: socket.socket, entries: Mapping[str, Entry], threads: int) -> None:
    """Fork children until the node closes the socket; `threads` are those of the process that did the imports."""
    name_process("sllm-forkserver")
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        _Server(control, entries).serve(threads)


def import_path() -> list[str]:
    """Let another process import what this one would, and nothing from the folder that it happens to be in."""
    return [path for path in sys.path if path]


def main(arguments: Sequence[str]) -> None:
    # The node decides when its children leave: a terminal's Ctrl-C and a service manager's SIGTERM reach the
    # whole group, and running answers are to be finished then.
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    name_process("sllm-forkserver")
    control = socket.socket(fileno=int(arguments[0]))
    serve(control, preload(arguments[1]).ENTRIES, count_threads())
