"""Vectors of texts: texts to tokens, tokens to the Router, vectors to an answer in OpenAI's shape."""

from __future__ import annotations

import asyncio
import base64
import sys
from array import array
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Literal, NamedTuple

import msgspec
from aiohttp import web

from sllm_actor.domain import Embedding, Model, RequestId, Span
from sllm_actor.domain.tokens import pack_uint32
from sllm_actor.errors import InvalidRequest
from sllm_actor.frontend.schema import MAX_TEXT_TOKENS, EmbeddingRequest, keep_alive_s
from sllm_actor.frontend.text import TextService
from sllm_actor.frontend.visit import VISIT
from sllm_actor.frontend.wishes import check_vocabulary
from sllm_actor.messages.embedding import Embed, Embedded

# Numbers that are written between two looks at what else the loop has to do: about a millisecond's work.
NUMBERS_AT_ONCE = 8192


class How(NamedTuple):
    """How a request's texts are embedded; `dimensions` 0 is as many as the model has."""

    embedding: Embedding
    dimensions: int


def embedding_of(model: Model, dimensions: int | None) -> How:
    """Say how a model embeds.

    Raises:
        InvalidRequest: it does not, or has no vectors of so many dimensions.
    """
    how = model.embedding
    if model.base:
        raise InvalidRequest(f"{model.name} is a LoRA adapter, which embeds no texts: ask {model.base}", param="model")
    if how is None:
        raise InvalidRequest(
            f"{model.name} embeds no texts: its config.json has no hidden_size, or it was registered by a "
            "version that did not embed (deploy it again)",
            param="model",
        )
    if dimensions is None:
        return How(how, 0)
    if not how.matryoshka:
        raise InvalidRequest(
            f"dimensions: the vectors of {model.name} can't be shortened (it is no matryoshka model)",
            param="dimensions",
        )
    if how.matryoshka_dimensions and dimensions not in how.matryoshka_dimensions:
        known = ", ".join(map(str, how.matryoshka_dimensions))
        raise InvalidRequest(f"dimensions: {dimensions} is none of {known}", param="dimensions")
    if dimensions > how.dimensions:
        raise InvalidRequest(
            f"dimensions: {dimensions} are more than the {how.dimensions} of {model.name}", param="dimensions"
        )
    return How(how, dimensions)


async def tokens_of(text: TextService, model: Model, how: How, texts: Sequence[str | list[int]]) -> list[Sequence[int]]:
    """Tokenize what is not tokenized yet.

    Raises:
        InvalidRequest: a text has no tokens or too many, or one that the model does not know; or all have too many.
    """
    found: list[Sequence[int]] = []
    total = 0
    for index, given in enumerate(texts):
        where = f"input[{index}]" if len(texts) > 1 else "input"
        if isinstance(given, str):
            tokens = await text.encode(model.path, given.lower() if how.embedding.lower_case else given)
        else:
            check_vocabulary(where, given, model)
            tokens = given
        longest = how.embedding.max_tokens
        if not tokens:
            raise InvalidRequest(f"{where}: the text has no tokens", param=where)
        if len(tokens) > longest:
            raise InvalidRequest(
                f"{where}: the text has {len(tokens)} tokens, {model.name} embeds at most {longest}", param=where
            )
        found.append(tokens)
        total += len(tokens)
        if total > MAX_TEXT_TOKENS:
            raise InvalidRequest(
                f"input: the texts have more than {MAX_TEXT_TOKENS} tokens in all (the first {index + 1}: {total})",
                param="input",
            )
    return found


def question_of(
    request_id: RequestId,
    model: Model,
    texts: Sequence[Sequence[int]],
    body: EmbeddingRequest,
    arrived_s: float,
    text_span: Span,
) -> Embed:
    """Write what is asked of the Router."""
    return Embed(
        request_id=request_id,
        model=model.name,
        prompt=b"".join(map(pack_uint32, texts)),
        sizes=pack_uint32(map(len, texts)),
        dimensions=body.dimensions or 0,
        arrived_s=arrived_s,
        spans=(text_span,),
        priority=VISIT.get().priority(body.priority),
        keep_alive_s=keep_alive_s(body.keep_alive),
    )


async def collect(items: AsyncGenerator[object, None]) -> list[bytes]:
    """Wait for the vectors and give them in the order of their texts."""
    vectors: dict[int, bytes] = {}
    async with aclosing(items):
        async for item in items:
            if isinstance(item, Embedded):
                vectors[item.index] = item.vector
    return [vectors[index] for index in range(len(vectors))]


async def vectors_response(
    model: str, vectors: Sequence[bytes], form: Literal["float", "base64"], prompt_tokens: int
) -> web.Response:
    """Write the answer; a long one is written with pauses, in which others have their turn."""
    parts: list[bytes] = []
    numbers = 0
    for index, vector in enumerate(vectors):
        written = base64.b64encode(vector).decode() if form == "base64" else _floats(vector)
        parts.append(msgspec.json.encode({"object": "embedding", "index": index, "embedding": written}))
        numbers += len(vector) // 4
        if numbers > NUMBERS_AT_ONCE:
            numbers = 0
            await asyncio.sleep(0)
    usage = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}
    end = msgspec.json.encode({"model": model, "usage": usage})
    body = b'{"object":"list","data":[' + b",".join(parts) + b"]," + end[1:]
    return web.Response(body=body, content_type="application/json")


def _floats(vector: bytes) -> list[float]:
    numbers = array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()
