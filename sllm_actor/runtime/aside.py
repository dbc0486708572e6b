"""The handlers of one actor that run beside its mailbox: concurrent ones and streams, a task each; plain functions."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

from sllm_actor.errors import ActorDied, SllmError
from sllm_actor.runtime.calls import CURRENT, Envelope, Reply, fail
from sllm_actor.runtime.tasks import TaskScope

if TYPE_CHECKING:
    from sllm_actor.runtime.cell import Cell


def answer_at_once(cell: Cell, envelope: Envelope) -> None:
    """Run a handler that is a plain function. The actor must be doing nothing else."""
    message, reply, handler, _, _ = envelope
    before = CURRENT.set(envelope)
    try:
        result = handler.function(cell.actor, message)
        if reply is not None and not reply.done():
            reply.set_result(result)
    except SllmError as error:
        cell.failed_as_typed(error, message, reply)
    except Exception as error:
        cell.failed_by_bug(error, message, reply)
    finally:
        CURRENT.reset(before)


class Aside:
    """Runs handlers as tasks, and finds the one to cancel."""

    def __init__(self, cell: Cell) -> None:
        self._cell = cell
        self._scope = TaskScope(f"{cell.name}/handlers")
        self._busy: dict[Reply, tuple[asyncio.Task[None], Envelope]] = {}

    def __len__(self) -> int:
        return len(self._scope)

    def tasks(self) -> list[asyncio.Task[Any]]:
        """List the handlers that run."""
        return self._scope.tasks()

    def run(self, envelope: Envelope) -> None:
        """Start the handler of a message."""
        what, reply = type(envelope[0]).__name__, envelope[1]
        on_end = partial(self._served, reply, what) if reply is not None else None
        context = self._cell.system.fresh_context()
        task = self._scope.spawn(self._serve(envelope), what, context=context, on_end=on_end)
        if reply is not None:
            self._busy[reply] = (task, envelope)

    async def _serve(self, envelope: Envelope) -> None:
        CURRENT.set(envelope)
        message, reply, handler, _, _ = envelope
        cell, actor = self._cell, self._cell.actor
        try:
            if handler.stream:
                items, put = handler.function(actor, message), reply.put  # type: ignore[union-attr]  # A stream's has it.
                try:
                    async for item in items:
                        await put(item)
                finally:
                    await items.aclose()
                result = None
            else:
                result = await handler.function(actor, message)
            if reply is not None and not reply.done():
                reply.set_result(result)
        except SllmError as error:
            cell.failed_as_typed(error, message, reply)
        except Exception as error:
            cell.failed_by_bug(error, message, reply)

    def _served(self, reply: Reply, what: str) -> None:
        """Answer for a handler that was cancelled, perhaps before its first line: no caller waits for ever."""
        self._busy.pop(reply, None)
        if not reply.done():
            cell = self._cell
            fail(reply, ActorDied(f"{cell.name} {'has stopped' if cell.closed else f'gave up on {what}'}"))

    def cancel(self, reply: Reply) -> bool:
        """Cancel the handler whose answer would go there; false where there is none."""
        busy = self._busy.get(reply)
        return busy is not None and busy[0].cancel()

    def envelopes(self) -> list[Envelope]:
        """List the messages that are handled here and whose answer someone waits for."""
        return [envelope for _, envelope in self._busy.values()]

    async def close(self) -> None:
        """Cancel every handler, and wait until each has ended."""
        await self._scope.close()
