"""What each key has left: requests and tokens in a minute, requests at once. State without I/O."""

from __future__ import annotations

import math
from collections.abc import Mapping

from sllm_actor.errors import RateLimited
from sllm_actor.frontend.keys import Key

MINUTE_S = 60.0


class Budget:
    """A minute's worth, refilled evenly (a token bucket). May be overdrawn: then it has to fill up again first."""

    def __init__(self, per_minute: int, now_s: float) -> None:
        self.per_minute = per_minute
        self._left = float(per_minute)
        self._at_s = now_s

    def left(self, now_s: float) -> float:
        """Give what is left."""
        refilled = (now_s - self._at_s) * self.per_minute / MINUTE_S
        self._left = min(float(self.per_minute), self._left + refilled)
        self._at_s = now_s
        return self._left

    def take(self, amount: int, now_s: float) -> None:
        """Take as much, whether or not it is left."""
        self._left = self.left(now_s) - amount

    def seconds_until(self, amount: float, now_s: float) -> float:
        """Give the time until as much is left."""
        return max(0.0, (amount - self.left(now_s)) * MINUTE_S / self.per_minute)

    def headers(self, kind: str, now_s: float) -> dict[str, str]:
        """Give the headers that OpenAI's clients know: what is allowed, left, and when it is whole again."""
        return {
            f"x-ratelimit-limit-{kind}": str(self.per_minute),
            f"x-ratelimit-remaining-{kind}": str(max(0, math.floor(self.left(now_s)))),
            f"x-ratelimit-reset-{kind}": f"{self.seconds_until(self.per_minute, now_s):.3f}s",
        }


class _Account:
    """What one key has used."""

    def __init__(self, key: Key, now_s: float) -> None:
        self.key = key
        self.running = 0
        self.requests = Budget(key.requests_per_minute, now_s) if key.requests_per_minute else None
        self.tokens = Budget(key.tokens_per_minute, now_s) if key.tokens_per_minute else None


class KeyLimits:
    """Owns the accounts of the keys, by name."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}

    def enter(self, key: Key, now_s: float) -> Mapping[str, str]:
        """Begin a request; give the headers that tell what is left. `leave` has to follow.

        Raises:
            RateLimited: it is one too many.
        """
        account = self._account(key, now_s)
        if key.concurrent_requests is not None and account.running >= key.concurrent_requests:
            raise _limited(f"the key {key.name} may have {key.concurrent_requests} requests at once", 1.0)
        if account.tokens is not None and (wait_s := account.tokens.seconds_until(1, now_s)):
            raise _limited(f"the key {key.name} may use {account.tokens.per_minute} tokens in a minute", wait_s)
        if account.requests is not None:
            if wait_s := account.requests.seconds_until(1, now_s):
                raise _limited(f"the key {key.name} may ask {account.requests.per_minute} times in a minute", wait_s)
            account.requests.take(1, now_s)
        account.running += 1
        headers = {} if account.requests is None else account.requests.headers("requests", now_s)
        return headers | ({} if account.tokens is None else account.tokens.headers("tokens", now_s))

    def leave(self, key: Key, used_tokens: int, now_s: float) -> None:
        """End a request that used as many tokens, prompt and answer."""
        account = self._accounts[key.name]
        account.running -= 1
        if account.tokens is not None:
            account.tokens.take(used_tokens, now_s)

    def _account(self, key: Key, now_s: float) -> _Account:
        account = self._accounts.get(key.name)
        if account is None or account.key != key:
            running = account.running if account is not None else 0
            account = self._accounts[key.name] = _Account(key, now_s)
            account.running = running
        return account

    def keep(self, names: frozenset[str]) -> None:
        """Forget the accounts of other keys, once nothing of theirs runs."""
        for name in [name for name, account in self._accounts.items() if name not in names and not account.running]:
            del self._accounts[name]


def _limited(message: str, wait_s: float) -> RateLimited:
    return RateLimited(message, retry_after_s=wait_s)
