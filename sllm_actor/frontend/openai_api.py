"""`/v1/…`: chat completions, completions, embeddings and models, as OpenAI's clients expect them."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from sllm_actor.domain import FinishReason, Model, RequestId, Span
from sllm_actor.domain.tokens import pack_uint32
from sllm_actor.errors import Conflict, InvalidRequest
from sllm_actor.frontend.deadline import timeout_of, within
from sllm_actor.frontend.embeddings import collect, embedding_of, question_of, tokens_of, vectors_response
from sllm_actor.frontend.gateway import GATEWAY, REQUEST_ID, Gateway, json_response, trace_of
from sllm_actor.frontend.orders import ChatOrder, CompletionOrder, new_stream_id, seeded
from sllm_actor.frontend.positions import HEADER as LAST_EVENT_ID
from sllm_actor.frontend.positions import place_behind
from sllm_actor.frontend.replying import reply, reply_rest
from sllm_actor.frontend.schema import ChatRequest, CompletionRequest, EmbeddingRequest, StreamOptions
from sllm_actor.frontend.tools import written_tools
from sllm_actor.frontend.visit import VISIT
from sllm_actor.frontend.wishes import check_vocabulary
from sllm_actor.messages.models import ListModels, ModelStatus
from sllm_actor.runtime import tracing

routes = web.RouteTableDef()


@routes.post("/v1/chat/completions")
async def chat_completions(request: web.Request) -> web.StreamResponse:
    gateway = request.app[GATEWAY]
    arrived_s = gateway.clock.monotonic_s()
    body = await gateway.read(request, ChatRequest)
    model = _generating(await gateway.model(body.model))
    if not model.chat:
        raise InvalidRequest(f"{model.name} has no chat template; use /v1/completions", param="model")
    begin_s = gateway.clock.monotonic_s()
    turns = [message.turn() for message in body.messages]
    rendered = await gateway.text.render(model.texts, turns, written_tools(body.tools, body.tool_choice))
    order = ChatOrder(
        stream_id=new_stream_id(),
        answer_id=RequestId(request[REQUEST_ID]),
        created_wall_s=gateway.clock.wall_s(),
        body=seeded(body),
        rendered=rendered,
    )
    return await reply(request, gateway, model, order, arrived_s, _text_span(gateway, begin_s))


@routes.post("/v1/completions")
async def completions(request: web.Request) -> web.StreamResponse:
    gateway = request.app[GATEWAY]
    arrived_s = gateway.clock.monotonic_s()
    body = await gateway.read(request, CompletionRequest)
    model = _generating(await gateway.model(body.model))
    begin_s = gateway.clock.monotonic_s()
    prompts = [await _prompt_tokens(gateway, model, prompt) for prompt in body.prompts()]
    text_span = _text_span(gateway, begin_s)
    echoes = [await _echo(gateway, model, prompt) if body.echo else "" for prompt in body.prompts()]
    order = CompletionOrder(
        stream_id=new_stream_id(),
        answer_id=RequestId(request[REQUEST_ID]),
        created_wall_s=gateway.clock.wall_s(),
        body=seeded(body),
        prompts=tuple(map(pack_uint32, prompts)),
        echoes=tuple(echo for echo in echoes for _ in range(body.n)),
    )
    return await reply(request, gateway, model, order, arrived_s, text_span)


@routes.get("/v1/streams/{stream_id}")
async def go_on(request: web.Request) -> web.StreamResponse:
    """Give what a client lacks of a stream, as if nothing had come between."""
    gateway = request.app[GATEWAY]
    arrived_s = gateway.clock.monotonic_s()
    found = await gateway.streams.find(request.match_info["stream_id"], VISIT.get().key)
    order = found.record.order
    usage = (order.body.stream_options or StreamOptions()).include_usage
    place = place_behind(request.headers.get(LAST_EVENT_ID, ""), found.record.choices, usage=usage)
    model = _generating(await gateway.model(order.body.model))
    if model.fingerprint != found.record.fingerprint:
        raise Conflict(f"{model.name} is another model than the one that the stream is of", param="stream_id")
    return await reply_rest(request, gateway, model, found, place, arrived_s, _text_span(gateway, arrived_s))


def _text_span(gateway: Gateway, begin_s: float) -> Span:
    return Span(name="text", begin_s=begin_s, end_s=gateway.clock.monotonic_s())


@routes.post("/v1/embeddings")
async def embeddings(request: web.Request) -> web.StreamResponse:
    gateway = request.app[GATEWAY]
    arrived_s = gateway.clock.monotonic_s()
    body = await gateway.read(request, EmbeddingRequest)
    model = await gateway.model(body.model)
    how = embedding_of(model, body.dimensions)
    timeout_s = timeout_of(request, gateway.limits.request_timeout_s)
    with gateway.answering(model), tracing(trace_of(request)):
        texts = await tokens_of(gateway.text, model, how, body.texts())
        text_span = Span(name="text", begin_s=arrived_s, end_s=gateway.clock.monotonic_s())
        question = question_of(RequestId(request[REQUEST_ID]), model, texts, body, arrived_s, text_span)
        VISIT.get().prompt_tokens = prompt_tokens = sum(map(len, texts))
        vectors = await collect(within(gateway.router.stream(question), timeout_s, arrived_s, gateway.clock))
        VISIT.get().finish = FinishReason.STOP
        return await vectors_response(model.name, vectors, body.encoding_format, prompt_tokens)


def _generating(model: Model) -> Model:
    if not model.generates:
        raise InvalidRequest(f"{model.name} embeds texts and does not generate; use /v1/embeddings", param="model")
    return model


async def _prompt_tokens(gateway: Gateway, model: Model, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        return list(await gateway.text.encode(model.texts, prompt))
    check_vocabulary("prompt", prompt, model)
    return prompt


async def _echo(gateway: Gateway, model: Model, prompt: str | list[int]) -> str:
    if isinstance(prompt, str):
        return prompt
    return await gateway.text.detokenizer(model.texts, ()).push(prompt, final=True)


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
        "parent": model.base or None,
    }
