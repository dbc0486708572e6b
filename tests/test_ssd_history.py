"""The SSD tier against a model of it: any history of pulls, pauses, leases, pins, evictions and restarts."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from ssd_tiers import CLOCK, MODELS, begin, held

from sllm_actor.errors import Conflict, ModelNotFound, NoCapacity
from sllm_actor.loader.chunk_place import ChunkPlace
from sllm_actor.loader.ssd_partial import SsdPartial
from sllm_actor.loader.ssd_quota import SsdLease
from sllm_actor.loader.ssd_tier import SsdTier
from sllm_actor.testing.tier_storm import check_model, fill

# Few, so that they meet: of each kind, and three or four fit.
numbers = st.integers(0, 5)
QUOTA_BYTES = sum(model.size_bytes for model in MODELS[:6]) * 6 // 10


class History(RuleBasedStateMachine):
    """`order` is what is expected to be held, the least recently used first; a partial is its negative number - 1."""

    tier: SsdTier

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
        self.order: list[int] = []
        self.pins: set[int] = set()
        self.leases: dict[int, list[SsdLease]] = {}
        self.partials: dict[int, SsdPartial] = {}
        self.done: dict[int, set[ChunkPlace]] = {}

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(work)

    @initialize()
    def open(self) -> None:
        self.tier = self.run(SsdTier.open(self.folder, QUOTA_BYTES, CLOCK))

    def teardown(self) -> None:
        self.run(self.tier.close())
        self.runner.close()
        shutil.rmtree(self.folder)

    def size(self, item: int) -> int:
        return MODELS[item if item >= 0 else -item - 1].size_bytes

    def is_free(self, item: int) -> bool:
        if item < 0:
            return -item - 1 not in self.partials
        return item not in self.pins and not self.leases.get(item)

    def use(self, item: int) -> None:
        if item in self.order:
            self.order.remove(item)
        self.order.append(item)

    @rule(number=numbers)
    def begin(self, number: int) -> None:
        if number in self.partials:
            return
        item, others = -number - 1, [held for held in self.order if held != -number - 1]
        left = [*others]
        for oldest in others:
            if sum(map(self.size, left)) + self.size(item) <= QUOTA_BYTES:
                break
            if self.is_free(oldest):
                left.remove(oldest)
        fits = sum(map(self.size, left)) + self.size(item) <= QUOTA_BYTES
        try:
            partial = self.run(begin(self.tier, MODELS[number]))
        except NoCapacity:
            assert not fits
            return
        assert fits
        for evicted in set(others) - set(left):
            self.done.pop(-evicted - 1, None)
        self.order = left
        self.use(item)
        self.partials[number] = partial
        done = self.done.setdefault(number, set())
        assert not done & set(partial.missing())

    @rule(number=numbers)
    def pull(self, number: int) -> None:
        self.begin(number)
        if number in self.partials:
            self.end_one(number, "publish")

    @precondition(lambda self: self.partials)
    @rule(data=st.data(), chunks=st.integers(1, 3))
    def write(self, data: st.DataObject, chunks: int) -> None:
        number = data.draw(st.sampled_from(sorted(self.partials)))
        partial = self.partials[number]
        for place in list(partial.missing())[:chunks]:
            self.run(partial.write(*place, memoryview(MODELS[number].chunk(place))))
            self.done[number].add(place)

    @precondition(lambda self: self.partials)
    @rule(data=st.data(), how=st.sampled_from(["publish", "publish", "pause", "drop"]))
    def end(self, data: st.DataObject, how: str) -> None:
        self.end_one(data.draw(st.sampled_from(sorted(self.partials))), how)

    def end_one(self, number: int, how: str) -> None:
        partial = self.partials.pop(number)
        if how == "publish":
            self.run(fill(partial, MODELS[number], random.Random(0), whole=True))
            check_model(self.run(partial.publish()).path, MODELS[number])
            self.use(number)
        elif how == "pause":
            self.run(partial.pause())
            self.use(-number - 1)
            return
        else:
            self.run(partial.drop())
        self.order.remove(-number - 1)
        del self.done[number]

    @rule(number=numbers)
    def lease(self, number: int) -> None:
        async def leased() -> SsdLease | None:
            return self.tier.lease(MODELS[number].model_id)

        lease = self.run(leased())
        assert (lease is not None) == (number in self.order)
        if lease is not None:
            self.use(number)
            self.leases.setdefault(number, []).append(lease)

    @rule(number=numbers)
    def release(self, number: int) -> None:
        if self.leases.get(number):
            self.leases[number].pop().release()

    @rule(number=numbers, pinned=st.booleans())
    def pin(self, number: int, pinned: bool) -> None:
        model_id = MODELS[number].model_id
        try:
            self.run(self.tier.pin(model_id) if pinned else self.tier.unpin(model_id))
        except ModelNotFound:
            assert number not in self.order
        else:
            assert number in self.order
            (self.pins.add if pinned else self.pins.discard)(number)

    @rule(number=numbers)
    def evict(self, number: int) -> None:
        try:
            self.run(self.tier.evict(MODELS[number].model_id))
        except ModelNotFound:
            assert number not in self.order
        except Conflict:
            assert number in self.order and not self.is_free(number)
        else:
            assert self.is_free(number)
            self.order.remove(number)

    @rule()
    def reopen(self) -> None:
        # In the order in which they were begun, as the tier pauses them.
        for number in self.partials:
            self.use(-number - 1)
        self.partials.clear()
        self.leases.clear()
        self.run(self.tier.close())
        self.open()

    @invariant()
    def is_as_expected(self) -> None:
        if not hasattr(self, "tier"):
            return
        self.run(self.tier.trash_emptied())
        expected = [f"near:{-item - 1}" if item < 0 else MODELS[item].model_id for item in self.order]
        assert [entry.model_id for entry in self.tier.entries()] == expected
        assert held(self.tier) == [name for name in expected if ":" not in name]
        assert self.tier.used_bytes == sum(map(self.size, self.order)) <= QUOTA_BYTES
        assert {entry.model_id for entry in self.tier.entries() if entry.pinned} == {
            MODELS[number].model_id for number in self.pins
        }
        assert len(os.listdir(self.folder / "models")) + len(os.listdir(self.folder / "partial")) == len(self.order)
        assert not os.listdir(self.folder / "trash")


TestHistory = History.TestCase
TestHistory.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
