"""One end of a simulated connection, with the manners of asyncio's own socket transport."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from contextvars import Context
from typing import TYPE_CHECKING, Any

from sllm_actor.testing.simulated_link import Host
from sllm_actor.testing.simulated_pipe import Data, Pipe

if TYPE_CHECKING:
    from sllm_actor.testing.trace import TraceRecorder

log = logging.getLogger(__name__)

# As asyncio's.
HIGH_WATER_BYTES = 64 * 1024
WARN_AFTER_LOST_WRITES = 5


class SimulatedTransport(asyncio.Transport):
    """Calls its protocol from the loop only, in the context in which the connection was made.

    The one exception is `pause_writing`, which `write` may call, as asyncio's does.
    """

    protocol: asyncio.BufferedProtocol

    def __init__(
        self,
        number: int,
        host: Host,
        context: Context,
        pipes: tuple[Pipe, Pipe],
        extra: dict[str, Any],
        trace: TraceRecorder,
    ) -> None:
        super().__init__(extra)
        self.number = number
        self.host = host
        self.context = context
        self.outbound, self.inbound = pipes
        self.outbound.source = self.inbound.sink = self
        # What can be read is given to the protocol: it was connected, wants it, runs, and has not said farewell.
        self.can_read = False
        # `connection_lost` was or will be called, or the process has died.
        self.over = False
        self._trace = trace
        self._started = False
        self._reading = True
        self._closing = False
        self._dead = False
        self._paused = False
        self._lost_writes = 0
        self._high_bytes = HIGH_WATER_BYTES
        self._low_bytes = HIGH_WATER_BYTES // 4

    def start(self, protocol: asyncio.BufferedProtocol) -> None:
        """Connect the protocol; it is given what came meanwhile."""
        if self._dead or self.over:
            return
        self.protocol = protocol
        self._started = True
        self.look()
        self._trace.record(self.host.name, "connected", self.number)
        protocol.connection_made(self)

    # What the protocol may call.

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self.protocol

    def write(self, data: Data) -> None:
        if not isinstance(data, bytes | bytearray | memoryview):
            raise TypeError(f"data argument must be a bytes-like object, not {type(data).__name__!r}")
        if self._refuses_write():
            return
        if data:
            self.outbound.send(data if isinstance(data, bytes) else memoryview(data).cast("B"))
            self._pause_if_full()

    def writelines(self, list_of_data: Iterable[Data]) -> None:
        self.write(b"".join(list_of_data))

    def can_write_eof(self) -> bool:
        return False

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self.look()
            if not self.outbound.unsent and not self.host.frozen:
                self._leave()

    def abort(self) -> None:
        self._closing = True
        self.outbound.unsent.clear()
        self.look()
        if not self.host.frozen:
            self._leave()

    def is_closing(self) -> bool:
        return self._closing

    def is_reading(self) -> bool:
        return self._reading and not self._closing

    def pause_reading(self) -> None:
        self._reading = False
        self.look()

    def resume_reading(self) -> None:
        self._reading = True
        self.look()

    def get_write_buffer_size(self) -> int:
        return len(self.outbound.unsent)

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._low_bytes, self._high_bytes

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        if high is None:
            high = HIGH_WATER_BYTES if low is None else 4 * low
        if low is None:
            low = high // 4
        if not high >= low >= 0:
            raise ValueError(f"high ({high!r}) must be >= low ({low!r}) must be >= 0")
        self._high_bytes, self._low_bytes = high, low
        self._pause_if_full()

    # What the pipes and the network call.

    def look(self) -> None:
        """Find out anew whether the protocol reads."""
        self.can_read = self._started and self._reading and not self._closing and not self.over and not self.host.frozen
        if self.can_read:
            self.inbound.poke()

    def hear_end(self) -> None:
        """Tell the protocol that the peer will send nothing more; unless it wants to stay, that is the end."""
        self._trace.record(self.host.name, "eof", self.number)
        if not self.protocol.eof_received():
            self.close()

    def drained(self) -> None:
        """The buffer has become shorter: go on writing, or end what was to be flushed first."""
        if self._paused and len(self.outbound.unsent) <= self._low_bytes:
            self._paused = False
            self.protocol.resume_writing()
        if self._closing and not self.outbound.unsent:
            self._leave()

    def lose(self, error: ConnectionResetError) -> None:
        """End with an error, if it has not ended; the peer hears nothing of it here."""
        if not self.over:
            self.outbound.break_off()
            self._end(error)

    def die(self) -> None:
        """End without a word: the process is gone."""
        self._dead = self.over = self._closing = True
        self.can_read = False
        self.outbound.unsent.clear()

    def _leave(self) -> None:
        """Close the socket, as the kernel does it: one that has unread bytes is reset."""
        if self.over:
            return
        if self.inbound.has_unread():
            self.outbound.break_off()
            self.outbound.send_reset()
        else:
            self.outbound.send_end()
        self._end(None)

    def _end(self, error: Exception | None) -> None:
        self.over = self._closing = True
        self.can_read = False
        self.host.call_soon(self.context, self._tell_lost, error)

    def _tell_lost(self, error: Exception | None) -> None:
        if self._dead:
            return
        self.host.ends.pop(self, None)
        self._trace.record(self.host.name, "lost", self.number, "cleanly" if error is None else type(error).__name__)
        if self._started:
            self.protocol.connection_lost(error)

    def _refuses_write(self) -> bool:
        if not self._closing:
            return False
        self._lost_writes += 1
        if self._lost_writes == WARN_AFTER_LOST_WRITES:
            log.warning("a protocol of %s goes on writing to a connection that it closed or lost", self.host.name)
        return True

    def _pause_if_full(self) -> None:
        if not self._paused and len(self.outbound.unsent) > self._high_bytes:
            self._paused = True
            self.protocol.pause_writing()
