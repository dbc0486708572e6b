"""Cluster facts that outlive a process: one interface, SQLite behind it on one machine."""

from __future__ import annotations

from sllm_actor.metadata.sqlite import SqliteStore
from sllm_actor.metadata.store import Store

__all__ = ["SqliteStore", "Store"]
