"""The write gate: background writes get a share beside cold loads, always some, and all where somebody presses."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loaders import CHUNK, checkpoint_of, opened, until
from loaders import mover as mover

from sllm_actor.checkpoint.convert import convert
from sllm_actor.checkpoint.folder import read_folder
from sllm_actor.errors import CheckpointChanged
from sllm_actor.loader.write_gate import UNMEASURED_BYTES_PER_S, WriteGate, WritePacer, allowed_bytes_per_s
from sllm_actor.runtime.tasks import TaskScope
from sllm_actor.testing.virtual_loop import VirtualLoop, run_virtual

RATE = 1000.0
SIZES = st.integers(min_value=1, max_value=5000)
GAPS_S = st.floats(min_value=0, max_value=20)
SLACK = 1e-6


class Write(NamedTuple):
    """A write that has passed."""

    who: int
    size_bytes: int
    at_s: float


def most_in_any_window(writes: Sequence[Write]) -> float:
    """By how much the bytes of any window exceed what its length allows, the window's first write not counted."""
    worst = float("-inf")
    for first, begin in enumerate(writes):
        total = 0
        for write in writes[first + 1 :]:
            total += write.size_bytes
            worst = max(worst, total - RATE * (write.at_s - begin.at_s))
    return worst


@given(st.lists(st.tuples(GAPS_S, SIZES), min_size=1, max_size=30))
def test_paced_writes_never_exceed_the_rate_over_any_window_and_each_waits_at_most_its_own_length(
    arrivals: list[tuple[float, int]],
) -> None:
    pacer, now_s, writes = WritePacer(RATE), 0.0, []
    for gap_s, size_bytes in arrivals:
        now_s += gap_s
        wait_s = pacer.wait_s(size_bytes, now_s)
        assert 0 <= wait_s <= size_bytes / RATE + SLACK
        now_s += wait_s
        assert pacer.wait_s(size_bytes, now_s) < SLACK
        pacer.begin(now_s)
        writes.append(Write(0, size_bytes, now_s))
    assert most_in_any_window(writes) <= SLACK * 5000


def test_time_that_no_write_has_used_is_not_saved_up() -> None:
    pacer = WritePacer(RATE)
    pacer.begin(0.0)
    assert pacer.wait_s(1000, 3600.0) == 0
    pacer.begin(3600.0)
    assert pacer.wait_s(1000, 3600.0) == 1.0


def simulate(main: Callable[[WriteGate, list[Write], TaskScope], Awaitable[None]]) -> list[Write]:
    """Run `main` with a gate on virtual time; give what has passed, and see that nothing is left."""

    async def run() -> list[Write]:
        gate, passed, tasks = WriteGate(RATE, VirtualLoop.running().clock), list[Write](), TaskScope("writers")
        await main(gate, passed, tasks)
        await tasks.close()
        return passed

    return run_virtual(run, limit_s=1e6)


async def write(gate: WriteGate, passed: list[Write], who: int, *sizes_bytes: int) -> None:
    for size_bytes in sizes_bytes:
        await gate(size_bytes)
        passed.append(Write(who, size_bytes, VirtualLoop.running().now_s))


async def write_on(gate: WriteGate, passed: list[Write], who: int, size_bytes: int, takes_s: float) -> None:
    while True:
        await write(gate, passed, who, size_bytes)
        await asyncio.sleep(takes_s)


def test_nothing_is_held_back_while_no_load_reads() -> None:
    async def main(gate: WriteGate, passed: list[Write], _: TaskScope) -> None:
        begun_s = VirtualLoop.running().now_s
        await write(gate, passed, 0, *[10**9] * 100)
        assert VirtualLoop.running().now_s == begun_s
        assert gate.observe() == {
            "holding": False, "bytes_per_s": RATE, "passed_bytes": 10**11, "held_s": 0.0,
        }  # fmt: skip

    assert len(simulate(main)) == 100


@given(st.lists(st.lists(SIZES, min_size=1, max_size=5), min_size=1, max_size=6))
def test_beside_a_load_that_never_ends_every_write_passes_in_order_and_within_the_rate(sizes: list[list[int]]) -> None:
    async def main(gate: WriteGate, passed: list[Write], tasks: TaskScope) -> None:
        gate.on_reading(True)
        begun_s = VirtualLoop.running().now_s
        await asyncio.gather(*(tasks.spawn(write(gate, passed, k, *own), f"{k}") for k, own in enumerate(sizes)))
        assert VirtualLoop.running().now_s - begun_s <= sum(map(sum, sizes)) / RATE + SLACK

    passed = simulate(main)
    assert sorted(write.size_bytes for write in passed) == sorted(size for own in sizes for size in own)
    assert most_in_any_window(passed) <= SLACK * 5000
    firsts = [write.who for k, write in enumerate(passed) if write.who not in {other.who for other in passed[:k]}]
    assert firsts == sorted(firsts)


@given(
    st.lists(st.tuples(st.sampled_from(["read", "press", "chain"]), GAPS_S, GAPS_S), min_size=1, max_size=12),
    st.lists(st.tuples(SIZES, st.sampled_from([0.5, 1.0, 3.0])), min_size=1, max_size=4),
)
def test_however_loads_and_waiters_come_the_share_holds_while_they_do_and_is_lifted_when_they_do_not(
    events: list[tuple[str, float, float]], writers: list[tuple[int, float]]
) -> None:
    held: list[tuple[float, float]] = []

    async def main(gate: WriteGate, passed: list[Write], tasks: TaskScope) -> None:
        loop = VirtualLoop.running()
        for k, (size_bytes, takes_s) in enumerate(writers):
            tasks.spawn(write_on(gate, passed, k, size_bytes, takes_s), f"{k}")
        for kind, before_s, lasts_s in events:
            await asyncio.sleep(before_s)
            gate.on_reading(True)
            begun_s = loop.now_s
            if kind == "press":
                await asyncio.sleep(lasts_s)
                held.append((begun_s, loop.now_s))
                with gate.pressing(), gate.pressing():
                    assert not gate.holding
                    await asyncio.sleep(lasts_s)
            elif kind == "chain":
                for _ in range(5):
                    await asyncio.sleep(lasts_s / 5)
                    gate.on_reading(False)
                    gate.on_reading(True)
                held.append((begun_s, loop.now_s))
            else:
                await asyncio.sleep(lasts_s)
                held.append((begun_s, loop.now_s))
            gate.on_reading(False)
            await asyncio.sleep(0)
            assert not gate.holding

    passed = simulate(main)
    for begin_s, end_s in held:
        within = [write for write in passed if begin_s < write.at_s < end_s]
        assert most_in_any_window(within) <= SLACK * 5000


def test_loads_without_a_pause_between_them_do_not_starve_the_writes() -> None:
    """Each lasts less than a write has to wait, and the wait must not begin anew with each."""

    async def main(gate: WriteGate, passed: list[Write], tasks: TaskScope) -> None:
        gate.on_reading(True)
        tasks.spawn(write_on(gate, passed, 0, 1000, 0.0), "writer")
        for _ in range(200):
            await asyncio.sleep(0.1)
            gate.on_reading(False)
            gate.on_reading(True)

    assert 20 <= len(simulate(main)) <= 21


def test_whoever_presses_lifts_the_restriction_for_all_who_wait_and_only_for_as_long() -> None:
    async def main(gate: WriteGate, passed: list[Write], tasks: TaskScope) -> None:
        loop = VirtualLoop.running()
        gate.on_reading(True)
        for k in range(5):
            tasks.spawn(write(gate, passed, k, 1000), f"{k}")
        await asyncio.sleep(1.5)
        assert len(passed) == 2
        with gate.pressing():
            for _ in range(20):
                await asyncio.sleep(0)
            assert len(passed) == 5
        assert gate.holding
        begun_s = loop.now_s
        await write(gate, passed, 5, 1000)
        assert loop.now_s - begun_s == pytest.approx(1.0)

    simulate(main)


def test_pressing_ends_with_an_error_too() -> None:
    async def main(gate: WriteGate, _: list[Write], __: TaskScope) -> None:
        gate.on_reading(True)
        with pytest.raises(KeyError), gate.pressing():
            raise KeyError
        assert gate.holding

    simulate(main)


def test_the_end_of_the_last_load_frees_all_who_wait() -> None:
    async def main(gate: WriteGate, passed: list[Write], tasks: TaskScope) -> None:
        gate.on_reading(True)
        waiting = [tasks.spawn(write(gate, passed, k, 10**9), f"{k}") for k in range(4)]
        await asyncio.sleep(1)
        gate.on_reading(False)
        begun_s = VirtualLoop.running().now_s
        await asyncio.gather(*waiting)
        assert VirtualLoop.running().now_s == begun_s
        assert gate.observe()["held_s"] == pytest.approx(3.0)

    simulate(main)


def test_a_waiter_that_is_cancelled_takes_nothing_from_those_behind_it() -> None:
    async def main(gate: WriteGate, passed: list[Write], tasks: TaskScope) -> None:
        gate.on_reading(True)
        begun_s = VirtualLoop.running().now_s
        await write(gate, passed, 0, 1000)
        impatient = [tasks.spawn(write(gate, passed, k, 10**6), f"{k}") for k in (1, 2)]
        patient = tasks.spawn(write(gate, passed, 3, 1000), "3")
        await asyncio.sleep(0.25)
        for task in reversed(impatient):
            task.cancel()
        await patient
        assert VirtualLoop.running().now_s - begun_s == pytest.approx(1.0)
        assert gate.observe()["passed_bytes"] == 2000

    assert [write.who for write in simulate(main)] == [0, 3]


def test_without_a_profile_a_bandwidth_is_assumed() -> None:
    assert allowed_bytes_per_s(None, 5) == UNMEASURED_BYTES_PER_S / 20


async def test_a_loader_tells_when_loads_read_and_when_none_does_any_more(tmp_path: Path, mover: str) -> None:
    told: list[bool] = []
    convert(checkpoint_of(tmp_path / "a", 4).path, tmp_path / "converted", chunk_bytes=CHUNK)
    one, other = read_folder(tmp_path / "converted"), checkpoint_of(tmp_path / "b", 4, seed=1)
    async with opened(on_reading=told.append) as loader:
        for lease in await asyncio.gather(loader.lease(one), loader.lease(other)):
            lease.release()
        assert told == [True, False]
        for verify in (False, True):
            (await loader.lease(one, verify=verify)).release()
            assert told == [True, False], "what is in the pool already is not read, be it checked or not"
        gone = checkpoint_of(tmp_path / "c", 4, seed=2)
        gone.file_path(gone.files[0]).unlink()
        with pytest.raises(CheckpointChanged):
            await loader.lease(gone)
        assert told == [True, False] * 2


async def test_a_loader_that_is_cancelled_or_closed_reads_no_more(tmp_path: Path, mover: str) -> None:
    told: list[bool] = []
    tasks = TaskScope("test")

    def lease(name: str, seed: int) -> asyncio.Task[Any]:
        return tasks.spawn(loader.lease(checkpoint_of(tmp_path / name, 20, seed=seed)), name, lambda _: None)

    async with opened(reading_threads=1, on_reading=told.append) as loader:
        cancelled = lease("a", 0)
        await until(lambda: told == [True])
        cancelled.cancel()
        await until(lambda: told == [True, False])
        lease("b", 1)
        await until(lambda: told == [True, False, True])
    assert told == [True, False] * 2
    await tasks.close()
