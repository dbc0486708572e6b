"""The routes behind their middlewares: errors become answers, strangers are turned away."""

from __future__ import annotations

import hmac
import ipaddress
import logging
from collections.abc import Awaitable, Callable

from aiohttp import web

from sllm_actor.errors import InvalidRequest, SllmError
from sllm_actor.frontend import admin_api, http_errors, openai_api
from sllm_actor.frontend.connections import Connection
from sllm_actor.frontend.gateway import GATEWAY, REQUEST_ID, Gateway, json_response, request_id_of

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
OPEN_PATHS = frozenset({"/health", "/ready", "/version"})
# The rest of what is sent after these is not waited for.
CLOSING = frozenset({408, 413})


@web.middleware
async def attend(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Keep the connection busy meanwhile, and give the request its id."""
    connection = request.protocol
    assert isinstance(connection, Connection)
    request[REQUEST_ID] = request_id_of(request)
    connection.begin()
    try:
        response = await handler(request)
    finally:
        connection.end(request)
    if not response.prepared:
        response.headers["X-Request-Id"] = request[REQUEST_ID]
        if response.status in CLOSING:
            response.force_close()
    return response


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give what went wrong the shape of all errors."""
    try:
        return await handler(request)
    except SllmError as error:
        return json_response(
            http_errors.body_of(error),
            status=http_errors.status_of(error),
            headers=http_errors.headers_of(error),
        )
    except web.HTTPException as error:
        text = error.text or error.reason
        code = "body_too_large" if error.status == 413 else error.reason.lower().replace(" ", "_")
        headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
        return json_response(http_errors.body(text, error.status, code=code), status=error.status, headers=headers)
    except ConnectionError:
        # Whoever would read an answer has gone.
        return web.Response()


def build_app(gateway: Gateway, api_key: str, log: logging.Logger) -> web.Application:
    """Put the routes behind the middlewares."""

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if api_key:
            given = request.headers.get("Authorization", "").removeprefix("Bearer ")
            known = hmac.compare_digest(given.encode(), api_key.encode())
            if not known and request.path not in OPEN_PATHS:
                text = "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'"
                return json_response(http_errors.body(text, 401, code="invalid_api_key"), status=401)
        elif not _is_own_name(request.host):
            # A page elsewhere whose name was pointed at loopback must not reach a node without a key.
            raise InvalidRequest(f"the Host header {request.host!r} is not a name of this node")
        return await handler(request)

    middlewares = [attend, answer_errors, guard]
    app = web.Application(middlewares=middlewares, client_max_size=gateway.limits.max_body_bytes, logger=log)
    app[GATEWAY] = gateway
    app.add_routes(openai_api.routes)
    app.add_routes(admin_api.routes)
    return app


def _is_own_name(host: str) -> bool:
    name = host.rsplit(":", 1)[0] if host.count(":") == 1 else host.partition("]")[0].lstrip("[")
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name == "localhost"
    return True
