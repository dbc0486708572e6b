"""One vector from the hidden states of a text, as they come: in one piece or in several.

The formulas are those of sentence-transformers' `Pooling`; everything is added up in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch

from sllm_actor.domain import Embedding, Pooling
from sllm_actor.errors import GenerationFailed


class Pooler:
    """Takes the hidden states of one text, from its first token to its last."""

    def __init__(self, embedding: Embedding, dimensions: int) -> None:
        self._how = embedding
        self._dimensions = dimensions
        self._state: torch.Tensor | None = None
        self._tokens = 0

    def take(self, hidden: torch.Tensor, past: int = 0) -> None:
        """Take the states of the tokens behind the `past` ones, `[tokens, hidden_size]`; a text may begin anew."""
        hidden = hidden.float()
        self._tokens = past + hidden.shape[0]
        before, pooling = self._state if past else None, self._how.pooling
        if pooling is Pooling.LAST:
            self._state = hidden[-1]
        elif pooling is Pooling.CLS:
            self._state = hidden[0] if before is None else before
        elif pooling is Pooling.MAX:
            largest = hidden.amax(0)
            self._state = largest if before is None else torch.maximum(before, largest)
        else:
            total = hidden.sum(0)
            self._state = total if before is None else before + total

    def vector(self) -> bytes:
        """Give the text's vector, little-endian float32.

        Raises:
            GenerationFailed: it has numbers that are none.
        """
        assert self._state is not None, "a text has a token"
        vector = self._state
        if self._how.pooling is Pooling.MEAN:
            vector = vector / self._tokens
        elif self._how.pooling is Pooling.MEAN_SQRT_LEN:
            vector = vector / self._tokens**0.5
        if self._dimensions:
            vector = vector[: self._dimensions]
        if self._how.normalize:
            vector = torch.nn.functional.normalize(vector, dim=0)
        if not bool(torch.isfinite(vector).all()):
            raise GenerationFailed("the model gave a vector that is not finite")
        packed: bytes = vector.cpu().numpy().astype(numpy.dtype("<f4")).tobytes()
        return packed


def check_text(prompt: Sequence[int], context_tokens: int, vocabulary: int) -> None:
    """Compare a text that is to be embedded with what a model can take.

    Raises:
        GenerationFailed: it is empty or too long, or has a token that the model does not know.
    """
    if not 0 < len(prompt) <= context_tokens:
        raise GenerationFailed(f"a text of {len(prompt)} tokens in a context of {context_tokens}")
    if max(prompt) >= vocabulary:
        raise GenerationFailed(f"token {max(prompt)} can't be computed: the model knows {vocabulary}")
