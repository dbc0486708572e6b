"""Who may ask: keys, looked up again when their file changes, and what they allow."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from sllm_actor.errors import AccessDenied, ConfigInvalid, KeyInvalid
from sllm_actor.frontend.key_limits import KeyLimits
from sllm_actor.frontend.keys import Key, Keyring, read_keys
from sllm_actor.runtime import Clock
from sllm_actor.runtime.threads import on_thread

log = logging.getLogger(__name__)

CHECK_S = 1.0
Stamp = tuple[int, int, int]


class Access:
    """Owns the keys of a node; without a file of them everybody may do everything."""

    def __init__(self, path: str, clock: Clock) -> None:
        self._path = path
        self._clock = clock
        self.needs_key = bool(path)
        self.limits = KeyLimits()
        self._stamp = self._look() if path else None
        self._keys = read_keys(path) if path else Keyring(())

    def admit(self, authorization: str, path: str) -> Key | None:
        """Find the key of a request to `path`; none where none is needed.

        Raises:
            KeyInvalid: there is none, or it is not known.
            AccessDenied: it may not do this.
        """
        if not self.needs_key:
            return None
        key = self._keys.find(authorization.removeprefix("Bearer ").strip())
        if key is None:
            raise KeyInvalid("the API key is missing or wrong: send it as 'Authorization: Bearer KEY'")
        if path.startswith("/admin") and not key.admin:
            raise AccessDenied(f"the key {key.name} may not administer this node")
        return key

    async def watch(self) -> None:
        """Read the file again whenever it changes, until cancelled. One that is wrong changes nothing."""
        while self.needs_key:
            await self._clock.sleep(CHECK_S)
            stamp = await on_thread(self._look)
            if stamp == self._stamp:
                continue
            self._stamp = stamp
            try:
                self._keys = await on_thread(read_keys, self._path)
            except ConfigInvalid as error:
                log.error("the keys stay as they were: %s", error)
            else:
                self.limits.keep(frozenset(key.name for key in self._keys.keys))
                log.info("%d API keys are known", len(self._keys.keys))

    def _look(self) -> Stamp | None:
        try:
            found = os.stat(Path(self._path).expanduser())
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino, found.st_size
