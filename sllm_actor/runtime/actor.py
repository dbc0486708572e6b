"""What an actor is: state that one message at a time may touch.

Source of the ideas: Erlang/OTP's gen_server, Pekko's typed actors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

if TYPE_CHECKING:
    from sllm_actor.runtime.system import ActorRef, ActorSystem
    from sllm_actor.runtime.tasks import TaskScope

F = TypeVar("F", bound=Callable[..., Any])


class Handler(NamedTuple):
    """How one message type is handled. A stream handler is an async generator and always concurrent."""

    function: Callable[..., Any]
    concurrent: bool
    stream: bool


def handles(message_type: type, *, concurrent: bool = False) -> Callable[[F], F]:
    """Mark the method that handles `message_type`.

    A coroutine answers an ask with what it returns, or with the typed error that it raises. An async
    generator answers a stream. A `concurrent` handler does not hold up the messages behind it.
    """

    def mark(function: F) -> F:
        stream = inspect.isasyncgenfunction(function)
        function.__handles__ = (message_type, Handler(function, concurrent or stream, stream))  # type: ignore[attr-defined]
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
        cls.handlers = cls.handlers | own

    async def started(self) -> None:
        """Run before the first message; an error here fails the spawn."""

    async def stopped(self) -> None:
        """Run after the last message, when no handler runs any more."""


class ActorContext(NamedTuple):
    """What the runtime lends an actor: its system, its own reference, and a scope for background work."""

    system: ActorSystem
    self_ref: ActorRef
    tasks: TaskScope
