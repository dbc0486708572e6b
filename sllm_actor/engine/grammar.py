"""An answer held to a grammar: which tokens may come next, given those that came.

The grammar arrives compiled (`Generate.grammar`); its state is a function of the answer's tokens alone, so a resumed
answer has it again once they are replayed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch
import xgrammar
import xgrammar.kernels.apply_token_bitmask_inplace_cpu  # Here, and not with the first token.

from sllm_actor.engine.utf8_guard import Utf8Guard
from sllm_actor.engine.vocabulary import read_vocabulary
from sllm_actor.errors import GenerationFailed, InvalidRequest

# Compiled grammars that an engine keeps ready, each the size of the text that it came as, or less.
MAX_KEPT_BYTES = 64 * 1024 * 1024


class GrammarConstraint:
    """The state of one answer. Not thread-safe."""

    def __init__(
        self, matcher: xgrammar.GrammarMatcher, bitmask: torch.Tensor, guard: Utf8Guard, last: int | None
    ) -> None:
        self._matcher = matcher
        self._bitmask = bitmask
        self._guard = guard
        self._last = last

    @property
    def ended(self) -> bool:
        """Tell whether the answer is whole and its end token has come."""
        return bool(self._matcher.is_terminated())

    def mask(self, logits: torch.Tensor) -> None:
        """Put what can't come next at minus infinity, in place. logits: `[vocabulary]`, any float type.

        Once the grammar has been satisfied and nothing can follow, the model's end tokens alone are left.
        """
        if self._matcher.fill_next_token_bitmask(self._bitmask):
            self._apply(logits)
        self._guard.mask(logits, self._last)

    def _apply(self, logits: torch.Tensor) -> None:
        if logits.dtype == torch.float32 and logits.device.type == "cpu":
            xgrammar.apply_token_bitmask_inplace(logits, self._bitmask[0], vocab_size=logits.shape[-1], backend="cpu")
        else:
            allowed = _unpack(self._bitmask[0], logits.shape[-1]).to(logits.device)
            logits.masked_fill_(~allowed, float("-inf"))

    def accept(self, token: int) -> None:
        """Take note of the token that came.

        Raises:
            GenerationFailed: it is none that could.
        """
        if not self._matcher.accept_token(token):
            raise GenerationFailed(f"token {token} does not fit the grammar of the answer")
        self._last = token


def _unpack(words: torch.Tensor, tokens: int) -> torch.Tensor:
    """Spread `[words]`, int32, 32 tokens in each, to `[tokens]`, bool."""
    bits = torch.arange(32, dtype=torch.int32)
    return ((words[:, None] >> bits) & 1).bool().flatten()[:tokens]


class Grammars:
    """The grammars of one model, the most recently used of them ready. Not thread-safe."""

    def __init__(self, path: str, vocabulary_tokens: int, stop_token_ids: Sequence[int]) -> None:
        self._path = path
        self._vocabulary_tokens = vocabulary_tokens
        self._stop_token_ids = stop_token_ids
        self._vocabulary: xgrammar.TokenizerInfo | None = None
        self._guard = Utf8Guard(())
        self._kept: OrderedDict[str, xgrammar.CompiledGrammar] = OrderedDict()
        self._kept_bytes = 0

    def constrain(self, grammar: str, generated: Iterable[int] = ()) -> GrammarConstraint:
        """Hold an answer to a compiled grammar, after the tokens that it has already.

        Raises:
            InvalidRequest: this is no grammar, none for this model, or the tokens do not fit it.
            TokenizerInvalid: the model's tokenizer can't be used with grammars.
        """
        matcher = xgrammar.GrammarMatcher(self._compiled(grammar))
        token = None
        for at, token in enumerate(generated):
            if not matcher.accept_token(token):
                raise InvalidRequest(f"token {at} of the answer so far, {token}, does not fit its grammar")
        bitmask = xgrammar.allocate_token_bitmask(1, self._vocabulary_tokens)
        return GrammarConstraint(matcher, bitmask, self._guard, token)

    def _compiled(self, grammar: str) -> xgrammar.CompiledGrammar:
        if grammar in self._kept:
            self._kept.move_to_end(grammar)
            return self._kept[grammar]
        if self._vocabulary is None:
            self._vocabulary = read_vocabulary(self._path, self._vocabulary_tokens, self._stop_token_ids)
            self._guard = Utf8Guard(self._vocabulary.decoded_vocab)
        try:
            compiled = xgrammar.CompiledGrammar.deserialize_json(grammar, self._vocabulary)
        except RuntimeError as error:  # The base of all that the library raises.
            raise InvalidRequest(f"this is no grammar for this model: {str(error)[:200]}") from error
        self._kept[grammar] = compiled
        self._kept_bytes += len(grammar)
        while self._kept_bytes > MAX_KEPT_BYTES:
            oldest, _ = self._kept.popitem(last=False)
            self._kept_bytes -= len(oldest)
        return compiled
