"""Every bound of a metadata store, with its unit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreLimits:
    """What a store takes, keeps and waits for. etcd's own bounds are wider where they are not changed there."""

    # What is taken.
    key_bytes: int = 1024
    value_bytes: int = 1024 * 1024
    # etcd's own bounds are 128 operations and 1.5 MiB a request; a receipt needs room beside what is asked for.
    commit_operations: int = 100
    commit_bytes: int = 1_200_000
    lease_ttl_s: int = 86_400
    # What is given.
    listing_facts: int = 100_000
    page_facts: int = 500
    answer_bytes: int = 64 * 1024 * 1024
    # Changes that a store in this process keeps for its watchers; who is further behind must list anew.
    kept_changes: int = 10_000
    kept_bytes: int = 64 * 1024 * 1024
    # What is waited for: a whole call, and one attempt of it at one endpoint.
    call_timeout_s: float = 10.0
    attempt_timeout_s: float = 2.0
    connect_timeout_s: float = 1.0
    calls_at_once: int = 64
    # The pause after every endpoint has failed doubles from the first to the last.
    retry_first_s: float = 0.05
    retry_last_s: float = 1.0
    # A watch that hears nothing for so long asks again, at the next endpoint.
    watch_quiet_s: float = 10.0
    # How long the receipt of a commit is kept, and so the latest moment at which a lost attempt can still be made.
    receipt_ttl_s: int = 60
