"""Keep an answer valid UTF-8, where tokens write single bytes: xgrammar's classes of characters let more through.

They take each lead byte with any byte behind it that continues a character. Behind four of them some do not (RFC 3629,
section 4): what they would write is longer than it needs to be, half of a pair of UTF-16, or no character at all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

_NEVER_BEHIND = {
    0xE0: range(0x80, 0xA0),
    0xED: range(0xA0, 0xC0),
    0xF0: range(0x80, 0x90),
    0xF4: range(0x90, 0xC0),
}


class Utf8Guard:
    """Knows of each token what it writes, as far as it matters here."""

    def __init__(self, written: Sequence[bytes]) -> None:
        never: list[int] = []
        behind: defaultdict[int, list[int]] = defaultdict(list)
        self._ends_with: dict[int, int] = {}
        for token, text in enumerate(written):
            if not text or text.isascii():
                continue
            if any(text[at + 1] in _NEVER_BEHIND.get(lead, ()) for at, lead in enumerate(text[:-1])):
                never.append(token)
            if text[-1] in _NEVER_BEHIND:
                self._ends_with[token] = text[-1]
            for lead, seconds in _NEVER_BEHIND.items():
                if text[0] in seconds:
                    behind[lead].append(token)
        self._never = torch.tensor(never, dtype=torch.long)
        self._behind = {lead: torch.tensor(tokens, dtype=torch.long) for lead, tokens in behind.items()}

    def mask(self, logits: torch.Tensor, last: int | None) -> None:
        """Put tokens that make no character behind `last` at minus infinity, in place. logits: `[vocabulary]`."""
        lead = None if last is None else self._ends_with.get(last)
        for tokens in (self._never, self._behind.get(lead) if lead is not None else None):
            if tokens is not None and len(tokens):
                logits[tokens.to(logits.device)] = float("-inf")
