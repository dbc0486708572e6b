"""Whoever a link belongs to, as the link sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from sllm_actor.errors import SllmError
from sllm_actor.runtime.handshake import Hello

if TYPE_CHECKING:
    from sllm_actor.runtime.link import Link


class LinkOwner(Protocol):
    """What a link tells of; on the loop, never to block."""

    def introduced(self, link: Link, hello: Hello) -> None:
        """A dialling peer has proved itself: call `admit` or `refuse`."""

    def opened(self, link: Link, hello: Hello) -> None:
        """Letters may be sent; set `hear`, which may raise `ProtocolViolation`, to get those that come."""

    def closed(self, link: Link, error: SllmError) -> None:
        """The link has ended; said once, also for one that never opened."""
