"""Requests as OpenTelemetry spans: the timeline of each becomes child spans of one in the client's trace.

The packages are an extra (`pip install sllm_actor[otel]`); without them, or without an endpoint, nothing is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sllm_actor.domain import RequestId, Timeline
from sllm_actor.errors import ConfigInvalid, RequestNotFound
from sllm_actor.frontend.visit import Visit
from sllm_actor.messages.generation import GetTimeline
from sllm_actor.runtime import ActorRef, Clock
from sllm_actor.runtime.threads import on_thread

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

KNOB = "otlp_endpoint"
NANOSECONDS = 1_000_000_000


class Telemetry:
    """Makes the spans of requests that have ended. Owns the exporter."""

    def __init__(
        self, tracer: Tracer, stop: Callable[[], Any], router: ActorRef, clock: Clock, timeout_s: float
    ) -> None:
        self._tracer = tracer
        self._stop = stop
        self._router = router
        self._clock = clock
        self._timeout_s = timeout_s

    async def trace(self, visit: Visit, trace: bytes | None) -> None:
        """Make the spans of a request."""
        try:
            timeline = await self._router.ask(
                GetTimeline(request_id=RequestId(visit.request_id)), timeout_s=self._timeout_s
            )
        except RequestNotFound:
            # It was none, or is forgotten already.
            return
        self.make(visit, timeline, trace)

    def make(self, visit: Visit, timeline: Timeline, trace: bytes | None) -> None:
        """Make the spans of a timeline; `trace` is the client's trace context, 25 bytes."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        # Spans are on the monotonic clock, which knows no date.
        offset_s = self._clock.wall_s() - self._clock.monotonic_s()

        def at(moment_s: float) -> int:
            return int((moment_s + offset_s) * NANOSECONDS)

        whole = self._tracer.start_span(
            f"{visit.method} {visit.route}", _parent(trace), SpanKind.SERVER, start_time=at(visit.begin_s),
            attributes={
                "http.request.method": visit.method, "http.route": visit.route,
                "http.response.status_code": visit.status, "gen_ai.request.model": visit.model,
                "gen_ai.usage.input_tokens": visit.prompt_tokens, "gen_ai.usage.output_tokens": visit.generated_tokens,
                "gen_ai.response.finish_reasons": [visit.finish] if visit.finish else [],
                "sllm.request_id": visit.request_id, "sllm.cold": timeline.cold,
            },
        )  # fmt: skip
        inside = set_span_in_context(whole)
        for span in timeline.spans:
            attributes: dict[str, str | int] = {"sllm.tier": span.tier} if span.tier else {}
            if span.size_bytes:
                attributes["sllm.size_bytes"] = span.size_bytes
            part = self._tracer.start_span(span.name, inside, start_time=at(span.begin_s), attributes=attributes)
            part.end(at(span.end_s))
        if visit.first_token_s:
            decode = self._tracer.start_span("decode", inside, start_time=at(visit.first_token_s))
            decode.end(at(visit.last_token_s))
        if visit.code:
            whole.set_status(Status(StatusCode.ERROR, visit.code))
        whole.end(at(visit.end_s))

    async def close(self) -> None:
        """Send what is left."""
        await on_thread(self._stop)


def _parent(trace: bytes | None) -> Any:
    from opentelemetry.context import Context
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

    if trace is None:
        return Context()
    return set_span_in_context(
        NonRecordingSpan(
            SpanContext(
                int.from_bytes(trace[:16]), int.from_bytes(trace[16:24]), is_remote=True,
                trace_flags=TraceFlags(trace[24]),
            )
        ),
        Context(),
    )  # fmt: skip


def open_telemetry(endpoint: str, node_id: str, router: ActorRef, clock: Clock, timeout_s: float) -> Telemetry | None:
    """Begin to send spans to `endpoint` (OTLP over HTTP); nothing where it is empty.

    Raises:
        ConfigInvalid: the packages are not installed.
    """
    if not endpoint:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise ConfigInvalid(f"{KNOB} needs other packages: pip install 'sllm_actor[otel]'", param=KNOB) from None
    resource = Resource.create({"service.name": "sllm_actor", "service.instance.id": node_id})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    # Bounded: what a slow collector does not take is dropped.
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return Telemetry(provider.get_tracer("sllm_actor"), provider.shutdown, router, clock, timeout_s)
