"""One answer, or one text, on its way through the runner: its tokens, and how far they are computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sllm_actor.domain import FinishReason, TokenLogprobs
from sllm_actor.engine.kv_cache import Slot
from sllm_actor.engine.pooling import Pooler
from sllm_actor.engine.sampling import Drawn, Sampler
from sllm_actor.errors import SllmError


class Generation:
    """One answer: its tokens, those of an earlier engine included, and how far they are computed."""

    def __init__(
        self, prompt: Sequence[int], sampler: Sampler | None, generated: Sequence[int], order: tuple[int, int]
    ) -> None:
        self.prompt = list(prompt)
        self._sampler = sampler
        self.tokens = list(generated)
        self.order = order  # Of those that wait, the least is first; of those that run, the greatest makes way.
        self.pinned = False
        self.parked = False  # It holds keys and values for one that will go on with it, and draws nothing.
        self.told = 0  # Of a parked one, how many tokens it knew when it was told last to be as far as it can.
        self.adapter = ""
        self.cached_tokens: int | None = None
        self.slot: Slot | None = None
        self.started = False
        self.drawn: Drawn | None = None
        self.finish: FinishReason | None = None
        # Of an answer that goes on, the prompt's log-probabilities have been told.
        self.scores_prompt = sampler is not None and sampler.sampling.prompt_logprobs and not generated
        self.scored: list[TokenLogprobs] = []  # Of the prompt's tokens from the second on.
        self.pooler: Pooler | None = None  # Of a text that is embedded: it has no answer, and ends with its `vector`.
        self.vector = b""

    @property
    def sampler(self) -> Sampler:
        assert self._sampler is not None, "a text that is embedded has no answer"
        return self._sampler

    @property
    def afresh(self) -> bool:
        """Whether all its tokens are computed: to be scored or embedded they need states, which no slot has."""
        return self.scores_prompt or self.pooler is not None

    @property
    def known(self) -> int:
        return len(self.prompt) + len(self.tokens)

    @property
    def written(self) -> int:
        return 0 if self.slot is None else len(self.slot.tokens)

    @property
    def reach(self) -> int:
        """How many of its tokens are to be computed for now: behind all of them a token is drawn.

        A parked one keeps its last for whoever takes it over. The prompt of a pinned one is computed in chunks that
        begin at fixed places, and so not by halves.
        """
        if not self.parked:
            return self.known
        return 0 if self.pinned and not self.tokens else self.known - 1

    @property
    def idle(self) -> bool:
        """Whether it waits for tokens from outside."""
        return self.parked and self.written >= self.reach

    @property
    def decodes(self) -> bool:
        """Whether its next token is computed alone. A pinned one replays an answer so, as it was computed first."""
        alone = self.known - self.written == 1 or (self.pinned and self.written >= len(self.prompt))
        return self.started and alone and not self.idle

    def can_go_on_with(self, parked: Generation) -> bool:
        """Tell whether what a parked one holds is computed as this one would compute it, and is the beginning of it."""
        return (
            parked.slot is not None
            and parked.started
            and self.finish is None
            and not self.afresh
            and (parked.adapter, parked.pinned) == (self.adapter, self.pinned)
            and parked.written < self.known
            and parked.slot.tokens == self.tokens_from(0, parked.written)
        )

    def tokens_from(self, begin: int, count: int) -> list[int]:
        """Give `count` known tokens from the `begin`-th on."""
        prompt = len(self.prompt)
        if begin >= prompt:
            return self.tokens[begin - prompt : begin - prompt + count]
        found = self.prompt[begin : begin + count]
        return found + self.tokens[: count - len(found)]

    def to_score(self, begin: int, count: int) -> range:
        """Give the prompt's tokens, by position, that the `count` from the `begin`-th on are to tell the chances of."""
        if not self.scores_prompt:
            return range(0)
        return range(max(begin, len(self.scored)) + 1, min(begin + count, len(self.prompt) - 1) + 1)


Work = list[tuple[Generation, int]]


class Step(NamedTuple):
    """What a step brought: who was given a slot, who failed and why, and who has a new token or an end.

    The token is in `drawn`; one that had to end for want of memory has none. Those in `parked` are as far as they can.
    """

    admitted: list[Generation]
    advanced: list[Generation]
    failed: list[tuple[Generation, SllmError]]
    parked: list[Generation]
