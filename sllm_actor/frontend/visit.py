"""One HTTP request from its head to its end: what its access line, the metrics and its key's limits are made of.

It has names, numbers and codes: nothing of what was asked or answered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import NamedTuple

from sllm_actor.domain import Model, RequestId
from sllm_actor.errors import AccessDenied
from sllm_actor.frontend.answer import Choice
from sllm_actor.frontend.choices import Counts
from sllm_actor.frontend.keys import Key
from sllm_actor.runtime import Clock


class TokenTimes(NamedTuple):
    """Who is told, in seconds, of the first token of an answer, and of each time between two."""

    first: Callable[[float], None]
    between: Callable[[float], None]


class Visit:
    """Filled in by whoever learns something; moments are monotonic, and 0.0 until they have come."""

    def __init__(self, request_id: RequestId, method: str, route: str, clock: Clock) -> None:
        self.request_id = request_id
        self.method = method
        self.route = route
        self.begin_s = clock.monotonic_s()
        self.key: Key | None = None
        self.limits: Mapping[str, str] = {}
        self.model = ""
        self.stream = False
        self.status = 0
        self.code = ""
        self.finish = ""
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.first_token_s = 0.0
        self.last_token_s = 0.0
        self.end_s = 0.0
        self._clock = clock

    def check(self, model: Model) -> None:
        """Note the model.

        Raises:
            AccessDenied: the key is not for it.
        """
        if not self.may_use(model):
            assert self.key is not None
            raise AccessDenied(f"the key {self.key.name} may not use {model.name}", param="model")
        self.model = model.name

    def may_use(self, model: Model) -> bool:
        """Tell whether the key is for this model."""
        return self.key is None or self.key.models is None or model.name in self.key.models

    def priority(self, asked: int) -> int:
        """Give the priority that a request has which asks for this one."""
        floor = None if self.key is None else self.key.min_priority
        return asked if floor is None else max(asked, floor)

    def noting(self, counts: Counts, times: TokenTimes) -> Callable[[Choice], None]:
        """Give who is to be told of each piece of an answer as it comes: how many tokens that brings, and when."""
        self.prompt_tokens = counts.prompt_tokens
        before: dict[int, tuple[float, int]] = {}
        # Of each choice, what an earlier request has generated: that one has counted it.
        earlier: Counter[int] = Counter()

        def note(choice: Choice) -> None:
            number, piece, _ = choice
            now_s = self._clock.monotonic_s()
            if piece.again:
                earlier[number] = piece.generated_tokens
                before[number] = now_s, piece.generated_tokens
            elif not self.first_token_s:
                self.first_token_s = now_s
                times.first(now_s - self.begin_s)
            last_s, generated = before.get(number, (now_s, piece.generated_tokens))
            if (tokens := piece.generated_tokens - generated) > 0:
                times.between((now_s - last_s) / tokens)
            before[number] = now_s, piece.generated_tokens
            self.last_token_s = now_s
            counts.take(choice)
            self.generated_tokens = counts.generated_tokens - earlier.total()
            if piece.finish is not None:
                self.finish = piece.finish

        return note


# Of the request that the running task is for.
VISIT: ContextVar[Visit] = ContextVar("visit")
