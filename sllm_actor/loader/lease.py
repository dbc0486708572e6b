"""What a loader hands out: the right to a checkpoint's memory, and the account of how it came there."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import msgspec

from sllm_actor.loader.device import DeviceBuffer
from sllm_actor.loader.holder import Holder
from sllm_actor.loader.mapping import HostFile


class LoadReport(msgspec.Struct, frozen=True):
    """Where the bytes of a lease came from and how long that took; the sources add up to the total.

    `in_place_bytes` lie in the page cache and stay there. `device_bytes` went on from host memory to devices.
    """

    pool_bytes: int = 0
    page_cache_bytes: int = 0
    ssd_bytes: int = 0
    in_place_bytes: int = 0
    remote_bytes: int = 0
    total_bytes: int = 0
    duration_s: float = 0.0
    device_bytes: int = 0


class Resident(msgspec.Struct, frozen=True):
    """One checkpoint in the pool, as `residents` reports it."""

    fingerprint: str
    path: str
    size_bytes: int
    holders: tuple[Holder, ...]
    pinned: bool
    last_used_s: float

    @property
    def leases(self) -> int:
        """How many leases there are."""
        return len(self.holders)


class DeviceTarget(NamedTuple):
    """Where on a device a file is to go, and at which byte of the buffer it begins."""

    buffer: DeviceBuffer
    offset: int = 0


class HostLease:
    """The right to use a checkpoint's host memory: it stays what it is until `release`."""

    def __init__(
        self,
        files: tuple[HostFile, ...],
        report: LoadReport,
        give_back: Callable[[], None],
        holder: Holder | None = None,
    ) -> None:
        self.files = files
        self.report = report
        self.holder = holder
        self._give_back: Callable[[], None] | None = give_back

    def is_of(self, who: str) -> None:
        """Say who has it now, for those who ask what a tier is held by."""
        if self.holder is not None:
            self.holder.who = who

    def release(self) -> None:
        """Give the memory back to the loader's judgement; doing it twice does nothing."""
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back()
