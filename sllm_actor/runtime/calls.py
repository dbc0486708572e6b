"""One question from both its ends: where its answer goes, until when it is wanted, and how it is called off.

An envelope is a plain tuple, and where an answer goes has the face of a future, because one of each is made for every
message: these are the parts of the runtime that are written for speed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from math import inf
from typing import TYPE_CHECKING, Any, Protocol

from sllm_actor.errors import DeadlineExceeded, NoSuchActor, SllmError
from sllm_actor.runtime.clock import Clock
from sllm_actor.runtime.letters import MAX_TRACE_BYTES

if TYPE_CHECKING:
    from sllm_actor.runtime.actor import Handler
    from sllm_actor.runtime.cell import Cell

# Two sweeps are at least this far apart, so that many deadlines close together cost one of them.
SWEEP_S = 0.002


class Reply(Protocol):
    """Where the answer to one message goes. An `asyncio.Future` is one."""

    def done(self) -> bool:
        """Tell whether nobody waits any more: it was answered, or given up."""

    def set_result(self, value: Any, /) -> None:
        """Give the asker what the handler returned, or the reader of a stream its end."""

    def set_exception(self, error: BaseException, /) -> None:
        """Give the asker an error."""


# Message, where its answer goes, its handler, until when (seconds of the system's clock), and its trace.
Envelope = tuple[Any, "Reply | None", Any, float, "bytes | None"]
NO_ENVELOPE: Envelope = (None, None, None, inf, None)
# The message that is handled here: what its handler asks others shares its deadline and its trace.
CURRENT: ContextVar[Envelope] = ContextVar("sllm_actor.envelope", default=NO_ENVELOPE)


def current_trace() -> bytes | None:
    """Give the trace of the message that is handled here."""
    trace: bytes | None = CURRENT.get()[4]
    return trace


@contextmanager
def tracing(trace: bytes | None) -> Iterator[None]:
    """Give what is asked and told in this block a trace: up to 64 bytes that travel with it and all that follows.

    They are the caller's own; a W3C trace context's 25 bytes (trace id, parent id, flags) are what they are meant for.
    """
    assert trace is None or len(trace) <= MAX_TRACE_BYTES, f"a trace of {len(trace)} bytes"
    _, _, _, deadline_s, _ = CURRENT.get()
    token = CURRENT.set((None, None, None, deadline_s, trace))
    try:
        yield
    finally:
        CURRENT.reset(token)


class Deadlines:
    """Fails calls when their time is over. One timer for all: none is made for a call, and nothing is noted of it.

    A sweeper looks through the calls that it knows, fails the late ones, and gives the earliest deadline of the others.
    """

    def __init__(self, clock: Clock) -> None:
        self.next_s = inf
        self._clock = clock
        self._sweepers: dict[Callable[[float], float], None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, sweep: Callable[[float], float]) -> None:
        """Call this sweeper from now on."""
        self._sweepers[sweep] = None

    def forget(self, sweep: Callable[[float], float]) -> None:
        """Call it no longer."""
        self._sweepers.pop(sweep, None)

    def note(self, deadline_s: float) -> None:
        """Tell of a deadline; only one before `next_s` matters."""
        if deadline_s < self.next_s:
            self._arm(deadline_s, self._clock.monotonic_s())

    def _arm(self, at_s: float, now_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.next_s = at_s
        self._timer = asyncio.get_running_loop().call_later(max(at_s - now_s, 0.0), self._sweep)

    def _sweep(self) -> None:
        self._timer = None
        self.next_s = inf
        now_s = self._clock.monotonic_s()
        next_s = min([sweep(now_s) for sweep in list(self._sweepers)], default=inf)
        if next_s < self.next_s:
            self._arm(max(next_s, now_s + SWEEP_S), now_s)

    def close(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()


def sweep_cell(cell: Cell, now_s: float) -> float:
    """Fail the calls of an actor whose time is over; give the earliest deadline of the others, in seconds."""
    next_s = inf
    for message, reply, _, deadline_s, _ in cell.envelopes():
        if deadline_s > now_s:
            next_s = min(next_s, deadline_s)
        elif reply is not None and not reply.done():
            reply.set_exception(too_late(cell.name, type(message)))
            cell.cancel_call(reply)
    return next_s


def too_late(target: str, what: type) -> DeadlineExceeded:
    """Say that an answer did not come in time."""
    return DeadlineExceeded(f"{target} did not answer {what.__name__} within its time")


def refusal(name: str, message: object, handler: Handler | None) -> NoSuchActor:
    """Say that an actor does not take a message, or not that way."""
    what = type(message).__name__
    if handler is None:
        return NoSuchActor(f"{name} does not handle {what}")
    return NoSuchActor(f"{name} answers {what} by {'a stream' if handler.stream else 'one answer, no stream'}")


class Backlog:
    """What has come of a stream and is not yet taken, for its reader to look at: true while there is anything."""

    __slots__ = ("_items",)

    def __init__(self) -> None:
        self._items: deque[Any] = deque()

    def __bool__(self) -> bool:
        return bool(self._items)

    def is_of(self, inflow: Inflow) -> None:
        """Show the items of this stream."""
        self._items = inflow.items


class Inflow:
    """The reading end of a stream: items that have come and are not yet taken, in number bounded by credit."""

    __slots__ = ("arrival", "error", "finished", "items")

    def __init__(self) -> None:
        self.items: deque[Any] = deque()
        self.finished = False
        self.error: BaseException | None = None
        self.arrival: asyncio.Future[None] | None = None

    def push(self, item: Any) -> None:
        """Take an item that has come."""
        self.items.append(item)
        if self.arrival is not None:
            wake(self.arrival)

    def finish(self, error: BaseException | None) -> None:
        """Take note of the end; what has come before is still given."""
        if not self.finished:
            self.finished = True
            self.error = error
            if self.arrival is not None:
                wake(self.arrival)

    async def arrived(self, create_future: Callable[[], asyncio.Future[None]]) -> bool:
        """Wait for an item; false at the end. Raises what the handler raised."""
        while not self.items:
            if self.finished:
                if self.error is not None:
                    raise self.error
                return False
            self.arrival = create_future()
            await self.arrival
            self.arrival = None
        return True


class LocalStream:
    """A stream whose reader is in this process: `inflow` holds at most `credit` items."""

    __slots__ = ("_cell", "_credit", "_dropped", "_room", "inflow")

    def __init__(self, credit: int, cell: Cell) -> None:
        self.inflow = Inflow()
        self._credit = credit
        self._cell = cell
        self._dropped = False
        self._room: asyncio.Future[None] | None = None

    def done(self) -> bool:
        return self._dropped or self.inflow.finished

    def set_result(self, value: Any, /) -> None:
        self.inflow.finish(None)

    def set_exception(self, error: BaseException, /) -> None:
        self.inflow.finish(error)

    async def put(self, item: Any) -> None:
        """Give the reader an item, once there is room for it."""
        while len(self.inflow.items) >= self._credit:
            self._room = self._cell.system.create_future()
            await self._room
        self.inflow.push(item)

    def take(self) -> Any:
        """Give the next item, and the handler room for another."""
        item = self.inflow.items.popleft()
        if self._room is not None:
            wake(self._room)
            self._room = None
        return item

    def drop(self) -> None:
        """The reader has gone."""
        if not self.done():
            self._dropped = True
            self._cell.cancel_call(self)


def wake(waiter: asyncio.Future[None]) -> None:
    """Let go on whoever waits for this; it may have left."""
    if not waiter.done():
        waiter.set_result(None)


def fail(reply: Reply | None, error: SllmError) -> None:
    """Give whoever still waits an error."""
    if reply is not None and not reply.done():
        reply.set_exception(error)
