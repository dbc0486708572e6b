"""What `/metrics` shows of the node itself, from one look at it: nothing is counted here."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)

# Of more actors than these, those whose mailboxes are the fullest are shown.
MAX_ACTORS = 200
MAX_LINKS = 1000
GAUGE = GaugeMetricFamily
COUNTER = CounterMetricFamily


class _Snapshot:
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def render(registry: CollectorRegistry, seen: Mapping[str, Any]) -> bytes:
    """Write a registry's metrics and those of the node's observation `seen` as Prometheus reads them. May be long."""
    node = CollectorRegistry()
    node.register(_Snapshot(list(families(seen))))
    return generate_latest(registry) + generate_latest(node)


def families(seen: Mapping[str, Any]) -> Iterator[Metric]:
    """Give the metrics of the node's observation `seen`."""
    yield from _starts(seen["starts"])
    yield from _migrations(seen["migrations"])
    yield from _streams(seen["streams"])
    waiting = GaugeMetricFamily(
        "sllm:num_requests_waiting", "Requests that wait for a start or a slot.", labels=["model_name"]
    )
    running = GaugeMetricFamily("sllm:num_requests_running", "Requests that are generated.", labels=["model_name"])
    for model, count in seen["in_progress"].items():
        waiting.add_metric([model], seen["waiting"].get(model, 0))
        running.add_metric([model], max(0, count - seen["waiting"].get(model, 0)))
    yield waiting
    yield running
    yield _gauge("loop_lag_worst_seconds", "The latest that the event loop ever was.", seen["loop_lag"]["worst_s"])
    yield _counter("loop_lag_faults", "Times that the event loop was later than allowed.", seen["loop_lag"]["faults"])
    yield _by("connections", "HTTP connections.", "state", seen["connections"]["counts"], GAUGE)
    closed = seen["connections"]["closed"]
    yield _by("connections_closed", "HTTP connections that the node closed.", "reason", closed, CounterMetricFamily)
    pool = seen["loader"]["pool"]
    yield _gauge("host_pool_bytes", "The host pool.", pool["size_bytes"])
    yield _gauge("host_pool_free_bytes", "What no checkpoint holds of it.", pool["free_bytes"])
    yield from _runtime(seen["system"])


def _migrations(seen: Mapping[str, Any]) -> Iterator[Metric]:
    yield _by("migrations", "Moves of running requests that this node saw to.", "outcome", seen["outcomes"], COUNTER)
    yield _counter("migration_rounds", "Times that a destination caught up, and the last time.", seen["rounds"])
    yield _counter("migration_tokens", "Tokens of moved requests, prompts included.", seen["tokens"])
    yield _counter("migration_bytes", "What was sent of them: tokens, and no keys and values.", seen["bytes"])
    yield _counter(
        "migration_recompute_seconds", "Time in which destinations computed what sources had already.",
        seen["recomputed_s"],
    )  # fmt: skip


def _streams(seen: Mapping[str, Any]) -> Iterator[Metric]:
    states = {state: seen[state] for state in ("live", "left")}
    yield _by(
        "kept_streams", "Streams that can be gone on with: live ones, and those that were left.", "state", states, GAUGE
    )
    yield _counter("streams_resumed", "Streams that a client went on with here.", seen["resumed"])
    yield _counter(
        "stream_log_failures", "Times that the metadata store took nothing of the streams.", seen["failures"]
    )
    yield _gauge("stream_log_lag_seconds", "The age of the oldest token that is not written down yet.", seen["lag_s"])


def _starts(starts: Mapping[str, Any]) -> Iterator[Metric]:
    yield _counter("placements", "Places given to models that were to start.", starts["placements"])
    yield _counter("recoveries", "Answers that went on elsewhere after their instance had gone.", starts["recovered"])
    yield _counter("preemptions", "Answers that were ended for more urgent ones, and resumed.", starts["preempted"])
    text = "Times that running answers were to move (migrate) or to end (preempt) for a start, by what came of it."
    yield _by("rooms_made", text, "outcome", starts["rooms"], COUNTER)
    text = "Times that a node was asked for a model's bytes before a device was taken for them, by what came of it."
    yield _by("bytes_first", text, "outcome", starts["fetches"], COUNTER)
    yield _by("starts_failed", "Starts of models that failed.", "reason", starts["failed"], COUNTER)
    seconds = SummaryMetricFamily("sllm:load_seconds", "Loads of weights, by where they came from.", labels=["tier"])
    size = CounterMetricFamily("sllm:load_bytes", "Bytes of weights, by where they came from.", labels=["tier"])
    for tier, load in starts["loads"].items():
        seconds.add_metric([tier], load["count"], load["seconds"])
        size.add_metric([tier], load["bytes"])
    yield seconds
    yield size
    yield _estimate_errors(**starts["estimate_errors"])


def _estimate_errors(bounds: Sequence[float], tiers: Mapping[str, Any]) -> Metric:
    family = HistogramMetricFamily(
        "sllm:start_estimate_error_ratio", "Predicted starts against observed ones, in parts of these.", labels=["tier"]
    )
    edges = [*(str(bound) for bound in bounds), "+Inf"]
    for tier, errors in tiers.items():
        below = itertools.accumulate(errors["counts"])
        family.add_metric([tier], list(zip(edges, below, strict=True)), errors["sum"])
    return family


def _runtime(system: Any) -> Iterator[Metric]:
    actors = sorted(system.actors, key=lambda actor: -actor.mailbox_depth)[:MAX_ACTORS]
    links = system.links[:MAX_LINKS]
    yield _counter("dead_letters", "Messages that could not be delivered.", system.dead_letters)
    depth = {actor.name: actor.mailbox_depth for actor in actors}
    yield _by("actor_mailbox_depth", "Messages in an actor's mailbox.", "actor", depth, GAUGE)
    handled = {actor.name: actor.handled for actor in actors}
    yield _by("actor_handled", "Messages that an actor has handled.", "actor", handled, COUNTER)
    for name, text, kind in (
        ("received_bytes", "Bytes from another node.", COUNTER),
        ("sent_bytes", "Bytes to another node.", COUNTER),
        ("waiting_bytes", "Bytes that wait to be sent to another node.", GAUGE),
        (
            "silences",
            "Times that another node was taken for dead, having said nothing for too long.",
            COUNTER,
        ),
    ):
        values = {link.node: getattr(link, name) for link in links}
        yield _by(f"link_{name}", text, "peer", values, kind)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"sllm:{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"sllm:{name}", text, value=value)


def _by(
    name: str,
    text: str,
    label: str,
    values: Mapping[str, float],
    kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
) -> Metric:
    family = kind(f"sllm:{name}", text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
