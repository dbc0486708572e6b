"""The fork server, with real processes: children, their ends, and the ends of those above them."""

from __future__ import annotations

import asyncio
import os
import resource
import select
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import ClassVar

import pytest

from sllm_actor.errors import EngineStartFailed
from sllm_actor.runtime.fork_template import VARIABLE, running_template
from sllm_actor.runtime.forking import ENVIRONMENT, Child, ForkServer
from sllm_actor.runtime.tasks import TaskScope

TESTS = Path(__file__).parent
LIMIT_S = 30.0


@pytest.fixture(scope="module")
def template() -> Iterator[str]:
    with running_template("forked_children", ENVIRONMENT) as path:
        yield path


@pytest.fixture(params=["of its own", "from a template"], autouse=True)
def from_template(request: pytest.FixtureRequest, template: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whatever a fork server promises, one that comes from a template does too."""
    wanted: bool = request.param == "from a template"
    if wanted:
        monkeypatch.setenv(VARIABLE, template)
    else:
        monkeypatch.delenv(VARIABLE, raising=False)
    return wanted


def server_of(module: str = "forked_children", folder: Path = TESTS) -> ForkServer:
    return ForkServer(module, {"PYTHONPATH": os.pathsep.join([str(folder), *sys.path])})


@asynccontextmanager
async def running() -> AsyncIterator[ForkServer]:
    server = server_of()
    try:
        async with asyncio.timeout(2 * LIMIT_S):
            await server.start()
            yield server
    finally:
        await server.stop()
        while Waiting.open:
            Waiting.open.pop().close()


class Waiting:
    """A child that waits until its socket closes, or until it is ended otherwise."""

    open: ClassVar[list[Waiting]] = []

    def __init__(self, child: Child, sock: socket.socket, said: str) -> None:
        self.child = child
        self.sock = sock
        self.pid, self.preloaded_by = map(int, said.split())
        self.pidfd = os.pidfd_open(self.pid)
        self.open.append(self)

    @classmethod
    async def fork(cls, server: ForkServer) -> Waiting:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            child = await server.fork("wait", [theirs.fileno()])
        return cls(child, ours, (await asyncio.get_running_loop().sock_recv(ours, 100)).decode())

    def gone(self) -> bool:
        """Wait until the process has ended, whoever its parent is now."""
        return has_ended(self.pidfd)

    def close(self) -> None:
        os.close(self.pidfd)
        self.sock.close()


def has_ended(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], LIMIT_S)[0])


async def test_a_child_runs_its_entry_with_what_the_server_or_its_template_has_preloaded(from_template: bool) -> None:
    async with running() as server:
        one, two = await Waiting.fork(server), await Waiting.fork(server)
        assert one.preloaded_by == two.preloaded_by
        assert (one.preloaded_by == server.pid) is not from_template
        assert len({one.pid, two.pid, server.pid, os.getpid()}) == 4
        assert one.pid == one.child.pid
        one.sock.close()
        assert await one.child.exited == 0
        assert not two.child.exited.done()


async def test_exit_statuses_are_told_as_subprocess_tells_them() -> None:
    async with running() as server:
        assert await (await server.fork("leave", [])).exited == 7
        assert await (await server.fork("fail", [])).exited == 1
        assert await (await server.fork("signal", [])).exited == -signal.SIGUSR1
        assert await (await server.fork("no such entry", [])).exited == 1


async def test_a_child_can_be_killed_and_killing_it_again_does_nothing() -> None:
    async with running() as server:
        killed, kept = await Waiting.fork(server), await Waiting.fork(server)
        killed.child.kill()
        killed.child.kill()
        assert await killed.child.exited == -signal.SIGKILL
        killed.child.kill()
        assert not kept.child.exited.done()
        assert await (await server.fork("leave", [])).exited == 7
        assert killed.gone()


async def test_a_child_has_the_descriptors_that_it_was_given_and_no_others() -> None:
    async with running() as server:
        other = await Waiting.fork(server)
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with ours, theirs:
            child = await server.fork("descriptors", [theirs.fileno(), ours.fileno(), theirs.fileno()])
            assert await asyncio.get_running_loop().sock_recv(ours, 100) == b"3 []\n"
            assert await child.exited == 0
        other.sock.close()


async def test_more_descriptors_than_travel_are_refused_and_the_server_goes_on() -> None:
    async with running() as server:
        with open("/dev/null", "rb") as null, pytest.raises(EngineStartFailed, match="descriptors"):
            await server.fork("leave", [null.fileno()] * 20)
        assert await (await server.fork("leave", [])).exited == 7


async def test_many_forks_leave_no_descriptor_in_the_node_or_the_server() -> None:
    async with running() as server:
        assert await (await server.fork("leave", [])).exited == 7
        folders = [Path("/proc/self/fd"), Path(f"/proc/{server.pid}/fd")]
        before = [len(os.listdir(folder)) for folder in folders]
        with open("/dev/null", "rb") as null:
            children = [await server.fork("leave", [null.fileno()]) for _ in range(40)]
            assert [await child.exited for child in children] == [7] * 40
        assert [len(os.listdir(folder)) for folder in folders] == before


async def test_a_machine_without_descriptors_refuses_a_fork_and_harms_no_child() -> None:
    async with running() as server:
        kept = await Waiting.fork(server)
        # Once this is told, the server has closed what it was given for the forks before.
        assert await (await server.fork("leave", [])).exited == 7
        limits = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
        taken = set(map(int, os.listdir(f"/proc/{server.pid}/fd")))
        lowest_free = min(set(range(len(taken) + 1)) - taken)
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
        with pytest.raises(EngineStartFailed, match="no process can be forked"):
            await server.fork("leave", [])
        with open("/dev/null", "rb") as null, pytest.raises(EngineStartFailed, match="no process can be forked"):
            await server.fork("leave", [null.fileno()])
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, limits)
        assert await (await server.fork("leave", [])).exited == 7
        assert not kept.child.exited.done()
        kept.sock.close()


async def test_children_end_with_a_server_that_is_killed_and_the_next_fork_starts_another(from_template: bool) -> None:
    async with running() as server:
        first_pid = server.pid
        one, two = await Waiting.fork(server), await Waiting.fork(server)
        os.kill(first_pid, signal.SIGKILL)
        assert [await one.child.exited, await two.child.exited] == [-signal.SIGKILL] * 2
        assert one.gone()
        assert two.gone()
        one.child.kill()
        again = await Waiting.fork(server)
        assert server.pid != first_pid
        assert (again.preloaded_by == server.pid) is not from_template
        again.sock.close()
        assert await again.child.exited == 0


async def test_stopping_ends_every_child_and_the_server() -> None:
    async with running() as server:
        child = await Waiting.fork(server)
        pidfd = os.pidfd_open(server.pid)
        await server.stop()
        assert await child.child.exited == -signal.SIGKILL
        assert child.gone()
        assert has_ended(pidfd)
        os.close(pidfd)
        assert server.pid == 0
        await server.stop()


async def test_stopping_a_server_that_is_still_importing_fails_who_waits_for_it(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import signal; signal.pause()")
    server = server_of("slow", tmp_path)
    tasks = TaskScope("test")
    starting = tasks.spawn(server.start(), "start", on_failure=lambda _: None)
    forking = tasks.spawn(server.fork("leave", []), "fork", on_failure=lambda _: None)
    while not server.pid:
        await asyncio.sleep(0)
    pidfd = os.pidfd_open(server.pid)
    async with asyncio.timeout(LIMIT_S):
        await server.stop()
        for waiter in (starting, forking):
            with pytest.raises(EngineStartFailed):
                await waiter
    assert has_ended(pidfd)
    os.close(pidfd)


@pytest.mark.parametrize("text", ["import no_such_module_anywhere", "def preload(): raise ValueError", "ENTRIES = {}"])
async def test_a_module_that_can_not_be_preloaded_fails_the_start_at_once(tmp_path: Path, text: str) -> None:
    (tmp_path / "broken.py").write_text("import sys; sys.stderr = open('/dev/null', 'w')\n" + text)
    server = server_of("broken", tmp_path)
    # Four times less than the server's own patience with imports that go on.
    async with asyncio.timeout(LIMIT_S):
        with pytest.raises(EngineStartFailed, match="has ended"):
            await server.start()
        with pytest.raises(EngineStartFailed):
            await server.fork("leave", [])
        await server.stop()


async def test_a_fork_whose_caller_gives_up_leaves_no_child() -> None:
    async with running() as server:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with ours:
            with theirs:
                forking = TaskScope("test").spawn(server.fork("wait", [theirs.fileno()]), "fork")
                await asyncio.sleep(0)
                forking.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await forking
            said = b"."
            while said:  # The child may have spoken; that its end of the socket closes is what counts.
                said = await asyncio.get_running_loop().sock_recv(ours, 100)
        assert await (await server.fork("leave", [])).exited == 7


NODE = """
import asyncio, os, socket
from test_forking import Waiting, server_of

async def main():
    server = server_of()
    child = await Waiting.fork(server)
    print(server.pid, child.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_the_server_and_its_children_end_with_a_node_that_is_killed() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    node = subprocess.Popen([sys.executable, "-c", NODE], stdout=subprocess.PIPE, env=environment)
    assert node.stdout is not None
    with node.stdout:
        pids = [int(word) for word in node.stdout.readline().split()]
        pidfds = [os.pidfd_open(pid) for pid in pids]
        node.kill()
        node.wait()
    assert len(pidfds) == 2
    for pidfd in pidfds:
        assert has_ended(pidfd)
        os.close(pidfd)


async def test_terminal_and_service_signals_do_not_reach_a_child() -> None:
    async with running() as server:
        child = await Waiting.fork(server)
        for unwanted in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(child.pid, unwanted)
            os.kill(server.pid, unwanted)
        assert await (await server.fork("leave", [])).exited == 7
        child.sock.close()
        assert await child.child.exited == 0
