"""Stores of every kind for tests: SQLite, memory, and real etcd, which is wiped for each test."""

from __future__ import annotations

import asyncio
import base64
import json
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from sllm_actor.errors import MetadataCompacted
from sllm_actor.metadata import Changes, Delete, EtcdAddress, EtcdStore, SqliteStore, Store, StoreLimits
from sllm_actor.metadata.etcd_address import parse_endpoints
from sllm_actor.runtime import SystemClock
from sllm_actor.testing.etcd import EtcdCluster
from sllm_actor.testing.simulated_store import MemoryStore

UNPACKED = Path(__file__).parent.parent / ".servers"
# Local stores keep few changes, so that a test can outrun them.
LIMITS = StoreLimits(kept_changes=100, page_facts=3)
# A slow machine is no lost one; what is to fail does so soon.
PATIENT = StoreLimits(page_facts=3, call_timeout_s=30, attempt_timeout_s=10)
HASTY = StoreLimits(call_timeout_s=3, attempt_timeout_s=0.5, watch_quiet_s=0.5)


def etcd_store(url: str, limits: StoreLimits = PATIENT, seed: int | None = None, **login: Any) -> EtcdStore:
    address = EtcdAddress(endpoints=parse_endpoints(url), **login)
    return EtcdStore(address, SystemClock(), Random(seed), limits)


@asynccontextmanager
async def opened(kind: str, folder: Path, etcd: EtcdCluster) -> AsyncIterator[Store]:
    """Open an empty store."""
    store: Store
    if kind == "sqlite":
        store = await SqliteStore.open(folder / "m.db", SystemClock(), LIMITS)
    elif kind == "memory":
        store = MemoryStore(SystemClock(), LIMITS)
    else:
        store = etcd_store(etcd.url())
        await wipe(store)
    try:
        yield store
    finally:
        await store.close()


async def wipe(store: Store) -> None:
    facts = (await store.list("")).facts
    for first in range(0, len(facts), 50):
        await store.commit([], [Delete(fact.key) for fact in facts[first : first + 50]])


def ask_etcd(etcd: EtcdCluster, path: str, body: dict[str, Any], token: str = "") -> dict[str, Any]:
    """Ask the first member what the store has no words for."""
    url = f"http://127.0.0.1:{etcd.member.port}{path}"
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Authorization": token} if token else {})
    with urllib.request.urlopen(request, timeout=30) as answer:
        given: dict[str, Any] = json.load(answer)
        return given


def b64(text: bytes) -> str:
    return base64.b64encode(text).decode()


async def forget_changes(store: Store, etcd: EtcdCluster) -> None:
    """Make a store forget the changes that it knows of."""
    if isinstance(store, EtcdStore):
        revision = await store.put("forgotten", b"")
        await asyncio.to_thread(ask_etcd, etcd, "/v3/kv/compaction", {"revision": str(revision), "physical": True})
        return
    for k in range(LIMITS.kept_changes + 1):
        await store.put("forgotten", str(k).encode())


async def watched(store: Store, prefix: str, from_revision: int, count: int) -> list[Changes]:
    """Give the first changes that a watch tells of."""
    found: list[Changes] = []
    watch = store.watch(prefix, from_revision)
    while len(found) < count:
        found.append(await anext(watch))
    await watch.aclose()
    return found


def values(changes: list[Changes]) -> list[tuple[str, bytes | None]]:
    """Give key and value of each change; None for one that was deleted."""
    return [
        (change.key, None if change.fact is None else change.fact.value) for part in changes for change in part.changes
    ]


async def is_compacted(store: Store, prefix: str, from_revision: int) -> bool:
    try:
        await watched(store, prefix, from_revision, 1)
    except MetadataCompacted:
        return True
    return False


def encoded(value: object) -> bytes:
    return msgspec.msgpack.encode(value)
