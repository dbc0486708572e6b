"""The time that an answer may take: it ends the wait for an item, and nothing that is done with one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from sllm_actor.errors import DeadlineExceeded
from sllm_actor.frontend.deadline import within
from sllm_actor.runtime import SystemClock

CLOCK = SystemClock()


class Numbers:
    """Gives numbers, and then waits for ever; `closed` tells that it was let go."""

    def __init__(self, numbers: int) -> None:
        self._numbers = numbers
        self.closed = False

    async def items(self) -> AsyncGenerator[int, None]:
        try:
            for number in range(self._numbers):
                yield number
            await asyncio.Event().wait()
        finally:
            self.closed = True


async def test_the_wait_for_an_item_ends_with_the_time_and_closes_what_makes_them() -> None:
    numbers = Numbers(2)
    seen = []
    with pytest.raises(DeadlineExceeded):
        async for item in within(numbers.items(), 0.02, CLOCK.monotonic_s(), CLOCK):
            seen.append(item)
    assert seen == [0, 1]
    assert numbers.closed


async def test_what_is_done_with_an_item_when_the_time_is_over_is_not_cut_off_but_no_further_one_comes() -> None:
    numbers, over = Numbers(9), asyncio.Event()
    seen = []
    with pytest.raises(DeadlineExceeded):
        async for item in within(numbers.items(), 0.02, CLOCK.monotonic_s(), CLOCK):
            asyncio.get_running_loop().call_later(0.05, over.set)
            await over.wait()
            seen.append(item)
    assert seen == [0]
    assert numbers.closed


async def test_a_caller_that_is_cancelled_stays_cancelled_and_an_answer_that_ends_in_time_is_whole() -> None:
    numbers = Numbers(0)

    async def read() -> None:
        async for _ in within(numbers.items(), 3600.0, CLOCK.monotonic_s(), CLOCK):
            pass

    async with asyncio.TaskGroup() as group:
        reading = group.create_task(read())
        await asyncio.sleep(0)
        reading.cancel()
    assert reading.cancelled()
    assert numbers.closed

    async def three() -> AsyncGenerator[int, None]:
        for number in range(3):
            yield number

    assert [item async for item in within(three(), 3600.0, CLOCK.monotonic_s(), CLOCK)] == [0, 1, 2]


async def test_an_error_of_the_items_own_is_passed_on_even_where_it_is_a_timeout() -> None:
    async def failing() -> AsyncGenerator[int, None]:
        yield 0
        raise TimeoutError("mine")

    with pytest.raises(TimeoutError, match="mine"):
        async for _ in within(failing(), 3600.0, CLOCK.monotonic_s(), CLOCK):
            pass
