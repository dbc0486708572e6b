"""Fork servers from a template: what they have from their node, when they are declined, and who outlives whom.

That they keep what every fork server promises is told by `test_forking`, which runs with and without a template.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from test_forking import LIMIT_S, TESTS, Waiting, has_ended

from sllm_actor.runtime.fork_template import VARIABLE, running_template
from sllm_actor.runtime.forking import ENVIRONMENT, ForkServer


@pytest.fixture
def template(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with running_template("forked_children", ENVIRONMENT) as path:
        monkeypatch.setenv(VARIABLE, path)
        yield path


@asynccontextmanager
async def running(module: str = "forked_children", **environment: str) -> AsyncIterator[ForkServer]:
    server = ForkServer(module, environment)
    try:
        async with asyncio.timeout(2 * LIMIT_S):
            await server.start()
            yield server
    finally:
        await server.stop()
        while Waiting.open:
            Waiting.open.pop().close()


async def told(server: ForkServer) -> dict[str, Any]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours:
        with theirs:
            child = await server.fork("tell", [theirs.fileno()])
        facts: dict[str, Any] = json.loads(await asyncio.get_running_loop().sock_recv(ours, 1024 * 1024))
    assert await child.exited == 0
    return facts


async def is_of_template(server: ForkServer) -> bool:
    child = await Waiting.fork(server)
    return child.preloaded_by != server.pid


@pytest.mark.usefixtures("template")
async def test_each_fork_server_has_the_environment_folder_and_outputs_of_its_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        async with running(SLLM_CHILD_NAME=name) as server:
            facts = await told(server)
            assert await is_of_template(server)
        assert facts["environment"]["SLLM_CHILD_NAME"] == name
        assert (
            facts["environment"].items()
            >= (ENVIRONMENT | {"PYTEST_CURRENT_TEST": os.environ["PYTEST_CURRENT_TEST"]}).items()
        )
        assert facts["folder"] == str(tmp_path / name)
        assert facts["import_path"] == [path for path in sys.path if path]
        assert facts["processors"] == sorted(os.sched_getaffinity(0))
        assert facts["name"] == "sllm-tell"
        assert capfd.readouterr() == ("to the output\n", "to the errors\n")


@pytest.mark.usefixtures("template")
async def test_a_variable_that_the_node_has_not_is_not_the_templates() -> None:
    async with running() as server:
        assert "SLLM_CHILD_NAME" not in (await told(server))["environment"]


@pytest.mark.usefixtures("template")
@pytest.mark.parametrize("name", ["LD_LIBRARY_PATH", "PYTHONHASHSEED", "OMP_NUM_THREADS"])
async def test_what_a_process_has_from_its_start_alone_is_a_reason_to_start_one(name: str) -> None:
    async with running(**{name: "7"}) as server:
        assert not await is_of_template(server)
        assert (await told(server))["environment"][name] == "7"


@pytest.mark.usefixtures("template")
async def test_another_module_is_started_on_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other_children.py").write_text("from forked_children import *\n")
    monkeypatch.syspath_prepend(tmp_path)
    async with running("other_children") as server:
        assert not await is_of_template(server)


@pytest.mark.usefixtures("template")
async def test_another_file_of_the_modules_name_is_started_on_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "forked_children.py").write_text((TESTS / "forked_children.py").read_text())
    monkeypatch.syspath_prepend(tmp_path)
    async with running() as server:
        assert not await is_of_template(server)


async def test_without_its_template_a_node_starts_one_of_its_own(template: str) -> None:
    os.unlink(template)
    async with running() as server:
        assert not await is_of_template(server)


async def test_an_environment_that_is_too_large_to_send_is_no_hindrance(template: str) -> None:
    assert os.path.exists(template)
    async with running(LARGE="x" * 120 * 1024, AND="y" * 20 * 1024) as server:
        assert not await is_of_template(server)


async def test_what_is_no_request_is_not_answered_and_harms_nobody(template: str) -> None:
    for words in (b"nonsense", b""):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking, open("/dev/null", "rb") as null:
            asking.settimeout(LIMIT_S)
            asking.connect(template)
            socket.send_fds(asking, [words], [null.fileno()] * 4)
            assert asking.recv(100) == b""
    async with running() as server:
        assert await is_of_template(server)


async def test_the_socket_lies_in_a_private_folder(template: str) -> None:
    assert os.stat(Path(template).parent).st_mode & 0o777 == 0o700


async def test_a_fork_server_outlives_its_template_and_leaves_no_dead_process(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_template("forked_children", ENVIRONMENT) as path:
        monkeypatch.setenv(VARIABLE, path)
        async with running() as ended:
            pid = ended.pid
        assert not os.path.exists(f"/proc/{pid}")
        server = ForkServer("forked_children", {})
        await server.start()
    assert not os.path.exists(path)
    assert await is_of_template(server)
    assert await (await server.fork("leave", [])).exited == 7
    await server.stop()
    Waiting.open.pop().close()


async def test_a_template_with_threads_is_complained_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "threaded_children.py").write_text(
        "import threading\nfrom forked_children import ENTRIES\n"
        "def preload():\n    threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with running_template("threaded_children", ENVIRONMENT) as path:
        monkeypatch.setenv(VARIABLE, path)
        async with running("threaded_children"):
            pass
    assert "the fork server has 2 threads" in caplog.text


OWNER = """
import os
from sllm_actor.runtime.fork_template import running_template

with running_template("forked_children", {}):
    (children,) = open(f"/proc/self/task/{os.getpid()}/children")
    print(children, flush=True)
    os.kill(os.getpid(), 9)
"""


def test_a_template_leaves_with_its_owner() -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
    )
    assert owner.stdout is not None
    with owner.stdout:
        pidfd = os.pidfd_open(int(owner.stdout.readline()))
    assert owner.wait() == -signal.SIGKILL
    assert has_ended(pidfd)
    os.close(pidfd)
