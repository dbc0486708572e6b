"""Bytes come before devices in simulated clusters: those go on serving, and nothing is left whatever fails."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

from test_evaluation import run

from sllm_actor.testing.cluster_simulation import check_seed
from sllm_actor.testing.process_loop import ProcessLoop
from sllm_actor.testing.simulated_cluster import Plan, SimulatedCluster
from sllm_actor.testing.virtual_loop import run_virtual
from sllm_actor.testing.workloads import Arrival
from sllm_actor.testing.world import Description, Models

# From afar, 120 MiB take 25 s.
FAR = Plan(remote_bytes_per_s=5e6)
# More models than devices; whatever comes from afar comes first.
CROWDED = Plan(models=8, requests=30, slots=1, remote_bytes_per_s=50e6, bytes_first_s=0.0)
SEEDS = 12
# One node with one device and no SSD copy of two models, whose bytes take 10.7 s.
ALONE = Description(nodes=1, devices=1, copies=0, models=(Models(shape="opt-6.7b", count=2),))


def test_a_device_goes_on_serving_while_the_bytes_of_another_model_come() -> None:
    answered = run([Arrival(0.0, 0, 50, 10), Arrival(30.0, 1, 50, 10), Arrival(33.0, 0, 50, 10)], described=ALONE)
    first, far, near = answered.seen
    assert not answered.errors()
    # From host memory onto the device that the other one does not have yet, for whose bytes it does not wait.
    assert near.tier == "host memory" and near.wait_s < 1.5
    assert near.end_s < far.first_token_s
    # Nor does that one wait longer than one that has the device to itself.
    assert far.wait_s < first.wait_s + 0.5


def test_a_model_whose_bytes_have_come_waits_for_the_device_and_has_it_next() -> None:
    """The other one answers until its bytes have been there for some seconds; whoever asks later comes later."""
    long = 450
    answered = run([Arrival(0.0, 0, 50, 10), Arrival(30.0, 0, 50, long), Arrival(31.0, 1, 50, 10)], described=ALONE)
    _, busy, far = answered.seen
    assert not answered.errors()
    assert 31.0 + 10.7 < busy.end_s < far.first_token_s < busy.end_s + 4.0


def test_who_leaves_while_bytes_come_leaves_no_lease_and_no_fetch() -> None:
    async def main() -> tuple[bool, bool, dict[str, int]]:
        cluster = SimulatedCluster(0, FAR)
        first, *_, model = sorted(cluster.models, key=lambda model: model.size_bytes)
        for stored in cluster.stored.values():
            stored[:] = [card for card in stored if card not in (first.card, model.card)]
        await cluster.start_all()
        # How fast bytes come is known once some have.
        await asyncio.wait([cluster.ask(1, cluster.nodes["n1"], first.name, random.Random(0))])
        await cluster.clock.sleep(5.0)
        asking = cluster.ask(2, cluster.nodes["n1"], model.name, random.Random(1))
        await cluster.clock.sleep(3.0)
        tiers = [node.tiers.loader for node in cluster.nodes.values()]
        came = any(not one.is_idle for one in tiers)
        asking.cancel()
        await cluster.clock.sleep(1.0)
        is_idle = all(one.is_idle for one in tiers)
        counts = Counter[str]()
        for node in cluster.nodes.values():
            counts.update(node.parts.starts.fetches)
        for name in cluster.names:
            await cluster.leave(name)
        await cluster.truth.close()
        return came, is_idle, dict(counts)

    assert run_virtual(main, kind=ProcessLoop) == (True, True, {"ended": 1})


def test_promises_hold_while_bytes_come_first_and_everything_breaks() -> None:
    """Each seed fails where a lease, an actor or a slot is left, or a request does not end."""
    seen: Counter[str] = Counter()
    for seed in range(SEEDS):
        seen.update(check_seed(seed, CROWDED).counts)
    assert seen["fetch come"] > 20 and seen["fetch ended"]
