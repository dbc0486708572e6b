"""What the rest of the house asks of a metadata store. Keys are `/`-separated paths; values are bytes."""

from __future__ import annotations

from typing import Protocol


class Store(Protocol):
    """Durable once a call has returned."""

    async def get(self, key: str) -> bytes | None:
        """Give the value, or None where there is none."""

    async def put(self, key: str, value: bytes) -> None:
        """Write a value, whole or not at all."""

    async def put_new(self, key: str, value: bytes) -> bool:
        """Write a value if the key has none; false if it has."""

    async def delete(self, key: str) -> bool:
        """Remove a value; false if there was none."""

    async def list(self, prefix: str) -> dict[str, bytes]:
        """Give all keys that begin with `prefix`, in order."""

    async def close(self) -> None:
        """Release the store; nothing may be asked of it afterwards."""
