"""Spawns actors, delivers messages to them and stops them in order. One event loop, one system."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

from sllm_actor.errors import ActorDied, DeadlineExceeded, MailboxFull, NoSuchActor, SllmError
from sllm_actor.runtime.actor import Actor, ActorContext, Handler
from sllm_actor.runtime.tasks import TaskScope

log = logging.getLogger(__name__)


class _Reply:
    """Where the answer to one ask goes, or the items of one stream: at most `credit` of them wait here.

    `answer` is done when the handler has ended, and cancelled when the caller has gone.
    """

    def __init__(self, credit: int) -> None:
        self._loop = asyncio.get_running_loop()
        self.answer: asyncio.Future[Any] = self._loop.create_future()
        self._credit = credit
        self._items: deque[Any] = deque()
        self._arrival: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None

    @property
    def is_stream(self) -> bool:
        return self._credit > 0

    def succeed(self, result: Any) -> None:
        if not self.answer.done():
            self.answer.set_result(result)
        _wake(self._arrival)

    def fail(self, error: BaseException) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)
            self.answer.exception()  # Whoever asked may be gone; that is no fault to report.
        _wake(self._arrival)

    async def put(self, item: Any) -> None:
        """Give the reader an item, waiting while it is `credit` items behind."""
        while len(self._items) >= self._credit:
            self._room = self._loop.create_future()
            await self._room
        self._items.append(item)
        _wake(self._arrival)

    async def arrived(self) -> bool:
        """Wait for an item; false once the handler has ended and every item is taken. Raises what it raised."""
        while not self._items:
            if self.answer.done():
                self.answer.result()
                return False
            self._arrival = self._loop.create_future()
            await self._arrival
        return True

    def take(self) -> Any:
        """Give the next item, and the handler room for another."""
        item = self._items.popleft()
        _wake(self._room)
        return item


def _cancel_with(task: asyncio.Task[Any], answer: asyncio.Future[Any]) -> None:
    if answer.cancelled():
        task.cancel()


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)


class _Cell:
    """One living actor: its mailbox and the task that empties it."""

    def __init__(self, actor: Actor, name: str, mailbox_messages: int) -> None:
        assert mailbox_messages > 0, "a mailbox is bounded"
        self.actor = actor
        self.name = name
        self.scope = TaskScope(name)
        self.stopping = False
        self.runner: asyncio.Task[None] | None = None
        self.end: asyncio.Task[None] | None = None
        self._mailbox_messages = mailbox_messages
        self._mailbox: asyncio.Queue[tuple[object, _Reply | None]] = asyncio.Queue(mailbox_messages)
        self._handlers = TaskScope(f"{name}/handlers")

    def put(self, message: object, reply: _Reply | None) -> None:
        """Queue a message, or fail at once with the reason."""
        if self.stopping:
            raise ActorDied(f"{self.name} has stopped")
        handler = self.actor.handlers.get(type(message))
        if handler is None:
            raise NoSuchActor(f"{self.name} does not handle {type(message).__name__}")
        asked_for_stream = reply is not None and reply.is_stream
        assert reply is None or asked_for_stream == handler.stream, f"{type(message).__name__}: ask and stream differ"
        assert reply is not None or not handler.stream, f"{type(message).__name__} is answered by a stream"
        # Concurrent handlers do not wait in the mailbox, so its bound is theirs too.
        running_full = handler.concurrent and len(self._handlers) >= self._mailbox_messages
        if running_full or self._mailbox.full():
            raise MailboxFull(f"the mailbox of {self.name} is full", retry_after_s=1.0)
        self._mailbox.put_nowait((message, reply))

    async def run(self) -> None:
        """Handle messages until the cell is stopped."""
        while True:
            message, reply = await self._mailbox.get()
            if reply is not None and reply.answer.done():
                continue  # The caller gave up while it waited.
            handler = self.actor.handlers[type(message)]
            task = self._handlers.spawn(self._handle(handler, message, reply), type(message).__name__)
            if reply is not None:
                reply.answer.add_done_callback(partial(_cancel_with, task))
                task.add_done_callback(partial(self._left, reply, type(message).__name__))
            if not handler.concurrent:
                await asyncio.wait([task])

    def _left(self, reply: _Reply, message_name: str, task: asyncio.Task[None]) -> None:
        """Answer for a handler that was cancelled, perhaps before its first line: no caller waits for ever."""
        why = "has stopped" if self.stopping else f"gave up on {message_name}"
        reply.fail(ActorDied(f"{self.name} {why}"))

    async def _handle(self, handler: Handler, message: object, reply: _Reply | None) -> None:
        try:
            result = await self._call(handler, message, reply)
            if reply is not None:
                reply.succeed(result)
        except SllmError as error:
            if reply is None:
                log.warning("%s could not handle %s: %s", self.name, type(message).__name__, error)
            else:
                reply.fail(error)
        except Exception:
            log.exception("%s failed on %s", self.name, type(message).__name__)
            if reply is not None:
                reply.fail(SllmError(f"{self.name} failed on {type(message).__name__}; the node's log says more"))

    async def _call(self, handler: Handler, message: object, reply: _Reply | None) -> Any:
        if not handler.stream:
            return await handler.function(self.actor, message)
        assert reply is not None, "put has checked it"
        async with aclosing(handler.function(self.actor, message)) as items:
            async for item in items:
                await reply.put(item)
        return None

    async def abandon(self) -> None:
        """Take no more messages, end what runs, tell every waiting caller."""
        self.stopping = True
        if self.runner is not None:
            self.runner.cancel()
        await self._handlers.close()
        await self.scope.close()
        while not self._mailbox.empty():
            _, reply = self._mailbox.get_nowait()
            if reply is not None:
                reply.fail(ActorDied(f"{self.name} has stopped"))

    async def stop(self) -> None:
        """Abandon it and let the actor clean up; a failure there must not keep others from stopping."""
        await self.abandon()
        try:
            await self.actor.stopped()
        except Exception:
            log.exception("%s failed while it stopped", self.name)


class ActorRef:
    """Where messages to one actor go. Survives the actor; sending to one that has gone fails with a typed error."""

    def __init__(self, system: ActorSystem, name: str) -> None:
        self._system = system
        self.name = name

    def __repr__(self) -> str:
        return f"ActorRef({self.name!r})"

    def tell(self, message: object) -> None:
        """Send and forget. A message that can't be delivered is a dead letter: counted and logged."""
        try:
            self._system._deliver(self.name, message, None)
        except SllmError as error:
            self._system._dead_letter(self.name, message, error)

    async def ask(self, message: object, *, timeout_s: float) -> Any:
        """Send and wait for the answer. Cancelling this cancels the handler.

        Raises:
            DeadlineExceeded: no answer within `timeout_s`.
            NoSuchActor, ActorDied, MailboxFull: not delivered, or its actor ended.
            SllmError: whatever typed error the handler raised.
        """
        reply = _Reply(credit=0)
        self._system._deliver(self.name, message, reply)
        try:
            async with asyncio.timeout(timeout_s):
                return await reply.answer
        except TimeoutError:
            raise DeadlineExceeded(
                f"{self.name} did not answer {type(message).__name__} within {timeout_s:g} s"
            ) from None

    async def stream(self, message: object) -> AsyncGenerator[Any, None]:
        """Send and iterate over the items of the answer; at most the system's credit of them run ahead.

        Close it (`contextlib.aclosing`) to cancel the handler. Raises like `ask`, but has no deadline.
        """
        reply = _Reply(self._system.stream_credit)
        self._system._deliver(self.name, message, reply)
        try:
            while await reply.arrived():
                yield reply.take()
        finally:
            reply.answer.cancel()


class ActorSystem:
    """Owns the actors of one node. Belongs to one event loop."""

    def __init__(self, *, mailbox_messages: int = 1024, stream_credit: int = 64) -> None:
        self.stream_credit = stream_credit
        self.dead_letters = 0
        self._mailbox_messages = mailbox_messages
        self._cells: dict[str, _Cell] = {}
        self._closing = False
        self._scope = TaskScope("system")

    async def spawn(self, actor: Actor, name: str) -> ActorRef:
        """Start an actor under a name that no living actor has.

        Raises:
            ActorDied: the system is closing, or the actor was stopped before it had started.
        """
        if self._closing:
            raise ActorDied(f"{name} can't start: its system is closing")
        assert name not in self._cells, f"there is an actor named {name} already"
        ref = ActorRef(self, name)
        cell = _Cell(actor, name, self._mailbox_messages)
        actor.context = ActorContext(self, ref, cell.scope)
        self._cells[name] = cell
        try:
            await actor.started()
        except BaseException:
            self._cells.pop(name, None)
            await cell.abandon()
            raise
        if cell.stopping:
            raise ActorDied(f"{name} was stopped while it started")
        cell.runner = self._scope.spawn(cell.run(), name)
        return ref

    def ref(self, name: str) -> ActorRef:
        """Make a reference from a name that travelled in a message."""
        return ActorRef(self, name)

    def names(self) -> list[str]:
        """List the living actors, oldest first."""
        return list(self._cells)

    def _deliver(self, name: str, message: object, reply: _Reply | None) -> None:
        cell = self._cells.get(name)
        if cell is None:
            raise NoSuchActor(f"there is no actor {name}")
        cell.put(message, reply)

    def _dead_letter(self, name: str, message: object, error: SllmError) -> None:
        self.dead_letters += 1
        log.info("dead letter %s to %s: %s", type(message).__name__, name, error)

    async def stop(self, name: str) -> None:
        """Stop one actor; does nothing if there is none of that name. Whoever asks again waits for the same end.

        An actor that stops itself is cancelled there.
        """
        cell = self._cells.get(name)
        if cell is None:
            return
        if cell.end is None:
            cell.end = self._scope.spawn(self._end(cell), f"{name}/stop")
        await asyncio.shield(cell.end)

    async def _end(self, cell: _Cell) -> None:
        await cell.stop()
        self._cells.pop(cell.name, None)

    async def close(self) -> None:
        """Stop every actor, youngest first; none can be spawned any more."""
        self._closing = True
        while self._cells:
            await self.stop(next(reversed(self._cells)))
        await self._scope.close()
