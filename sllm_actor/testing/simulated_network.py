"""A network in memory, between hosts that are names: TCP as it is on a bad day, and the same day each time.

What can go wrong is what goes wrong with TCP: connections are cut, bytes are late, a direction is blocked, a machine
dies with or without a word. Bytes of a living connection are never lost, doubled or swapped. Every draw comes from the
dice that are given. It stands on a virtual loop. TLS and Unix sockets are not simulated.
Source of the ideas: FoundationDB's Sim2, TigerBeetle's packet simulator.
"""

from __future__ import annotations

import asyncio
import errno
import random
import socket
import ssl
from contextvars import Context, copy_context
from math import inf

from sllm_actor.errors import AddressInUse, ConfigInvalid
from sllm_actor.runtime.network import Endpoint, Network, ProtocolFactory
from sllm_actor.testing.simulated_link import Host, Link, Power
from sllm_actor.testing.simulated_pipe import Pipe, reset_by_peer
from sllm_actor.testing.simulated_transport import SimulatedTransport
from sllm_actor.testing.trace import TraceRecorder
from sllm_actor.testing.virtual_loop import VirtualLoop

# As Linux does it: asked again after a second, and after twice as long, until two minutes have passed.
CONNECT_TIMEOUT_S = 127.0
CONNECT_RETRY_S = 1.0
EPHEMERAL_PORTS = range(50_000, 60_000)


class SimulatedListener:
    """Where a host listens; `close` lets its open connections stay."""

    def __init__(self, host: Host, port: int, factory: ProtocolFactory) -> None:
        self.endpoint = f"tcp://{host.name}:{port}"
        self.factory = factory
        self.context: Context = copy_context()
        self._host = host
        self._port = port

    def close(self) -> None:
        if self._host.listeners.get(self._port) is self:
            del self._host.listeners[self._port]


class SimulatedNetwork:
    """The hosts, the links between them, and the hand that breaks both. Hosts are made when they are first named."""

    def __init__(
        self,
        loop: VirtualLoop,
        dice: random.Random,
        trace: TraceRecorder,
        *,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        torn: bool = True,
    ) -> None:
        self.trace = trace
        self._loop = loop
        self._dice = dice
        self._connect_timeout_s = connect_timeout_s
        # Readers take what has come in pieces of any size.
        self._torn = torn
        self._hosts: dict[str, Host] = {}
        self._links: dict[tuple[str, str], Link] = {}
        self._connections = 0

    def host(self, name: str) -> Network:
        """Give the network as the process that runs on a host now sees it."""
        host = self._host(name)
        assert host.power is Power.UP, f"{name} must be revived first"
        return _HostNetwork(self, host)

    # What can be done to it.

    def set_link(
        self,
        a: str,
        b: str,
        *,
        latency_s: float | None = None,
        jitter_s: float | None = None,
        bandwidth_bytes_per_s: float | None = None,
        loss: float | None = None,
        both: bool = True,
    ) -> None:
        """Change what is given: how slow, uneven, narrow and lossy the way from a to b is; or `both` ways.

        A lost segment (`loss` is the probability) is sent again, so that it and what follows it are late.
        """
        for link in self._ways(a, b, both):
            link.latency_s = link.latency_s if latency_s is None else latency_s
            link.jitter_s = link.jitter_s if jitter_s is None else jitter_s
            link.loss = link.loss if loss is None else loss
            if bandwidth_bytes_per_s is not None:
                link.bandwidth_bytes_per_s = bandwidth_bytes_per_s
        self.trace.record("network", "link", a, b, latency_s, jitter_s, bandwidth_bytes_per_s, loss, both)

    def partition(self, a: str, b: str, *, both: bool = True) -> None:
        """Hold back whatever goes from a to b, and with `both` also what comes back. Nobody is told."""
        self.trace.record("network", "partition", a, b, both)
        for link in self._ways(a, b, both):
            if not link.blocked:
                link.blocked_since_s = self._loop.now_s

    def heal(self, a: str, b: str) -> None:
        """Let both directions pass again; what was held back comes after a time that its senders need to notice."""
        self.trace.record("network", "heal", a, b)
        blocked = [link for link in self._ways(a, b, True) if link.blocked]
        ends = self._ends(a, b)
        # A pipe is met twice where both its ends live.
        pipes = list(
            dict.fromkeys(pipe for end in ends for pipe in (end.outbound, end.inbound) if pipe.link in blocked)
        )
        for pipe in pipes:
            pipe.unblock()
        for link in blocked:
            link.blocked_since_s = inf
        for pipe in pipes:
            pipe.poke()
            pipe.back.acknowledge_again()

    def cut(self, a: str, b: str) -> None:
        """Break every connection between the two: each end hears of it in its own time; bytes under way are lost."""
        self.trace.record("network", "cut", a, b)
        for end in self._ends(a, b):
            end.outbound.break_off()
            end.inbound.break_off()
            delay_s = end.inbound.link.delay_s(self._dice)
            self._loop.call_later(delay_s, end.lose, reset_by_peer(), context=end.context)

    def half_open(self, gone: str, left: str, *, resets: bool = False) -> None:
        """Make `gone` lose its connections to `left`, which hears nothing of it.

        What `left` then writes vanishes; with `resets` it is answered with a reset.
        """
        self.trace.record("network", "half open", gone, left, resets)
        for end in self._ends(gone, left):
            if end.host.name == gone:
                end.inbound.mute = not resets
                end.lose(reset_by_peer())

    def kill(self, name: str, *, silent: bool = True) -> None:
        """End a host's process, which hears nothing any more.

        `silent`: the machine is gone with it, and its peers wait. Otherwise the machine resets its connections, and
        refuses new ones.
        """
        self.trace.record("network", "kill", name, silent)
        host = self._host(name)
        ends = list(host.ends)
        host.end_process(Power.DARK if silent else Power.NO_PROCESS)
        for end in ends:
            end.die()
            if not silent:
                end.outbound.break_off()
                end.outbound.send_reset()

    def revive(self, name: str) -> None:
        """Start the machine with a new process, which has no listeners; `host` gives its network.

        What peers still send on old connections is answered with resets.
        """
        self.trace.record("network", "revive", name)
        host = self._host(name)
        assert host.power is not Power.UP, f"{name} lives"
        host.power = Power.UP
        for other in self._hosts.values():
            for end in other.ends:
                if end.outbound.sink.host is host:
                    end.outbound.poke()

    def freeze(self, name: str) -> None:
        """Stop a process as SIGSTOP does: it reads nothing, hears nothing, and sends nothing.

        Its tasks run on, for they share the loop: what they write is sent after the thaw.
        """
        self.trace.record("network", "freeze", name)
        host = self._host(name)
        host.frozen = True
        for end in host.ends:
            end.look()

    def thaw(self, name: str) -> None:
        """Let a frozen process go on."""
        self.trace.record("network", "thaw", name)
        host = self._host(name)
        if host.frozen:
            host.thaw()
            for end in host.ends:
                end.look()
                host.call_soon(end.context, end.outbound.refill)

    def slow_reader(self, name: str, bytes_per_s: float) -> None:
        """Let a host read no more than this, over all its connections; `inf` ends it."""
        self.trace.record("network", "slow reader", name, bytes_per_s)
        host = self._host(name)
        host.read_bytes_per_s = bytes_per_s
        host.read_free_s = self._loop.now_s

    # What hosts do.

    async def listen(self, host: Host, endpoint: str, factory: ProtocolFactory) -> SimulatedListener:
        where = _parse(endpoint)
        if where.host != host.name:
            raise ConfigInvalid(f"{endpoint} is not at {host.name}", param="endpoint")
        port = where.port or host.free_port()
        if port in host.listeners:
            raise AddressInUse(f"can't listen at {endpoint}: Address already in use", param="endpoint")
        listener = SimulatedListener(host, port, factory)
        host.listeners[port] = listener
        self.trace.record(host.name, "listen", port)
        return listener

    async def dial(self, host: Host, incarnation: int, endpoint: str, factory: ProtocolFactory) -> None:
        where = _parse(endpoint)
        target = self._hosts.get(where.host)
        if target is None:
            raise socket.gaierror(socket.EAI_NONAME, f"no host {where.host}")
        out, back = self._link(host.name, target.name), self._link(target.name, host.name)
        self.trace.record(host.name, "dial", target.name, where.port)
        await self._reach(target, out, back)
        if host.incarnation != incarnation:
            await host.awake(incarnation)
        listener = target.listeners.get(where.port)
        delay_s = back.delay_s(self._dice)
        if listener is None:
            await asyncio.sleep(delay_s)
            raise ConnectionRefusedError(errno.ECONNREFUSED, f"nobody listens at {endpoint}")
        ours, theirs = self._connect(host, target, where.port, listener)
        ours.inbound.not_before(self._loop.now_s + delay_s)
        target.call_soon(listener.context, _accept, listener, theirs)
        connected = False
        try:
            await asyncio.sleep(delay_s)
            await host.awake(incarnation)
            if ours.over:
                raise reset_by_peer()
            # From the loop, as asyncio does it: an error in there is not the dialler's.
            self._loop.call_soon(ours.start, factory(), context=ours.context)
            await asyncio.sleep(0)
            connected = True
        finally:
            if not connected:
                ours.abort()

    async def _reach(self, target: Host, out: Link, back: Link) -> None:
        """Return when a request to connect has come to a machine that answers.

        Raises:
            TimeoutError: none has.
        """
        last_s = self._loop.now_s + self._connect_timeout_s
        retry_s = CONNECT_RETRY_S
        while True:
            delay_s = out.delay_s(self._dice)
            await asyncio.sleep(delay_s)
            if not (out.blocked or back.blocked or target.power is Power.DARK):
                return
            left_s = last_s - self._loop.now_s
            await asyncio.sleep(max(0.0, min(retry_s - delay_s, left_s)))
            if left_s <= retry_s:
                raise TimeoutError(errno.ETIMEDOUT, f"{target.name} does not answer")
            retry_s *= 2

    def _connect(
        self, host: Host, target: Host, port: int, listener: SimulatedListener
    ) -> tuple[SimulatedTransport, SimulatedTransport]:
        self._connections += 1
        out, back = (
            Pipe(self._loop, self._dice, self.trace, self._link(a.name, b.name), torn=self._torn)
            for a, b in ((host, target), (target, host))
        )
        out.back, back.back = back, out
        near, far = (host.name, EPHEMERAL_PORTS[self._connections % len(EPHEMERAL_PORTS)]), (target.name, port)
        ours = SimulatedTransport(
            self._connections, host, copy_context(), (out, back), {"sockname": near, "peername": far}, self.trace
        )
        theirs = SimulatedTransport(
            self._connections, target, listener.context, (back, out), {"sockname": far, "peername": near}, self.trace
        )
        host.ends[ours] = None
        target.ends[theirs] = None
        return ours, theirs

    def _host(self, name: str) -> Host:
        host = self._hosts.get(name)
        if host is None:
            host = self._hosts[name] = Host(name, self._loop)
        return host

    def _link(self, a: str, b: str) -> Link:
        link = self._links.get((a, b))
        if link is None:
            link = self._links[a, b] = Link(a, b)
        return link

    def _ways(self, a: str, b: str, both: bool) -> list[Link]:
        return [self._link(a, b), self._link(b, a)] if both and a != b else [self._link(a, b)]

    def _ends(self, a: str, b: str) -> list[SimulatedTransport]:
        """List the ends of the connections between two hosts, in the order in which they were made."""
        links = self._ways(a, b, True)
        hosts = [self._host(name) for name in dict.fromkeys((a, b))]
        return [end for host in hosts for end in host.ends if end.outbound.link in links]


class _HostNetwork:
    """One process's network."""

    def __init__(self, network: SimulatedNetwork, host: Host) -> None:
        self._network = network
        self._host = host
        self._incarnation = host.incarnation

    async def listen(self, endpoint: str, factory: ProtocolFactory, tls: ssl.SSLContext | None) -> SimulatedListener:
        _refuse(tls)
        await self._host.awake(self._incarnation)
        return await self._network.listen(self._host, endpoint, factory)

    async def dial(self, endpoint: str, factory: ProtocolFactory, tls: ssl.SSLContext | None) -> None:
        _refuse(tls)
        await self._host.awake(self._incarnation)
        await self._network.dial(self._host, self._incarnation, endpoint, factory)


def _accept(listener: SimulatedListener, transport: SimulatedTransport) -> None:
    transport.start(listener.factory())


def _refuse(tls: ssl.SSLContext | None) -> None:
    if tls is not None:
        raise ConfigInvalid("a simulated network has no TLS", param="endpoint")


def _parse(endpoint: str) -> Endpoint:
    where = Endpoint.parse(endpoint)
    if where.path:
        raise ConfigInvalid(f"{endpoint}: a simulated network has no Unix sockets", param="endpoint")
    return where
