"""`/v1/…`: chat completions, completions and models, as OpenAI's clients expect them."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from aiohttp import web

from sllm_actor.domain import Model, RequestId, Sampling, Span
from sllm_actor.errors import InvalidRequest, SllmError
from sllm_actor.frontend.answer import Piece, Wish, answer, max_tokens
from sllm_actor.frontend.deadline import timeout_of, within
from sllm_actor.frontend.gateway import GATEWAY, REQUEST_ID, Gateway, json_response, trace_of
from sllm_actor.frontend.schema import ChatRequest, CompletionRequest
from sllm_actor.frontend.sse import EventStream
from sllm_actor.frontend.visit import VISIT
from sllm_actor.messages.models import ListModels, ModelStatus
from sllm_actor.messages.text import ChatTurn
from sllm_actor.runtime import tracing

routes = web.RouteTableDef()


@routes.post("/v1/chat/completions")
async def chat_completions(request: web.Request) -> web.StreamResponse:
    gateway = request.app[GATEWAY]
    arrived_s = gateway.clock.monotonic_s()
    body = await gateway.read(request, ChatRequest)
    model = await gateway.model(body.model)
    if not model.chat:
        raise InvalidRequest(f"{model.name} has no chat template; use /v1/completions", param="model")
    begin_s = gateway.clock.monotonic_s()
    turns = [ChatTurn(role=message.template_role(), content=message.text()) for message in body.messages]
    prompt = await gateway.text.render(model.path, turns)
    text_span = Span(name="text", begin_s=begin_s, end_s=gateway.clock.monotonic_s())
    wish = _wish(request, model, list(prompt), body, arrived_s, text_span)
    return await _reply(request, gateway, wish, body, ChatShape(wish, gateway.clock.wall_s()))


@routes.post("/v1/completions")
async def completions(request: web.Request) -> web.StreamResponse:
    gateway = request.app[GATEWAY]
    arrived_s = gateway.clock.monotonic_s()
    body = await gateway.read(request, CompletionRequest)
    model = await gateway.model(body.model)
    begin_s = gateway.clock.monotonic_s()
    if isinstance(body.prompt, str):
        prompt = list(await gateway.text.encode(model.path, body.prompt))
    else:
        prompt = body.prompt
        if max(prompt) >= model.vocabulary_tokens:
            raise InvalidRequest(
                f"prompt: token {max(prompt)} is outside the vocabulary of {model.vocabulary_tokens}",
                param="prompt",
            )
    text_span = Span(name="text", begin_s=begin_s, end_s=gateway.clock.monotonic_s())
    wish = _wish(request, model, prompt, body, arrived_s, text_span)
    return await _reply(request, gateway, wish, body, CompletionShape(wish, gateway.clock.wall_s()))


@routes.get("/v1/models")
async def list_models(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    statuses: tuple[ModelStatus, ...] = await gateway.manager.ask(ListModels(), timeout_s=gateway.limits.ask_timeout_s)
    return json_response(
        {
            "object": "list",
            "data": [_model_card(status.model) for status in statuses if VISIT.get().may_use(status.model)],
        }
    )


@routes.get("/v1/models/{name:.+}")
async def get_model(request: web.Request) -> web.Response:
    return json_response(_model_card(await request.app[GATEWAY].model(request.match_info["name"])))


def _model_card(model: Model) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": int(model.registered_wall_s),
        "owned_by": "sllm_actor",
        "max_model_len": model.context_tokens,
    }


def _wish(
    request: web.Request,
    model: Model,
    prompt: list[int],
    body: ChatRequest | CompletionRequest,
    arrived_s: float,
    text_span: Span,
) -> Wish:
    sampling = Sampling(
        max_tokens=max_tokens(model, len(prompt), body.limit()),
        temperature=model.default_temperature if body.temperature is None else body.temperature,
        top_p=model.default_top_p if body.top_p is None else body.top_p,
        seed=secrets.randbits(63) if body.seed is None else body.seed,
        ignore_eos=body.ignore_eos,
    )
    request_id = RequestId(request[REQUEST_ID])
    return Wish(request_id, model, prompt, sampling, body.stops(), arrived_s, (text_span,), body.priority)


class ChatShape:
    """Chat completions on the wire."""

    def __init__(self, wish: Wish, created_wall_s: float) -> None:
        self._base = {
            "id": f"chatcmpl-{wish.request_id}",
            "created": int(created_wall_s),
            "model": wish.model.name,
        }

    def first_chunk(self) -> dict[str, Any] | None:
        return self._chunk({"role": "assistant", "content": ""}, None)

    def chunk(self, text: str, finish: str | None) -> dict[str, Any]:
        return self._chunk({"content": text} if text else {}, finish)

    def _chunk(self, delta: dict[str, Any], finish: str | None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return self._base | {"object": "chat.completion.chunk", "choices": [choice]}

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        return self._base | {"object": "chat.completion.chunk", "choices": [], "usage": usage}

    def whole(self, text: str, finish: str, usage: dict[str, int]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        return self._base | {"object": "chat.completion", "choices": [choice], "usage": usage}


class CompletionShape:
    """Completions on the wire."""

    def __init__(self, wish: Wish, created_wall_s: float) -> None:
        self._base = {
            "id": f"cmpl-{wish.request_id}",
            "object": "text_completion",
            "created": int(created_wall_s),
            "model": wish.model.name,
        }

    def first_chunk(self) -> dict[str, Any] | None:
        return None

    def chunk(self, text: str, finish: str | None) -> dict[str, Any]:
        return self._base | {"choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": finish}]}

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        return self._base | {"choices": [], "usage": usage}

    def whole(self, text: str, finish: str, usage: dict[str, int]) -> dict[str, Any]:
        return self.chunk(text, finish) | {"usage": usage}


Shape = ChatShape | CompletionShape


def _usage(piece: Piece) -> dict[str, int]:
    return {
        "prompt_tokens": piece.prompt_tokens,
        "completion_tokens": piece.generated_tokens,
        "total_tokens": piece.prompt_tokens + piece.generated_tokens,
    }


async def _reply(
    request: web.Request, gateway: Gateway, wish: Wish, body: ChatRequest | CompletionRequest, shape: Shape
) -> web.StreamResponse:
    timeout_s = timeout_of(request, gateway.limits.request_timeout_s)
    gateway.enter()
    try:
        with tracing(trace_of(request)):
            answered = VISIT.get().noting(wish, answer(wish, gateway.router, gateway.text))
            async with aclosing(within(answered, timeout_s, wish.arrived_s, gateway.clock)) as pieces:
                if body.stream:
                    usage = body.stream_options is not None and body.stream_options.include_usage
                    return await _stream(gateway.events(request, wish.model), pieces, shape, usage)
                return await _gather(pieces, shape)
    finally:
        gateway.leave()


async def _gather(pieces: AsyncGenerator[Piece, None], shape: Shape) -> web.Response:
    text = []
    async for piece in pieces:
        text.append(piece.text)
    assert piece.finish is not None
    return json_response(shape.whole("".join(text), piece.finish, _usage(piece)))


async def _stream(
    events: EventStream, pieces: AsyncGenerator[Piece, None], shape: Shape, include_usage: bool
) -> web.StreamResponse:
    """Send the answer as events; an error before the first of them stays an error."""
    begun = False
    async with events:
        try:
            async for piece in pieces:
                if not begun and (first := shape.first_chunk()) is not None:
                    await events.send(first)
                begun = True
                if piece.text:
                    await events.send(shape.chunk(piece.text, None))
                if piece.finish is not None:
                    await events.send(shape.chunk("", piece.finish))
                    if include_usage:
                        await events.send(shape.usage_chunk(_usage(piece)))
        except SllmError as error:
            if not events.opened:
                raise
            return await events.fail(error)
        return await events.done()
