"""Who waits for a slot leaves for an instance that has one free."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from sllm_actor.actors.going_on import MAX_TURNED_AWAY, Tries
from sllm_actor.actors.queued import CalledElsewhere, Queued
from sllm_actor.actors.slots import Slots
from sllm_actor.domain import ModelName
from sllm_actor.errors import Draining, EngineDied, NoCapacity, NoSuchActor
from sllm_actor.messages.instances import InstanceStarted

MODEL = ModelName("m")


def instance(name: str) -> InstanceStarted:
    return InstanceStarted(instance_id=name, model=MODEL, node="n", worker=f"worker/{name}", spans=())  # type: ignore[arg-type]


async def never() -> AsyncIterator[str]:
    await asyncio.get_running_loop().create_future()
    yield "never"


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


class Waits:
    """Requests that wait, each in a task of its own."""

    def __init__(self) -> None:
        self.idle: list[InstanceStarted] = []
        self.queued = Queued(lambda _: self.idle)

    def waits(self, priority: int = 0, *, tried: tuple[str, ...] = ("busy",)) -> asyncio.Task[str]:
        return asyncio.ensure_future(self.queued.next_of(never(), MODEL, tried, priority))

    async def frees(self, *names: str) -> None:
        self.idle = [instance(name) for name in names]
        self.queued.look(MODEL)
        await turns()


def called_to(task: asyncio.Task[str]) -> str | None:
    error = task.exception() if task.done() else None
    assert error is None or isinstance(error, CalledElsewhere)
    return error.instance.instance_id if error is not None else None


async def test_each_free_instance_calls_one_of_those_who_wait() -> None:
    waits = Waits()
    first, second, third = waits.waits(), waits.waits(), waits.waits()
    await turns()
    await waits.frees("a", "b")
    assert [called_to(task) for task in (first, second, third)] == ["a", "b", None]
    third.cancel()


async def test_the_most_urgent_is_called_first() -> None:
    waits = Waits()
    usual, urgent = waits.waits(5), waits.waits(1)
    await turns()
    await waits.frees("a")
    assert (called_to(usual), called_to(urgent)) == (None, "a")
    usual.cancel()


async def test_nobody_is_called_to_where_he_has_waited_before() -> None:
    waits = Waits()
    task = waits.waits(tried=("busy", "a"))
    await turns()
    await waits.frees("a")
    assert called_to(task) is None
    await waits.frees("a", "b")
    assert called_to(task) == "b"


async def test_who_comes_to_wait_is_called_at_once_where_one_is_free() -> None:
    waits = Waits()
    await waits.frees("a")
    task = waits.waits()
    await turns()
    assert called_to(task) == "a"


async def test_who_has_his_slot_first_stays() -> None:
    async def one() -> AsyncIterator[str]:
        yield "token"

    assert await Queued(lambda _: []).next_of(one(), MODEL, ("busy",), 0) == "token"


async def test_a_time_limit_of_his_own_is_no_call() -> None:
    waits = Waits()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await waits.queued.next_of(never(), MODEL, ("busy",), 0)


def test_a_request_that_instances_leave_before_it_has_a_slot_is_refused_with_overload_and_not_with_their_end() -> None:
    tries = Tries()
    for number in range(MAX_TURNED_AWAY):
        gone = Draining("it makes room") if number % 2 else NoSuchActor("it has left")
        tries.note(gone, had_slot=False)
    with pytest.raises(NoCapacity, match="21 instances of the model have made room") as refusal:
        tries.note(NoSuchActor("it has left"), had_slot=False)
    assert refusal.value.retry_after_s is not None


def test_a_request_that_ends_with_three_instances_fails_with_what_the_last_one_did() -> None:
    tries = Tries()
    for end, had_slot in ((Draining("it stops"), True), (EngineDied("it died"), False)):
        tries.note(end, had_slot=had_slot)
    tries.note(Draining("it makes room"), had_slot=False)
    with pytest.raises(EngineDied, match="it died, too"):
        tries.note(EngineDied("it died, too"), had_slot=True)


async def test_who_waits_for_a_slot_can_be_turned_away_and_who_has_one_keeps_it() -> None:
    slots = Slots(1)
    assert slots.take_now()
    waiting = asyncio.ensure_future(slots.take(0))
    await turns()
    slots.turn_away(lambda: Draining("it leaves"))
    with pytest.raises(Draining, match="it leaves"):
        await waiting
    assert not slots.take_now()
    slots.give()
    assert slots.take_now()
