"""Programs as children: what they are given, how they end, and what ends with them."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence

import pytest

from sllm_actor.errors import EngineStartFailed
from sllm_actor.runtime.spawning import Spawned, spawn
from sllm_actor.testing.node_process import living

LIMIT_S = 30.0


def shell(program: str, fds: Sequence[int] = ()) -> Spawned:
    return spawn(["bash", "-c", program], fds, os.environ)


async def test_a_child_has_the_descriptors_that_it_is_given_and_no_others_and_its_end_is_known() -> None:
    ours, theirs = os.pipe()
    kept, _ = os.pipe()
    os.set_inheritable(kept, True)
    async with asyncio.timeout(LIMIT_S):
        assert await shell(f"ls /proc/$$/fd >&{theirs}; exit 7", [theirs]).exited == 7
    held = set(os.read(ours, 4096).split())
    assert str(theirs).encode() in held and str(kept).encode() not in held


@pytest.mark.parametrize("ends", ["killed", "by itself"])
async def test_what_a_child_has_started_ends_with_it(ends: str) -> None:
    ours, theirs = os.pipe()
    child = shell(f"sleep 1000 & echo $! >&{theirs}; " + ("wait" if ends == "killed" else "exit 0"), [theirs])
    other = int(os.read(ours, 64))
    if ends == "killed":
        assert living([child.pid, other]) == [child.pid, other]
        child.kill()
    async with asyncio.timeout(LIMIT_S):
        assert await child.exited == (-signal.SIGKILL if ends == "killed" else 0)
        while living([other]):
            await asyncio.sleep(0)
    child.kill()


async def test_a_program_that_is_not_there_is_named() -> None:
    with pytest.raises(EngineStartFailed, match="/nowhere/program"):
        spawn(["/nowhere/program"], [], os.environ)
