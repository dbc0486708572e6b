"""Spans as a collector gets them: a real node, a real receiver of OTLP over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from sllm_actor.testing.node_process import NodeProcess

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT_ID = "00f067aa0ba902b7"


@asynccontextmanager
async def receiver() -> AsyncIterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """Take what is exported; give the endpoint and what has come."""
    exports: list[ExportTraceServiceRequest] = []

    async def take(request: web.Request) -> web.Response:
        assert request.content_type == "application/x-protobuf"
        exports.append(ExportTraceServiceRequest.FromString(await request.read()))
        return web.Response(content_type="application/x-protobuf")

    app = web.Application()
    app.router.add_post("/v1/traces", take)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1/traces", exports
    finally:
        await runner.cleanup()


def ask(start: AbstractContextManager[NodeProcess]) -> None:
    """Ask a cold model twice, first in a trace of the client's own; a node that ends sends what is left."""
    body = {"model": "demo", "messages": [{"role": "user", "content": "What is 47 + 35?"}]}
    with start as node:
        node.deploy("builtin:demo", "demo")
        traced = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "X-Request-Id": "traced"}
        assert node.request("POST", "/v1/chat/completions", body, traced).status == 200
        assert node.request("POST", "/v1/chat/completions", body, {"X-Request-Id": "plain"}).status == 200
        assert node.call("GET", "/admin/requests/plain")["request_id"] == "plain", "its spans are asked for"
        assert node.stop() == (0, [])


async def test_a_collector_gets_a_request_and_the_parts_of_its_start_in_the_clients_trace(
    start_node: Callable[..., AbstractContextManager[NodeProcess]],
) -> None:
    async with receiver() as (endpoint, exports):
        await asyncio.to_thread(ask, start_node(f"otlp_endpoint={endpoint}"))
    resources = [resource for export in exports for resource in export.resource_spans]
    names = {item.key: item.value.string_value for item in resources[0].resource.attributes}
    assert names["service.name"] == "sllm_actor"
    spans = [span for resource in resources for scope in resource.scope_spans for span in scope.spans]
    wholes = {attribute(span, "sllm.request_id"): span for span in spans if span.kind == Span.SPAN_KIND_SERVER}
    traced, plain = wholes["traced"], wholes["plain"]
    assert (traced.trace_id.hex(), traced.parent_span_id.hex()) == (TRACE_ID, PARENT_ID)
    assert traced.name == "POST /v1/chat/completions"
    parts = {span.name: span for span in spans if span.parent_span_id == traced.span_id}
    assert parts.keys() >= {"text", "placement", "load", "skeleton", "attach", "prefill", "decode"}
    for part in parts.values():
        assert part.trace_id == traced.trace_id
        assert traced.start_time_unix_nano <= part.end_time_unix_nano <= traced.end_time_unix_nano
    assert plain.trace_id != traced.trace_id
    assert plain.parent_span_id == b"", "a request of no trace begins one"
    assert "load" not in {span.name for span in spans if span.parent_span_id == plain.span_id}, "it was loaded already"


def attribute(span: Span, name: str) -> str:
    return next(str(item.value.string_value) for item in span.attributes if item.key == name)
