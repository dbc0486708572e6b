"""The numbers that a system gives of itself are right, on virtual time and a simulated network."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any

import msgspec
import pytest

from sllm_actor.errors import DeadlineExceeded
from sllm_actor.runtime import Actor, ActorSystem, Limits, Security, handles
from sllm_actor.runtime.stats import ActorStats, LinkStats
from sllm_actor.runtime.tasks import TaskScope
from sllm_actor.testing.simulated_network import SimulatedNetwork
from sllm_actor.testing.trace import TraceRecorder
from sllm_actor.testing.virtual_loop import VirtualLoop, run_virtual

LATENCY_S = 0.05
CREDIT = 4


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", forbid_unknown_fields=True):
    """Base of what the tests send."""


class Nap(Message, tag="nap", frozen=True):
    """Answered after so long."""

    nap_s: float
    padding: bytes = b""


class Count(Message, tag="count", frozen=True):
    """Answered by a stream of so many numbers."""

    upto: int


class Crash(Message, tag="crash", frozen=True):
    """Handled by a bug."""


class Sleeper(Actor):
    def __init__(self) -> None:
        self.handled: list[float] = []

    @handles(Nap)
    async def nap(self, message: Nap) -> None:
        self.handled.append(message.nap_s)
        await self.context.system.clock.sleep(message.nap_s)

    @handles(Count)
    async def count(self, message: Count) -> AsyncGenerator[int, None]:
        for number in range(message.upto):
            yield number

    @handles(Crash)
    async def crash(self, _: Crash) -> None:
        raise ZeroDivisionError


class Bed:
    """Two nodes with a known way between them."""

    def __init__(self) -> None:
        loop = VirtualLoop.running()
        self.dice = random.Random(1)
        self.net = SimulatedNetwork(loop, self.dice, TraceRecorder(loop.clock))
        self.net.set_link("a", "b", latency_s=LATENCY_S, jitter_s=0.0)
        self.a, self.b = (
            ActorSystem(
                node_id=name,
                messages=(Nap, Count, Crash),
                security=Security(secret=b"a secret of two nodes"),
                limits=Limits(stream_credit=CREDIT, heartbeat_s=1.0),
                clock=loop.clock,
                network=self.net.host(name),
                randomness=self.dice.randbytes,
            )
            for name in ("a", "b")
        )
        self.tasks = TaskScope("test")


def on_a_bed(test: Callable[[Bed], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    async def main() -> None:
        bed = Bed()
        await bed.b.listen("tcp://b:7000")
        await test(bed)
        await bed.a.close()
        await bed.b.close()

    def run() -> None:
        run_virtual(main)

    run.__name__ = test.__name__
    run.__doc__ = test.__doc__
    return run


def actor_of(system: ActorSystem) -> ActorStats:
    (actor,) = system.stats().actors
    return actor


def link_of(system: ActorSystem) -> LinkStats:
    (link,) = system.stats().links
    return link


@on_a_bed
async def test_what_was_handled_what_waits_and_how_long_it_took_are_counted(bed: Bed) -> None:
    ref = await bed.b.spawn(Sleeper(), "sleeper")
    assert actor_of(bed.b) == ActorStats(name="sleeper", mailbox_depth=0, handled=0, busy_s=0.0, restarts=0)
    await ref.ask(Nap(nap_s=2.0), timeout_s=10.0)
    await ref.ask(Nap(nap_s=0.5), timeout_s=10.0)
    await asyncio.sleep(100.0)
    seen = actor_of(bed.b)
    assert (seen.handled, seen.mailbox_depth) == (2, 0)
    # What passes while it has nothing to do is not its time.
    assert seen.busy_s == pytest.approx(2.5)
    for _ in range(4):
        ref.tell(Nap(nap_s=10.0))
    await asyncio.sleep(5.0)
    assert actor_of(bed.b).mailbox_depth == 3
    await asyncio.sleep(40.0)
    assert (actor_of(bed.b).handled, actor_of(bed.b).mailbox_depth) == (6, 0)
    assert actor_of(bed.b).busy_s == pytest.approx(42.5)


@on_a_bed
async def test_restarts_are_counted_and_the_other_counts_go_on(bed: Bed) -> None:
    ref = await bed.b.spawn(Sleeper, "sleeper")
    await ref.ask(Nap(nap_s=1.0), timeout_s=10.0)
    for _ in range(2):
        ref.tell(Crash())
        await ref.ask(Nap(nap_s=1.0), timeout_s=10.0)
    assert (actor_of(bed.b).restarts, actor_of(bed.b).handled) == (2, 5)
    assert actor_of(bed.b).busy_s == pytest.approx(3.0)


@on_a_bed
async def test_dead_letters_are_counted_where_they_are_found(bed: Bed) -> None:
    await bed.b.spawn(Sleeper(), "sleeper")
    bed.b.ref("nobody").tell(Crash())
    bed.a.ref("nobody", at="b@tcp://b:7000").tell(Crash())
    await asyncio.sleep(1.0)
    assert (bed.a.stats().dead_letters, bed.b.stats().dead_letters) == (0, 2)
    bed.net.kill("b", silent=False)
    await asyncio.sleep(1.0)
    bed.a.ref("sleeper", at="b@tcp://b:7000").tell(Crash())
    await asyncio.sleep(1.0)
    assert bed.a.stats().dead_letters == 1


@on_a_bed
async def test_a_link_counts_its_bytes_and_both_ends_agree(bed: Bed) -> None:
    await bed.b.spawn(Sleeper(), "sleeper")
    ref = bed.a.ref("sleeper", at="b@tcp://b:7000")
    await ref.ask(Nap(nap_s=0.0), timeout_s=5.0)
    before = link_of(bed.a)
    assert before.open
    assert (before.node, before.connections, before.waiting_bytes) == ("b", 1, 0)
    await ref.ask(Nap(nap_s=0.0, padding=bytes(10_000)), timeout_s=5.0)
    after = link_of(bed.a)
    assert 10_000 < after.sent_bytes - before.sent_bytes < 10_200
    assert 0 < after.received_bytes - before.received_bytes < 100
    there = link_of(bed.b)
    assert (there.received_bytes, there.sent_bytes) == (after.sent_bytes, after.received_bytes)


@on_a_bed
async def test_the_round_trip_is_that_of_the_way(bed: Bed) -> None:
    await bed.b.spawn(Sleeper(), "sleeper")
    await bed.a.ref("sleeper", at="b@tcp://b:7000").ask(Nap(nap_s=0.0), timeout_s=5.0)
    assert link_of(bed.a).round_trip_s == 0.0
    await asyncio.sleep(3.0)
    # Reads may be cut anywhere; each piece is a little later.
    assert link_of(bed.a).round_trip_s == pytest.approx(2 * LATENCY_S, rel=0.05)
    bed.net.set_link("a", "b", latency_s=0.2)
    await asyncio.sleep(3.0)
    assert link_of(bed.a).round_trip_s == pytest.approx(0.4, rel=0.05)


@on_a_bed
async def test_what_waits_here_and_runs_there_is_counted_until_it_ends(bed: Bed) -> None:
    await bed.b.spawn(Sleeper(), "sleeper")
    ref = bed.a.ref("sleeper", at="b@tcp://b:7000")
    asking = bed.tasks.spawn(ref.ask(Nap(nap_s=60.0), timeout_s=5.0), "ask", on_failure=lambda _: None)
    await asyncio.sleep(1.0)
    assert (link_of(bed.a).waiting_asks, link_of(bed.b).running_calls) == (1, 1)
    with pytest.raises(DeadlineExceeded):
        await asking
    await asyncio.sleep(1.0)
    assert (link_of(bed.a).waiting_asks, link_of(bed.b).running_calls) == (0, 0)


@on_a_bed
async def test_a_stream_that_waits_for_its_reader_counts_a_stall_and_one_that_is_read_does_not(bed: Bed) -> None:
    await bed.b.spawn(Sleeper(), "sleeper")
    ref = bed.a.ref("sleeper", at="b@tcp://b:7000")
    assert [item async for item in ref.stream(Count(upto=CREDIT))] == list(range(CREDIT))
    assert link_of(bed.b).credit_stalls == 0
    async with aclosing(ref.stream(Count(upto=CREDIT + 1))) as items:
        assert await anext(items) == 0
        await asyncio.sleep(10.0)
        assert link_of(bed.b).credit_stalls == 1
        assert [item async for item in items] == [1, 2, 3, 4]


@on_a_bed
async def test_an_answer_that_comes_too_late_is_counted(bed: Bed) -> None:
    await bed.b.spawn(Sleeper(), "sleeper")
    ref = bed.a.ref("sleeper", at="b@tcp://b:7000")
    await ref.ask(Nap(nap_s=0.0), timeout_s=5.0)
    with pytest.raises(DeadlineExceeded):
        # Answered at once, but the way is longer than that.
        await ref.ask(Nap(nap_s=0.0), timeout_s=1.5 * LATENCY_S)
    await asyncio.sleep(1.0)
    assert link_of(bed.a).late_answers == 1


@on_a_bed
async def test_a_lost_link_is_not_open_and_the_next_is_counted(bed: Bed) -> None:
    await bed.b.spawn(Sleeper(), "sleeper")
    ref = bed.a.ref("sleeper", at="b@tcp://b:7000")
    await ref.ask(Nap(nap_s=0.0), timeout_s=5.0)
    bed.net.cut("a", "b")
    bed.net.partition("a", "b")
    await asyncio.sleep(1.0)
    lost = link_of(bed.a)
    assert (lost.open, lost.sent_bytes, lost.received_bytes, lost.round_trip_s) == (False, 0, 0, 0.0)
    bed.net.heal("a", "b")
    await asyncio.sleep(20.0)
    await ref.ask(Nap(nap_s=0.0), timeout_s=5.0)
    assert (link_of(bed.a).open, link_of(bed.a).connections) == (True, 2)


@on_a_bed
async def test_a_message_that_expires_behind_a_slow_one_is_dropped_though_its_asker_can_not_be_heard(bed: Bed) -> None:
    sleeper = Sleeper()
    await bed.b.spawn(sleeper, "sleeper")
    ref = bed.a.ref("sleeper", at="b@tcp://b:7000")
    await ref.ask(Nap(nap_s=0.0), timeout_s=5.0)
    asks = [
        bed.tasks.spawn(ref.ask(Nap(nap_s=nap_s), timeout_s=timeout_s), "ask", on_failure=lambda _: None)
        for nap_s, timeout_s in ((1.5, 5.0), (7.0, 1.0))
    ]
    await asyncio.sleep(0.5)
    # From here on, nothing comes through that would call off the second.
    bed.net.partition("a", "b")
    await asyncio.sleep(1.6)
    assert sleeper.handled == [0.0, 1.5]
    bed.net.heal("a", "b")
    await asyncio.wait(asks)
