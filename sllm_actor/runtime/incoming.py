"""Calls that came from another node: their answers go back over the link that they came by, and nowhere else."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sllm_actor.errors import NodeUnreachable, ProtocolViolation, SllmError
from sllm_actor.runtime.letters import ANSWER, ITEM, Failure, Mark

if TYPE_CHECKING:
    from sllm_actor.runtime.cell import Cell
    from sllm_actor.runtime.link import Link
    from sllm_actor.runtime.peer import Peer


class InCall:
    """An ask from another node. Its answer is a letter, which goes out over the link that the ask came by."""

    __slots__ = ("_finished", "cell", "link", "number", "peer")

    def __init__(self, peer: Peer, link: Link, number: int, cell: Cell | None) -> None:
        self.peer = peer
        self.link = link
        self.number = number
        self.cell = cell
        self._finished = False

    def done(self) -> bool:
        return self._finished

    def set_result(self, value: Any, /) -> None:
        if self._finished:
            return
        self._finished = True
        number, link = self.number, self.link
        self.peer.incoming.pop(number, None)
        if link.is_open:
            if type(value) not in link.sendable:
                try:
                    link.check_value(value)
                except SllmError as error:
                    self._say(error)
                    return
            link.send((ANSWER, number, value))

    def set_exception(self, error: BaseException, /) -> None:
        if not self._finished:
            self._finished = True
            self.peer.incoming.pop(self.number, None)
            if self.link.is_open:
                assert isinstance(error, SllmError)
                self._say(error)

    def _say(self, error: SllmError) -> None:
        self.link.send_control(failure_of(self.number, error), self.number)

    def call_off(self) -> None:
        """The caller has gone: cancel the handler, or skip the message when its turn comes."""
        if not self._finished:
            self._finished = True
            if self.cell is not None:
                self.cell.cancel_call(self)


def failure_of(number: int, error: SllmError) -> Failure:
    """Describe an error to the asker of a call, within bounds and in characters that can be written."""
    param = None if error.param is None else _printable(str(error.param), 256)
    retry_after_s = None if error.retry_after_s is None else float(error.retry_after_s)
    return Failure(number, error.code, _printable(error.message, 4096), param, retry_after_s)


def _printable(text: str, length: int) -> str:
    return str(text)[:length].encode("utf-8", "backslashreplace").decode()


class InWatch(InCall):
    """An actor here that another node watches; the answer is the reason of its end."""

    __slots__ = ("stop_watching",)

    stop_watching: Callable[[], None]

    def call_off(self) -> None:
        self._finished = True
        self.stop_watching()


class InStream(InCall):
    """A stream that another node reads. Items go out while it has credit, and its link room."""

    __slots__ = (
        "_credit", "_groups", "_half_credit", "_half_window_bytes", "_marked_bytes", "_marked_items", "_out_bytes",
        "_out_items", "_room", "_window_bytes",
    )  # fmt: skip

    def __init__(self, peer: Peer, link: Link, number: int, cell: Cell | None, credit: int, window_bytes: int) -> None:
        super().__init__(peer, link, number, cell)
        self._credit = credit
        self._window_bytes = window_bytes
        self._half_credit = (credit + 1) // 2
        self._half_window_bytes = (window_bytes + 1) // 2
        self._out_items = 0
        self._out_bytes = 0
        # What has gone out since the last mark, and the groups that end with a mark not yet credited.
        self._marked_items = 0
        self._marked_bytes = 0
        self._groups: deque[tuple[int, int]] = deque()
        self._room: asyncio.Future[None] | None = None

    async def put(self, item: Any) -> None:
        """Send an item, once there is room for it.

        Raises:
            NodeUnreachable: the reader's node has gone.
            FrameInvalid, FrameTooLong: it does not travel.
        """
        link = self.link
        while self._out_items >= self._credit or self._out_bytes >= self._window_bytes or link.waiting_bytes:
            if not await self._wait():
                break
        if not link.is_open:
            raise NodeUnreachable(f"{self.peer.node}, which reads this stream, has gone")
        if type(item) not in link.sendable:
            link.check_value(item)
        size = link.send_item((ITEM, self.number, item))
        self._out_items += 1
        self._out_bytes += size
        self._marked_items += 1
        self._marked_bytes += size
        # Half a window at a time is credited, whichever of the two is used up first.
        if self._marked_items >= self._half_credit or self._marked_bytes >= self._half_window_bytes:
            self._groups.append((self._marked_items, self._marked_bytes))
            self._marked_items = self._marked_bytes = 0
            link.send_control(Mark(self.number), self.number)

    async def _wait(self) -> bool:
        """Wait for credit, or for the link to be written; false when there was room after all."""
        if self._out_items < self._credit and self._out_bytes < self._window_bytes:
            if self.link.waiting_bytes <= self.peer.max_waiting_bytes:
                return False
            await self.link.room()
            return True
        self.peer.credit_stalls += 1
        self._room = self.peer.system.create_future()
        await self._room
        return True

    def credited(self, items: int) -> None:
        """The reader has taken a group of items.

        Raises:
            ProtocolViolation: it has not been sent such a group.
        """
        if not self._groups or self._groups[0][0] != items:
            raise ProtocolViolation(f"{self.peer.node} gives credit for {items} items that it was not sent")
        group_items, group_bytes = self._groups.popleft()
        self._out_items -= group_items
        self._out_bytes -= group_bytes
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
