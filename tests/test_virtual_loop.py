"""Virtual time: an hour costs a turn, what hangs is named, and no error is only logged."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator

import pytest

from sllm_actor.testing.trace import TraceRecorder
from sllm_actor.testing.virtual_loop import (
    START_S,
    WIND_UP_S,
    SimulationError,
    SimulationFailed,
    SimulationStuck,
    SimulationTooLong,
    VirtualLoop,
    run_virtual,
)

HOUR_S = 3600.0


def test_an_hour_of_sleep_takes_two_turns_of_the_loop() -> None:
    async def main() -> tuple[float, int]:
        loop = VirtualLoop.running()
        turns = loop.turns
        await asyncio.sleep(HOUR_S)
        return loop.now_s, loop.turns - turns

    now_s, turns = run_virtual(main)
    assert now_s == START_S + HOUR_S
    assert turns <= 2


def test_sleepers_wake_at_their_own_moments_and_in_their_order() -> None:
    async def main() -> list[tuple[str, float]]:
        loop = VirtualLoop.running()
        woken: list[tuple[str, float]] = []

        async def sleep(name: str, duration_s: float) -> None:
            await asyncio.sleep(duration_s)
            woken.append((name, loop.now_s - START_S))

        await asyncio.gather(sleep("late", 2.5), sleep("early", 0.25), sleep("between", 1.0))
        return woken

    assert run_virtual(main) == [("early", 0.25), ("between", 1.0), ("late", 2.5)]


def test_what_is_ready_runs_before_time_moves() -> None:
    async def main() -> None:
        loop = VirtualLoop.running()
        loop.call_later(0.001, lambda: None)
        for _ in range(100):
            await asyncio.sleep(0)
        assert loop.now_s == START_S

    run_virtual(main)


def test_a_deadline_passes_after_days_as_exactly_as_at_the_start() -> None:
    async def main() -> None:
        loop = VirtualLoop.running()
        await asyncio.sleep(1e7 + 0.1)
        before_s = loop.now_s
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await asyncio.Event().wait()
        assert loop.now_s == before_s + 0.001

    run_virtual(main, limit_s=2e7)


def test_waiting_for_what_nobody_will_do_is_found_and_the_tasks_are_named() -> None:
    async def wait_for_nobody() -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        await asyncio.gather(asyncio.create_task(wait_for_nobody(), name="the lonely one"))

    with pytest.raises(SimulationStuck, match=r"the lonely one: .*wait_for_nobody .* > Event\.wait \(locks\.py"):
        run_virtual(main)


def test_a_simulation_that_lasts_too_long_is_ended() -> None:
    async def main() -> None:
        while True:
            await asyncio.sleep(1)

    with pytest.raises(SimulationTooLong, match="main"):
        run_virtual(main, limit_s=10)


def test_a_simulation_that_turns_on_the_spot_is_ended() -> None:
    async def main() -> None:
        while True:
            await asyncio.sleep(0)

    with pytest.raises(SimulationTooLong, match="turns"):
        run_virtual(main, limit_turns=1000)


def test_the_error_of_main_is_given_as_it_is() -> None:
    async def main() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run_virtual(main)


def test_an_error_in_a_callback_fails_the_simulation_at_once() -> None:
    def fail() -> None:
        raise ValueError("in a callback")

    async def main() -> None:
        asyncio.get_running_loop().call_later(1, fail)
        await asyncio.sleep(HOUR_S)
        raise AssertionError("the simulation went on")

    with pytest.raises(SimulationFailed) as failed:
        run_virtual(main)
    assert isinstance(failed.value.__cause__, ValueError)


def test_an_error_in_the_last_turn_fails_it_too() -> None:
    def fail() -> None:
        raise ValueError("at the very end")

    async def main() -> None:
        asyncio.get_running_loop().call_soon(fail)

    with pytest.raises(SimulationFailed):
        run_virtual(main)


def test_a_task_whose_error_nobody_took_fails_it() -> None:
    async def fail() -> None:
        raise ValueError("unseen")

    async def main() -> None:
        task = asyncio.create_task(fail())
        await asyncio.sleep(1)
        # A cycle, as tracebacks make them: only the garbage collector would find it.
        kept: list[object] = [task]
        kept.append(kept)

    with pytest.raises(SimulationFailed, match="never retrieved") as failed:
        run_virtual(main)
    assert isinstance(failed.value.__cause__, ValueError)


def test_a_task_whose_error_was_taken_does_not() -> None:
    async def fail() -> None:
        raise ValueError("seen")

    async def main() -> str:
        return str(*await asyncio.gather(asyncio.create_task(fail()), return_exceptions=True))

    assert run_virtual(main) == "seen"


def test_tasks_that_are_left_are_cancelled_oldest_first() -> None:
    ended: list[int] = []

    async def stay(number: int) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(number)

    async def main() -> list[asyncio.Task[None]]:
        # More than are looked through at a time.
        tasks = [asyncio.create_task(stay(number)) for number in range(300)]
        await asyncio.sleep(1)
        return tasks

    assert all(task.cancelled() for task in run_virtual(main))
    assert ended == list(range(300))


def test_a_task_that_fails_while_it_is_cancelled_fails_the_simulation() -> None:
    async def stay() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise ValueError("on the way out")

    async def main() -> asyncio.Task[None]:
        task = asyncio.create_task(stay())
        await asyncio.sleep(1)
        return task

    with pytest.raises(SimulationFailed, match="cancelled"):
        run_virtual(main)


def test_a_task_that_will_not_be_cancelled_is_named() -> None:
    async def stay() -> None:
        while True:
            try:
                await asyncio.sleep(WIND_UP_S)
            except asyncio.CancelledError:
                continue

    async def main() -> asyncio.Task[None]:
        task = asyncio.create_task(stay(), name="the stubborn one")
        await asyncio.sleep(1)
        return task

    with pytest.raises(SimulationTooLong, match="the stubborn one"):
        run_virtual(main)


def test_a_generator_that_is_left_is_closed() -> None:
    closed: list[str] = []

    async def count(name: str) -> AsyncIterator[int]:
        try:
            while True:
                yield 1
        finally:
            await asyncio.sleep(1)
            closed.append(name)

    async def main() -> AsyncIterator[int]:
        async for _ in count("dropped"):
            break
        kept = count("kept")
        await anext(kept)
        await asyncio.sleep(2)
        assert closed == ["dropped"]
        return kept

    run_virtual(main)
    assert closed == ["dropped", "kept"]


def test_other_threads_are_refused() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with pytest.raises(SimulationError, match="one thread"):
            loop.call_soon_threadsafe(print)
        with pytest.raises(SimulationError, match="one thread"):
            await asyncio.to_thread(print)

    run_virtual(main)


def test_the_collector_rests_while_a_simulation_runs() -> None:
    async def main() -> bool:
        return gc.isenabled()

    assert gc.isenabled()
    assert run_virtual(main) is False
    assert gc.isenabled()


def test_tasks_have_the_same_names_in_each_run() -> None:
    async def main() -> str:
        return asyncio.create_task(asyncio.sleep(0)).get_name()

    assert run_virtual(main) == run_virtual(main)


def test_a_trace_drops_its_oldest_lines_but_not_from_its_digest() -> None:
    def traced(first: str, count: int, kept: int) -> TraceRecorder:
        loop = VirtualLoop()
        loop.close()
        trace = TraceRecorder(loop.clock, kept_lines=kept)
        trace.record("a", first)
        for number in range(count):
            trace.record("b", "counts", number, 0.5, None)
        return trace

    short, whole = traced("begins", 1000, 10), traced("begins", 1000, 5000)
    assert short.lines() == whole.lines()[-10:]
    assert short.lines()[-1] == "1000.000000000 b counts 999 0.5 None"
    assert short.recorded == 1001
    assert short.digest() == whole.digest() == short.digest()
    assert short.digest() != traced("starts", 1000, 10).digest()
