"""`/`: a page that shows the node to people. Its files are read once, and nothing of them is made at run time.

Anybody may load them, for they hold nothing of the node: what the page shows, it asks for with the key that it has
been given.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from aiohttp import web

FOLDER = Path(__file__).with_name("page")
INDEX = "index.html"
PREFIX = "/page/"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# Nothing inline, nothing from elsewhere, in nobody's frame.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Asked for each time, and sent again only where it is another one.
    "Cache-Control": "no-cache",
}
routes = web.RouteTableDef()


class PageFile(NamedTuple):
    """One file of the page, as it is sent."""

    content: bytes
    content_type: str
    etag: str


def _read(path: Path) -> PageFile:
    content = path.read_bytes()
    return PageFile(content, TYPES[path.suffix], hashlib.sha256(content).hexdigest()[:32])


FILES = {path.name: _read(path) for path in sorted(FOLDER.iterdir()) if path.suffix in TYPES}


def is_open(path: str) -> bool:
    """Tell whether a path is one of the page's, which needs no key."""
    return path == "/" or (path.startswith(PREFIX) and path[len(PREFIX) :] in FILES)


@routes.get("/")
async def index(request: web.Request) -> web.Response:
    return _answer(request, FILES[INDEX])


@routes.get("/page/{name}")
async def file(request: web.Request) -> web.Response:
    found = FILES.get(request.match_info["name"])
    if found is None:
        raise web.HTTPNotFound
    return _answer(request, found)


def _answer(request: web.Request, found: PageFile) -> web.Response:
    etags = request.if_none_match or ()
    is_known = any(etag.value == found.etag for etag in etags)
    body, status = (None, 304) if is_known else (found.content, 200)
    response = web.Response(body=body, status=status, headers=HEADERS)
    response.etag = found.etag
    if not is_known:
        response.content_type, response.charset = found.content_type, "utf-8"
    return response
