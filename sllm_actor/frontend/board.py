"""What the page shows of a node and its cluster, looked up once for all who watch it.

A look has parts (models, nodes, requests and so on), each as the JSON that is sent, so that who has watched before is
sent those that have changed and nothing else. A part that can't be had keeps what it was, and `problems` says why.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from sllm_actor.domain.timeline import Timeline
from sllm_actor.errors import Overloaded, SllmError
from sllm_actor.frontend.gateway import Gateway, encode_json
from sllm_actor.messages.generation import ListRequests
from sllm_actor.messages.instances import InstanceStatus, ListInstances
from sllm_actor.messages.models import ListModels, ListTiers, ModelStatus, TierEntry, TiersView
from sllm_actor.messages.operations import ShowNodes

# Of each kind, so many are shown at most; of the requests the newest, and all that run.
MAX_SHOWN = 200
MAX_ENDED = 60
# A node that does not answer must not hold up what the others say.
LOOK_TIMEOUT_S = 2.0
RETRY_AFTER_S = 5.0
Parts = Mapping[str, bytes]


class Board:
    """Looks at the node no more often than each `watch_interval_s`, and only while somebody watches."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._looking = asyncio.Lock()
        self._looked_s = float("-inf")
        self._parts: dict[str, bytes] = {}
        self._watchers = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count somebody who watches in this block.

        Raises:
            Overloaded: as many watch as may.
        """
        most = self._gateway.limits.max_watchers
        if self._watchers >= most:
            raise Overloaded(f"{most} watch this node already, which is max_watchers", retry_after_s=RETRY_AFTER_S)
        self._watchers += 1
        try:
            yield
        finally:
            self._watchers -= 1

    async def look(self) -> Parts:
        """Give what there is to see, no older than one interval."""
        gateway = self._gateway
        async with self._looking:
            if gateway.clock.monotonic_s() - self._looked_s >= gateway.limits.watch_interval_s:
                self._parts = await self._look()
                self._looked_s = gateway.clock.monotonic_s()
            return self._parts

    async def _look(self) -> dict[str, bytes]:
        gateway = self._gateway
        timeout_s = min(LOOK_TIMEOUT_S, gateway.limits.ask_timeout_s)
        questions: dict[str, tuple[Awaitable[Any], Callable[[Any], Any]]] = {
            "models": (gateway.manager.ask(ListModels(), timeout_s=timeout_s), _models),
            "tiers": (gateway.manager.ask(ListTiers(), timeout_s=timeout_s), _tiers),
            "nodes": (gateway.nodes.ask(ShowNodes(), timeout_s=timeout_s), lambda nodes: nodes[:MAX_SHOWN]),
            "instances": (gateway.nodes.ask(ListInstances(), timeout_s=timeout_s), _instances),
            "requests": (gateway.router.ask(ListRequests(), timeout_s=timeout_s), _requests),
        }
        answers = await asyncio.gather(*(question for question, _ in questions.values()), return_exceptions=True)
        parts, problems = dict(self._parts), {}
        for (name, (_, shown)), answer in zip(questions.items(), answers, strict=True):
            if isinstance(answer, SllmError):
                problems[name] = answer.message
            elif isinstance(answer, BaseException):
                raise answer
            else:
                parts[name] = encode_json(shown(answer))
        return parts | {"node": encode_json(self._node()), "problems": encode_json(problems)}

    def _node(self) -> dict[str, Any]:
        gateway = self._gateway
        seen = gateway.see()
        return {
            "node": seen["system"].node,
            "version": version("sllm_actor"),
            "ready": gateway.ready and not gateway.draining,
            "waiting": seen["waiting"],
            "failed_starts": seen["starts"]["failed"],
            "migrations": seen["migrations"]["outcomes"],
            "lag_faults": seen["loop_lag"]["faults"],
        }


def _models(statuses: tuple[ModelStatus, ...]) -> list[dict[str, Any]]:
    return [
        {
            "name": status.model.name,
            "fingerprint": status.model.fingerprint,
            "architecture": status.model.architecture,
            "dtype": status.model.dtype,
            "size_bytes": status.model.size_bytes,
            "base": status.model.base,
            "chat": status.model.chat,
            "generates": status.model.generates,
            "state": status.state,
            "instances": status.instances,
            "loading_bytes": status.loading_bytes,
        }
        for status in statuses[:MAX_SHOWN]
    ]


def _tiers(view: TiersView) -> dict[str, Any]:
    return {
        "host": [_entry(entry) for entry in view.host[:MAX_SHOWN]],
        "host_free_bytes": view.host_free_bytes,
        "host_bytes": view.host_bytes,
        "ssd": [_entry(entry) for entry in view.ssd[:MAX_SHOWN]],
        "ssd_used_bytes": view.ssd_used_bytes,
        "ssd_quota_bytes": view.ssd_quota_bytes,
    }


def _entry(entry: TierEntry) -> dict[str, Any]:
    """Leave out what changes by being looked at, such as how long something has been idle."""
    return {
        "models": entry.models,
        "size_bytes": entry.size_bytes,
        "done_bytes": entry.done_bytes,
        "leases": entry.leases,
        "pinned": entry.pinned,
    }


def _instances(running: tuple[InstanceStatus, ...]) -> list[dict[str, Any]]:
    return [
        {"instance_id": one.instance_id, "model": one.model, "node": one.node, "active": one.active}
        for one in running[:MAX_SHOWN]
    ]


def _requests(timelines: tuple[Timeline, ...]) -> list[Timeline]:
    running = [one for one in timelines if not one.end_s]
    ended = [one for one in timelines if one.end_s]
    return running[:MAX_SHOWN] + ended[:MAX_ENDED]
