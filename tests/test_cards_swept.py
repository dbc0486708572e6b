"""Cards that no registration has are dropped, at a cost that does not grow with cards times registrations."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from sllm_actor.actors.registry import Registry
from sllm_actor.domain import Model, ModelName
from sllm_actor.loader.cards import Cards
from sllm_actor.messages.declare import changed
from sllm_actor.runtime import SystemClock
from sllm_actor.testing.simulated_node import model_of
from sllm_actor.testing.simulated_store import MemoryStore

MODELS = 50


class Looked(dict[ModelName, Model]):
    """Counts how often all registrations are gone through."""

    times = 0

    def values(self) -> Any:
        self.times += 1
        return super().values()


def folders(data: Path) -> list[str]:
    return sorted(entry.name for entry in data.iterdir())


async def test_all_registrations_are_looked_at_once_for_all_cards(tmp_path: Path) -> None:
    cards = Cards(tmp_path)
    for number in range(2 * MODELS):
        (tmp_path / f"card-{number:03}").mkdir()
    tiers = SimpleNamespace(keep_cards=cards.keep)
    registry = Registry(MemoryStore(SystemClock()), cast(Any, None), cast(Any, tiers), SystemClock())
    known = registry._models = Looked()
    for number in range(MODELS):
        known[ModelName(f"m-{number}")] = changed(model_of(f"m-{number}", 1, 1.0), card=f"card-{number:03}")
    await registry._sweep()
    assert folders(tmp_path) == [f"card-{number:03}" for number in range(MODELS)]
    assert known.times == 1
    # Whatever changes in a registration, its card is looked for anew.
    del known[ModelName("m-7")]
    registry._look_again()
    await registry._sweep()
    assert folders(tmp_path) == [f"card-{number:03}" for number in range(MODELS) if number != 7]


async def test_a_card_that_becomes_wanted_while_it_is_waited_for_stays(tmp_path: Path) -> None:
    cards, wanted = Cards(tmp_path), set[str]()
    for key in ("a", "b"):
        (tmp_path / key).mkdir()
    async with cards._lock("a"):
        sweep = asyncio.ensure_future(cards.keep(wanted.__contains__))
        while not cards._lock("a")._waiters:
            await asyncio.sleep(0)
        wanted.add("a")
    await sweep
    assert folders(tmp_path) == ["a"]
