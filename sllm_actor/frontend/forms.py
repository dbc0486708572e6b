"""The form that a request gives its answer: found, compiled, and checked against the request's other fields."""

from __future__ import annotations

from sllm_actor.domain import Model
from sllm_actor.errors import InvalidRequest
from sllm_actor.frontend.grammars import GrammarService
from sllm_actor.frontend.response_format import Source, source_of
from sllm_actor.frontend.schema import ChatRequest, CompletionRequest
from sllm_actor.frontend.tools import source_of_calls
from sllm_actor.messages.text import Encoded


async def grammar_of(grammars: GrammarService, model: Model, body: ChatRequest, prompt: Encoded) -> str:
    """Compile what an answer must look like; empty where any text will do. `prompt` says how the model writes calls.

    Raises:
        InvalidRequest: it can't be compiled within bounds, or the request has fields that do not go with it.
    """
    source = source_of(body.response_format)
    if source is not None and prompt.tool_format:
        raise InvalidRequest("response_format: an answer that may be a tool call has no other form", param=source.param)
    if prompt.tool_format:
        parallel = body.parallel_tool_calls
        source = source_of_calls(body.tools, body.tool_choice, prompt.tool_format, prompt.marker, parallel=parallel)
    return await _compile(grammars, model, body, source)


async def grammar_of_completion(grammars: GrammarService, model: Model, body: CompletionRequest) -> str:
    """Compile what each answer to a prompt must look like; empty where any text will do.

    Raises:
        InvalidRequest: as `grammar_of` does.
    """
    return await _compile(grammars, model, body, source_of(body.response_format))


async def _compile(
    grammars: GrammarService, model: Model, body: ChatRequest | CompletionRequest, source: Source | None
) -> str:
    if source is None:
        return ""
    if body.ignore_eos:
        raise InvalidRequest("ignore_eos: an answer of a given form ends where the form does", param="ignore_eos")
    if body.min_tokens:
        raise InvalidRequest("min_tokens: an answer of a given form ends where the form does", param="min_tokens")
    return await grammars.compile(model, source.form, source.text, source.param)
