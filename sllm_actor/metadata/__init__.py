"""Cluster facts that outlive a process: one interface, SQLite behind it on one machine, etcd on many."""

from __future__ import annotations

from sllm_actor.metadata.etcd import EtcdStore
from sllm_actor.metadata.etcd_address import EtcdAddress
from sllm_actor.metadata.limits import StoreLimits
from sllm_actor.metadata.sqlite import SqliteStore
from sllm_actor.metadata.store import (
    Absent,
    Change,
    Changes,
    CreatedAt,
    Delete,
    Fact,
    HasValue,
    Kind,
    Lease,
    LeaseId,
    Listing,
    Outcome,
    Present,
    Put,
    Store,
    Unchanged,
)

__all__ = [
    "Absent",
    "Change",
    "Changes",
    "CreatedAt",
    "Delete",
    "EtcdAddress",
    "EtcdStore",
    "Fact",
    "HasValue",
    "Kind",
    "Lease",
    "LeaseId",
    "Listing",
    "Outcome",
    "Present",
    "Put",
    "SqliteStore",
    "Store",
    "StoreLimits",
    "Unchanged",
]
