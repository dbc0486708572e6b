"""Who is a member and who leads: at most one at a time, whatever is cut, killed or held up."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from metadata_stores import UNPACKED

from sllm_actor.actors.leadership import Leadership
from sllm_actor.actors.membership import NODES, Membership, Standing
from sllm_actor.domain.member import Member
from sllm_actor.domain.names import NodeId
from sllm_actor.errors import Fenced, LeaseLost, NodeIdInUse
from sllm_actor.metadata import Put
from sllm_actor.metadata.election import Seat
from sllm_actor.policy.lease_term import LeaseTerm
from sllm_actor.policy.members import Joined, Left, View, differences
from sllm_actor.runtime import Clock
from sllm_actor.testing.etcd import running_etcd
from sllm_actor.testing.simulated_store import MemoryStore, Way
from sllm_actor.testing.virtual_loop import VirtualLoop, run_virtual

REPOSITORY = Path(__file__).parent.parent
TTL_S = 8


def member(node: str = "a", start: str = "1") -> Member:
    return Member(
        node=NodeId(node), endpoint=f"tcp://{node}:1", roles=("worker",), start=start, ttl_s=TTL_S,
        host_pool_bytes=2**30, max_instances=4,
    )  # fmt: skip


@dataclass
class Node:
    """One node of a simulated cluster, and what has happened to it, with the moments."""

    name: str
    way: Way
    clock: Clock
    standings: list[tuple[float, Standing | None]] = field(default_factory=list)
    seats: list[tuple[float, Seat | None]] = field(default_factory=list)
    changes: list[Joined | Left] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.membership = Membership(self.way, self.clock, member(self.name), on_change=self.changes.append)
        self.membership.listen(lambda standing: self.standings.append((self.clock.monotonic_s(), standing)))
        self.leadership = Leadership(
            self.way, self.membership, "scheduler", self.name.encode(), self.clock,
            lambda seat: self.seats.append((self.clock.monotonic_s(), seat)),
        )  # fmt: skip

    async def start(self) -> Node:
        await self.membership.start()
        return self

    async def stop(self) -> None:
        await self.leadership.stop()
        await self.membership.stop()

    @property
    def leads(self) -> bool:
        return self.leadership.seat is not None


class House:
    """Nodes on one virtual clock around one store."""

    def __init__(self) -> None:
        self.clock = VirtualLoop.running().clock
        self.truth = MemoryStore(self.clock)

    def node(self, name: str) -> Node:
        return Node(name, Way(self.truth, self.clock), self.clock)

    async def until(self, true: Callable[[], bool], limit_s: float = 60) -> float:
        """Let time pass until something has come true, and give how long that took."""
        begun_s = self.clock.monotonic_s()
        while not true():
            await self.clock.sleep(0.01)
            assert self.clock.monotonic_s() - begun_s < limit_s, "it does not come true"
        return self.clock.monotonic_s() - begun_s


def in_a_house(test: Callable[[House], Awaitable[None]]) -> Callable[[], None]:
    """Make a test on virtual time."""

    def run() -> None:
        async def main() -> None:
            house = House()
            await test(house)
            await house.truth.close()

        run_virtual(main)

    run.__name__ = test.__name__
    run.__doc__ = test.__doc__
    return run


@given(st.integers(1, 1000), st.floats(0, 1e6), st.floats(0, 1e6))
def test_a_lease_is_given_up_before_its_store_can_end_it_and_kept_alive_in_time_for_that(
    ttl_s: int, sent_s: float, later_s: float
) -> None:
    term = LeaseTerm(ttl_s, sent_s)
    assert sent_s < term.next_s < term.given_up_s < sent_s + ttl_s
    assert term.holds(sent_s + later_s) == (sent_s + later_s < term.given_up_s)


def test_differences_are_who_left_and_who_joined_and_one_that_came_back_is_both() -> None:
    def view(**epochs: int) -> View:
        return {NodeId(name): Joined(member(name), epoch) for name, epoch in epochs.items()}

    assert differences(view(a=1), view(a=1)) == []
    assert differences(view(), view(b=2, a=1)) == [Joined(member("a"), 1), Joined(member("b"), 2)]
    assert differences(view(a=1, b=2), view(b=2)) == [Left(NodeId("a"), 1)]
    assert differences(view(a=1, b=2), view(a=3, c=4)) == [
        Left(NodeId("a"), 1), Left(NodeId("b"), 2), Joined(member("a"), 3), Joined(member("c"), 4),
    ]  # fmt: skip


@in_a_house
async def test_members_hear_of_those_who_come_and_of_those_who_go(house: House) -> None:
    a = await house.node("a").start()
    b = await house.node("b").start()
    await house.until(lambda: len(a.membership.members) == len(b.membership.members) == 2)
    seen = a.membership.members[NodeId("b")]
    assert seen.member == member("b") and seen.epoch == b.membership.held().epoch
    await b.stop()
    await house.until(lambda: list(a.membership.members) == ["a"])
    assert a.changes[-1] == Left(NodeId("b"), seen.epoch)
    with pytest.raises(LeaseLost):
        b.membership.held()
    await a.stop()
    assert (await house.truth.list("")).facts == ()


@in_a_house
async def test_a_member_stays_one_for_as_long_as_its_store_answers(house: House) -> None:
    a = await house.node("a").start()
    held = a.membership.held()
    await house.clock.sleep(100 * TTL_S)
    assert a.membership.held() == held and len(a.standings) == 1
    await a.stop()


@in_a_house
async def test_a_second_node_of_an_id_is_refused_and_the_first_stays(house: House) -> None:
    a = await house.node("a").start()
    held = a.membership.held()
    second = house.node("a")
    with pytest.raises(NodeIdInUse, match="another node has the id a"):
        await second.start()
    assert second.standings == [] and a.membership.held() == held
    await second.membership.stop()
    await a.stop()


@in_a_house
async def test_a_node_that_was_killed_joins_again_when_its_lease_has_ended_in_a_later_epoch(house: House) -> None:
    lease = await house.truth.grant(TTL_S)
    epoch = await house.truth.put(NODES + "a", msgspec.msgpack.encode(member("a", "0")), lease.id)
    a = house.node("a")
    took_s = house.clock.monotonic_s()
    await a.start()
    assert TTL_S - 1 < house.clock.monotonic_s() - took_s < 2 * TTL_S
    assert a.membership.held().epoch > epoch
    await a.stop()


@in_a_house
async def test_a_node_that_is_cut_off_stops_owning_before_others_may_and_joins_again_later(house: House) -> None:
    a, b = await house.node("a").start(), await house.node("b").start()
    first = a.membership.held()
    await house.clock.sleep(3.7 * TTL_S)
    a.way.cut = True
    cut_s = house.clock.monotonic_s()
    await house.until(lambda: a.membership.standing is None)
    lost_s = house.clock.monotonic_s()
    await house.until(lambda: NodeId("a") not in b.membership.members)
    assert cut_s < lost_s < house.clock.monotonic_s() - TTL_S / 8
    assert a.standings[-1][1] is None and a.standings[-1][0] <= lost_s + 0.02
    a.way.cut = False
    await house.until(lambda: a.membership.standing is not None)
    assert a.membership.held().epoch > first.epoch
    await asyncio.gather(a.stop(), b.stop())


@in_a_house
async def test_a_cut_that_is_shorter_than_the_patience_costs_nothing(house: House) -> None:
    a = house.node("a")
    a.way.patience_s = TTL_S / 8
    await a.start()
    held = a.membership.held()
    for _ in range(5):
        a.way.cut = True
        await house.clock.sleep(0.3 * TTL_S)
        a.way.cut = False
        await house.clock.sleep(0.4 * TTL_S)
    assert a.membership.held() == held and len(a.standings) == 1
    await a.stop()


@in_a_house
async def test_a_member_that_is_removed_hears_of_it_and_joins_again(house: House) -> None:
    a = await house.node("a").start()
    first = a.membership.held()
    await house.truth.delete(first.key)
    await house.until(lambda: len(a.standings) == 3)
    assert a.standings[1][1] is None and a.membership.held().epoch > first.epoch
    await a.stop()


@in_a_house
async def test_a_node_that_joins_again_too_slowly_for_its_lease_tries_again_until_it_does(house: House) -> None:
    a = await house.node("a").start()
    await house.truth.delete(a.membership.held().key)
    a.way.latency_s = 0.4 * TTL_S
    await house.until(lambda: len(a.standings) > 3)
    a.way.latency_s = 0.001
    await house.until(lambda: a.membership.standing is not None)
    await a.stop()


@in_a_house
async def test_one_leads_and_when_it_is_cut_off_another_does_within_two_leases_and_never_both(house: House) -> None:
    nodes = [await house.node(name).start() for name in "abc"]
    await house.until(lambda: any(node.leads for node in nodes))
    led: list[int] = []
    for _ in range(4):
        (leader,) = [node for node in nodes if node.leads]
        leader.way.cut = True

        def another(leader: Node = leader) -> bool:
            assert sum(node.leads for node in nodes) <= 1
            return any(node.leads for node in nodes if node is not leader)

        assert await house.until(another) < 2 * TTL_S
        (successor,) = [node for node in nodes if node.leads]
        seat = successor.leadership.seat
        assert seat is not None
        led.append(seat.epoch)
        leader.way.cut = False
        with pytest.raises(Fenced):
            await leader.leadership.commit([], [Put("owned", b"")])
        assert (await successor.leadership.commit([], [Put("owned", successor.name.encode())])).done
        await house.until(lambda: all(node.membership.standing for node in nodes))
    assert led == sorted(set(led))
    await asyncio.gather(*(node.stop() for node in nodes))


@in_a_house
async def test_a_leader_that_stops_is_followed_at_once_and_one_whose_seat_is_taken_stands_again(house: House) -> None:
    a, b = await house.node("a").start(), house.node("b")
    await house.until(lambda: a.leads)
    await b.start()
    seat = a.leadership.seat
    assert seat is not None
    await house.clock.sleep(TTL_S)
    await house.truth.delete(seat.key)
    await house.until(lambda: b.leads and not a.leads)
    await b.stop()
    assert await house.until(lambda: a.leads) < 1
    assert [bool(seat) for _, seat in a.seats] == [True, False, True]
    await a.stop()


@pytest.mark.parametrize("seed", range(2))
def test_through_any_cuts_no_two_lead_at_once_and_no_fenced_write_is_late(seed: int) -> None:
    """The epochs of what is written in a leader's name never go back."""

    async def main() -> None:
        house, random = House(), Random(seed)
        nodes = [await house.node(name).start() for name in "abc"]
        for _ in range(40):
            node = random.choice(nodes)
            node.way.cut = not node.way.cut
            node.way.loses_answers = random.random() < 0.5
            for _ in range(random.randrange(1, 60)):
                await house.clock.sleep(0.1)
                assert sum(node.leads for node in nodes) <= 1
                for node in nodes:
                    seat = node.leadership.seat
                    if seat is not None and not node.way.cut:
                        await node.leadership.commit([], [Put("epoch", str(seat.epoch).encode())])
        for node in nodes:
            node.way.cut = node.way.loses_answers = False
        await house.until(lambda: all(node.membership.standing for node in nodes))
        await house.until(lambda: sum(node.leads for node in nodes) == 1)
        history = house.truth.watch("epoch", 2)
        epochs = []
        revision = (await house.truth.list("")).revision
        await house.truth.put("epoch", b"0")
        async for changes in history:
            if changes.revision > revision:
                break
            epochs += [int(change.fact.value) for change in changes.changes if change.fact is not None]
        await history.aclose()
        assert epochs == sorted(epochs) and len(set(epochs)) > 1
        await asyncio.gather(*(node.stop() for node in nodes))
        await house.truth.close()

    run_virtual(main)


LEADER = """
import asyncio, sys
from random import Random
from sllm_actor.actors.leadership import Leadership
from sllm_actor.actors.membership import Membership
from sllm_actor.domain.member import Member
from sllm_actor.errors import SllmError
from sllm_actor.metadata import EtcdAddress, EtcdStore, Put
from sllm_actor.metadata.election import commit_fenced
from sllm_actor.metadata.etcd_address import parse_endpoints
from sllm_actor.runtime import SystemClock

async def main(url, name):
    clock = SystemClock()
    store = EtcdStore(EtcdAddress(endpoints=parse_endpoints(url)), clock, Random())
    me = Member(node=name, endpoint="tcp://x:1", roles=(), start="1", ttl_s=3, host_pool_bytes=1, max_instances=1)
    membership = Membership(store, clock, me)
    seats = []
    def on_seat(seat):
        if seat:
            seats.append(seat)
        print("leads" if seat else "stops", flush=True)
    Leadership(store, membership, "scheduler", name.encode(), clock, on_seat)
    await membership.start()
    print("joined", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        try:
            await commit_fenced(store, seats[0], [], [Put("owned", name.encode())])
            print("wrote", flush=True)
        except SllmError as error:
            print(error.code, flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


class LeaderProcess:
    """A process that is a member and stands for leader; each line that it is given is an attempt to write as one."""

    def __init__(self, url: str, name: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", LEADER, url, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            bufsize=1, env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        )  # fmt: skip

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def write(self) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        return self.hear()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()


def test_a_leader_process_that_is_held_up_is_followed_and_can_not_write_when_it_goes_on(tmp_path: Path) -> None:
    with running_etcd(tmp_path, UNPACKED, members=3) as cluster:
        first = LeaderProcess(cluster.url(), "first")
        processes = [first]
        try:
            assert [first.hear(), first.hear()] == ["joined", "leads"] and first.write() == "wrote"
            second = LeaderProcess(cluster.url(), "second")
            processes.append(second)
            assert second.hear() == "joined"
            first.process.send_signal(signal.SIGSTOP)
            assert second.hear() == "leads" and second.write() == "wrote"
            first.process.send_signal(signal.SIGCONT)
            assert first.hear() == "stops"
            assert first.write() == "fenced"
            # A member of etcd that is killed costs nobody the lead.
            cluster.members[0].kill()
            assert second.write() == "wrote"
        finally:
            for process in processes:
                process.end()
