"""Answers in OpenAI's shapes: whole, as events, and the rest of a stream that another gateway may have begun."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple

from aiohttp import web

from sllm_actor.domain import Model, RequestId, Span
from sllm_actor.errors import SllmError
from sllm_actor.frontend.answer import Choice, Piece, Wish
from sllm_actor.frontend.choice_log import Unkept
from sllm_actor.frontend.choices import Counts, choices
from sllm_actor.frontend.deadline import timeout_of, within
from sllm_actor.frontend.gateway import REQUEST_ID, Gateway, json_response, trace_of
from sllm_actor.frontend.live_stream import LiveStream
from sllm_actor.frontend.orders import Order, wishes_of
from sllm_actor.frontend.positions import Place
from sllm_actor.frontend.schema import StreamOptions
from sllm_actor.frontend.shapes import Shape, WholeChoice
from sllm_actor.frontend.sse import EventStream
from sllm_actor.frontend.stream_records import Found
from sllm_actor.frontend.visit import VISIT, TokenTimes
from sllm_actor.runtime import tracing

STREAM_HEADER = "X-Stream-Id"


class _Answering(NamedTuple):
    """One request that is being answered."""

    request: web.Request
    gateway: Gateway
    order: Order
    wishes: Sequence[Wish]
    shape: Shape
    counts: Counts
    timeout_s: float

    def note(self, times: TokenTimes) -> Callable[[Choice], None]:
        return VISIT.get().noting(self.counts, times)


async def _begin(
    request: web.Request, gateway: Gateway, model: Model, order: Order, arrived_s: float, text_span: Span
) -> _Answering:
    request_id, priority = RequestId(request[REQUEST_ID]), VISIT.get().priority(order.body.priority)
    wishes = await wishes_of(order, model, gateway.grammars, request_id, priority, arrived_s, text_span)
    timeout_s = timeout_of(request, gateway.limits.request_timeout_s)
    counts = Counts(wishes, order.body.n)
    return _Answering(request, gateway, order, wishes, order.shape(wishes[0]), counts, timeout_s)


async def reply(
    request: web.Request, gateway: Gateway, model: Model, order: Order, arrived_s: float, text_span: Span
) -> web.StreamResponse:
    """Answer an order, whole or as events.

    Raises:
        SllmError: whatever went wrong, as long as no event has been sent.
    """
    answering = await _begin(request, gateway, model, order, arrived_s, text_span)
    with gateway.answering(model) as times, tracing(trace_of(request)):
        if not order.body.stream:
            return await _gather(answering, times)
        stream = gateway.streams.begin(order, len(answering.wishes), model, VISIT.get().key)
        return await _stream(answering, times, stream, Place(len(answering.wishes)))


async def reply_rest(
    request: web.Request,
    gateway: Gateway,
    model: Model,
    found: Found,
    place: Place,
    arrived_s: float,
    text_span: Span,
) -> web.StreamResponse:
    """Take a stream over, and send the events that its client lacks.

    Raises:
        SllmError: whatever went wrong, as long as no event has been sent.
    """
    answering = await _begin(request, gateway, model, found.record.order, arrived_s, text_span)
    with gateway.answering(model) as times, tracing(trace_of(request)):
        stream = await gateway.streams.take_over(found, VISIT.get().key)
        return await _stream(answering, times, stream, place)


async def _gather(answering: _Answering, times: TokenTimes) -> web.Response:
    gateway, wishes, note = answering.gateway, answering.wishes, answering.note(times)
    said: list[list[Piece]] = [[] for _ in wishes]
    pieces = choices(wishes, gateway.router, gateway.text, gateway.turns, [Unkept() for _ in wishes])
    async with aclosing(within(pieces, answering.timeout_s, wishes[0].arrived_s, gateway.clock)) as limited:
        async for choice in limited:
            note(choice)
            said[choice.number].append(choice.piece)
    whole = []
    for index, parts in enumerate(said):
        finish = parts[-1].finish
        assert finish is not None, "every choice ends with a finish"
        entries = [entry for piece in parts for entry in piece.entries]
        whole.append(WholeChoice(index, "".join(piece.text for piece in parts), finish, entries))
    return json_response(answering.shape.whole(whole, answering.counts.usage()))


async def _stream(answering: _Answering, times: TokenTimes, stream: LiveStream, place: Place) -> web.StreamResponse:
    gateway, wishes = answering.gateway, answering.wishes
    with gateway.streams.answering(stream):
        pieces = choices(wishes, gateway.router, gateway.text, gateway.turns, stream.logs)
        async with aclosing(within(pieces, answering.timeout_s, wishes[0].arrived_s, gateway.clock)) as limited:
            events = gateway.events(answering.request, wishes[0].model, _headers(stream))
            return await _send(events, limited, answering.note(times), answering, stream, place)


def _headers(stream: LiveStream) -> dict[str, str]:
    return {STREAM_HEADER: stream.id} if stream.kept or stream.undecided else {}


async def _send(
    events: EventStream,
    pieces: AsyncGenerator[Choice, None],
    note: Callable[[Choice], None],
    answering: _Answering,
    stream: LiveStream,
    place: Place,
) -> web.StreamResponse:
    """Send the answer as events; an error before the first of them stays an error."""
    shape, counts = answering.shape, answering.counts
    options = answering.order.body.stream_options or StreamOptions()
    begun: set[int] = set()
    ended = 0

    def hold(index: int, chunk: dict[str, Any] | None) -> None:
        if chunk is None or not place.count(index):
            return
        if options.continuous_usage_stats:
            chunk = chunk | {"usage": counts.usage()}
        elif options.include_usage:
            chunk = chunk | {"usage": None}
        events.hold(chunk, place.event_id() if stream.kept else b"")

    async with events:
        try:
            async with stream.held():
                async for choice in pieces:
                    note(choice)
                    index, piece, more = choice
                    if index not in begun:
                        begun.add(index)
                        hold(index, shape.first_chunk(index))
                    if piece.text or piece.entries:
                        hold(index, shape.chunk(index, piece.text, piece.entries))
                    if piece.finish is not None:
                        ended += 1
                        hold(index, shape.last_chunk(index, piece.finish))
                    # The last event of all goes with what is behind it.
                    if events.is_full or not (more or ended == counts.choices):
                        await events.flush()
                place.check_end()
        except SllmError as error:
            if not events.opened:
                raise
            VISIT.get().code = error.code
            # Its client may not read any more: what is generated for it ends before that is waited for.
            await pieces.aclose()
            return await events.fail(error)
        if options.include_usage and place.count_usage():
            events.hold(shape.usage_chunk(counts.usage()), place.event_id() if stream.kept else b"")
        return await events.done()
