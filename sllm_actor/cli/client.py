"""Ask a node over HTTP, as any client would."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import aiohttp
import msgspec

from sllm_actor.cli.seen import Moment, Seen

CONNECT_TIMEOUT_S = 5.0
DEFAULT_URL = "http://127.0.0.1:8400"
MAX_EVENT_BYTES = 1024 * 1024
# A look at a cluster of two hundred nodes with as many models each.
MAX_LOOK_BYTES = 16 * 1024 * 1024


class NodeUnreachable(Exception):
    """No node answers at the URL, or the one that did has gone."""


class NodeRefused(Exception):
    """The node answered with an error; `code` and `param` are its own, `hint` says what to do next."""

    def __init__(self, message: str, code: str = "", param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param
        self.hint = ""


class NodeClient:
    """Speaks to one node. Use as `async with NodeClient(url, key) as client`."""

    def __init__(self, url: str, api_key: str) -> None:
        self._url = (url if "://" in url else f"http://{url}").rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: aiohttp.ClientSession | None = None

    @property
    def url(self) -> str:
        """Where the node is asked."""
        return self._url

    async def __aenter__(self) -> NodeClient:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
        self._session = aiohttp.ClientSession(
            headers=self._headers, timeout=timeout, read_bufsize=MAX_EVENT_BYTES, trust_env=False
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    @asynccontextmanager
    async def _open(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        headers: dict[str, str] | None = None,
        **options: Any,
    ) -> AsyncGenerator[aiohttp.ClientResponse, None]:
        assert self._session is not None
        answered = False
        try:
            asked = self._session.request(method, self._url + path, json=body, headers=headers, **options)
            async with asked as response:
                answered = True
                if response.status >= 400:
                    raise _refusal(response.status, await response.text())
                yield response
        except aiohttp.ContentTypeError:
            raise NodeUnreachable(f"what answers at {self._url} is no node; name one with --url") from None
        except (aiohttp.ClientError, TimeoutError) as error:
            if answered:
                raise NodeUnreachable(f"the node at {self._url} went away in the middle of its answer") from error
            missing = f"no node answers at {self._url}: {_why(error)}"
            raise NodeUnreachable(f"{missing}; start one with 'sllm-node start', or name it with --url") from error

    async def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Ask and give the JSON answer.

        Raises:
            NodeUnreachable, NodeRefused.
        """
        async with self._open(method, path, body) as response:
            answer: dict[str, Any] = await response.json()
            return answer

    async def lines(self, path: str, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Ask for a stream of JSON objects, one a line, and give them until `success`.

        Raises:
            NodeUnreachable, NodeRefused: also where the stream ends early or with an error.
        """
        async with self._open("POST", path, body) as response:
            async for line in response.content:
                item = json.loads(line)
                if "error" in item:
                    raise _from_error(item["error"])
                yield item
                if item["status"] == "success":
                    return
            raise NodeRefused("the answer ended before it was complete", "stream_cut")

    async def events(
        self, path: str, body: dict[str, Any], request_id: str, on_comment: Callable[[str], None] = lambda _: None
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Ask for a stream and give its events until `[DONE]`; comments tell what the answer waits for.

        Raises:
            NodeUnreachable, NodeRefused: also where the stream ends early or with an error event.
        """
        async with self._open("POST", path, body, {"X-Request-Id": request_id}) as response:
            async for line in response.content:
                if line.startswith(b": "):
                    on_comment(line[len(b": ") :].decode().strip())
                if not line.startswith(b"data: "):
                    continue
                data = line[len(b"data: ") :].strip()
                if data == b"[DONE]":
                    return
                event = json.loads(data)
                if "error" in event:
                    raise _from_error(event["error"])
                yield event
            raise NodeRefused("the answer ended before it was complete", "stream_cut")

    async def looks(self, silence_s: float) -> AsyncGenerator[Look, None]:
        """Watch the node: give what there is to see, then all of it again after each change, until it ends that.

        Raises:
            NodeUnreachable, NodeRefused: also where nothing is heard for `silence_s`.
        """
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=silence_s)
        parts: dict[str, Any] = {}
        kind = ""
        async with self._open("GET", "/admin/events", None, timeout=timeout, read_bufsize=MAX_LOOK_BYTES) as response:
            if response.content_type != "text/event-stream":
                raise NodeUnreachable(f"what answers at {self._url} is no node; name one with --url")
            async for line in response.content:
                if line.startswith(b"event: "):
                    kind = line[len(b"event: ") :].decode().strip()
                if not line.startswith(b"data: "):
                    continue
                data = line[len(b"data: ") :]
                if kind == "error":
                    raise _from_error(json.loads(data)["error"])
                try:
                    change = msgspec.json.decode(data, type=_Change)
                    parts = parts | change.parts
                    yield Look(change.moment, parts, msgspec.convert(parts, Seen))
                except msgspec.DecodeError as wrong:
                    raise NodeRefused(f"the node tells what this version can't read: {wrong}") from None


class _Change(msgspec.Struct):
    moment: Moment
    parts: dict[str, Any]


class Look(NamedTuple):
    """A node and its cluster at a moment: `parts` as they were told (docs/page.md), and what is `seen` in them."""

    moment: Moment
    parts: dict[str, Any]
    seen: Seen


def _why(error: Exception) -> str:
    """Say in a few words why there is no connection."""
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "its name is unknown"
    if isinstance(error, aiohttp.ClientOSError) and error.errno:
        return os.strerror(error.errno)
    if isinstance(error, TimeoutError):
        return f"silence for {CONNECT_TIMEOUT_S:g} s"
    return "the URL is none" if isinstance(error, aiohttp.InvalidURL) else str(error) or type(error).__name__


def _refusal(status: int, text: str) -> NodeRefused:
    try:
        return _from_error(json.loads(text)["error"])
    except (ValueError, KeyError, TypeError):
        return NodeRefused(f"HTTP {status}: {text[:200]}", f"http_{status}")


def _from_error(error: dict[str, Any]) -> NodeRefused:
    return NodeRefused(str(error.get("message")), str(error.get("code")), error.get("param"))
