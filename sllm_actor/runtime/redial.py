"""Dial a peer until it answers: one attempt at a time, further apart after each failure, with jitter."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from sllm_actor.errors import ConfigInvalid, HandshakeRefused, LinkDuplicate, NodeUnreachable, SllmError

if TYPE_CHECKING:
    from sllm_actor.runtime.link import Link
    from sllm_actor.runtime.peer import Peer
    from sllm_actor.runtime.remotes import Remotes

log = logging.getLogger(__name__)


class Dialling:
    """The attempts to reach one peer. `error` is why the last one failed, None while there is hope."""

    def __init__(self, peer: Peer, remotes: Remotes) -> None:
        self.error: SllmError | None = None
        self._peer = peer
        self._remotes = remotes
        self._limits = remotes.system.limits
        self._task: asyncio.Task[None] | None = None
        self._delay_s = remotes.system.limits.redial_first_s
        self._opened_s: float | None = None
        self._link: Link | None = None

    @property
    def under_way(self) -> bool:
        """Tell whether an attempt runs that has not failed yet."""
        return self._task is not None and self.error is None

    def begin(self, failed: SllmError | None = None) -> None:
        """Dial until there is a link; does nothing if that is being done, or there is nowhere to dial.

        Where it is known to have `failed` already, nobody waits for the first attempt.
        """
        if self._task is None and self._peer.link is None and self._peer.endpoint and not self._remotes.closing:
            system, self.error = self._remotes.system, failed
            self._task = system.tasks.spawn(self._run(), f"dial-{self._peer.node}", context=system.fresh_context())

    def succeeded(self) -> None:
        """There is a link, whoever dialled."""
        self._opened_s = self._remotes.system.now_s()
        self.stop()

    def stop(self) -> None:
        """Dial no more."""
        self.error = None
        task, self._task = self._task, None
        if task is not None and task is not asyncio.current_task():
            task.cancel()

    async def _run(self) -> None:
        opened_s, self._opened_s = self._opened_s, None
        if opened_s is not None and self._remotes.system.now_s() - opened_s > self._limits.redial_last_s:
            self._delay_s = self._limits.redial_first_s
        try:
            if opened_s is not None:
                # One that was lost soon after it had opened may be lost so again and again.
                await self._pause()
            while self._peer.link is None:
                error = await self._attempt()
                if error is None or self._peer.link is not None:
                    return
                if not isinstance(error, LinkDuplicate):
                    # One that crossed the peer's own dial has not failed: that one will open.
                    self.error = error
                    self._peer.unreachable(error)
                await self._pause()
        finally:
            if self._task is asyncio.current_task():
                self._task = None

    async def _pause(self) -> None:
        delay_s, self._delay_s = self._delay_s, min(self._delay_s * 2, self._limits.redial_last_s)
        await self._remotes.system.clock.sleep(delay_s * (0.5 + self._remotes.chance()))

    async def _attempt(self) -> SllmError | None:
        """Dial once; give why there is no link, None when there is."""
        peer, network = self._peer, self._remotes.network
        outcome: asyncio.Future[SllmError | None] = asyncio.get_running_loop().create_future()

        def settle(error: SllmError | None) -> None:
            if not outcome.done():
                outcome.set_result(error)

        link = self._remotes.dialling_link(peer, settle)
        try:
            async with asyncio.timeout(self._limits.handshake_timeout_s):
                await network.dial(peer.endpoint, lambda: link, self._remotes.security.client_tls)
            return await outcome
        except TimeoutError:
            return NodeUnreachable(f"{peer.node} did not answer at {peer.endpoint}")
        except ConfigInvalid as error:
            return error
        except HandshakeRefused as error:
            return error
        except OSError as error:
            if isinstance(error, ConnectionRefusedError):
                self._remotes.fell_silent(peer.node, peer.endpoint)
            return NodeUnreachable(f"{peer.node} can't be reached at {peer.endpoint}: {error.strerror or error}")
        finally:
            if not link.is_open:
                link.close(NodeUnreachable(f"the attempt to reach {peer.node} was given up"))
