"""Why a model started where it did: asked of the Scheduler, over HTTP and at the terminal."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import SMALL
from test_cli import cli, cli_json
from test_metrics import look, value
from test_scheduler import LIMITS, MIB, HandClock, Manager, ask, question, report, scheduler, view
from test_scheduler import clock as clock
from test_scheduler import system as system
from test_supervision import now_s, virtual_system, virtually

from sllm_actor.actors import Scheduler
from sllm_actor.actors.decision_log import DecisionLog
from sllm_actor.actors.start_counts import StartCounts
from sllm_actor.domain import ModelName, RequestId
from sllm_actor.errors import NoCapacity, RequestNotFound
from sllm_actor.messages.declare import changed
from sllm_actor.messages.explanation import ExplainPlacement, Explanation
from sllm_actor.messages.placement import PlaceModel
from sllm_actor.policy.explaining import refused
from sllm_actor.runtime import ActorSystem
from sllm_actor.testing.node_process import NodeProcess, running_node

pytestmark = pytest.mark.usefixtures("warm_starts")


async def why(system: ActorSystem, request_id: str = "for-new") -> Explanation:
    question = ExplainPlacement(request_id=RequestId(request_id))
    explanation: Explanation = await scheduler(system).ask(question, timeout_s=60)
    return explanation


async def start(system: ActorSystem, clock: HandClock, took_s: float, **ended: Any) -> Explanation:
    scheduler(system).tell(report())
    placement = await ask(system, question())
    clock.now_s += took_s
    failed = (placement.placement_id,) if ended.get("failed") else ()
    scheduler(system).tell(report(ended=(placement.placement_id,), failed=failed))
    return await why(system)


async def test_a_decision_knows_what_was_expected_and_then_what_was_seen(system: ActorSystem, clock: HandClock) -> None:
    scheduler(system).tell(report())
    placement = await ask(system, question())
    assert (await why(system)).outcome == "granted"
    clock.now_s += 3.0
    scheduler(system).tell(report(ended=(placement.placement_id,)))
    explanation = await why(system)
    assert (explanation.outcome, explanation.observed_s) == ("started", 3.0)
    assert explanation.predicted_s == pytest.approx(1024 * 1024 / 1e9)


async def test_what_a_start_took_is_expected_of_the_next_one_and_what_failed_teaches_nothing(
    system: ActorSystem, clock: HandClock
) -> None:
    assert (await start(system, clock, took_s=50.0, failed=True)).outcome == "failed"
    assert (await start(system, clock, took_s=3.0)).predicted_s < 0.1
    assert (await start(system, clock, took_s=3.0)).predicted_s == pytest.approx(3.0)


async def test_a_place_that_nobody_used_is_told_apart_and_teaches_nothing(
    system: ActorSystem, clock: HandClock
) -> None:
    scheduler(system).tell(report())
    await ask(system, question())
    clock.now_s += 61
    scheduler(system).tell(report())
    assert (await why(system)).outcome == "expired"
    assert (await start(system, clock, took_s=1.0)).predicted_s < 0.1


async def test_instances_that_were_given_up_for_a_start_are_named(system: ActorSystem) -> None:
    manager = Manager(report(slots=1, instances=[view("old")]))
    await system.spawn(manager, "manager")
    scheduler(system).tell(manager.report)
    await ask(system, question())
    assert (await why(system)).given_up == ("old-1",)


async def test_one_who_waited_in_vain_is_told_for_what(system: ActorSystem) -> None:
    scheduler(system).tell(report(slots=1, instances=[view("busy", active=1)]))
    with pytest.raises(NoCapacity):
        await ask(system, question(timeout_s=0.01))
    explanation = await why(system)
    assert (explanation.outcome, explanation.chosen) == ("waited in vain", None)
    assert explanation.reason == "no node would have room, whichever idle instances were given up"
    with pytest.raises(RequestNotFound):
        await why(system, "never-asked")


def test_the_oldest_decision_is_forgotten_and_a_newer_one_of_a_request_takes_its_place() -> None:
    def decision(name: str, reason: str = "") -> Explanation:
        asked = PlaceModel(
            request_id=RequestId(name), model=ModelName("m"), fingerprint="f", size_bytes=1, host_bytes=1, timeout_s=1.0
        )
        return refused(asked, "startup_time", reason, waited_s=0.0)

    log = DecisionLog(history=2)
    for name in ("a", "b", "a", "c"):
        log.note(decision(name))
    with pytest.raises(RequestNotFound):
        log.find(RequestId("b"))
    log.note(decision("a", "once more"))
    log.end(RequestId("a"), "failed", 2.0)
    log.end(RequestId("b"), "failed", 2.0)
    found = log.find(RequestId("a"))
    assert (found.reason, found.outcome, found.observed_s) == ("once more", "failed", 2.0)
    assert log.find(RequestId("c")).outcome == "waited in vain"


@virtually
async def test_a_wait_for_the_best_node_ends_by_itself_and_holds_nobody_up() -> None:
    made = virtual_system()
    limits = LIMITS._replace(placement_policy="locality_wait", locality_wait_s=7.0)
    await made.spawn(Scheduler(made.clock, limits, StartCounts()), "scheduler")
    full = report(slots=1, instances=[view("busy", active=1)])
    scheduler(made).tell(full)
    scheduler(made).tell(report(name="node-2", on_ssd=("elsewhere",)))
    begin_s = now_s()
    waiting = asyncio.ensure_future(ask(made, question()))
    assert (await ask(made, question("elsewhere"))).node == "node-2"
    assert now_s() == begin_s
    assert (await waiting).node == "node-2"
    assert now_s() == begin_s + 7.0
    await made.close()


@virtually
async def test_a_wait_for_a_place_that_is_not_free_in_time_ends_by_itself_and_holds_nobody_up() -> None:
    """From the SSD it takes ten seconds; where it is in host memory an answer runs, as long as it has run."""
    made = virtual_system()
    await made.spawn(Scheduler(made.clock, LIMITS, StartCounts()), "scheduler")
    # What runs there has no room elsewhere that it could move to.
    large = changed(view("busy", active=1), running_s=2.0, host_bytes=60 * MIB)
    scheduler(made).tell(changed(report(slots=1, instances=[large]), host_fingerprints=("new",)))
    kept = changed(view("kept", active=1), host_bytes=60 * MIB)
    scheduler(made).tell(changed(report(name="node-2", slots=3, instances=[kept]), ssd_bytes_per_s=MIB / 10.0))
    begin_s = now_s()
    waiting = asyncio.ensure_future(ask(made, question()))
    other = await ask(made, question("other"))
    assert (other.node, now_s()) == ("node-2", begin_s)
    assert (await waiting).node == "node-2"
    # It has run for 5.9 seconds then, is expected to do so as long again, and leaves within a fifth of one.
    assert now_s() == pytest.approx(begin_s + 3.9)
    await made.close()


# A node.


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A node whose model was started once, by `cold`, and then asked by `warm`."""
    with running_node(tmp_path_factory.mktemp("node"), *SMALL) as node:
        node.deploy("builtin:demo", "demo")
        for name in ("cold", "warm"):
            body = {"model": "demo", "prompt": "1 + 1", "max_tokens": 1}
            assert node.request("POST", "/v1/completions", body, {"X-Request-Id": name}).status == 200
        yield node


def test_a_cold_request_shows_the_candidates_and_how_good_the_estimate_was(asked: NodeProcess) -> None:
    answer = asked.call("GET", "/admin/explain/cold")
    decision = answer["decision"]
    assert (answer["start_of"], answer["node"], decision["outcome"]) == ("cold", "node-1", "started")
    assert answer["text"] == decision["reason"]
    assert "node-1 reads 3.4 MB at" in answer["text"]
    (candidate,) = decision["candidates"]
    assert candidate == decision["chosen"]
    assert [term["name"] for term in candidate["terms"]] == ["queue", "bytes", "engine"]
    assert decision["observed_s"] > 0
    assert value(look(asked), "start_estimate_error_ratio_count", tier="ssd") == 1
    assert value(look(asked), "start_estimate_error_ratio_bucket", tier="ssd", le="+Inf") == 1


def test_a_warm_request_names_its_instance_and_one_that_is_unknown_is_a_404(asked: NodeProcess) -> None:
    answer = asked.call("GET", "/admin/explain/warm")
    assert answer["decision"] is None
    assert answer["text"] == "was routed to running instance demo-1 on node-1, which had no other request"
    assert asked.request("GET", "/admin/explain/nobody").status == 404


def test_the_terminal_explains_as_a_table_and_as_json(asked: NodeProcess) -> None:
    there = ("--url", asked.url)
    shown = cli("explain", "cold", *there)
    assert shown.returncode == 0
    assert "chosen" in shown.stdout
    assert "policy startup_time, waited" in shown.stdout
    assert "were expected" in shown.stdout
    assert "running instance demo-1" in cli("explain", "warm", *there).stdout
    assert cli_json("explain", "cold", *there) == asked.call("GET", "/admin/explain/cold")
    assert cli_json("explain", "nobody", *there, status=1)["error"]["code"] == "request_not_found"
