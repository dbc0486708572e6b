"""All of a system's connections to other nodes: who may connect, and which of two that cross stays."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from math import inf
from typing import TYPE_CHECKING, Any

from sllm_actor.errors import (
    ConfigInvalid,
    LinkDuplicate,
    NodeDown,
    NodeMismatch,
    NodeUnreachable,
    Overloaded,
    SllmError,
)
from sllm_actor.runtime.handshake import MAX_NAME_LENGTH, NONCE_BYTES, VERSION_MAX, VERSION_MIN, Hello
from sllm_actor.runtime.hearing import DECLARED_DOWN
from sllm_actor.runtime.letters import LetterCodec
from sllm_actor.runtime.link import Link
from sllm_actor.runtime.network import Endpoint, Listener, Network
from sllm_actor.runtime.peer import Peer
from sllm_actor.runtime.references import ActorRef, NodeAddress
from sllm_actor.runtime.security import Security
from sllm_actor.runtime.stats import LinkStats
from sllm_actor.runtime.wire import Role, Wire

if TYPE_CHECKING:
    from sllm_actor.runtime.system import ActorSystem


class Remotes:
    """Owns the peers, the listener and the links that are still shaking hands."""

    def __init__(
        self,
        system: ActorSystem,
        messages: Sequence[type],
        security: Security,
        network: Network,
        randomness: Callable[[int], bytes],
    ) -> None:
        self.system = system
        self.security = security
        self.network = network
        self.closing = False
        self.codec = LetterCodec(messages, self._write_reference, self._read_reference, ActorRef)
        self._randomness = randomness
        # A peer lives as long as a reference, a link, a dial or a timer needs it.
        self._peers: weakref.WeakValueDictionary[str, Peer] = weakref.WeakValueDictionary()
        self._down: dict[str, int] = {}
        # Whether who knows better says that an incarnation lives.
        self.vouched: Callable[[str, int], bool] = lambda _node, _uid: False
        # Told of each node (and its endpoint) that fell silent, or whose machine says that nobody listens there.
        self.fell_silent: Callable[[str, str], None] = lambda _node, _endpoint: None
        # And of each that a link is open to.
        self.is_heard: Callable[[str], None] = lambda _node: None
        system.deadlines.watch(self._sweep)
        self._owners: dict[Link, Peer | None] = {}
        self._listener: Listener | None = None

    def chance(self) -> float:
        """Give a random number from 0 to 1."""
        return int.from_bytes(self._randomness(4), "big") / 2**32

    def peer(self, address: NodeAddress, *, heard: bool = False) -> Peer:
        """Find or begin the peer of a node. An endpoint that was `heard` in a message replaces none that is known.

        Raises:
            Overloaded: too many nodes are known already.
        """
        peer = self._peers.get(address.node)
        if peer is None:
            if len(self._peers) >= self.system.limits.max_peers:
                gc.collect()
            if len(self._peers) >= self.system.limits.max_peers:
                raise Overloaded(f"{len(self._peers)} nodes are known already")
            peer = self._peers[address.node] = Peer(self, address.node)
        if address.endpoint not in ("", peer.endpoint) and peer.link is None and not (heard and peer.endpoint):
            peer.endpoint = address.endpoint
            # That it was not reached elsewhere says nothing of there.
            peer.dialling.stop()
        return peer

    def _sweep(self, now_s: float) -> float:
        """Fail the asks whose time is over; give the earliest deadline of the others, in seconds."""
        return min([peer.sweep(now_s) for peer in self._peers.values() if peer.calls], default=inf)

    def declare_down(self, node: str, uid: int) -> None:
        """Remember that an incarnation was declared down; of as many nodes as may be known, the oldest is forgotten."""
        self._down.pop(node, None)
        self._down[node] = uid
        while len(self._down) > self.system.limits.max_peers:
            del self._down[next(iter(self._down))]

    def is_down(self, node: str, uid: int) -> bool:
        """Tell whether this incarnation was declared down, and nobody vouches for it."""
        return self._down.get(node) == uid and not self.vouched(node, uid)

    # References in messages: node, endpoint, uid, name.

    def _write_reference(self, ref: ActorRef) -> Any:
        address = self.system.address if ref.is_local else ref.address
        return (address.node, address.endpoint, address.uid, ref.name)

    def _read_reference(self, raw: Any) -> ActorRef:
        if type(raw) is not list or [type(field) for field in raw] != [str, str, int, str]:
            raise ValueError("a reference is written as node, endpoint, uid and name")
        node, endpoint, uid, name = raw
        if not 0 < len(node) <= MAX_NAME_LENGTH or len(endpoint) > MAX_NAME_LENGTH or not 0 <= uid < 2**63:
            raise ValueError("a reference whose node is out of bounds")
        try:
            if endpoint:
                Endpoint.parse(endpoint)
            address = NodeAddress(node, endpoint, uid)
            if node == self.system.address.node and uid in (0, self.system.address.uid):
                return self.system.ref(name)
            return ActorRef(self.system, name, address, self.peer(address, heard=True))
        except SllmError as error:
            raise ValueError(error.message) from error

    # Links.

    async def listen(self, endpoint: str, advertise: str | None) -> str:
        """Accept connections; gives the endpoint as others dial it. Raises like `ActorSystem.listen`."""
        # The simulated network has hosts of its own; for real ones the rule holds.
        if not self.security.is_secured and not Endpoint.parse(endpoint).is_local:
            raise ConfigInvalid(
                f"{endpoint} can be reached from other machines: give a cluster secret or TLS", param="endpoint"
            )
        if advertise is None and Endpoint.parse(endpoint).host in ("0.0.0.0", "::"):
            raise ConfigInvalid(f"others can't dial {endpoint}: say what to advertise", param="advertise")
        if advertise is not None:
            Endpoint.parse(advertise)
        self._listener = await self.network.listen(endpoint, self._accepting_link, self.security.server_tls)
        return advertise or self._listener.endpoint

    def _hello(self, links: int) -> Hello:
        limits, address = self.system.limits, self.system.address
        return Hello(
            version_min=VERSION_MIN,
            version_max=VERSION_MAX,
            node=address.node,
            uid=address.uid,
            nonce=self._randomness(NONCE_BYTES),
            endpoint=address.endpoint,
            secured=bool(self.security.secret),
            links=links,
            max_frame_bytes=limits.max_frame_bytes,
            max_blob_bytes=limits.max_blob_bytes,
        )

    def _accepting_link(self) -> Link:
        link = self._link(Wire(Role.ACCEPTOR, self._hello(0), self.codec, self.system.limits, self.security.secret))
        shaking = sum(not known.is_open and known.dialled is None for known in self._owners)
        if self.closing or shaking > self.system.limits.max_handshakes:
            link.close(NodeUnreachable("too many peers are shaking hands"))
        return link

    def dialling_link(self, peer: Peer, settle: Callable[[SllmError | None], None]) -> Link:
        """Make a link to dial a peer with; `settle` hears once how the handshake ended, None for well."""
        wire = Wire(
            Role.DIALER,
            self._hello(peer.links_seen),
            self.codec,
            self.system.limits,
            self.security.secret,
            expected_node=peer.node,
        )
        link = self._link(wire)
        link.dialled = settle
        return link

    def _link(self, wire: Wire) -> Link:
        link = Link(wire, self, self.codec, self.system.clock, self.system.limits)
        self._owners[link] = None
        return link

    def introduced(self, link: Link, hello: Hello) -> None:
        """Admit a peer that has proved itself, or say why not."""
        if hello.node == self.system.address.node:
            link.refuse(NodeMismatch(f"there is a node {hello.node!r} already, this one"))
            return
        try:
            peer = self.peer(NodeAddress(hello.node, "", 0))
        except Overloaded as error:
            link.refuse(NodeMismatch(error.message))
            return
        ours_first = self.system.address.node < hello.node
        if self.is_down(hello.node, hello.uid):
            link.refuse(NodeDown(f"this incarnation of {hello.node} was declared down; begin another"))
        elif peer.link is not None and hello.uid == peer.uid and hello.links < peer.links_seen:
            # Dialled before the link that we have was open there, too.
            link.refuse(LinkDuplicate(f"{self.system.address.node} and {hello.node} are connected already"))
        elif peer.link is None and peer.dialling.under_way and ours_first:
            link.refuse(LinkDuplicate(f"{self.system.address.node} is dialling {hello.node} itself"))
        else:
            if peer.link is not None:
                peer.link.close(NodeUnreachable(f"{hello.node} has connected anew"))
                peer.lost(peer.link, NodeUnreachable(f"{hello.node} has connected anew"))
            link.admit()

    def opened(self, link: Link, hello: Hello) -> None:
        """Make a link its peer's."""
        peer = self.peer(NodeAddress(hello.node, "", 0))
        if self.is_down(hello.node, hello.uid):
            # It let us in, so it does not know: each is down to the other from now on.
            link.goodbye(DECLARED_DOWN)
            return
        if self.closing or peer.link is not None:
            link.close(LinkDuplicate(f"{hello.node} is connected already"))
            return
        self._down.pop(hello.node, None)
        self._owners[link] = peer
        link.hear = peer.hearing.hear
        peer.opened(link, hello)
        if link.dialled is not None:
            link.dialled(None)

    def closed(self, link: Link, error: SllmError) -> None:
        """Forget a link."""
        peer = self._owners.pop(link, None)
        if peer is not None:
            peer.lost(link, error)
        elif link.dialled is not None:
            link.dialled(error)

    def close_listeners(self) -> None:
        """Accept nobody any more."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    async def close(self) -> None:
        """Say goodbye to every peer, and end every link."""
        self.closing = True
        self.close_listeners()
        for peer in list(self._peers.values()):
            peer.close()
        for link in list(self._owners):
            link.close(NodeUnreachable("this node is closing"))
        await self._until_closed()

    async def _until_closed(self) -> None:
        """Give the transports the turns that they need to close."""
        for _ in range(CLOSING_TURNS):
            if not self._owners:
                return
            await self.system.clock.sleep(0)
        for link in list(self._owners):
            link.abort()

    def stats(self) -> tuple[LinkStats, ...]:
        """Give the counts of every peer."""
        return tuple(peer.stats() for peer in self._peers.values())


CLOSING_TURNS = 100
