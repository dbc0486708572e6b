"""Whole clusters of production actors, simulated with machines that nobody here has: `sllm-node simulate`."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import re
import statistics
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sllm_actor.cli.simulation import Workload
from sllm_actor.errors import ConfigInvalid, InvalidInput
from sllm_actor.loader.device_profile import Alone, DeviceIdentity, DeviceProfile
from sllm_actor.testing.evaluation import WARM, Run, evaluate
from sllm_actor.testing.hardware import CONTAINER_S, DEVICES, MACHINES, SHAPES, devices_for
from sllm_actor.testing.node_process import CLI
from sllm_actor.testing.oracle import mean_waits_s
from sllm_actor.testing.simulated_tiers import SimulatedCard, SimulatedTiers
from sllm_actor.testing.virtual_loop import VirtualLoop, run_virtual
from sllm_actor.testing.workloads import LENGTHS, Arrival, gamma_arrivals, zipf
from sllm_actor.testing.world import SYSTEMS, Description, Models, World, calibrated, changed, read_description

SMALL = Description(nodes=2, copies=1, models=(Models(shape="opt-6.7b", count=4),))
# How long a model's bytes come from an SSD.
SSD_S = 2.22
BURST = [Arrival(0.01 * number, 0, 50, 100) for number in range(8)]


def run(arrivals: list[Arrival], system: str = "ours", described: Description = SMALL) -> Run:
    return evaluate(World(described, SYSTEMS[system]), arrivals, seed=1)


def test_a_burst_for_one_model_spreads_over_the_instances_that_come_up() -> None:
    answered = run(BURST, described=changed(SMALL, "copies=2"))
    assert not answered.errors()
    # Eight devices, an instance on each, and nobody waits behind all others: an answer takes 3.3 s.
    assert len({one.node for one in answered.seen}) == 2 and answered.starts == 8
    assert max(answered.waits_s()) < 4 * 3.3


def test_help_for_a_burst_at_a_cold_model_comes_with_its_first_instance_and_not_behind_it() -> None:
    """The SSD of each node has the model: 2.2 s for its bytes, 0.5 s more for whoever copies them from host memory."""
    answered = run(BURST, described=changed(SMALL, "copies=2"))
    assert max(answered.waits_s()) < 2.3 + 0.5 + 0.1 + 0.1
    # In host memory by now, and the instances have gone meanwhile; at two gateways, one request each.
    again = [Arrival(60.0, 0, 50, 100), Arrival(60.001, 0, 50, 100)]
    waits_s = [one.wait_s for one in run([*BURST, *again], described=changed(SMALL, "copies=2")).seen[-2:]]
    assert max(waits_s) < 0.53 + 0.1 + 0.05


def test_whoever_finds_every_instance_busy_has_another_one_started_at_once() -> None:
    """From host memory that takes 0.53 s and 0.1 s; one is asked in each tenth of a second between two whole looks."""
    for tenth in range(5):
        asked = [Arrival(0.0, 0, 50, 10), Arrival(9.0, 0, 50, 200), Arrival(9.2 + tenth / 10, 0, 50, 10)]
        later = run(asked, described=changed(SMALL, "nodes=1,keep_alive_s=60")).seen[-1]
        assert later.tier == WARM and later.wait_s < 0.53 + 0.1 + 0.08


def test_it_is_seen_at_once_that_two_instances_together_have_too_much() -> None:
    """Each is on a node of its own; the third request comes before it is told that the second instance is busy."""
    for tenth in range(5):
        begin_s = 9.0 + tenth / 10
        asked = [Arrival(0.0, 0, 50, 10), Arrival(0.0, 0, 50, 10)]
        asked += [Arrival(begin_s + number / 100, 0, 50, 300) for number in range(3)]
        later = run(asked, described=changed(SMALL, "nodes=3,devices=1,copies=3,keep_alive_s=60")).seen[-1]
        # From the SSD of the third node, a tenth of a second after what was told last.
        assert later.tier == WARM and later.wait_s < SSD_S + 0.1 + 0.1 + 0.15


@pytest.mark.parametrize(("tokens", "least_s", "most_s"), [(20, 0.9, 1.3), (400, SSD_S + 0.1, SSD_S + 0.1 + 1.3)])
def test_a_place_where_host_memory_has_the_bytes_is_waited_for_as_long_as_it_is_expected_soon(
    tokens: int, least_s: float, most_s: float
) -> None:
    """Two models on the first node, whose places are taken; the second one has a device free, and both on its SSD.

    The other model's answer has run for 0.3 s and ends in 0.4, or has 13 s to go, which nobody knows: it is waited for
    until it has run for half of what that would save, 1.6 s, and all models are looked at twice a second.
    """
    asked = [Arrival(0.0, 0, 50, 300), Arrival(3.0, 1, 50, 300), Arrival(6.0, 2, 50, 10)]
    asked += [Arrival(20.0, 0, 50, 200), Arrival(20.0, 1, 50, tokens), Arrival(20.3, 0, 50, 10)]
    answered = run(asked, described=changed(SMALL, "devices=2,copies=2,keep_alive_s=60")).seen
    assert [one.node for one in answered[:3]] == ["n0001", "n0001", "n0002"]
    later = answered[-1]
    assert later.tier == WARM and least_s < later.wait_s < most_s


def test_a_place_goes_at_once_to_a_busy_model_that_had_found_none() -> None:
    """Two devices; the other model's answer takes three to four seconds, of five lengths."""
    for more in range(5):
        asked = [Arrival(0.0, 0, 50, 10), Arrival(9.0, 1, 50, 100 + 3 * more)]
        asked += [Arrival(9.0, 0, 50, 900), Arrival(9.1, 0, 50, 10)]
        answered = run(asked, described=changed(SMALL, "nodes=1,devices=2,keep_alive_s=60")).seen
        waited, other = answered[-1], next(one for one in answered if one.model)
        assert 0.0 < waited.first_token_s - other.end_s < 0.53 + 0.1 + 0.1


@pytest.mark.parametrize("gap_s", [0.0, 0.01])
def test_a_burst_of_one_model_does_not_take_all_that_is_free_from_a_larger_one_of_another(gap_s: float) -> None:
    """Both run already, and the smaller one's model has the lower number, and as many requests as there are devices."""
    both = [Arrival(0.0, model, 50, 200) for model in (0, 1)]
    both += [Arrival(6.0 + gap_s * number, 0, 50, 200) for number in range(8)]
    both += [Arrival(6.0 + gap_s * number, 1, 50, 200) for number in range(24)]
    answered = run(both, described=changed(SMALL, "copies=2"))
    waits_s = {model: [one.wait_s for one in answered.seen if one.model == model] for model in (0, 1)}
    # An answer takes 6.6 s, and all of them together four times that on eight devices: nobody waits for longer.
    assert max(waits_s[1]) < 4.1 * 6.6
    # Where all are known, whoever has three times as many waits not much longer for them than the others.
    assert gap_s or max(waits_s[1]) < 1.5 * max(waits_s[0])


def test_a_long_start_that_several_wait_for_does_not_keep_others_from_help() -> None:
    """Requests at both gateways wait for the larger model, whose bytes take 4.3 s, and want no other place."""
    models = (Models(shape="opt-6.7b", count=1), Models(shape="opt-13b", count=1))
    described = Description(nodes=2, copies=1, models=models)
    burst = [Arrival(0.1, 0, 50, 100)] * 4
    answered = run([*[Arrival(0.0, 1, 50, 10)] * 6, *burst], described=described)
    waits_s = sorted(one.wait_s for one in answered.seen if one.model == 0)
    # From the SSD in 2.3 s, and its help half a second later, from the memory beside it.
    assert len({one.node for one in answered.seen if one.model == 1}) == 1
    assert waits_s[1] < 2.3 + 0.5 + 0.7 + 0.2


def test_a_wait_is_split_into_what_it_was_for() -> None:
    first, second = run([Arrival(0.0, 0, 50, 100), Arrival(0.0, 0, 50, 100)], described=changed(SMALL, "copies=2")).seen
    for one in (first, second):
        assert sum(one.parts) == pytest.approx(one.wait_s) and min(one.parts) >= 0.0
    # 13.3 GB at 6 GB/s and 0.1 s to attach; whoever came later waited for an instance that came up beside it, too.
    assert first.parts.load_s == pytest.approx(2.2, abs=0.1) and first.parts.slot_s < 0.2 < 0.5 < second.parts.slot_s
    few = changed(SMALL, "nodes=1,devices=1")
    waiting = run([Arrival(0.0, 0, 50, 100), Arrival(0.0, 1, 50, 100)], described=few).seen[1]
    assert waiting.parts.place_s > 3.0 and waiting.parts.slot_s < 1.0


def test_two_models_that_are_asked_at_once_for_one_device_take_turns_and_both_are_answered() -> None:
    """Each start made the other's instance leave before its request had come there, until both were refused."""
    few = changed(SMALL, "nodes=1,devices=1")
    answered = run([Arrival(0.0, 0, 50, 100), Arrival(0.0, 1, 50, 100)], described=few)
    assert not answered.errors() and answered.starts == 2


def test_an_instance_that_helps_another_comes_from_the_memory_beside_it_and_not_from_far() -> None:
    answered = run(BURST[:3])
    assert {one.node for one in answered.seen} == {"n0001"} and answered.starts == 3
    # The first from the SSD in 2.3 s, the others in half a second once they are missed: no download of 10.7 s.
    assert max(answered.waits_s()) < 4.0


def test_a_request_behind_another_finds_its_instance_and_waits_for_no_load() -> None:
    first, second = run([Arrival(0.0, 0, 50, 10), Arrival(2.6, 0, 50, 10)]).seen
    assert first.tier == "ssd" and second.tier == WARM
    # 13.3 GB at 6 GB/s, and the copy to the device behind it.
    assert 2.2 < first.wait_s < 2.6 and second.wait_s < 0.1


def test_a_model_that_was_let_go_comes_from_host_memory() -> None:
    first, second = run([Arrival(0.0, 0, 50, 10), Arrival(30.0, 0, 50, 10)]).seen
    assert (first.tier, second.tier) == ("ssd", "host memory")
    # 13.3 GB at 25 GB/s.
    assert 0.5 < second.wait_s < 0.9


def test_a_disk_that_reads_for_others_is_told_of_as_a_queue_until_it_has() -> None:
    async def main() -> list[float]:
        cards = {name: SimulatedCard(name, 10**9) for name in ("a", "b")}
        clock = VirtualLoop.running().clock
        tiers = SimulatedTiers(cards, ["a"], clock, pool_bytes=10**10, ssd_bytes_per_s=1e9, remote_bytes_per_s=1e8)
        told = [tiers.disk_queue_s(cards["a"])]
        for name, wait_s in (("a", 0.1), ("b", 5.0)):
            begun = asyncio.ensure_future(tiers.lease(cards[name]))
            await clock.sleep(wait_s)
            told += [tiers.disk_queue_s(cards["a"]), tiers.queues().remote_s]
            await begun
        return [*told, tiers.disk_queue_s(cards["a"]), tiers.queues().remote_s]

    # At the bandwidth that is assumed and then seen, of what has not arrived: a part is a quarter.
    assert run_virtual(main) == [0.0, 1.0, 0.0, 0.0, 7.5, 0.0, 0.0]


def test_a_system_that_keeps_nothing_downloads_each_time() -> None:
    first, second = run([Arrival(0.0, 0, 50, 10), Arrival(60.0, 0, 50, 10)], "ray_serve").seen
    assert (first.tier, second.tier) == ("source", "source")
    assert min(first.wait_s, second.wait_s) > SHAPES["opt-6.7b"].size_bytes / MACHINES["a40"].remote_bytes_per_s


def test_the_same_seed_gives_the_same_run() -> None:
    assert run(BURST) == run(BURST)


def test_a_model_takes_as_many_devices_as_its_bytes_need() -> None:
    assert devices_for(SHAPES["opt-13b"], DEVICES["a40"]) == 1
    assert devices_for(SHAPES["opt-30b"], DEVICES["a40"]) == 2
    assert World(Description(models=(Models(shape="opt-30b", count=2),)), SYSTEMS["ours"]).instances == 2


def test_each_model_lies_on_as_many_disks_as_was_asked_for() -> None:
    world = World(Description(nodes=3, copies=2, models=(Models(shape="opt-6.7b", count=6),)), SYSTEMS["ours"])
    stored = [name for node in world.names for name in world.stored(node)]
    assert sorted(stored) == sorted([model.card for model in world.models] * 2)
    assert {len(world.stored(node)) for node in world.names} == {4}


def test_what_is_described_and_changed_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text('machine = "h100"\nnodes = 3\n[[models]]\nshape = "opt-13b"\ncount = 5\n')
    described = read_description(path)
    assert (described.nodes, described.models[0].count, described.hardware.device) == (3, 5, "h100")
    assert changed(described, "nodes=+2, ssd_bytes=4e12").nodes == 5
    assert changed(described, "ssd_bytes=+1e12").hardware.ssd_bytes == MACHINES["h100"].ssd_bytes + 1e12
    for changes, said in (
        ("cores=2", "'cores=2': it is NAME=VALUE"), ("nodes=0", "nodes=0: .*>= 1"), ("nodes=many", "nodes=many: "),
        ("machine=abacus", "there is no machine 'abacus'"),
    ):  # fmt: skip
        with pytest.raises(InvalidInput, match=said):
            changed(described, changes)
    for text, said in (
        ("nodes = 0", "nodes"), ("node = 1", "unknown field `node`"), ("nodes = ", "cluster.toml"),
        ('models = [{shape = "gpt-5", count = 1}]', "there is no shape 'gpt-5'"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(InvalidInput, match=said):
            read_description(path)
    with pytest.raises(InvalidInput, match="a model needs 3 devices, and a node has 1"):
        World(Description(models=(Models(shape="opt-66b", count=1),), devices=1), SYSTEMS["ours"])


def test_no_run_is_sooner_than_the_oracle_and_one_alone_is_hardly_later() -> None:
    world = World(SMALL, SYSTEMS["ours"])
    # 13.3 GB at 6 GB/s, attached within 0.1 s, and the prompt of 50 tokens.
    alone = [Arrival(0.0, 0, 50, 10)]
    alone_s, wait_s = mean_waits_s(world, alone).least_s, run(alone).waits_s()[0]
    assert 2.3 < alone_s < wait_s + 1e-9 < 1.1 * alone_s
    # Of a burst on few devices, most wait for those before them.
    few = changed(SMALL, "devices=1")
    crowd = [Arrival(0.0, 0, 50, 100) for _ in range(12)]
    least_s = mean_waits_s(World(few, SYSTEMS["ours"]), crowd).least_s
    mean_s = sum(run(crowd, described=few).waits_s()) / len(crowd)
    assert 3 * mean_waits_s(world, alone).least_s < least_s < mean_s
    assert mean_waits_s(world, []).least_s == 0.0


def test_a_container_is_started_before_each_model_of_kserve() -> None:
    arrivals = [Arrival(0.0, 0, 50, 10)]
    kserve, ray_serve = (run(arrivals, system).waits_s()[0] for system in ("kserve", "ray_serve"))
    assert kserve == pytest.approx(ray_serve + CONTAINER_S, abs=0.1)


def test_a_calibration_of_a_real_node_is_the_simulated_ones_disk(tmp_path: Path) -> None:
    profile = DeviceProfile(
        device=DeviceIdentity(filesystem_id=1, kind="ext4", source="/dev/nvme0n1", size_bytes=10**12), reader="pread",
        direct=True, chunk_bytes=2**24, reads=(Alone(1, 1e9), Alone(4, 3e9)), writes=(Alone(1, 1e9),), together=(),
        reading_threads=4, measured_at=datetime(2026, 1, 1, tzinfo=UTC), package_version="1",
    )  # fmt: skip
    path = tmp_path / "disk_profile.json"
    path.write_bytes(msgspec.json.encode(profile))
    described = calibrated(SMALL, path)
    assert described.hardware.ssd_bytes_per_s == 3e9
    first = run([Arrival(0.0, 0, 50, 10)], described=described).seen[0]
    assert 4.4 < first.wait_s < 4.8
    path.write_text("{}")
    with pytest.raises(ConfigInvalid, match="damaged"):
        calibrated(SMALL, path)
    ran = cli("--calibration", tmp_path / "none.json")
    assert ran.returncode == 1 and "none.json: No such file" in ran.stderr


def test_many_models_are_registered_and_two_runs_of_many_nodes_are_the_same_to_the_byte() -> None:
    models = (Models(shape="opt-6.7b", count=120),)
    many = Description(nodes=12, copies=1, machine="h100", models=models, concurrency=4, gateways=3)
    dice = random.Random(7)
    arrivals = gamma_arrivals(dice, seconds=5, per_s=20, parts=zipf(120), lengths=LENGTHS["gsm8k"])
    first, again = (msgspec.msgpack.encode(run(arrivals, described=many)) for _ in range(2))
    assert first == again and len(arrivals) > 30


def test_clients_ask_the_gateways_and_instances_run_on_nodes_that_nobody_asks() -> None:
    world = World(changed(SMALL, "gateways=1,copies=2"), SYSTEMS["ours"])
    assert [world.means().config_of(name).roles for name in world.names] == ["gateway,controller,worker", "worker"]
    answered = evaluate(world, [Arrival(0.0, number % 4, 50, 100) for number in range(8)], seed=1)
    assert not answered.errors() and {one.node for one in answered.seen} == {"n0001", "n0002"}


def cli(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([CLI, "simulate", *arguments], capture_output=True, text=True, timeout=120, env=os.environ)


def test_the_command_compares_systems_and_variants_and_writes_a_page(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    ran = cli("--seconds", "20", "--systems", "ours,ray_serve", "--what-if", "nodes=+1", "--html", page, "--json")
    assert ran.returncode == 0, ran.stderr
    answer: dict[str, Any] = json.loads(ran.stdout)
    assert list(answer) == ["ours", "ray_serve", "ours nodes=+1", "ray_serve nodes=+1"]
    assert all(one["failed"] == 0 and one["requests"] > 0 for one in answer.values())
    assert answer["ours"]["wait_mean_s"] < answer["ray_serve"]["wait_mean_s"]
    text = page.read_text()
    assert text.count("<svg") == 4 and all(name in text for name in answer)
    # Nothing that a browser would fetch.
    assert not re.search(r'(?:src|href)="(?!#)', re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL))


def test_who_waits_for_longer_than_the_time_limit_has_failed() -> None:
    answered = run(BURST, "ray_serve", changed(SMALL, "timeout_s=2"))
    assert answered.errors().total() == len(BURST) and answered.errors().keys() <= {"deadline_exceeded", "no_capacity"}


def test_a_system_or_lengths_that_are_unknown_are_refused() -> None:
    for arguments, said in (
        (["--systems", "magic"], "there is no system 'magic'"),
        (["--lengths", "no"], "lengths are"),
    ):
        ran = cli(*arguments)
        assert ran.returncode == 1 and said in ran.stderr and "Traceback" not in ran.stderr


def test_minutes_of_a_functions_trace_are_replayed_in_intervals(tmp_path: Path) -> None:
    path = tmp_path / "inv.csv"
    path.write_text("HashFunction,minute_1,minute_2,minute_3\na,3,0,0\nb,0,2,0\nc,1,0,0\n")
    asked = Workload(None, path, "gsm8k", 2.0, 100.0, 1, bin_s=60)
    first, second = ({one.at_s // 60 for one in asked.arrivals(2) if one.model == model} for model in (0, 1))
    assert (first, second) == ({0.0}, {1.0})
    for wrong, said in (
        (asked._replace(functions=None), "--bin-s joins the minutes of --functions"),
        (asked._replace(trace=path), "without --trace"),
        (asked._replace(bin_s=90), "whole minutes, .*, not 90"),
        (asked._replace(bin_s=120, seconds=130.0), "has 3 minutes, and 4 are needed"),
    ):
        with pytest.raises(InvalidInput, match=said):
            wrong.arrivals(2)
    ran = cli("--seconds", "60", "--functions", path, "--bin-s", "60", "--json")
    answer = json.loads(ran.stdout)["ours"]
    assert ran.returncode == 0 and answer["requests"] > 0 and answer["over_least"] >= answer["over_first_come"] > 0
    assert cli("--functions", path, "--bin-s", "0").returncode == 2


def test_how_bursty_requests_are_can_be_asked_for() -> None:
    def cv_of(workload: Workload) -> float:
        moments = [one.at_s for one in workload.arrivals(1)]
        gaps = [later - earlier for earlier, later in itertools.pairwise(moments)]
        return statistics.stdev(gaps) / statistics.fmean(gaps)

    asked = Workload(None, None, "gsm8k", 2.0, 5_000.0, 1)
    assert cv_of(asked) > 4
    assert cv_of(asked._replace(cv=1.0)) == pytest.approx(1.0, rel=0.1)
    steady, bursty = (cli("--seconds", "20", "--cv", cv, "--json") for cv in ("0.5", "8"))
    assert (steady.returncode, bursty.returncode) == (0, 0)
    assert json.loads(steady.stdout)["ours"]["wait_mean_s"] < json.loads(bursty.stdout)["ours"]["wait_mean_s"]
    assert cli("--cv", "0").returncode == 2
