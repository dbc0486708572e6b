"""The routes behind their middlewares: errors become answers, strangers are turned away."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import Awaitable, Callable

from aiohttp import web

from sllm_actor.domain.roles import Role
from sllm_actor.errors import InvalidRequest, SllmError
from sllm_actor.frontend import access_log, admin_api, events_api, http_errors, openai_api, page
from sllm_actor.frontend.board import Board
from sllm_actor.frontend.connections import Connection
from sllm_actor.frontend.gateway import GATEWAY, REQUEST_ID, Gateway, json_response, request_id_of, trace_of
from sllm_actor.frontend.turns import REQUEST_UNITS
from sllm_actor.frontend.visit import VISIT, Visit

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
OPEN_PATHS = frozenset({"/health", "/ready", "/version"})
# The rest of what is sent after these is not waited for.
CLOSING = frozenset({408, 413})
# As nginx counts those who hang up; nobody is sent it.
CLIENT_LEFT = 499


@web.middleware
async def attend(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Keep the connection busy meanwhile, and give the request its id and its visit."""
    gateway = request.app[GATEWAY]
    connection = request.protocol
    assert isinstance(connection, Connection)
    request_id = request_id_of(request)
    request[REQUEST_ID] = request_id
    visit = Visit(request_id, request.method, _route_of(request), gateway.clock)
    VISIT.set(visit)
    connection.begin()
    try:
        await gateway.turns.first.take(REQUEST_UNITS)
        response = await handler(request)
        visit.status = response.status
    except asyncio.CancelledError:
        # A client may hang up as soon as it has read the end.
        visit.status = 200 if visit.finish else CLIENT_LEFT
        visit.finish = visit.finish or "abort"
        raise
    finally:
        connection.end(request)
        visit.end_s = gateway.clock.monotonic_s()
        gateway.metrics.note(visit)
        access_log.write(visit)
        if gateway.telemetry is not None and visit.prompt_tokens:
            gateway.tasks.spawn(gateway.telemetry.trace(visit, trace_of(request)), "spans")
    if not response.prepared:
        response.headers["X-Request-Id"] = request_id
        response.headers.update(visit.limits)
        if response.status in CLOSING or (response.status == 503 and not request.content.is_eof()):
            response.force_close()
    return response


def _route_of(request: web.Request) -> str:
    """Give the pattern that the path has matched: of these there are few, of paths any number."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "none"


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give what went wrong the shape of all errors."""
    try:
        return await handler(request)
    except SllmError as error:
        VISIT.get().code = error.code
        return json_response(
            http_errors.body_of(error),
            status=http_errors.status_of(error),
            headers=http_errors.headers_of(error),
        )
    except web.HTTPException as error:
        text = error.text or error.reason
        code = "body_too_large" if error.status == 413 else error.reason.lower().replace(" ", "_")
        VISIT.get().code = code
        headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
        return json_response(http_errors.body(text, error.status, code=code), status=error.status, headers=headers)
    except ConnectionError:
        # Whoever would read an answer has gone, or did not read it.
        VISIT.get().finish = "abort"
        return web.Response(status=CLIENT_LEFT)


@web.middleware
async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn away who has no key, or has used it up."""
    gateway = request.app[GATEWAY]
    if not gateway.access.needs_key and not _is_own_name(request.host):
        # A page elsewhere whose name was pointed at loopback must not reach a node without a key.
        raise InvalidRequest(f"the Host header {request.host!r} is not a name of this node")
    if request.path in OPEN_PATHS or page.is_open(request.path):
        return await handler(request)
    visit = VISIT.get()
    key = visit.key = gateway.access.admit(request.headers.get("Authorization", ""), request.path)
    if request.path.startswith("/v1/"):
        gateway.check_role(Role.GATEWAY)
    if key is None or not _generates(request):
        return await handler(request)
    limits = gateway.access.limits
    visit.limits = limits.enter(key, gateway.clock.monotonic_s())
    try:
        return await handler(request)
    finally:
        limits.leave(key, visit.prompt_tokens + visit.generated_tokens, gateway.clock.monotonic_s())


def _generates(request: web.Request) -> bool:
    """Tell whether a request's tokens are counted: one for an answer, or for the rest of one."""
    if request.method == "POST":
        return request.path.startswith("/v1/")
    return request.path.startswith("/v1/streams/")


def build_app(gateway: Gateway, log: logging.Logger) -> web.Application:
    """Put the routes behind the middlewares."""
    middlewares = [attend, answer_errors, guard]
    app = web.Application(middlewares=middlewares, client_max_size=gateway.limits.max_body_bytes, logger=log)
    app[GATEWAY] = gateway
    app[events_api.BOARD] = Board(gateway)
    for routes in (openai_api.routes, admin_api.routes, events_api.routes, page.routes):
        app.add_routes(routes)
    return app


def _is_own_name(host: str) -> bool:
    name = host.rsplit(":", 1)[0] if host.count(":") == 1 else host.partition("]")[0].lstrip("[")
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name == "localhost"
    return True
