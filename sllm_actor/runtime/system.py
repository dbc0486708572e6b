"""Spawns actors, delivers messages to them, restarts and stops them in order. One event loop, one system."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
from collections.abc import Callable, Sequence
from math import inf
from typing import Any

from sllm_actor.errors import ActorDied, ConfigInvalid, NoSuchActor, SllmError
from sllm_actor.runtime.actor import Actor
from sllm_actor.runtime.calls import CURRENT, NO_ENVELOPE, Deadlines, current_trace, sweep_cell
from sllm_actor.runtime.cell import Cell
from sllm_actor.runtime.clock import Clock, SystemClock
from sllm_actor.runtime.limits import Limits
from sllm_actor.runtime.network import Network, SocketNetwork
from sllm_actor.runtime.references import ActorRef, NodeAddress
from sllm_actor.runtime.remotes import Remotes
from sllm_actor.runtime.security import Security
from sllm_actor.runtime.stats import ActorStats, SystemStats
from sllm_actor.runtime.supervision import Ended, Supervision
from sllm_actor.runtime.tasks import TaskScope

log = logging.getLogger(__name__)


class ActorSystem:
    """Owns the actors of one node, and its connections to others. Belongs to one event loop.

    `messages` is the table of types that travel between nodes: msgspec structs with a tag in the field `kind`, unknown
    fields forbidden. `randomness` gives so many random bytes; `on_escalation` hears of an actor without a parent that
    could not be kept alive.
    """

    def __init__(
        self,
        *,
        node_id: str = "local",
        messages: Sequence[type] = (),
        security: Security | None = None,
        limits: Limits | None = None,
        clock: Clock | None = None,
        network: Network | None = None,
        randomness: Callable[[int], bytes] = os.urandom,
        on_escalation: Callable[[ActorRef, BaseException], None] | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.clock = clock or SystemClock()
        self.now_s = self.clock.monotonic_s
        self.tasks = TaskScope("system")
        self.deadlines = Deadlines(self.clock)
        self.dead_letters = 0
        self.deadlines.watch(lambda now_s: min([sweep_cell(cell, now_s) for cell in self.cells.values()], default=inf))
        self.cells: dict[str, Cell] = {}
        self._closing = False
        self._watches = 0
        self._on_escalation = on_escalation
        self._context = contextvars.copy_context()
        self._context.run(CURRENT.set, NO_ENVELOPE)
        # Bound to the loop at its first call: to look for the running loop takes longer than to make a future.
        self.create_future: Callable[[], asyncio.Future[Any]] = self._create_first_future
        uid = int.from_bytes(randomness(7), "big") + 1
        self.address = NodeAddress(node_id, "", uid)
        self._remotes = Remotes(
            self,
            messages,
            security or Security(),
            network or SocketNetwork(self.limits.handshake_timeout_s, self.limits.max_handshakes),
            randomness,
        )

    def _create_first_future(self) -> asyncio.Future[Any]:
        self.create_future = asyncio.get_running_loop().create_future
        return self.create_future()

    def vouch_with(self, vouched: Callable[[str, int], bool]) -> None:
        """Have somebody say which incarnations (node, uid) live: they are let in again after a time without a link."""
        self._remotes.vouched = vouched

    def hear_of_silence(self, fell_silent: Callable[[str, str], None], is_heard: Callable[[str], None]) -> None:
        """Say of each node, and its endpoint, that it answers no heartbeats or no dials; and of each that it does."""
        self._remotes.fell_silent, self._remotes.is_heard = fell_silent, is_heard

    def fresh_context(self) -> contextvars.Context:
        """Give the context of a handler, free of whoever happened to wake it."""
        return self._context.copy()

    def callerless_context(self) -> contextvars.Context:
        """Give a copy of the caller's context for work that outlives the call: its trace stays, its deadline goes."""
        context = contextvars.copy_context()
        context.run(CURRENT.set, (None, None, None, inf, current_trace()))
        return context

    # Actors.

    async def spawn(
        self, actor: Actor | Callable[[], Actor], name: str, *, supervision: Supervision | None = None
    ) -> ActorRef:
        """Start an actor under a name that no living actor has.

        Given an instance, an unexpected exception in a handler fails that call and the actor goes on. Given a
        class or another way to make one, it is made anew then, as `supervision` says (three times in five seconds
        by default); its reference and its mailbox stay.

        Raises:
            ActorDied: the system is closing, or the actor was stopped before it had started.
        """
        return await self._spawn(None, actor, name, supervision)

    async def spawn_child(
        self, parent: Cell, actor: Actor | Callable[[], Actor], name: str, supervision: Supervision | None
    ) -> ActorRef:
        """Start an actor that `parent` supervises; `ActorContext.spawn` is for everyone else."""
        if parent.closed:
            raise ActorDied(f"{name} can't start: {parent.name} is stopping")
        return await self._spawn(parent, actor, f"{parent.name}/{name}", supervision)

    async def _spawn(
        self,
        parent: Cell | None,
        actor: Actor | Callable[[], Actor],
        name: str,
        supervision: Supervision | None,
    ) -> ActorRef:
        if self._closing:
            raise ActorDied(f"{name} can't start: its system is closing")
        assert name not in self.cells, f"there is an actor named {name} already"
        ref = ActorRef(self, name, self.address, None)
        if isinstance(actor, Actor):
            assert supervision is None, "an instance can't be made anew; give its class"
            cell = Cell(self, ref, None, actor, parent, None)
        else:
            cell = Cell(self, ref, actor, actor(), parent, supervision or Supervision())
        self.cells[name] = cell
        if parent is not None:
            parent.children[name] = cell
        try:
            await cell.start()
        except BaseException:
            if cell.end is None:
                self._forget(cell)
                await cell.stop()
            raise
        return ref

    def _forget(self, cell: Cell) -> None:
        self.cells.pop(cell.name, None)
        if cell.parent is not None:
            cell.parent.children.pop(cell.name, None)

    def ref(self, name: str, at: str | NodeAddress | None = None) -> ActorRef:
        """Make a reference from a name; `at` is the node's address, `ID@ENDPOINT`, this one by default.

        Raises:
            ConfigInvalid: `at` is no address.
        """
        if at is None:
            return ActorRef(self, name, self.address, None)
        address = NodeAddress.parse(at) if isinstance(at, str) else at
        if address.node == self.address.node and address.uid in (0, self.address.uid):
            return ActorRef(self, name, self.address, None)
        return ActorRef(self, name, address, self._remotes.peer(address))

    def names(self) -> list[str]:
        """List the living actors, oldest first."""
        return list(self.cells)

    # Messages.

    def cell(self, name: str) -> Cell:
        """Find an actor of this system.

        Raises:
            NoSuchActor: there is none of that name.
        """
        cell = self.cells.get(name)
        if cell is None:
            raise NoSuchActor(f"there is no actor {name}")
        return cell

    def dead_letter(self, name: str, what: str, error: SllmError) -> None:
        """Count and log a message that found no reader."""
        self.dead_letters += 1
        log.info("dead letter %s to %s: %s", what, name, error)

    # Watching.

    def watch(self, ref: ActorRef, hear: Callable[[str], None]) -> Callable[[], None]:
        """Call `hear` with the reason, once, when the actor of `ref` has ended; gives how to stop watching.

        It may be called before this returns: one that is not there has ended.
        """
        peer = ref.peer
        if peer is not None:
            return peer.watch(ref, hear)
        cell = self.cells.get(ref.name)
        if cell is None:
            hear("no_such_actor")
            return _nothing
        self._watches += 1
        cell.watchers[self._watches] = hear
        number = self._watches

        def stop() -> None:
            cell.watchers.pop(number, None)

        return stop

    def watch_for(self, watcher: Cell, ref: ActorRef) -> Callable[[], None]:
        """Send `Ended` to an actor; `ActorContext.watch` is for everyone else."""
        self._watches += 1
        number, heard = self._watches, False

        def hear(reason: str) -> None:
            nonlocal heard
            heard = True
            watcher.watching.pop(number, None)
            watcher.hear_of(Ended(ref, reason))

        stop = self.watch(ref, hear)
        if not heard:
            watcher.watching[number] = stop

        def stop_watching() -> None:
            watcher.watching.pop(number, None)
            stop()

        return stop_watching

    # Ends.

    def escalated(self, ref: ActorRef, failure: BaseException) -> None:
        """An actor without a parent could not be kept alive."""
        if self._on_escalation is not None:
            self._on_escalation(ref, failure)
        else:
            log.critical("%r could not be kept alive: %r", ref, failure)

    async def stop(self, name: str, *, drain_s: float = 0.0) -> None:
        """Stop one actor and its children; does nothing if there is none of that name.

        It takes no more messages. Those that had come are handled for up to `drain_s` seconds, then what runs is
        cancelled. Whoever asks again waits for the same end. An actor that stops itself is cancelled there.
        """
        cell = self.cells.get(name)
        if cell is not None:
            await asyncio.shield(self.end(cell, "stopped", drain_s))

    def end(self, cell: Cell, reason: str, drain_s: float = 0.0) -> asyncio.Task[None]:
        """Begin to stop an actor; its watchers will hear the reason."""
        if cell.end is None:
            cell.closed = True
            work = self._end(cell, reason, drain_s)
            cell.end = self.tasks.spawn(work, f"{cell.name}/stop", context=self.fresh_context())
        return cell.end

    async def _end(self, cell: Cell, reason: str, drain_s: float) -> None:
        if drain_s > 0:
            try:
                async with asyncio.timeout(drain_s):
                    await cell.drain()
            except TimeoutError:
                log.warning("%s was not drained within %g s", cell.name, drain_s)
        try:
            await cell.stop()
        finally:
            self._forget(cell)
            cell.tell_watchers(reason)

    async def close(self, *, drain_s: float = 0.0) -> None:
        """Stop every actor, youngest first, and every connection; none can be spawned any more."""
        self._closing = True
        self._remotes.close_listeners()
        while self.cells:
            await self.stop(next(reversed(self.cells)), drain_s=drain_s)
        await self._remotes.close()
        self.deadlines.close()
        await self.tasks.close()

    # Other nodes.

    async def listen(self, endpoint: str, *, advertise: str | None = None) -> str:
        """Let other nodes connect at an endpoint (`tcp://HOST:PORT`, `unix:///PATH`); gives this node's address.

        `advertise` is the endpoint that others are told to dial, by default the same: `tcp://0.0.0.0:8401` needs one.

        Raises:
            ConfigInvalid: it can be reached from other machines, and neither a secret nor TLS secures it.
            AddressInUse: someone listens there.
        """
        if self.address.endpoint:
            raise ConfigInvalid(f"this node listens at {self.address.endpoint} already", param="endpoint")
        self.address = self.address._replace(endpoint=await self._remotes.listen(endpoint, advertise))
        return str(self.address)

    # What can be seen.

    def stats(self) -> SystemStats:
        """Give the counts of every actor and connection as they are now."""
        actors = tuple(
            ActorStats(
                name=cell.name,
                mailbox_depth=cell.depth,
                handled=cell.handled,
                busy_s=cell.busy_s,
                restarts=cell.restarts,
            )
            for cell in self.cells.values()
        )
        return SystemStats(
            node=self.address.node,
            dead_letters=self.dead_letters,
            actors=actors,
            links=self._remotes.stats(),
        )


def _nothing() -> None:
    """Stop watching what has ended."""
