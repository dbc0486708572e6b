"""`/metrics` says what was asked: read with Prometheus' own parser and compared with the answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from clusters import eventually
from conftest import SMALL
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from sllm_actor.domain import RequestId
from sllm_actor.frontend.metrics import MAX_MODELS, Metrics
from sllm_actor.frontend.node_metrics import MAX_ACTORS, render
from sllm_actor.frontend.visit import Visit
from sllm_actor.runtime import SystemClock
from sllm_actor.runtime.stats import ActorStats, SystemStats
from sllm_actor.testing.node_process import NodeProcess, running_node

pytestmark = pytest.mark.usefixtures("warm_starts")

CHAT = "/v1/chat/completions"
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parsed(text: str) -> Samples:
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples.get((f"sllm:{name}", frozenset(labels.items())), 0.0)


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A node of which nobody has asked anything yet."""
    with running_node(tmp_path_factory.mktemp("node"), *SMALL) as node:
        node.deploy("builtin:demo", "demo")
        yield node


def look(node: NodeProcess) -> Samples:
    reply = node.request("GET", "/metrics")
    assert reply.headers["Content-Type"].startswith("text/plain; version=")
    return parsed(reply.body.decode())


def ask(content: str = "What is 1 + 1?", **options: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": [{"role": "user", "content": content}], **options}


def test_metrics_say_what_was_asked_and_answered(counted: NodeProcess) -> None:
    used = [counted.call("POST", CHAT, ask(f"What is {number} + 1?"))["usage"] for number in range(3)]
    cut = counted.call("POST", CHAT, ask("Count from 1 to 900.", max_tokens=7))["usage"]
    streamed = list(counted.stream(CHAT, ask(stream_options={"include_usage": True})))[-1]["usage"]
    used += [cut, streamed]
    assert counted.request("POST", CHAT, ask() | {"model": "absent"}).status == 404
    assert counted.request("POST", CHAT, ask(temperature=9)).status == 400
    events = counted.stream(CHAT, ask("Count from 1 to 999."), {"X-Request-Id": "leaver"})
    next(events)
    # A stream's end is counted just after its last byte has gone out.
    while value(during := look(counted), "request_success_total", model_name="demo", finished_reason="stop") < 4:
        pass
    events.close()
    eventually(lambda: counted.call("GET", "/admin/requests/leaver")["outcome"] != "running")
    while value(samples := look(counted), "request_success_total", model_name="demo", finished_reason="abort") < 1:
        pass

    name = {"model_name": "demo"}
    assert value(during, "num_requests_running", **name) == 1
    assert value(samples, "num_requests_running", **name) == value(samples, "num_requests_waiting", **name) == 0
    assert value(samples, "request_success_total", **name, finished_reason="stop") == 4
    assert value(samples, "request_success_total", **name, finished_reason="length") == 1
    answers = sum(usage["completion_tokens"] for usage in used)
    assert value(during, "generation_tokens_total", **name) == answers
    assert value(during, "request_generation_tokens_sum", **name) == answers
    assert value(during, "prompt_tokens_total", **name) == sum(usage["prompt_tokens"] for usage in used)
    for histogram in ("time_to_first_token", "e2e_request_latency"):
        assert value(samples, f"{histogram}_seconds_count", **name) == 6
        assert value(samples, f"{histogram}_seconds_sum", **name) > 0
    assert value(samples, "time_per_output_token_seconds_count", **name) >= 5
    assert value(samples, "inter_token_latency_seconds_count", **name) > 10
    assert value(samples, "requests_rejected_total", reason="model_not_found") == 1
    assert value(samples, "requests_rejected_total", reason="invalid_request") == 1
    assert value(samples, "http_requests_total", method="POST", route=CHAT, status="200") == 5
    assert value(samples, "http_requests_total", method="POST", route=CHAT, status="404") == 1
    assert value(samples, "http_requests_total", method="POST", route=CHAT, status="499") == 1


def test_metrics_tell_of_starts_and_of_the_node(counted: NodeProcess) -> None:
    counted.call("POST", "/admin/models/demo/unload")
    before = look(counted)
    counted.chat("demo", "What is 1 + 1?")
    after = look(counted)
    assert value(after, "placements_total") == value(before, "placements_total") + 1
    loads = [labels for name, labels in after if name == "sllm:load_seconds_count"]
    changed = sum(value(after, "load_seconds_count", **dict(labels)) for labels in loads)
    assert changed == sum(value(before, "load_seconds_count", **dict(labels)) for labels in loads) + 1
    assert value(after, "actor_handled_total", actor="router") > 0
    assert ("sllm:actor_mailbox_depth", frozenset({("actor", "scheduler")})) in after
    assert value(after, "connections", state="open") >= 1
    assert value(after, "host_pool_bytes") == 64 * 2**20
    assert ("sllm:loop_lag_worst_seconds", frozenset()) in after


def test_paths_and_methods_that_clients_make_up_make_no_series(counted: NodeProcess) -> None:
    for number in range(5):
        assert counted.request("GET", f"/made/up/{number}").status == 404
        assert counted.request("GET", f"/v1/models/made-up-{number}").status == 404
        assert counted.request("BREW", "/health").status in (400, 404, 405)
    samples = look(counted)
    assert not [
        labels for _, labels in samples if any(text.startswith(("/made", "made-up", "BREW")) for _, text in labels)
    ]
    assert value(samples, "http_requests_total", method="GET", route="none", status="404") == 5
    assert value(samples, "http_requests_total", method="GET", route="/v1/models/{name}", status="404") == 5


def test_labels_of_models_and_actors_are_bounded_and_registries_are_their_own() -> None:
    metrics, other = Metrics(), Metrics()
    for number in range(2 * MAX_MODELS):
        visit = Visit(RequestId("r"), "POST", CHAT, SystemClock())
        visit.model, visit.prompt_tokens, visit.finish = f"m{number}", 1, "stop"
        metrics.of(visit.model)
        metrics.note(visit)
    samples = parsed(generate_latest(metrics.registry).decode())
    assert len([name for name, _ in samples if name == "sllm:prompt_tokens_total"]) == MAX_MODELS + 1
    assert value(samples, "prompt_tokens_total", model_name="other") == MAX_MODELS
    assert value(samples, "request_success_total", model_name="other", finished_reason="stop") == MAX_MODELS
    assert "m0" not in generate_latest(other.registry).decode()


def test_of_many_actors_the_fullest_are_shown() -> None:
    actors = tuple(
        ActorStats(name=f"a{number}", mailbox_depth=number, handled=0, busy_s=0, restarts=0) for number in range(1000)
    )
    seen: dict[str, Any] = {
        "system": SystemStats(node="n", dead_letters=0, actors=actors, links=()),
        "loop_lag": {"worst_s": 0.5, "faults": 2},
        "loader": {"pool": {"size_bytes": 5, "free_bytes": 3}},
        "waiting": {"m": 2},
        "in_progress": {"m": 5},
        "starts": {
            "placements": 1,
            "recovered": 0,
            "preempted": 6,
            "rooms": {"made": 1},
            "fetches": {"come": 3},
            "failed": {},
            "loads": {"ssd": {"count": 2, "seconds": 1.5, "bytes": 7}},
            "estimate_errors": {"bounds": (0.1, 1.0), "tiers": {"ssd": {"counts": [1, 2, 1], "sum": 4.5}}},
        },
        "migrations": {
            "outcomes": {"moved": 3, "aborted": 1},
            "rounds": 7,
            "tokens": 900,
            "bytes": 3600,
            "recomputed_s": 1.5,
        },
        "streams": {"live": 4, "left": 1, "resumed": 2, "failures": 0, "lag_s": 0.25},
        "connections": {"counts": {"open": 1}, "closed": {}},
    }
    samples = parsed(render(Metrics().registry, seen).decode())
    moved = [value for name, value in samples.items() if "sllm:migrations_total" in str(name) and "moved" in str(name)]
    assert moved == [3]
    assert value(samples, "migration_recompute_seconds_total") == 1.5
    depths = [labels for name, labels in samples if name == "sllm:actor_mailbox_depth"]
    assert len(depths) == MAX_ACTORS
    assert value(samples, "actor_mailbox_depth", actor="a999") == 999
    assert (value(samples, "num_requests_waiting", model_name="m"), value(samples, "loop_lag_faults_total")) == (2, 2)
    assert value(samples, "num_requests_running", model_name="m") == 3
    assert (value(samples, "kept_streams", state="left"), value(samples, "stream_log_lag_seconds")) == (1, 0.25)
    assert (value(samples, "preemptions_total"), value(samples, "rooms_made_total", outcome="made")) == (6, 1)
    assert value(samples, "bytes_first_total", outcome="come") == 3
    assert value(samples, "load_seconds_sum", tier="ssd") == 1.5
