"""The aiohttp server: middlewares, bind, stop."""

from __future__ import annotations

import errno
import hmac
import ipaddress
import logging
import socket
from collections.abc import Awaitable, Callable

from aiohttp import web

from sllm_actor.errors import AddressInUse, ConfigInvalid, InvalidRequest, SllmError
from sllm_actor.frontend import admin_api, http_errors, openai_api
from sllm_actor.frontend.gateway import GATEWAY, REQUEST_ID, Gateway, json_response, request_id_of

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
OPEN_PATHS = frozenset({"/health", "/ready", "/version"})
SHUTDOWN_TIMEOUT_S = 2.0


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach a bind to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def build_app(gateway: Gateway, api_key: str) -> web.Application:
    """Put the routes behind the middlewares."""

    @web.middleware
    async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
        request[REQUEST_ID] = request_id_of(request)
        try:
            response = await handler(request)
        except SllmError as error:
            response = json_response(
                http_errors.body_of(error),
                status=http_errors.status_of(error),
                headers=http_errors.headers_of(error),
            )
        except ConnectionError:
            # Whoever would read an answer has gone.
            response = web.Response()
        except web.HTTPException as error:
            text = error.text or error.reason
            code = "body_too_large" if error.status == 413 else error.reason.lower().replace(" ", "_")
            headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
            response = json_response(
                http_errors.body(text, error.status, code=code), status=error.status, headers=headers
            )
        if not response.prepared:
            response.headers["X-Request-Id"] = request[REQUEST_ID]
        return response

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

    app = web.Application(middlewares=[answer_errors, guard], client_max_size=gateway.limits.max_body_bytes, logger=log)
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


class HttpServer:
    """Owns the listening socket and the connections. Belongs to one event loop."""

    def __init__(self, gateway: Gateway, api_key: str) -> None:
        self._gateway = gateway
        self._runner = web.AppRunner(
            build_app(gateway, api_key),
            handler_cancellation=True,
            access_log=None,
            shutdown_timeout=SHUTDOWN_TIMEOUT_S,
        )
        self._site: web.SockSite | None = None
        self.url = ""

    async def start(self, listening: socket.socket) -> None:
        """Serve on a socket that `bind` gave."""
        await self._runner.setup()
        self._site = web.SockSite(self._runner, listening)
        await self._site.start()
        host, port = listening.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def drain(self) -> None:
        """Take no new connections and begin no new answers; wait for those that run, within the drain time."""
        self._gateway.draining = True
        if self._site is not None:
            await self._site.stop()
        if not await self._gateway.drained():
            log.warning("some answers were cut off: the drain time is over")

    async def close(self) -> None:
        """Close every connection."""
        await self._runner.cleanup()


def bind(host: str, port: int, *, has_key: bool) -> socket.socket:
    """Bind and listen.

    Raises:
        ConfigInvalid: an address off loopback without an API key, or one that is not this machine's.
        AddressInUse: the port is taken.
    """
    if not is_loopback(host) and not has_key:
        raise ConfigInvalid(
            f"host: {host} can be reached from other machines; set api_key_file, or bind 127.0.0.1",
            param="host",
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(1024)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(f"port {port} of {host} is in use; choose another with --port", param="port") from None
        raise ConfigInvalid(f"can't bind {host}:{port}: {error.strerror or error}", param="host") from None
    listening.setblocking(False)
    return listening
