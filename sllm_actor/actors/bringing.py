"""Brings a model's bytes nearer, without a device: to the SSD for whoever pulls it, to host memory before a start."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from sllm_actor.actors.instance_starter import InstanceStarter
from sllm_actor.actors.registry import Registry
from sllm_actor.actors.start_counts import StartCounts
from sllm_actor.domain import ModelName, Span
from sllm_actor.loader.cards import Card
from sllm_actor.loader.loads import OnProgress
from sllm_actor.loader.tiers import Tiers
from sllm_actor.messages.instances import StartProgress
from sllm_actor.messages.models import PullProgress
from sllm_actor.runtime.progress import Step, followed


async def pulled(registry: Registry, tiers: Tiers, name: ModelName) -> AsyncGenerator[PullProgress, None]:
    """Bring a model to the SSD; each item tells how far that is. Closing this ends it.

    Raises:
        SllmError: whatever went wrong, by its type.
    """
    wanted = await registry.wanted(registry.find(name))
    if not isinstance(wanted, Card):
        yield PullProgress(done_bytes=wanted.size_bytes, total_bytes=wanted.size_bytes)
        return
    async with aclosing(tiers.pulled(wanted)) as progress:
        async for done_bytes, total_bytes in progress:
            yield PullProgress(done_bytes=done_bytes, total_bytes=total_bytes)


async def fetched(
    registry: Registry, starter: InstanceStarter, name: ModelName, counts: StartCounts
) -> AsyncGenerator[StartProgress, None]:
    """Bring a model to host memory; each item tells how far that is. Closing this ends it, and holds nothing.

    Raises:
        SllmError: whatever went wrong, by its type.
    """

    async def fetch(on_progress: OnProgress) -> tuple[Span, ...]:
        return await starter.fetch(await registry.wanted(registry.find(name)), on_progress)

    async with aclosing(followed(fetch)) as steps:
        async for step in steps:
            if isinstance(step, Step):
                yield StartProgress(done_bytes=step.done, total_bytes=step.total)
            else:
                counts.started(step)
