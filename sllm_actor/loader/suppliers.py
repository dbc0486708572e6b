"""The sources that hold one checkpoint: each read goes to the one that is expected to answer it soonest.

A source that fails is left alone for a while, or for good, and another one reads in its place; what has arrived
stays. Where several are to be mixed, the checkpoint has digests, so that a wrong one can't do harm.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence

from sllm_actor.errors import ReadFailed, SllmError, SourceError, SourceInvalid, SourceUnreachable, SourceViolation
from sllm_actor.runtime.clock import Clock
from sllm_actor.sources.source import Source, SourceFile
from sllm_actor.units import KIB

log = logging.getLogger(__name__)

# How often a source may fail, one time after another, before this checkpoint is no longer asked of it.
MAX_FAILURES = 6
# A failure that has brought so much is the first of a new row: such a link gets there, cut by cut.
LEAST_PROGRESS_BYTES = 16 * KIB
# How often it may give something else than what was written.
MAX_WRONGS = 3
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0
_WEIGHT = 0.3
# What a source is believed to give before it has been read from.
_FIRST_BYTES_PER_S = 1e9


class Supplier:
    """One source of the checkpoint, and how it has done so far."""

    def __init__(self, source: Source, files: Mapping[str, SourceFile]) -> None:
        self.source = source
        self.files = files
        self.bytes_per_s = 0.0
        self.under_way_bytes = 0
        self.reads = 0
        self.failures = 0
        self.failed_s = float("-inf")
        self.wrongs = 0
        self.resting_until_s = 0.0
        self.given_up: SllmError | None = None

    def expected_s(self, size_bytes: int) -> float:
        """Estimate when so many bytes would be here, behind what is under way."""
        return (self.under_way_bytes + size_bytes) / (self.bytes_per_s or _FIRST_BYTES_PER_S)


class Suppliers:
    """Chooses among sources, and replaces those that fail. Belongs to one fetch."""

    def __init__(self, suppliers: Sequence[Supplier], clock: Clock, chance: Callable[[], float]) -> None:
        assert suppliers, "a checkpoint comes from somewhere"
        self._suppliers = list(suppliers)
        self._clock = clock
        self._chance = chance
        self._changed = asyncio.Event()

    @property
    def parallel(self) -> int:
        """How many reads at once are of use."""
        return sum(supplier.source.parallel for supplier in self._suppliers if supplier.given_up is None)

    def add(self, supplier: Supplier) -> None:
        """Ask one more, from the next read on, and rather than one of which no more is known."""
        self._suppliers.insert(0, supplier)
        self._changed.set()

    async def read(self, name: str, offset: int, into: memoryview, *, mixed: bool = True) -> tuple[Supplier, ...]:
        """Fill `into` from the first source that can, and say which it was.

        What has come of a read that was cut stays, and the next one goes on behind it: also that of another source,
        if `mixed`, and then all of them are named.

        Raises:
            SourceError, SourceInvalid: every source has failed; this is what the last one said.
        """
        came_bytes, givers = 0, dict[Supplier, None]()
        while came_bytes < len(into):
            supplier = await self._choose(len(into) - came_bytes)
            if not mixed and givers.keys() != {supplier}:
                came_bytes, givers = 0, {}
            with into[came_bytes:] as rest:
                more_bytes = await self._read_some(supplier, name, offset + came_bytes, rest)
            if more_bytes:
                came_bytes += more_bytes
                givers[supplier] = None
        return tuple(givers)

    async def _read_some(self, supplier: Supplier, name: str, offset: int, into: memoryview) -> int:
        """Fill `into` from its beginning on as far as the source gives it; return how far that was."""
        begun_s = self._clock.monotonic_s()
        supplier.reads += 1
        supplier.under_way_bytes += len(into)
        try:
            await supplier.source.read(supplier.files[name], offset, into)
        except (SourceError, SourceInvalid, ReadFailed) as wrong:
            came_bytes = wrong.came_bytes if isinstance(wrong, SourceError) else 0
            self._blame(supplier, wrong, begun_s, came_bytes)
            return came_bytes
        finally:
            # Those that run at once share the bandwidth: what is seen of one is multiplied by their number.
            sharing = supplier.reads
            supplier.reads -= 1
            supplier.under_way_bytes -= len(into)
            self._changed.set()
        self._praise(supplier, len(into) * sharing, begun_s)
        return len(into)

    def blame(self, supplier: Supplier, wrong: SllmError) -> None:
        """Say that what a source gave was not what was written.

        Raises:
            SllmError: `wrong`, where no other source is left and this one has been wrong too often.
        """
        supplier.wrongs += 1
        if supplier.wrongs >= MAX_WRONGS:
            self._give_up(supplier, wrong)
        if all(known.given_up is not None for known in self._suppliers):
            raise wrong

    def _praise(self, supplier: Supplier, size_bytes: int, begun_s: float) -> None:
        seen = size_bytes / max(self._clock.monotonic_s() - begun_s, 1e-9)
        before = supplier.bytes_per_s
        supplier.bytes_per_s = seen if not before else (1 - _WEIGHT) * before + _WEIGHT * seen
        if begun_s > supplier.failed_s:
            supplier.failures = 0

    def _blame(self, supplier: Supplier, wrong: SllmError, begun_s: float, came_bytes: int) -> None:
        passing = isinstance(wrong, SourceUnreachable | SourceViolation)
        if passing and begun_s <= supplier.failed_s:
            return  # Of the same moment as one that has been counted.
        supplier.failed_s = self._clock.monotonic_s()
        supplier.failures = supplier.failures + 1 if came_bytes < LEAST_PROGRESS_BYTES else 1
        if not passing or supplier.failures >= MAX_FAILURES:
            self._give_up(supplier, wrong)
            return
        pause_s = _pause_s(supplier.failures, wrong, self._chance)
        supplier.resting_until_s = self._clock.monotonic_s() + pause_s
        log.info("%s is left alone for %.1f s: %s", supplier.source.url, pause_s, wrong)

    def _give_up(self, supplier: Supplier, wrong: SllmError) -> None:
        if supplier.given_up is None:  # Reads that were under way then may fail, too.
            log.warning("%s is given up: %s", supplier.source.url, wrong)
        supplier.given_up = wrong

    async def _choose(self, size_bytes: int) -> Supplier:
        while True:
            self._changed.clear()
            left = [supplier for supplier in self._suppliers if supplier.given_up is None]
            if not left:
                last = self._suppliers[-1].given_up
                assert last is not None
                raise last
            now_s = self._clock.monotonic_s()
            ready = [
                supplier
                for supplier in left
                if supplier.resting_until_s <= now_s and supplier.reads < supplier.source.parallel
            ]
            if ready:
                return min(ready, key=lambda supplier: supplier.expected_s(size_bytes))
            resting = [supplier.resting_until_s - now_s for supplier in left if supplier.resting_until_s > now_s]
            await self._until_changed(min(resting, default=None))

    async def _until_changed(self, longest_s: float | None) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(longest_s):
                await self._changed.wait()


async def list_files(source: Source, clock: Clock, chance: Callable[[], float]) -> tuple[SourceFile, ...]:
    """List a source's files by name, asking again where it can't be reached.

    Raises:
        SourceError, SourceInvalid: as `Source.files` does.
    """
    for failures in range(1, MAX_FAILURES + 1):
        try:
            return tuple(sorted(await source.files(), key=lambda file: file.name))
        except SourceUnreachable as wrong:
            if failures == MAX_FAILURES:
                raise
            await clock.sleep(_pause_s(failures, wrong, chance))
    raise AssertionError("the last failure is raised")


def _pause_s(failures: int, wrong: SllmError, chance: Callable[[], float]) -> float:
    pause_s = min(_FIRST_PAUSE_S * 2.0 ** (failures - 1), _LONGEST_PAUSE_S) * (0.5 + chance())
    return max(pause_s, min(wrong.retry_after_s or 0.0, _LONGEST_PAUSE_S))
