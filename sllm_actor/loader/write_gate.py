"""Hold background writes back while cold loads read from the same device.

Reads and writes of a device slow each other down, so that a download at full speed costs a cold load its bandwidth.
While one reads, writes get a small share of what the device could write, and all of it when somebody waits for the
memory that they free. Source of the ideas: WiscSort (VLDB '23), whose BRAID model says this of any storage.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from sllm_actor.loader.device_profile import DeviceProfile
from sllm_actor.runtime.clock import Clock

# What a device is believed to write until it has been calibrated.
UNMEASURED_BYTES_PER_S = 500e6


class WritePacer:
    """Say how long each write has to wait for writes to stay within a rate. Pure: it is told the time.

    A write begins no sooner after the one before it than its own size takes at that rate. So over any stretch of time
    begin at most the rate's bytes and one write, time that nobody used is not saved up, and each write has its turn.
    """

    def __init__(self, bytes_per_s: float) -> None:
        assert bytes_per_s > 0, bytes_per_s
        self._bytes_per_s = bytes_per_s
        self._last_s = float("-inf")

    def wait_s(self, size_bytes: int, now_s: float) -> float:
        """Return the seconds until a write of `size_bytes` may begin; 0 where it may now."""
        return max(0.0, self._last_s + size_bytes / self._bytes_per_s - now_s)

    def begin(self, now_s: float) -> None:
        """Note that a write begins, whether it had to wait or not."""
        self._last_s = now_s


class WriteGate:
    """Awaited before each background write: `await gate(size_bytes)`. Belongs to one event loop.

    Writes pass in the order in which they came: at once, or at `bytes_per_s` while loads read and nobody presses.
    """

    def __init__(self, bytes_per_s: float, clock: Clock) -> None:
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._pacer = WritePacer(bytes_per_s)
        self._reading = False
        self._pressing = 0
        self._turn = asyncio.Lock()
        self._lifted = asyncio.Event()
        self._lifted.set()
        self._passed_bytes = 0
        self._held_s = 0.0

    @property
    def holding(self) -> bool:
        """Whether writes are being held back."""
        return self._reading and self._pressing == 0

    def on_reading(self, reading: bool) -> None:
        """Be told that loads begin to read from the device, or that none does any more."""
        self._reading = reading
        self._update()

    @contextmanager
    def pressing(self) -> Iterator[None]:
        """Lift the restriction for as long as somebody waits for the memory that the writes will free."""
        self._pressing += 1
        self._update()
        try:
            yield
        finally:
            self._pressing -= 1
            self._update()

    async def __call__(self, size_bytes: int) -> None:
        """Return when a background write of `size_bytes` may begin; a caller that is cancelled takes nothing."""
        assert size_bytes >= 0, size_bytes
        arrived_s = self._clock.monotonic_s()
        try:
            async with self._turn:
                await self._until_allowed(size_bytes)
                self._pacer.begin(self._clock.monotonic_s())
                self._passed_bytes += size_bytes
        finally:
            self._held_s += self._clock.monotonic_s() - arrived_s

    async def _until_allowed(self, size_bytes: int) -> None:
        while self.holding and (wait_s := self._pacer.wait_s(size_bytes, self._clock.monotonic_s())) > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._lifted.wait()

    def observe(self) -> dict[str, object]:
        """Show what has passed and how long writes have waited, for people."""
        return {
            "holding": self.holding,
            "bytes_per_s": self._bytes_per_s,
            "passed_bytes": self._passed_bytes,
            "held_s": self._held_s,
        }

    def _update(self) -> None:
        if self.holding:
            self._lifted.clear()
        else:
            self._lifted.set()


def allowed_bytes_per_s(profile: DeviceProfile | None, percent: int) -> float:
    """Return what background writes get beside cold loads: so many hundredths of what the device writes alone."""
    alone = UNMEASURED_BYTES_PER_S if profile is None else profile.write_bytes_per_s
    return alone * percent / 100
