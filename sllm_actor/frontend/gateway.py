"""What the HTTP handlers share: the actors they ask, the text service, the clock, the limits."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, NamedTuple, TypeVar

import msgspec
from aiohttp import web

from sllm_actor.domain import Model, ModelName, RequestId, check_model_name
from sllm_actor.domain.names import is_request_id
from sllm_actor.domain.roles import Role, Roles
from sllm_actor.errors import (
    Draining,
    InvalidName,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    RequestTimeout,
    RoleMissing,
)
from sllm_actor.frontend.access import Access
from sllm_actor.frontend.connections import Connections
from sllm_actor.frontend.grammars import GrammarService
from sllm_actor.frontend.metrics import Metrics
from sllm_actor.frontend.progress import Progress
from sllm_actor.frontend.schema import parse
from sllm_actor.frontend.sse import EventStream
from sllm_actor.frontend.stream_log import StreamLog
from sllm_actor.frontend.telemetry import Telemetry
from sllm_actor.frontend.text import TextService
from sllm_actor.frontend.turns import Turns
from sllm_actor.frontend.visit import VISIT, TokenTimes
from sllm_actor.messages.models import GetModel
from sllm_actor.runtime import ActorRef, Clock
from sllm_actor.runtime.tasks import TaskScope

T = TypeVar("T")


class Limits(NamedTuple):
    """The gateway's knobs; the names are those of `Config`."""

    max_body_bytes: int
    max_incoming_bytes: int
    body_timeout_s: float
    ask_timeout_s: float
    migration_timeout_s: float
    engine_start_timeout_s: float
    drain_timeout_s: float
    stream_open_after_s: float
    heartbeat_interval_s: float
    request_timeout_s: float
    max_watchers: int
    watch_interval_s: float

    @property
    def deploy_timeout_s(self) -> float:
        """How long a registration may take, which may check a model in an engine and stop instances first."""
        return self.drain_timeout_s + self.engine_start_timeout_s


class Gateway:
    """Lent to every handler. `draining` is set when the node stops: no new answers begin then."""

    def __init__(
        self,
        *,
        router: ActorRef,
        manager: ActorRef,
        coordinator: ActorRef,
        nodes: ActorRef,
        text: TextService,
        grammars: GrammarService,
        clock: Clock,
        limits: Limits,
        observe: Callable[[], Any],
        tasks: TaskScope,
        access: Access,
        telemetry: Telemetry | None,
        streams: StreamLog,
        roles: Roles,
    ) -> None:
        self.router = router
        self.manager = manager
        self.coordinator = coordinator
        # Knows the other nodes.
        self.nodes = nodes
        self.text = text
        self.grammars = grammars
        self.clock = clock
        self.limits = limits
        # Gives the counts of the actors, the connections and the loop.
        self.observe = observe
        self.tasks = tasks
        self.access = access
        self.telemetry = telemetry
        self.streams = streams
        self._roles = roles
        self.progress = Progress(manager, clock, limits.ask_timeout_s)
        self.turns = Turns()
        self.ready = False
        self.draining = False
        self.metrics = Metrics()
        # Of the server, once it runs.
        self.connections: Connections | None = None
        self._incoming_bytes = 0
        self._answering: Counter[str] = Counter()
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._left_at_stop: set[asyncio.Timeout] = set()

    @property
    def is_quiet(self) -> bool:
        """Whether nothing is being answered."""
        return self._quiet.is_set()

    def check_role(self, *any_of: Role) -> None:
        """Refuse what this node is not there for.

        Raises:
            RoleMissing: it has none of these roles.
        """
        if not self._roles.intersection(any_of):
            raise RoleMissing(
                f"this node has not the role {' or '.join(any_of)}, only {', '.join(sorted(self._roles))}: ask another"
            )

    async def read(self, request: web.Request, kind: type[T]) -> T:
        """Read and check a JSON body, within the bounds of size and time.

        Raises:
            InvalidRequest, UnsupportedField: what is wrong with it; `param` names the field.
            RequestTimeout: it came too slowly.
            Overloaded: others are being received, and with it they would be too much.
        """
        if request.content_type != "application/json":
            raise InvalidRequest(f"the content type is {request.content_type}, it must be application/json")
        if (request.content_length or 0) > self.limits.max_body_bytes:
            raise web.HTTPRequestEntityTooLarge(self.limits.max_body_bytes, request.content_length or 0)
        try:
            async with asyncio.timeout(self.limits.body_timeout_s):
                with self._incoming(request.content_length):
                    raw = await request.read()
        except TimeoutError:
            raise RequestTimeout(f"the body did not arrive in {self.limits.body_timeout_s:g} s") from None
        return parse(raw, kind)

    @contextmanager
    def _incoming(self, length_bytes: int | None) -> Iterator[None]:
        """Have room for a body, and for the longest where it does not say how long it is."""
        room_bytes = self.limits.max_body_bytes if length_bytes is None else length_bytes
        if self._incoming_bytes and self._incoming_bytes + room_bytes > self.limits.max_incoming_bytes:
            raise Overloaded("this node is receiving as much as it has room for", retry_after_s=1.0)
        self._incoming_bytes += room_bytes
        try:
            yield
        finally:
            self._incoming_bytes -= room_bytes

    async def model(self, name: str) -> Model:
        """Find a registered model.

        Raises:
            ModelNotFound: there is none of that name, or there can't be.
            AccessDenied: it is not for the key of this request.
        """
        question = GetModel(name=known_name(name))
        model: Model = await self.manager.ask(question, timeout_s=self.limits.ask_timeout_s)
        VISIT.get().check(model)
        return model

    def events(self, request: web.Request, model: Model, headers: dict[str, str]) -> EventStream:
        """Begin the events of an answer of `model`."""
        since_s = self.clock.monotonic_s()
        return EventStream(
            request,
            {"X-Request-Id": request[REQUEST_ID], **headers, **VISIT.get().limits},
            lambda: self.progress.of(model, since_s),
            self.tasks,
            self.clock,
            open_after_s=self.limits.stream_open_after_s,
            interval_s=self.limits.heartbeat_interval_s,
        )

    @contextmanager
    def answering(self, model: Model) -> Iterator[TokenTimes]:
        """Count an answer that is made in this block; give who is to be told of its tokens' times.

        Raises:
            Draining: the node is stopping.
        """
        if self.draining:
            raise Draining("this node is stopping", retry_after_s=5.0)
        self._answering[model.name] += 1
        self._quiet.clear()
        metrics = self.metrics.of(model.name)
        try:
            yield TokenTimes(metrics.first_token.observe, metrics.between_tokens.observe)
        finally:
            self._answering[model.name] -= 1
            if not self._answering[model.name]:
                del self._answering[model.name]
            if not self._answering:
                self._quiet.set()

    def see(self) -> dict[str, Any]:
        """Give what the node tells of itself, and what the gateway adds to it."""
        connections = self.connections
        assert connections is not None
        shown = {"counts": connections.counts(), "closed": dict(connections.closed)}
        in_progress = dict.fromkeys(self.metrics.models(), 0) | self._answering
        return {**self.observe(), "in_progress": in_progress, "connections": shown, "streams": self.streams.observe()}

    @asynccontextmanager
    async def until_stop(self) -> AsyncGenerator[None, None]:
        """Do in this block what can be gone on with later: it is left when the node stops.

        Raises:
            Draining: the node is stopping.
        """
        stopping = Draining("this node is stopping; the same again goes on from there", retry_after_s=5.0)
        if self.draining:
            raise stopping
        try:
            async with asyncio.timeout(None) as limit:
                self._left_at_stop.add(limit)
                try:
                    yield
                finally:
                    self._left_at_stop.discard(limit)
        except TimeoutError:
            if not limit.expired():
                raise
            raise stopping from None

    def stop(self) -> None:
        """Begin no new answers, and leave what need not come to its end."""
        self.draining = True
        for limit in self._left_at_stop:
            limit.reschedule(0.0)

    async def drained(self) -> bool:
        """Wait until no answer runs, or the time for that is over; tell which."""
        try:
            async with asyncio.timeout(self.limits.drain_timeout_s):
                await self._quiet.wait()
        except TimeoutError:
            return False
        return True


def known_name(text: str) -> ModelName:
    """Give a name that a model may have.

    Raises:
        ModelNotFound: there can be none of that name.
    """
    try:
        return check_model_name(text)
    except InvalidName:
        raise ModelNotFound(f"the model {text[:120]!r} does not exist", param="model") from None


GATEWAY = web.AppKey("gateway", Gateway)
TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
REQUEST_ID = web.RequestKey("request_id", str)


def request_id_of(request: web.Request) -> RequestId:
    """Take over the client's X-Request-Id where it is a usable one, else make one."""
    given = request.headers.get("X-Request-Id", "")
    return RequestId(given if is_request_id(given) else f"req-{secrets.token_hex(12)}")


def trace_of(request: web.Request) -> bytes | None:
    """Give the W3C trace context of a request: 25 bytes (trace id, parent id, flags), None where there is none."""
    match = TRACEPARENT.fullmatch(request.headers.get("traceparent", ""))
    return bytes.fromhex("".join(match.groups())) if match else None


def json_response(content: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """Answer with JSON; infinite durations are written as "forever"."""
    return web.Response(body=encode_json(content), status=status, headers=headers, content_type="application/json")


def encode_json(content: Any) -> bytes:
    """Write JSON on one line; infinite durations are written as "forever"."""
    return msgspec.json.encode(_without_infinities(msgspec.to_builtins(content)))


def _without_infinities(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_infinities(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinities(item) for item in value]
    return "forever" if value == float("inf") else value
