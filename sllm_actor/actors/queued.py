"""Requests that wait for a slot of their instance, and leave for another instance of the model that has one free."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Collection
from typing import TypeVar

from sllm_actor.domain import ModelName
from sllm_actor.messages.instances import InstanceStarted

T = TypeVar("T")


class _Turn:
    """One who waits, the instances where it does or did, and the one that it is called to."""

    def __init__(self, tried: Collection[str], rank: tuple[int, int]) -> None:
        self.tried = tried
        self.rank = rank
        self.called_to: InstanceStarted | None = None
        self.limit = asyncio.timeout(None)

    def call(self, instance: InstanceStarted) -> None:
        self.called_to = instance
        self.limit.reschedule(0.0)


class CalledElsewhere(Exception):
    """Another instance has a slot free."""

    def __init__(self, instance: InstanceStarted) -> None:
        super().__init__(instance.instance_id)
        self.instance = instance


class Queued:
    """Owns who waits in which queue. `idle` lists the instances of a model that nobody of this gateway asks."""

    def __init__(self, idle: Callable[[ModelName], list[InstanceStarted]]) -> None:
        self._idle = idle
        self._waiting: dict[ModelName, list[_Turn]] = {}
        self._numbers = itertools.count()

    async def next_of(self, items: AsyncIterator[T], model: ModelName, tried: Collection[str], priority: int) -> T:
        """Wait for the next item of a request that has no slot yet; `tried` are its instance and earlier ones.

        It is called to none of those again: others' gateways may keep them busy, and it would go round among them.

        Raises:
            CalledElsewhere: it is to ask another instance, and has been given up here.
            StopAsyncIteration: there is none.
        """
        turn = _Turn(tried, (priority, next(self._numbers)))
        self._waiting.setdefault(model, []).append(turn)
        try:
            async with turn.limit:
                self.look(model)
                return await anext(items)
        except TimeoutError:
            if turn.called_to is None or not turn.limit.expired():
                raise
            raise CalledElsewhere(turn.called_to) from None
        finally:
            others = self._waiting[model]
            others.remove(turn)
            if not others:
                del self._waiting[model]

    def look(self, model: ModelName) -> None:
        """Call those who wait to where nobody does, the most urgent first and of equals the oldest."""
        waiting = self._waiting.get(model, ())
        called = {turn.called_to.instance_id for turn in waiting if turn.called_to is not None}
        free = [one for one in self._idle(model) if one.instance_id not in called] if waiting else []
        for turn in sorted((one for one in waiting if one.called_to is None), key=lambda one: one.rank):
            if not free:
                return
            instance = next((one for one in free if one.instance_id not in turn.tried), None)
            if instance is not None:
                free.remove(instance)
                turn.call(instance)
