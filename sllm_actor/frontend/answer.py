"""One answer: prompt to tokens, tokens to text, stop strings, usage. Knows nothing of HTTP."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import NamedTuple

from sllm_actor.domain import FinishReason, Model, RequestId, Sampling, Span
from sllm_actor.domain.tokens import pack_uint32
from sllm_actor.errors import InvalidRequest
from sllm_actor.frontend.choice_log import ChoiceLog
from sllm_actor.frontend.text import TextService
from sllm_actor.frontend.turns import Turns
from sllm_actor.frontend.written import Entry, Writer
from sllm_actor.messages.generation import Finished, Generate, PromptLogprobs, Tokens
from sllm_actor.runtime import ActorRef, Backlog


class Wish(NamedTuple):
    """What a client asked for, checked, with the model's defaults filled in."""

    request_id: RequestId
    model: Model
    prompt: Sequence[int]
    sampling: Sampling
    stops: Sequence[str]
    arrived_s: float
    spans: tuple[Span, ...]
    priority: int = 0
    # How long the instance stays from the end of this on; None where the model's own says it.
    keep_alive_s: float | None = None
    grammar: str = ""
    # The special token that a tool call begins with, which is to be written out.
    marker: int | None = None


class Piece(NamedTuple):
    """Some text of an answer; the last piece alone has a `finish`. Token counts are totals so far.

    One that is told `again` is made of tokens that were generated for an earlier request.
    """

    text: str
    finish: FinishReason | None
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int = 0
    entries: tuple[Entry, ...] = ()
    again: bool = False


class Choice(NamedTuple):
    """A piece of one of the choices, by its number. `more` where the next item is there already."""

    number: int
    piece: Piece
    more: bool = False


def max_tokens(model: Model, prompt_tokens: int, asked: int | None) -> int:
    """Decide how long the answer may be.

    Raises:
        InvalidRequest: the prompt, or the prompt and what was asked for, exceed the model's context.
    """
    room = model.context_tokens - prompt_tokens
    if prompt_tokens == 0:
        raise InvalidRequest("the prompt has no tokens")
    if room < 1:
        raise InvalidRequest(
            f"the prompt has {prompt_tokens} tokens, the context of {model.name} is {model.context_tokens} tokens"
        )
    if asked is not None and asked > room:
        raise InvalidRequest(
            f"max_tokens is {asked} and the prompt has {prompt_tokens} tokens, the context of {model.name} is "
            f"{model.context_tokens} tokens",
            param="max_tokens",
        )
    return room if asked is None else asked


async def answer(
    wish: Wish, number: int, router: ActorRef, text: TextService, turns: Turns, log: ChoiceLog
) -> AsyncGenerator[Choice, None]:
    """Generate the choice of that number, piece by piece, ending with the piece that has a `finish`.

    What is in the log is told again, and gone on with; what comes is noted there.

    Raises:
        SllmError: whatever went wrong, by its type.
    """
    writer = Writer(text, wish.model.texts, wish.prompt, wish.stops, wish.marker)
    async with aclosing(_again(wish, number, writer, turns, log)) as pieces:
        async for choice in pieces:
            yield choice
            if choice.piece.finish is not None:
                return
    request = Generate(
        request_id=wish.request_id,
        model=wish.model.name,
        prompt=pack_uint32(wish.prompt),
        sampling=wish.sampling,
        arrived_s=wish.arrived_s,
        spans=wish.spans,
        priority=wish.priority,
        keep_alive_s=wish.keep_alive_s,
        grammar=wish.grammar,
        base=wish.model.base,
        generated=pack_uint32(log.tokens),
    )
    prompt_tokens = len(wish.prompt)
    backlog, share = Backlog(), turns.first
    async with aclosing(router.stream(request, backlog)) as items:
        async for item in items:
            if not share.take_now():
                await share.take()
            share = turns.next
            if isinstance(item, Finished):
                log.finish(item)
                yield Choice(number, await _last(writer, item, prompt_tokens))
                return
            if isinstance(item, PromptLogprobs):
                entries = await writer.of_prompt(wish.prompt, item.index, item.logprobs)
                yield Choice(number, Piece("", None, prompt_tokens, 0, 0, entries), bool(backlog))
                continue
            assert isinstance(item, Tokens)
            # Each by itself, however they came together, so that an answer's pieces are the same each time.
            for at, token_id in enumerate(item.token_ids):
                log.take(token_id)
                shown = await writer.push((token_id,), item.logprobs[at : at + 1])
                finish = FinishReason.STOP if writer.stopped else None
                if shown.text or finish is not None:
                    piece = Piece(shown.text, finish, prompt_tokens, writer.tokens, 0, shown.entries)
                    yield Choice(number, piece, bool(backlog) and finish is None)
                if finish is not None:
                    return


async def _again(wish: Wish, number: int, writer: Writer, turns: Turns, log: ChoiceLog) -> AsyncGenerator[Choice, None]:
    """Write what is known already, token by token as it was written before."""
    prompt_tokens = len(wish.prompt)
    for token_id in list(log.tokens):
        await turns.next.take()
        shown = await writer.push((token_id,), ())
        finish = FinishReason.STOP if writer.stopped else None
        if shown.text or finish is not None:
            yield Choice(number, Piece(shown.text, finish, prompt_tokens, writer.tokens, again=True))
    if log.end is not None and not writer.stopped:
        yield Choice(number, (await _last(writer, log.end, prompt_tokens))._replace(again=True))


async def _last(writer: Writer, end: Finished, prompt_tokens: int) -> Piece:
    shown = await writer.end()
    reason = FinishReason.STOP if writer.stopped else end.reason
    return Piece(shown.text, reason, prompt_tokens, end.generated_tokens, end.cached_tokens, shown.entries)
