"""What a request for an answer comes to once its texts are read: all that the same answer can be made of once more."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import TypeVar

import msgspec

from sllm_actor.domain import Model, RequestId, Span
from sllm_actor.domain.tokens import unpack_uint32
from sllm_actor.frontend.answer import Wish
from sllm_actor.frontend.forms import grammar_of, grammar_of_completion
from sllm_actor.frontend.grammars import GrammarService
from sllm_actor.frontend.schema import ChatMessage, ChatRequest, CompletionRequest, keep_alive_s
from sllm_actor.frontend.shapes import ChatShape, CompletionShape
from sllm_actor.frontend.tool_formats import FORMATS
from sllm_actor.frontend.tool_shape import ToolShape
from sllm_actor.frontend.wishes import of_choices, sampling_of
from sllm_actor.messages.text import Encoded

Body = TypeVar("Body", ChatRequest, CompletionRequest)


class _Order(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`stream_id` is nobody else's; `answer_id` is what the client calls it, and may come again."""

    stream_id: str
    answer_id: RequestId
    created_wall_s: float


class ChatOrder(_Order, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="chat"):
    """A chat: its `body`, with the seed that it is answered with, and its messages as the model reads them."""

    body: ChatRequest
    rendered: Encoded

    @property
    def prompts(self) -> Sequence[bytes]:
        return (self.rendered.token_ids,)

    @property
    def marker(self) -> int | None:
        return self.rendered.marker

    async def grammar(self, grammars: GrammarService, model: Model) -> str:
        return await grammar_of(grammars, model, self.body, self.rendered)

    def shape(self, wish: Wish) -> ChatShape:
        if not self.rendered.tool_format:
            return ChatShape(wish, self.created_wall_s, self.answer_id)
        names = {tool.function.name for tool in self.body.tools or ()}
        form = FORMATS[self.rendered.tool_format]
        parallel = self.body.parallel_tool_calls
        return ToolShape(
            wish, self.created_wall_s, self.answer_id, self.stream_id, form, names, n=self.body.n, parallel=parallel
        )

    def kept(self) -> ChatOrder:
        """Give it without what is in its prompt as well."""
        body = msgspec.structs.replace(self.body, messages=[ChatMessage("user", "")])
        return msgspec.structs.replace(self, body=body)


class CompletionOrder(_Order, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="completion"):
    """Texts to go on with: the `body`, with its seed, the prompts' tokens, and what of each choice's is echoed."""

    body: CompletionRequest
    prompts: tuple[bytes, ...]
    echoes: tuple[str, ...]

    @property
    def marker(self) -> int | None:
        return None

    async def grammar(self, grammars: GrammarService, model: Model) -> str:
        return await grammar_of_completion(grammars, model, self.body)

    def shape(self, wish: Wish) -> CompletionShape:
        return CompletionShape(wish, self.created_wall_s, self.answer_id, self.echoes)

    def kept(self) -> CompletionOrder:
        """Give it without what is in its prompts as well."""
        return msgspec.structs.replace(self, body=msgspec.structs.replace(self.body, prompt=""))


Order = ChatOrder | CompletionOrder


def new_stream_id() -> str:
    """Make an id that nobody can guess."""
    return f"stream-{secrets.token_hex(16)}"


def seeded(body: Body) -> Body:
    """Give a body with a seed: where the client has none, one is drawn here, so that it is the same ever after."""
    return body if body.seed is not None else msgspec.structs.replace(body, seed=secrets.randbits(63))


async def wishes_of(
    order: Order,
    model: Model,
    grammars: GrammarService,
    request_id: RequestId,
    priority: int,
    arrived_s: float,
    text_span: Span,
) -> list[Wish]:
    """Say what is asked of the Router, for each choice.

    Raises:
        InvalidRequest: the order does not fit the model; `param` names the field.
    """
    body = order.body
    wishes = []
    for packed in order.prompts:
        prompt = list(unpack_uint32(packed))
        wishes.append(
            Wish(
                request_id, model, prompt, sampling_of(model, len(prompt), body), body.stops(), arrived_s,
                (text_span,), priority, keep_alive_s(body.keep_alive), marker=order.marker,
            )
        )  # fmt: skip
    grammar = await order.grammar(grammars, model)
    return of_choices([wish._replace(grammar=grammar) for wish in wishes], body.n)
