"""`/v1/…`: chat completions, completions, embeddings and models, as OpenAI's clients expect them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from aiohttp import web

from sllm_actor.domain import FinishReason, Model, RequestId, Span
from sllm_actor.domain.tokens import unpack_uint32
from sllm_actor.errors import InvalidRequest, SllmError
from sllm_actor.frontend.answer import Choice, Piece, Wish
from sllm_actor.frontend.choices import Counts, choices
from sllm_actor.frontend.deadline import timeout_of, within
from sllm_actor.frontend.embeddings import collect, embedding_of, question_of, tokens_of, vectors_response
from sllm_actor.frontend.forms import grammar_of, grammar_of_completion
from sllm_actor.frontend.gateway import GATEWAY, REQUEST_ID, Gateway, json_response, trace_of
from sllm_actor.frontend.schema import ChatRequest, CompletionRequest, EmbeddingRequest, StreamOptions, keep_alive_s
from sllm_actor.frontend.shapes import ChatShape, CompletionShape, Shape, WholeChoice
from sllm_actor.frontend.sse import EventStream
from sllm_actor.frontend.tool_formats import FORMATS
from sllm_actor.frontend.tool_shape import ToolShape
from sllm_actor.frontend.tools import written_tools
from sllm_actor.frontend.visit import VISIT
from sllm_actor.frontend.wishes import check_vocabulary, of_choices, sampling_of
from sllm_actor.messages.models import ListModels, ModelStatus
from sllm_actor.messages.text import Encoded
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
    prompt = unpack_uint32(rendered.token_ids)
    text_span = Span(name="text", begin_s=begin_s, end_s=gateway.clock.monotonic_s())
    wish = _wish(request, model, list(prompt), body, arrived_s, text_span)
    grammar = await grammar_of(gateway.grammars, model, body, rendered)
    wish = wish._replace(grammar=grammar, marker=rendered.marker)
    return await _reply(request, gateway, of_choices([wish], body.n), body, _chat_shape(wish, body, rendered, gateway))


def _chat_shape(wish: Wish, body: ChatRequest, rendered: Encoded, gateway: Gateway) -> ChatShape:
    now_s = gateway.clock.wall_s()
    if not rendered.tool_format:
        return ChatShape(wish, now_s)
    names = {tool.function.name for tool in body.tools or ()}
    form = FORMATS[rendered.tool_format]
    return ToolShape(wish, now_s, form, names, n=body.n, parallel=body.parallel_tool_calls)


@routes.post("/v1/completions")
async def completions(request: web.Request) -> web.StreamResponse:
    gateway = request.app[GATEWAY]
    arrived_s = gateway.clock.monotonic_s()
    body = await gateway.read(request, CompletionRequest)
    model = _generating(await gateway.model(body.model))
    begin_s = gateway.clock.monotonic_s()
    prompts = [await _prompt_tokens(gateway, model, prompt) for prompt in body.prompts()]
    text_span = Span(name="text", begin_s=begin_s, end_s=gateway.clock.monotonic_s())
    wishes = [_wish(request, model, prompt, body, arrived_s, text_span) for prompt in prompts]
    grammar = await grammar_of_completion(gateway.grammars, model, body)
    wishes = [wish._replace(grammar=grammar) for wish in wishes]
    echoes = [await _echo(gateway, model, prompt) if body.echo else "" for prompt in body.prompts()]
    echoes = [echo for echo in echoes for _ in range(body.n)]
    shape = CompletionShape(wishes[0], gateway.clock.wall_s(), echoes)
    return await _reply(request, gateway, of_choices(wishes, body.n), body, shape)


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


def _wish(
    request: web.Request,
    model: Model,
    prompt: list[int],
    body: ChatRequest | CompletionRequest,
    arrived_s: float,
    text_span: Span,
) -> Wish:
    sampling = sampling_of(model, len(prompt), body)
    request_id, priority = RequestId(request[REQUEST_ID]), VISIT.get().priority(body.priority)
    idle_s = keep_alive_s(body.keep_alive)
    return Wish(request_id, model, prompt, sampling, body.stops(), arrived_s, (text_span,), priority, idle_s)


async def _reply(
    request: web.Request, gateway: Gateway, wishes: Sequence[Wish], body: ChatRequest | CompletionRequest, shape: Shape
) -> web.StreamResponse:
    timeout_s = timeout_of(request, gateway.limits.request_timeout_s)
    with gateway.answering(wishes[0].model) as times, tracing(trace_of(request)):
        counts = Counts(wishes, body.n)
        note = VISIT.get().noting(counts, times)
        answered = choices(wishes, gateway.router, gateway.text, gateway.turns)
        async with aclosing(within(answered, timeout_s, wishes[0].arrived_s, gateway.clock)) as pieces:
            if body.stream:
                events = gateway.events(request, wishes[0].model)
                return await _stream(events, pieces, note, shape, counts, body.stream_options or StreamOptions())
            return await _gather(pieces, note, shape, counts, len(wishes))


async def _gather(
    pieces: AsyncGenerator[Choice, None],
    note: Callable[[Choice], None],
    shape: Shape,
    counts: Counts,
    number_of_choices: int,
) -> web.Response:
    said: list[list[Piece]] = [[] for _ in range(number_of_choices)]
    async for choice in pieces:
        note(choice)
        said[choice.number].append(choice.piece)
    whole = []
    for index, parts in enumerate(said):
        finish = parts[-1].finish
        assert finish is not None, "every choice ends with a finish"
        entries = [entry for piece in parts for entry in piece.entries]
        whole.append(WholeChoice(index, "".join(piece.text for piece in parts), finish, entries))
    return json_response(shape.whole(whole, counts.usage()))


async def _stream(
    events: EventStream,
    pieces: AsyncGenerator[Choice, None],
    note: Callable[[Choice], None],
    shape: Shape,
    counts: Counts,
    options: StreamOptions,
) -> web.StreamResponse:
    """Send the answer as events; an error before the first of them stays an error."""
    begun: set[int] = set()
    ended = 0

    def hold(chunk: dict[str, Any] | None) -> None:
        if chunk is None:
            return
        if options.continuous_usage_stats:
            chunk = chunk | {"usage": counts.usage()}
        elif options.include_usage:
            chunk = chunk | {"usage": None}
        events.hold(chunk)

    async with events:
        try:
            async for choice in pieces:
                note(choice)
                index, piece, more = choice
                if index not in begun:
                    begun.add(index)
                    hold(shape.first_chunk(index))
                if piece.text or piece.entries:
                    hold(shape.chunk(index, piece.text, piece.entries))
                if piece.finish is not None:
                    ended += 1
                    hold(shape.last_chunk(index, piece.finish))
                # The last event of all goes with what is behind it.
                if events.is_full or not (more or ended == counts.choices):
                    await events.flush()
        except SllmError as error:
            if not events.opened:
                raise
            VISIT.get().code = error.code
            return await events.fail(error)
        if options.include_usage:
            events.hold(shape.usage_chunk(counts.usage()))
        return await events.done()
