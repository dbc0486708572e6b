"""What a node's reports say that its disk has stays true, though it is looked through only where something changes."""

from __future__ import annotations

from typing import cast

from sllm_actor.actors.on_disk import OnDisk, Wanted
from sllm_actor.domain import Model, ModelName
from sllm_actor.loader.tiers import Tiers
from sllm_actor.runtime.clock import SystemClock
from sllm_actor.testing.simulated_node import model_of
from sllm_actor.testing.simulated_tiers import SimulatedCard, SimulatedTiers

SIZE_BYTES = 1000


def print_of(name: str) -> str:
    return model_of(name, SIZE_BYTES, 1.0).fingerprint


def test_a_checkpoint_that_comes_to_the_disk_or_leaves_it_is_told_of_and_one_registered_later_too() -> None:
    cards = {name: SimulatedCard(name, SIZE_BYTES) for name in ("a", "b", "c")}
    tiers = SimulatedTiers(
        cards, ["a"], SystemClock(), pool_bytes=10**6, ssd_bytes_per_s=1e6, remote_bytes_per_s=1e6,
        ssd_quota_bytes=2 * SIZE_BYTES,
    )  # fmt: skip
    models: dict[ModelName, Model] = {ModelName(name): model_of(name, SIZE_BYTES, 1.0) for name in ("a", "b")}
    wanted: dict[ModelName, Wanted] = {ModelName(name): card for name, card in cards.items()}
    disk = OnDisk(models, wanted, cast(Tiers, tiers), shared=True)
    assert disk.fingerprints() == (print_of("a"),)
    tiers.ssd.store("b", SIZE_BYTES)
    assert disk.fingerprints() == (print_of("a"), print_of("b"))
    tiers.ssd.store("c", SIZE_BYTES)  # In place of `a`; nobody has registered it yet.
    assert disk.fingerprints() == (print_of("b"),)
    models[ModelName("c")] = model_of("c", SIZE_BYTES, 1.0)
    disk.look_again()
    assert disk.fingerprints() == (print_of("b"), print_of("c"))
