"""One answer as it is written: tokens in, text out that may be shown, and the log-probabilities that belong to it.

What could be the beginning of a stop string waits, and so does half a character. A token's entry goes out with the
first character of its text, so nothing is said of tokens behind a stop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from sllm_actor.domain import TokenLogprobs
from sllm_actor.frontend.stop_strings import StopScanner
from sllm_actor.frontend.text import TextService


class Entry(NamedTuple):
    """A token's bytes and log-probability, and those of the likeliest in its place; a prompt's first has none."""

    piece: bytes
    logprob: float | None
    top: tuple[tuple[bytes, float], ...]


class Written(NamedTuple):
    """What can be shown now."""

    text: str
    entries: tuple[Entry, ...]


class Writer:
    """Writes one answer. `stopped` once a stop string is whole; `tokens` counts all that were taken."""

    def __init__(
        self, text: TextService, path: str, prompt: Sequence[int], stops: Sequence[str], marker: int | None = None
    ) -> None:
        self._text = text
        self._path = path
        self._detokenizer = text.detokenizer(path, prompt, marker)
        self._scanner = StopScanner(stops)
        # Entries whose text is not shown yet, with the character at which it begins. Bounded like the text that waits.
        self._waiting: deque[tuple[int, Entry]] = deque()
        self._pushed_characters = 0
        self._shown_characters = 0
        self.tokens = 0

    @property
    def stopped(self) -> bool:
        return self._scanner.stopped

    async def push(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> Written:
        """Take tokens; `logprobs` has one for each, or none at all."""
        if not logprobs:
            self.tokens += len(token_ids)
            return Written(self._show(await self._detokenizer.push(token_ids)), ())
        shown = ""
        entries = await self._describe(token_ids, logprobs)
        for token_id, entry in zip(token_ids, entries, strict=True):
            self.tokens += 1
            self._waiting.append((self._pushed_characters, entry))
            shown += self._show(await self._detokenizer.push((token_id,)))
            if self.stopped:
                break
        return Written(shown, self._ready())

    async def of_prompt(
        self, prompt: Sequence[int], index: int, logprobs: Sequence[TokenLogprobs]
    ) -> tuple[Entry, ...]:
        """Describe the prompt's tokens from the `index`-th on; before the second of them, the first one, too."""
        entries = await self._describe(prompt[index : index + len(logprobs)], logprobs)
        if index == 1:
            (first,) = await self._text.describe(self._path, prompt[:1])
            entries = [Entry(first, None, ()), *entries]
        return tuple(entries)

    async def end(self) -> Written:
        """Give what is left, now that nothing more comes."""
        text = self._show(await self._detokenizer.push((), final=True))
        flushed = self._scanner.flush()
        self._shown_characters += len(flushed)
        entries = self._ready()
        if not self.stopped:
            entries += tuple(entry for _, entry in self._waiting)
        self._waiting.clear()
        return Written(text + flushed, entries)

    def _show(self, text: str) -> str:
        self._pushed_characters += len(text)
        shown = self._scanner.push(text)
        self._shown_characters += len(shown)
        return shown

    def _ready(self) -> tuple[Entry, ...]:
        ready = []
        while self._waiting and self._waiting[0][0] < self._shown_characters:
            ready.append(self._waiting.popleft()[1])
        return tuple(ready)

    async def _describe(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> list[Entry]:
        asked = list(token_ids)
        for logprob in logprobs:
            asked += [token_id for token_id, _ in logprob.top]
        pieces = iter(await self._text.describe(self._path, asked))
        own = [next(pieces) for _ in token_ids]
        return [
            Entry(piece, logprob.logprob, tuple((next(pieces), value) for _, value in logprob.top))
            for piece, logprob in zip(own, logprobs, strict=True)
        ]
