"""`/admin/events`: what the page shows, as server-sent events, for as long as somebody watches.

The first event, `snapshot`, has every part of it; each `change` behind it the parts that are no longer what they were.
Source: WHATWG HTML, "Server-sent events".
"""

from __future__ import annotations

from aiohttp import web

from sllm_actor.errors import SllmError
from sllm_actor.frontend.board import Board, Parts
from sllm_actor.frontend.gateway import GATEWAY, Gateway, encode_json
from sllm_actor.frontend.http_errors import body_of
from sllm_actor.frontend.sse import HEADERS, write_on

BOARD = web.AppKey("board", Board)
routes = web.RouteTableDef()


@routes.get("/admin/events", allow_head=False)
async def events(request: web.Request) -> web.StreamResponse:
    gateway, board = request.app[GATEWAY], request.app[BOARD]
    response = web.StreamResponse(headers=HEADERS)
    with board.watching():
        try:
            async with gateway.until_stop():
                await _tell(request, response)
        except SllmError as error:
            if not response.prepared:
                raise
            await write_on(request, response, _event("error", encode_json(body_of(error))))
    await response.write_eof()
    return response


async def _tell(request: web.Request, response: web.StreamResponse) -> None:
    """Write what has changed after each look, until the client leaves or may not watch any longer."""
    gateway, board = request.app[GATEWAY], request.app[BOARD]
    told: Parts = {}
    told_s = 0.0
    while True:
        parts = await board.look()
        now_s = gateway.clock.monotonic_s()
        changed = {name: part for name, part in parts.items() if told.get(name) != part}
        if not response.prepared:
            await response.prepare(request)
        if changed:
            await write_on(request, response, _event("change" if told else "snapshot", _content(gateway, changed)))
        elif now_s - told_s >= gateway.limits.heartbeat_interval_s:
            await write_on(request, response, b": nothing has changed\n\n")
        if changed or now_s - told_s >= gateway.limits.heartbeat_interval_s:
            told_s = now_s
        told = parts
        await gateway.clock.sleep(gateway.limits.watch_interval_s)
        # A key that was revoked meanwhile ends what it has begun.
        gateway.access.admit(request.headers.get("Authorization", ""), request.path)


def _content(gateway: Gateway, parts: Parts) -> bytes:
    """Write parts that are JSON already; the moment is on both clocks, as timelines have the monotonic one."""
    clock = gateway.clock
    moment = encode_json({"wall_s": clock.wall_s(), "monotonic_s": clock.monotonic_s()})
    return b'{"moment":%b,"parts":{%b}}' % (
        moment,
        b",".join(b"%b:%b" % (encode_json(name), part) for name, part in parts.items()),
    )


def _event(kind: str, content: bytes) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), content)
