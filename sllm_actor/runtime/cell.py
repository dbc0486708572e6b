"""One living actor: its mailbox, the task that empties it, and what happens when it fails or stops."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from math import inf
from typing import TYPE_CHECKING

from sllm_actor.errors import ActorDied, HandlerFailed, MailboxFull, SllmError
from sllm_actor.runtime.actor import FUNCTION, PLAIN, Actor, ActorContext, Handler
from sllm_actor.runtime.aside import Aside, answer_at_once
from sllm_actor.runtime.calls import CURRENT, NO_ENVELOPE, Envelope, Reply, fail, refusal, too_late, wake
from sllm_actor.runtime.supervision import Ended, RestartWindow, Supervision
from sllm_actor.runtime.tasks import TaskScope

if TYPE_CHECKING:
    from sllm_actor.runtime.references import ActorRef
    from sllm_actor.runtime.system import ActorSystem

log = logging.getLogger(__name__)

# Messages that one actor handles before the others on the loop have a turn.
TURN_MESSAGES = 64
set_current = CURRENT.set


class Cell:
    """An actor's place in its system. It outlives the actor object, which a restart makes anew."""

    # fmt: off
    __slots__ = (
        "_alive", "_aside", "_cleaning", "_control", "_current", "_draining", "_failure", "_gone", "_runner",
        "_scope", "_started", "_stopping", "_window", "actor", "bound", "busy_s", "children", "closed", "end",
        "handled", "handlers", "make", "name", "parent", "queue", "ref", "restarts", "system", "waiter",
        "watchers", "watching",
    )
    # fmt: on

    def __init__(
        self,
        system: ActorSystem,
        ref: ActorRef,
        make: Callable[[], Actor] | None,
        actor: Actor,
        parent: Cell | None,
        supervision: Supervision | None,
    ) -> None:
        self.system = system
        self.ref = ref
        self.name = ref.name
        self.make = make
        self.actor = actor
        self.handlers = actor.handlers
        self.parent = parent
        self.children: dict[str, Cell] = {}
        # Who watches this actor, and how this actor stops watching others.
        self.watchers: dict[int, Callable[[str], None]] = {}
        self.watching: dict[int, Callable[[], None]] = {}
        self.closed = False
        self.end: asyncio.Task[None] | None = None
        self.handled = 0
        self.restarts = 0
        self.busy_s = 0.0
        self.bound = system.limits.mailbox_messages
        self._window = RestartWindow(supervision) if supervision is not None else None
        self.queue: deque[Envelope] = deque()
        self._control: deque[Envelope] = deque()
        self.waiter: asyncio.Future[None] | None = None
        self._runner: asyncio.Task[None] | None = None
        self._current: Envelope | None = None
        # Who waits in the mailbox for nobody any more.
        self._gone: set[Reply | None] = set()
        self._aside: Aside | None = None
        self._scope: TaskScope | None = None
        self._started = False
        # Whether the present actor object has started, and is to be asked to clean up.
        self._alive = False
        self._cleaning: asyncio.Task[None] | None = None
        self._draining = False
        self._stopping = False
        self._failure: BaseException | None = None

    # The mailbox.

    @property
    def depth(self) -> int:
        """Messages that wait."""
        return len(self.queue) + len(self._control)

    @property
    def scope(self) -> TaskScope:
        """The actor's own background tasks."""
        if self._scope is None:
            self._scope = TaskScope(self.name, self.system.callerless_context)
        return self._scope

    def put(
        self, message: object, reply: Reply | None, deadline_s: float, trace: bytes | None, wants_stream: bool
    ) -> None:
        """Queue a message, or fail at once with the reason. `reply` is where its answer goes, None for nowhere.

        Raises:
            ActorDied, NoSuchActor, MailboxFull: it was not queued, and will not run.
        """
        if self.closed:
            raise ActorDied(f"{self.name} has stopped")
        handler = self.handlers.get(type(message))
        if handler is None or handler.stream is not wants_stream:
            raise refusal(self.name, message, handler)
        queue, waiter = self.queue, self.waiter
        if not handler[PLAIN]:
            queue = self._queue_for(handler)
            apart = handler.concurrent or handler.at_once
            if apart and waiter is not None and not waiter.done() and self._current is None:
                # Nothing is before it, so it need not wait for the runner's turn.
                self.handled += 1
                self._run_apart((message, reply, handler, deadline_s, trace))
                return
        elif len(queue) >= self.bound:
            raise MailboxFull(f"the mailbox of {self.name} is full", retry_after_s=1.0)
        queue.append((message, reply, handler, deadline_s, trace))
        if waiter is None:
            self._stir()
        elif not waiter.done():
            waiter.set_result(None)

    def _queue_for(self, handler: Handler) -> deque[Envelope]:
        """Find the queue of a handler that is not an ordinary one."""
        control = self.system.limits.control_messages
        queue, bound = (self._control, control) if handler.priority else (self.queue, self.bound)
        # Concurrent handlers do not wait in the mailbox, so its bound is theirs too.
        if len(queue) >= bound or (handler.concurrent and self._aside is not None and len(self._aside) >= bound):
            raise MailboxFull(f"the mailbox of {self.name} is full", retry_after_s=1.0)
        return queue

    def hear_of(self, ended: Ended) -> None:
        """Queue a notice that was asked for by watching; as many come as there are watches."""
        handler = self.actor.handlers.get(Ended)
        if handler is None or self.closed:
            return
        self._control.append((ended, None, handler, inf, None))
        self._stir()

    def _stir(self) -> None:
        if self.waiter is not None:
            wake(self.waiter)
        elif self._runner is None and self._started:
            self._start_runner()

    def _start_runner(self) -> None:
        self._runner = self.system.tasks.spawn(self._run(), self.name, context=self.system.fresh_context())

    async def start(self) -> None:
        """Let the actor begin; its messages wait until it has."""
        self.actor.context = ActorContext(self.system, self.ref, self)
        await self.actor.started()
        if self.closed:
            await self._end_helpers()
            raise ActorDied(f"{self.name} was stopped while it started")
        self._started = self._alive = True
        if self.depth or self._failure is not None:
            self._start_runner()

    async def _run(self) -> None:
        while not self._stopping:
            if self._failure is not None:
                set_current(NO_ENVELOPE)
                if not await self._recover(self._failure):
                    self._fail_queued()
                    return
            elif self.queue or self._control:
                await self._turn()
                if self.queue or self._control:
                    await self._rest(asyncio.sleep(0))
            elif self._draining:
                return
            else:
                # Who is in here was answered just before it gave up.
                self._gone.clear()
                self.waiter = self.system.create_future()
                await self._rest(self.waiter)
                self.waiter = None

    async def _rest(self, until: Awaitable[None]) -> None:
        """Wait between messages. A cancel that comes here was meant for a handler that has ended."""
        try:
            await until
        except asyncio.CancelledError:
            if self._stopping:
                raise
            self._forgive()

    def _forgive(self) -> None:
        """Take a cancel for done."""
        while self._runner is not None and self._runner.cancelling():
            self._runner.uncancel()

    async def _turn(self) -> None:
        """Handle the messages that are there, up to a turn's share."""
        control, queue, actor, gone = self._control, self.queue, self.actor, self._gone
        handled = 0
        began_s = self.system.now_s()
        while handled < TURN_MESSAGES and self._failure is None and (control or queue):
            envelope = (control or queue).popleft()
            handled += 1
            message, reply, handler, deadline_s, _ = envelope
            if gone and reply in gone:
                gone.discard(reply)
                continue  # The caller gave up while it waited.
            if deadline_s <= began_s:
                fail(reply, too_late(self.name, type(message)))
                continue
            if not handler[PLAIN] and (handler.concurrent or handler.at_once):
                self._run_apart(envelope)
                continue
            set_current(envelope)
            self._current = envelope
            try:
                result = await handler[FUNCTION](actor, message)
                if reply is not None:
                    reply.set_result(result)
                if self._stopping:
                    break  # The handler was cancelled, and would not have it.
            except BaseException as error:
                self._handle_failure(error, message, reply)
        self._current = None
        self.handled += handled
        self.busy_s += self.system.now_s() - began_s

    def _handle_failure(self, error: BaseException, message: object, reply: Reply | None) -> None:
        """Sort out why a serial handler ended: by its caller, by a stop, by a typed error, or by a bug."""
        if isinstance(error, asyncio.InvalidStateError) and reply is not None and reply.done():
            return  # It answered an asker who has given up.
        if isinstance(error, asyncio.CancelledError):
            if self._stopping:
                fail(reply, ActorDied(f"{self.name} has stopped"))
                raise error
            self._forgive()
            fail(reply, ActorDied(f"{self.name} gave up on {type(message).__name__}"))
        elif isinstance(error, SllmError):
            self.failed_as_typed(error, message, reply)
        else:
            self.failed_by_bug(error, message, reply)
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise error

    def failed_as_typed(self, error: SllmError, message: object, reply: Reply | None) -> None:
        """A handler said in a typed error why it can't."""
        if reply is None:
            log.warning("%s could not handle %s: %s", self.name, type(message).__name__, error)
        fail(reply, error)

    def failed_by_bug(self, error: BaseException, message: object, reply: Reply | None) -> None:
        """A handler raised what it should not: the actor has failed."""
        what = type(message).__name__
        log.error("%s failed on %s", self.name, what, exc_info=error)
        fail(reply, HandlerFailed(f"{self.name} failed on {what}; the log of its node says more"))
        if self._window is not None and self._failure is None:
            self._failure = error
            self._stir()

    def _run_apart(self, envelope: Envelope) -> None:
        if envelope[2].at_once:
            self._current = envelope
            answer_at_once(self, envelope)
            self._current = None
            return
        if self._aside is None:
            self._aside = Aside(self)
        self._aside.run(envelope)

    def cancel_call(self, reply: Reply) -> None:
        """Cancel the handler whose answer would go there, if it still runs."""
        if self._current is not None and self._current[1] is reply:
            if self._runner is not None:
                self._runner.cancel()
        elif (self._aside is None or not self._aside.cancel(reply)) and (self.queue or self._control):
            self._gone.add(reply)

    def envelopes(self) -> list[Envelope]:
        """List the messages that wait here or are being handled."""
        aside = self._aside.envelopes() if self._aside is not None else []
        return [*self._control, *self.queue, *aside, *([self._current] if self._current is not None else [])]

    async def _recover(self, failure: BaseException) -> bool:
        """Make the actor anew, mailbox and reference kept; false when that was too often, and the parent has to."""
        while True:
            await self._end_work()
            self._failure = None
            # What the old object watched, the new one watches anew.
            for notice in [envelope for envelope in self._control if type(envelope[0]) is Ended]:
                self._control.remove(notice)
            assert self._window is not None and self.make is not None
            if not self._window.allows(self.system.now_s()):
                log.error("%s failed too often and is stopped", self.name)
                self.system.end(self, "failed")
                self._pass_up(failure)
                return False
            self.restarts += 1
            log.warning("%s is restarted after %r", self.name, failure)
            try:
                self.actor = self.make()
                self.handlers = self.actor.handlers
                self.actor.context = ActorContext(self.system, self.ref, self)
                await self.actor.started()
                self._alive = True
                return True
            except (Exception, asyncio.CancelledError) as error:
                if self._stopping:
                    raise
                self._forgive()
                log.error("%s failed while it restarted", self.name, exc_info=error)
                failure = error

    def _pass_up(self, failure: BaseException) -> None:
        if self.parent is None:
            self.system.escalated(self.ref, failure)
        else:
            self.parent.child_failed(failure)

    def child_failed(self, failure: BaseException) -> None:
        """A child could not be kept alive: this actor has failed, too, unless it can't be made anew."""
        if self._window is None:
            self._pass_up(failure)
        elif self._failure is None and not self.closed:
            self._failure = failure
            self._stir()

    async def drain(self) -> None:
        """Take no more messages; return once those that had come are handled."""
        self.closed = True
        self._draining = True
        self._stir()
        while self.depth or self._current is not None or self._aside:
            running = [self._runner] if self._runner is not None and not self._runner.done() else []
            running += self._aside.tasks() if self._aside is not None else []
            if not running:
                return
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)

    async def stop(self) -> None:
        """End what runs, tell every waiting caller, and let the actor clean up, if it has ever started."""
        self.closed = True
        self._stopping = True
        if self._runner is not None and self._runner is not asyncio.current_task():
            self._runner.cancel()
            await asyncio.wait([self._runner])
        self._fail_queued()
        await self._end_work()

    def _fail_queued(self) -> None:
        for queue in (self._control, self.queue):
            while queue:
                fail(queue.popleft()[1], ActorDied(f"{self.name} has stopped"))

    async def _end_work(self) -> None:
        """End what belongs to the present actor; let it clean up, once, whoever else wants it meanwhile."""
        if self._cleaning is None:
            work = self._clean_up()
            self._cleaning = self.system.tasks.spawn(work, f"{self.name}/end", context=self.system.fresh_context())
        try:
            await asyncio.shield(self._cleaning)
        finally:
            if self._cleaning is not None and self._cleaning.done():
                self._cleaning = None

    async def _clean_up(self) -> None:
        for stop in list(self.watching.values()):
            stop()
        self.watching.clear()
        if self._aside is not None:
            await self._aside.close()
            self._aside = None
        await self._end_helpers()
        if not self._alive:
            return
        self._alive = False
        try:
            await self.actor.stopped()
        except (Exception, asyncio.CancelledError):
            # Nobody cancels this: a cancellation here is that of something it waited for.
            log.exception("%s failed while it stopped", self.name)

    async def _end_helpers(self) -> None:
        if self._scope is not None:
            await self._scope.close()
            self._scope = None
        while self.children:
            await self.system.stop(next(reversed(self.children)))

    def tell_watchers(self, reason: str) -> None:
        """Say that this actor has ended for good."""
        watchers, self.watchers = self.watchers, {}
        for hear in watchers.values():
            hear(reason)
