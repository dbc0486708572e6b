"""The tokens of one choice as they come, and its end: what the same events can be made of once more."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sllm_actor.messages.generation import Finished


class ChoiceLog:
    """One choice's answer. `tokens` and `end` are those that are known already where it goes on."""

    def __init__(self, on_change: Callable[[], None], tokens: Sequence[int] = (), end: Finished | None = None) -> None:
        self.tokens = list(tokens)
        self.end = end
        self._on_change = on_change

    def take(self, token_id: int) -> None:
        """Note a token, behind the others."""
        self.tokens.append(token_id)
        self._on_change()

    def finish(self, end: Finished) -> None:
        """Note the end."""
        self.end = end
        self._on_change()


class Unkept(ChoiceLog):
    """The log of a choice that nobody goes on with: there is nothing in it."""

    def __init__(self) -> None:
        super().__init__(lambda: None)

    def take(self, token_id: int) -> None:
        """Forget it."""

    def finish(self, end: Finished) -> None:
        """Forget it."""
