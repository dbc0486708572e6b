"""What the SSD tier holds and what makes room in it: unleased and unpinned, the least recently used first.

Bookkeeping only: it sees no byte and no file. Belongs to one event loop.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from sllm_actor.errors import ModelTooLarge, NoCapacity, SllmError
from sllm_actor.loader.holder import DOWNLOAD, Holder
from sllm_actor.units import format_bytes


class SsdEntry(msgspec.Struct, frozen=True):
    """One model in the tier, or a partial one, which has the key that it was begun with for `model_id`.

    `size_bytes` is what it takes of the quota, a partial's reserved bytes included; `done_bytes` what it has of them.
    A partial that someone is writing counts as leased once.
    """

    model_id: str
    path: Path
    size_bytes: int
    pinned: bool
    last_used_wall_s: float
    partial: bool
    done_bytes: int
    holders: tuple[Holder, ...]

    @property
    def leases(self) -> int:
        """How many leases there are."""
        return len(self.holders)


class HeldModel:
    """A whole model in the tier."""

    def __init__(self, model_id: str, path: Path, size_bytes: int, last_used_s: float, pinned: bool) -> None:
        self.model_id = model_id
        self.path = path
        self.size_bytes = size_bytes
        self.last_used_s = last_used_s
        self.pinned = pinned
        self.holders: list[Holder] = []

    @property
    def free(self) -> bool:
        """Whether it may be evicted."""
        return not self.pinned and not self.holders

    def describe(self) -> SsdEntry:
        return SsdEntry(
            self.model_id, self.path, self.size_bytes, self.pinned, self.last_used_s,
            partial=False, done_bytes=self.size_bytes, holders=tuple(self.holders),
        )  # fmt: skip


class SsdLease:
    """The right to a model's files: they stay while it is held."""

    def __init__(self, held: HeldModel, holder: Holder) -> None:
        held.holders.append(holder)
        self.holder = holder
        self.model_id = held.model_id
        self.path = held.path
        self.size_bytes = held.size_bytes
        self._held: HeldModel | None = held

    def release(self) -> None:
        """Give it back. Twice is once."""
        if self._held is not None:
            self._held.holders.remove(self.holder)
        self._held = None


class HeldPartial:
    """A model that is on its way; `busy` while someone writes, publishes or drops it."""

    def __init__(self, key: str, path: Path, size_bytes: int, last_used_s: float, done_bytes: int) -> None:
        self.key = key
        self.path = path
        self.size_bytes = size_bytes
        self.last_used_s = last_used_s
        self.done_bytes = done_bytes
        self.busy = False
        self.busy_since_s = 0.0

    @property
    def free(self) -> bool:
        """Whether it may be given up."""
        return not self.busy

    def describe(self) -> SsdEntry:
        return SsdEntry(
            self.key, self.path, self.size_bytes, False, self.last_used_s, partial=True, done_bytes=self.done_bytes,
            holders=(Holder(DOWNLOAD, self.busy_since_s),) if self.busy else (),
        )  # fmt: skip


Held = HeldModel | HeldPartial


class Quota:
    """Models by id and partials by key, within a number of bytes."""

    def __init__(self, quota_bytes: int) -> None:
        self.quota_bytes = quota_bytes
        self.models: dict[str, HeldModel] = {}
        # Counts the changes of `models`' keys.
        self.revision = 0
        self.partials: dict[str, HeldPartial] = {}
        self.given_up: tuple[SsdEntry, ...] = ()

    @property
    def used_bytes(self) -> int:
        """What whole and partial models take."""
        return sum(held.size_bytes for held in self.all())

    def entries(self) -> list[SsdEntry]:
        """List what is held, the least recently used first."""
        return [held.describe() for held in sorted(self.all(), key=lambda held: held.last_used_s)]

    def add(self, held: Held) -> None:
        """Take up what is not there yet."""
        if isinstance(held, HeldModel):
            assert held.model_id not in self.models, "a model is held once"
            self.models[held.model_id] = held
            self.revision += 1
        else:
            assert held.key not in self.partials, "a partial is held once"
            self.partials[held.key] = held

    def remove(self, held: Held) -> None:
        """Forget it."""
        if isinstance(held, HeldModel):
            del self.models[held.model_id]
            self.revision += 1
        else:
            del self.partials[held.key]

    def make_room(self, needed_bytes: int, what: str) -> list[Held]:
        """Remove what is in the way of `needed_bytes` more, and return it; nothing where that would not be enough.

        Raises:
            ModelTooLarge: it is more than the quota.
            NoCapacity: what is leased, pinned or being written leaves too little.
        """
        if needed_bytes > self.quota_bytes:
            raise ModelTooLarge(
                f"{what} has {format_bytes(needed_bytes)} and the SSD tier's quota is {format_bytes(self.quota_bytes)}"
            )
        victims = self._oldest(self.used_bytes + needed_bytes - self.quota_bytes)
        if victims is None:
            kept_bytes = sum(held.size_bytes for held in self.all() if not held.free)
            raise NoCapacity(
                f"{what} needs {format_bytes(needed_bytes)}, and {format_bytes(kept_bytes)} of the SSD tier's "
                f"{format_bytes(self.quota_bytes)} are leased, pinned or being written"
            )
        for held in victims:
            self.remove(held)
        return victims

    def exchange(self, old: HeldPartial | None, new: HeldPartial) -> list[Held]:
        """Put `new` in the place of `old`; remove and return what else is in its way. Raises what `make_room` does."""
        if old is not None:
            self.remove(old)
        try:
            victims = self.make_room(new.size_bytes, new.key[:200])
        except SllmError:
            if old is not None:
                self.add(old)
            raise
        self.add(new)
        return victims

    def shrink(self) -> list[Held]:
        """Remove what is beyond the quota, as far as it may be removed, and return it; `given_up` describes it."""
        over_bytes = self.used_bytes - self.quota_bytes
        victims = self._oldest(over_bytes)
        if victims is None:
            victims = [held for held in self.all() if held.free]
        for held in victims:
            self.remove(held)
        self.given_up = tuple(held.describe() for held in victims)
        return victims

    def _oldest(self, wanted_bytes: int) -> list[Held] | None:
        """Choose what frees so many bytes; None where nothing does."""
        victims: list[Held] = []
        for held in sorted(self.all(), key=lambda held: held.last_used_s):
            if wanted_bytes <= 0:
                break
            if held.free and held.size_bytes:
                victims.append(held)
                wanted_bytes -= held.size_bytes
        return victims if wanted_bytes <= 0 else None

    def all(self) -> list[Held]:
        """List what is held, in no order."""
        return [*self.models.values(), *self.partials.values()]
