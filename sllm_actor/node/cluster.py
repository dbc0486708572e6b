"""What makes a node one of many: the shared store, its lease, the election, the routes, the way to whoever leads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from random import SystemRandom
from typing import NamedTuple

from sllm_actor.actors.leadership import Leadership
from sllm_actor.actors.leased_facts import LeasedFacts
from sllm_actor.actors.membership import Membership
from sllm_actor.actors.migration_book import MigrationBook, NoBook, SharedBook
from sllm_actor.actors.place import Place
from sllm_actor.actors.route_book import RouteBook
from sllm_actor.actors.routes import Routes
from sllm_actor.actors.scheduler import Scheduler
from sllm_actor.actors.scheduler_way import SchedulerWay
from sllm_actor.config import Config
from sllm_actor.config.private_files import read_private_file
from sllm_actor.domain import NodeId
from sllm_actor.domain.member import Member
from sllm_actor.domain.roles import Role, Roles, roles_of
from sllm_actor.errors import ConfigInvalid, Fenced, MetadataFailed, SllmError
from sllm_actor.messages.placement import MembersChanged
from sllm_actor.metadata import EtcdAddress, EtcdStore, Outcome, SqliteStore, Store
from sllm_actor.metadata.election import Leader, Seat, observe, unseat
from sllm_actor.metadata.etcd_address import client_tls, parse_endpoints
from sllm_actor.metadata.store import Condition, Operation
from sllm_actor.runtime import ActorSystem, Clock
from sllm_actor.runtime.tasks import TaskScope

log = logging.getLogger(__name__)

ELECTION = "scheduler"
MAX_PASSWORD_BYTES = 4096
# Without a leader for so many times of a lease: whoever was to follow has had its time.
PATIENCE_LEASES = 3.0

# Of an epoch, the members in theirs, and those of them that answer no more.
MakeScheduler = Callable[[int, Mapping[NodeId, int], Collection[NodeId]], Scheduler]


class Alone(NamedTuple):
    """A node that is its own cluster."""

    store: Store
    place: Place
    way: SchedulerWay
    routes: Routes

    @property
    def shared(self) -> bool:
        return False

    @property
    def moves(self) -> MigrationBook:
        return NoBook()

    def peers(self) -> list[str]:
        return []

    def members(self) -> Mapping[NodeId, str]:
        return {self.place.node: ""}

    def roles(self) -> Mapping[NodeId, Roles]:
        return {self.place.node: frozenset(Role)}

    async def commit(self, conditions: Sequence[Condition], operations: Sequence[Operation]) -> Outcome:
        return await self.store.commit(conditions, operations)

    async def lead(self, system: ActorSystem, make: MakeScheduler) -> None:
        self.way.lead_to(await system.spawn(make(0, {}, ()), "scheduler"))

    async def step_down(self) -> None:
        """Nobody has to be told."""


class Many:
    """One of many nodes, once it has joined."""

    shared = True

    def __init__(self, store: Store, system: ActorSystem, clock: Clock, config: Config) -> None:
        self.store = store
        self.routes = Routes()
        self.way = SchedulerWay(clock, PATIENCE_LEASES * config.lease_ttl_s)
        self._system = system
        self._clock = clock
        self._scope = TaskScope("cluster")
        self._make: MakeScheduler | None = None
        self._seat: Seat | None = None
        self._leadership: Leadership | None = None
        self._leader: Leader | None = None
        # The epochs of members that answer no more: they hang, or nobody listens at their endpoints.
        self._silent: set[int] = set()
        # The epochs of those who lost their seat for that: one that has another since lives, whatever its machine says.
        self._unseated: set[int] = set()
        self._roles = roles_of(config.roles)
        works = Role.WORKER in self._roles
        member = Member(
            node=NodeId(config.node_id),
            endpoint=system.address.endpoint,
            roles=tuple(sorted(self._roles)),
            start=f"{system.address.uid:x}",
            ttl_s=config.lease_ttl_s,
            host_pool_bytes=config.host_pool_bytes if works else 0,
            max_instances=config.max_instances if works else 0,
        )
        self._led = True
        # A member that can lead, if there is one.
        self._controller = NodeId("")
        self.membership = Membership(store, clock, member, on_change=lambda _: self._tell_members())
        system.vouch_with(self._is_member)
        system.hear_of_silence(self._fell_silent, self._is_heard)
        # Who is asked by no client need not know where every instance of the cluster is.
        asked = Role.GATEWAY in self._roles
        self._book = RouteBook(store, self.membership, clock, self.routes.publish if asked else None)
        self._moves = LeasedFacts(store, self.membership, clock, "migrations")
        self.moves: MigrationBook = SharedBook(self._moves)

    async def join(self) -> None:
        """Become a member, and learn of the others.

        Raises:
            NodeIdInUse: another node of this id is a member, and stays one.
            MetadataFailed: the store can't be asked.
        """
        await self.membership.start()
        self.place = Place(
            self.membership.node,
            address=str(self._system.address),
            epoch=self._epoch,
            published=self._book.add,
            withdrawn=self._book.remove,
        )
        self._book.start()
        self._moves.start()
        self._scope.spawn(self._watch_leader(), "leader")

    def _epoch(self) -> int | None:
        standing = self.membership.standing
        return None if standing is None else standing.epoch

    def members(self) -> Mapping[NodeId, str]:
        """Give everybody's address, as far as is known here."""
        return {node: f"{node}@{joined.member.endpoint}" for node, joined in self.membership.members.items()}

    def roles(self) -> Mapping[NodeId, Roles]:
        """Give everybody's roles; those that a later version may have are passed over."""
        known = {role.value for role in Role}
        return {
            node: frozenset(Role(role) for role in joined.member.roles if role in known)
            for node, joined in self.membership.members.items()
        }

    def _is_member(self, node: str, uid: int) -> bool:
        """Tell whether that very process is a member: a link that was cut for long has not ended it."""
        joined = self.membership.members.get(NodeId(node))
        return joined is not None and joined.member.start == f"{uid:x}"

    def peers(self) -> list[str]:
        """List the other nodes as sources name them."""
        own = self.place.node
        endpoints = {node: joined.member.endpoint for node, joined in self.membership.members.items() if node != own}
        return [f"{node}@{at.removeprefix('tcp://')}" for node, at in endpoints.items() if at.startswith("tcp://")]

    async def lead(self, system: ActorSystem, make: MakeScheduler) -> None:
        """Be ready to lead from now on, where that is a role of this node."""
        if Role.CONTROLLER not in self._roles:
            return
        self._make = make
        value = str(system.address).encode()
        self._leadership = Leadership(self.store, self.membership, ELECTION, value, self._clock, self._on_seat)

    async def commit(self, conditions: Sequence[Condition], operations: Sequence[Operation]) -> Outcome:
        """Commit as the leader, as `Leadership.commit` does."""
        if self._leadership is None:
            raise Fenced("this node does not lead")
        return await self._leadership.commit(conditions, operations)

    async def step_down(self) -> None:
        """Let somebody else lead, and be no member: nothing more is sent here, and what is here can be finished."""
        if self._leadership is not None:
            await self._leadership.stop()
        await self.membership.stop()

    async def close(self) -> None:
        """Take no more part."""
        await self.step_down()
        await self._book.stop()
        await self._moves.stop()
        await self._scope.close()

    def _on_seat(self, seat: Seat | None) -> None:
        """Lead, or stop leading: from here on the Scheduler takes no message."""
        before, self._seat = self._seat, seat
        if before is not None and (cell := self._system.cells.get(_scheduler_name(before.epoch))) is not None:
            self._system.end(cell, "leads no more")
        if seat is not None:
            self._scope.spawn(self._begin(seat), "lead")

    async def _begin(self, seat: Seat) -> None:
        assert self._make is not None
        name = _scheduler_name(seat.epoch)
        await self._system.spawn(self._make(seat.epoch, self._epochs(), self._gone()), name)
        if self._seat != seat:
            await self._system.stop(name)

    def _epochs(self) -> dict[NodeId, int]:
        return {node: joined.epoch for node, joined in self.membership.members.items()}

    def _gone(self) -> tuple[NodeId, ...]:
        """List the members that answer no more."""
        return tuple(node for node, epoch in self._epochs().items() if epoch in self._silent)

    def _tell_members(self) -> None:
        for known in (self._silent, self._unseated):
            if known:
                known.intersection_update(self._epochs().values())
        self._look_for_controllers()
        if self._seat is not None and _scheduler_name(self._seat.epoch) in self._system.cells:
            self._system.ref(_scheduler_name(self._seat.epoch)).tell(
                MembersChanged(epochs=self._epochs(), gone=self._gone())
            )

    def _look_for_controllers(self) -> None:
        """Say so once where nobody can lead."""
        members = self.membership.members
        one = members.get(self._controller)
        if one is None or Role.CONTROLLER not in one.member.roles:
            others = (node for node, joined in members.items() if Role.CONTROLLER in joined.member.roles)
            self._controller = next(others, NodeId(""))
        led = self._controller != ""
        if self._led and not led:
            log.error("no member of the cluster has the role controller: no model is started until one joins")
        self._led = led

    async def _watch_leader(self) -> None:
        async with aclosing(observe(self.store, ELECTION, self._clock)) as leaders:
            async for leader in leaders:
                self._leader = leader
                if leader is None:
                    self.way.lead_to(None)
                    continue
                try:
                    self.way.lead_to(self._system.ref(_scheduler_name(leader.epoch), leader.value.decode()))
                except (SllmError, UnicodeDecodeError) as error:
                    log.error("who leads can't be found: %s", error)
                    self.way.lead_to(None)

    def _is_heard(self, node: str) -> None:
        """Take it for one that may be asked again: where it was wrongly missed, its next report says what it has."""
        joined = self.membership.members.get(NodeId(node))
        if joined is not None and joined.epoch in self._silent:
            self._silent.discard(joined.epoch)
            self._tell_members()

    def _fell_silent(self, node: str, endpoint: str) -> None:
        """Do without it, and see to it that another one leads where it did: its lease may last for long yet."""
        leader = self._leader
        joined = self.membership.members.get(NodeId(node))
        if joined is None or joined.member.endpoint != endpoint:
            return
        if joined.epoch not in self._silent:
            self._silent.add(joined.epoch)
            self._tell_members()
        if (
            leader is not None
            and leader.value == f"{node}@{endpoint}".encode()
            and joined.epoch not in self._unseated
            and self._leadership is not None
            and self.membership.standing is not None
        ):
            self._scope.spawn(self._unseat(leader, node, endpoint, joined.epoch), "unseat")

    async def _unseat(self, leader: Leader, node: str, endpoint: str, epoch: int) -> None:
        try:
            if await unseat(self.store, leader):
                self._unseated.add(epoch)
                log.warning("%s, who led, is not heard from %s any more: another one may lead", node, endpoint)
        except MetadataFailed as failed:
            log.warning("%s is heard no more, and can't be kept from leading: %s", node, failed.message)


Cluster = Alone | Many


def _scheduler_name(epoch: int) -> str:
    """Each leader has a Scheduler of its own: what was meant for another finds none."""
    return f"scheduler-{epoch}"


async def open_cluster(
    config: Config, folder: Path, node: NodeId, system: ActorSystem, clock: Clock, stack: AsyncExitStack
) -> Cluster:
    """Open the store that the configuration names, and join if it is one of many's; `stack` leaves and closes it.

    Raises:
        ConfigInvalid: the address of the store, or the files that go with it, can't be used.
        NodeIdInUse, MetadataFailed: as `Many.join` does.
    """
    if not config.metadata:
        store = await SqliteStore.open(folder / "metadata.db", clock)
        stack.push_async_callback(store.close)
        routes = Routes()
        place = Place(
            node,
            published=routes.add,
            withdrawn=lambda gone: routes.remove(gone.model, gone.instance_id),
        )
        return Alone(store, place, SchedulerWay(clock, 0.0), routes)
    shared = EtcdStore(etcd_address(config), clock, SystemRandom())
    stack.push_async_callback(shared.close)
    many = Many(shared, system, clock, config)
    stack.push_async_callback(many.close)
    await many.join()
    return many


def etcd_address(config: Config) -> EtcdAddress:
    """Give where etcd is and how one proves oneself to it, as the knobs say.

    Raises:
        ConfigInvalid: the address, or the files that go with it, can't be used.
    """
    endpoints = parse_endpoints(config.metadata)
    tls = None
    if endpoints[0].scheme == "https":
        tls = client_tls(config.metadata_ca_file, config.metadata_cert_file, config.metadata_key_file)
    password = ""
    if config.metadata_user:
        knob = "metadata_password_file"
        if not config.metadata_password_file:
            raise ConfigInvalid(f"{knob}: the user {config.metadata_user[:64]!r} needs a password", param=knob)
        password = read_private_file(config.metadata_password_file, knob, MAX_PASSWORD_BYTES).strip()
    return EtcdAddress(endpoints=endpoints, tls=tls, user=config.metadata_user, password=password)
