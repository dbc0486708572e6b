"""Vectors of texts: gateway to Router to InferenceWorker to engine, and the vectors on the way back."""

from __future__ import annotations

from sllm_actor.domain import ModelName, RequestId, Span
from sllm_actor.messages.declare import message


@message("embedding.ask")
class Embed:
    """Ask for a vector of each text: `prompt` has the token ids of all, behind each other, `sizes` how many each has.

    Both are little-endian uint32. Of a matryoshka model's vectors `dimensions` are given, or all where that is 0.
    A stream of `Embedded`, one for each text, in the order in which they are computed, ended by one `Finished`. Fails
    with the typed error of whatever went wrong. Otherwise as `Generate`.
    """

    request_id: RequestId
    model: ModelName
    prompt: bytes
    sizes: bytes
    dimensions: int = 0
    arrived_s: float = 0.0
    spans: tuple[Span, ...] = ()
    priority: int = 0
    keep_alive_s: float | None = None


@message("embedding.vector")
class Embedded:
    """The vector of the text `index`, little-endian float32."""

    request_id: RequestId
    index: int
    vector: bytes
