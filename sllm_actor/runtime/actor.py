"""What an actor is: state that one message at a time may touch.

Source of the ideas: Erlang/OTP's gen_server, Pekko's typed actors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

if TYPE_CHECKING:
    from sllm_actor.runtime.cell import Cell
    from sllm_actor.runtime.references import ActorRef
    from sllm_actor.runtime.supervision import Supervision
    from sllm_actor.runtime.system import ActorSystem
    from sllm_actor.runtime.tasks import TaskScope

F = TypeVar("F", bound=Callable[..., Any])


class Handler(NamedTuple):
    """How one message type is handled. A stream handler is an async generator, or gives one, and always concurrent.

    One that answers `at_once` is a plain function: it can't wait.
    """

    function: Callable[..., Any]
    concurrent: bool
    stream: bool
    priority: bool
    # A coroutine, neither concurrent nor with priority, as most are.
    plain: bool
    at_once: bool


# To name a field of a named tuple takes longer than to count to it, and this is done for every message.
FUNCTION, PLAIN = Handler._fields.index("function"), Handler._fields.index("plain")


def handles(
    message_type: type, *, concurrent: bool = False, priority: bool = False, stream: bool = False
) -> Callable[[F], F]:
    """Mark the method that handles `message_type`.

    A coroutine answers an ask with what it returns, or with the typed error that it raises. An async generator answers
    a `stream`, and so does a function that returns one and says so. Any other plain function answers without any task
    being woken, where its actor does nothing else: for questions that are answered from memory. A `concurrent` handler
    does not hold up the messages behind it. A `priority` one is for control: its messages are served before ordinary
    ones, and have a bound of their own.
    """

    def mark(function: F) -> F:
        streams = stream or inspect.isasyncgenfunction(function)
        aside, is_coroutine = concurrent or streams, inspect.iscoroutinefunction(function)
        at_once = not (streams or is_coroutine)
        assert not (streams and is_coroutine), f"{function.__name__} is a coroutine, no stream"
        assert not (at_once and concurrent), f"{function.__name__} is a plain function: it holds up nobody"
        handler = Handler(function, aside, streams, priority, not (aside or priority or at_once), at_once)
        function.__handles__ = (message_type, handler)  # type: ignore[attr-defined]
        return function

    return mark


class Actor:
    """Base of every actor. `context` is there from `started` on."""

    handlers: ClassVar[dict[type, Handler]] = {}
    context: ActorContext

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own: dict[type, Handler] = {}
        for attribute in vars(cls).values():
            if hasattr(attribute, "__handles__"):
                message_type, handler = attribute.__handles__
                assert message_type not in own, f"{cls.__name__} handles {message_type.__name__} twice"
                own[message_type] = handler
        inherited: dict[type, Handler] = {}
        for base in reversed(cls.__mro__[1:]):
            inherited |= vars(base).get("handlers", {})
        for message_type, handler in inherited.items():
            # A method that is overridden under its name handles what it did, without being marked again.
            override = vars(cls).get(handler.function.__name__)
            if override is not None and not hasattr(override, "__handles__"):
                inherited[message_type] = handler._replace(function=override)
        cls.handlers = inherited | own

    async def started(self) -> None:
        """Run before the first message; an error here fails the spawn."""

    async def stopped(self) -> None:
        """Run after the last message, when no handler runs any more."""


class ActorContext:
    """What the runtime lends an actor: its system, its own reference, its tasks, its children, its watches."""

    __slots__ = ("_cell", "self_ref", "system")

    def __init__(self, system: ActorSystem, self_ref: ActorRef, cell: Cell) -> None:
        self.system = system
        self.self_ref = self_ref
        self._cell = cell

    @property
    def tasks(self) -> TaskScope:
        """A scope for background work; it ends with the actor. What runs there has no caller and no deadline."""
        return self._cell.scope

    async def spawn(
        self, actor: Actor | Callable[[], Actor], name: str, *, supervision: Supervision | None = None
    ) -> ActorRef:
        """Start a child, which this actor supervises: it stops before its parent does. Its name is `PARENT/NAME`."""
        return await self.system.spawn_child(self._cell, actor, name, supervision)

    def watch(self, ref: ActorRef) -> Callable[[], None]:
        """Have `Ended` sent to this actor, once, when the actor of `ref` or its node ends; gives how to stop."""
        return self.system.watch_for(self._cell, ref)
