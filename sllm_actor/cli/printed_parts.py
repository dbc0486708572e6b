"""Parts of what verbs print with `--json`: models, tiers, nodes, requests, explanations. Declarations alone.

They are declared beside what is sent between nodes, not taken from there: that may change, and this is promised.
"""

from __future__ import annotations

from typing import Literal

import msgspec


class Printed(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Whatever is printed: every field is always there, and no others are, where the description does not say so."""


Duration = float | Literal["forever"]


class Scaling(Printed):
    """How many instances of a model may run."""

    min_instances: int
    max_instances: int
    target_concurrency: int


class Embedding(Printed):
    """How a model makes vectors of texts."""

    pooling: str
    normalize: bool
    dimensions: int
    max_tokens: int
    lower_case: bool
    matryoshka: bool
    matryoshka_dimensions: list[int]


class Model(Printed):
    """A registration; `card` is empty for a folder, `base` for all but adapters."""

    name: str
    path: str
    source: str
    card: str
    fingerprint: str
    architecture: str
    dtype: str
    size_bytes: int
    host_bytes: int
    context_tokens: int
    vocabulary_tokens: int
    eos_token_ids: list[int]
    default_temperature: float
    default_top_p: float
    chat: bool
    keep_alive_s: Duration
    registered_wall_s: float
    default_top_k: int
    default_min_p: float
    default_repetition_penalty: float
    default_max_tokens: int | None
    generates: bool
    embedding: Embedding | None
    base: str
    text_path: str
    scaling: Scaling
    backend: str


class ModelStatus(Printed):
    """A registration and where it stands: `state` is remote, cold, ssd, loading, host or running."""

    kind: str
    model: Model
    state: str
    instances: int
    host_bytes: int
    loading_bytes: int


class Instance(Printed):
    """A running instance; `expires_in_s` is 0 while it answers."""

    kind: str
    instance_id: str
    model: str
    node: str
    pid: int
    active: int
    size_bytes: int
    expires_in_s: Duration
    late_imports: list[str]


class Holder(Printed):
    """Who has a lease on a checkpoint."""

    kind: str
    who: str
    held_s: float


class TierEntry(Printed):
    """One checkpoint in one tier; of one that is on its way `done_bytes` are there."""

    kind: str
    models: list[str]
    model_id: str
    size_bytes: int
    done_bytes: int
    leases: int
    held_by: list[Holder]
    pinned: bool
    idle_s: Duration


class Way(Printed):
    """What has gone one way since the node's start."""

    kind: str
    size_bytes: int
    busy_s: float
    bytes_per_s: float


class Tiers(Printed):
    """What the tiers of the asked node hold."""

    kind: str
    host: list[TierEntry]
    host_free_bytes: int
    host_bytes: int
    ssd: list[TierEntry]
    ssd_used_bytes: int
    ssd_quota_bytes: int
    local_queues_s: dict[str, Duration]
    remote_queue_s: Duration
    ways: dict[str, Way]


class Node(Printed):
    """A member of the cluster; of one that is not `reported`, no more is known than that."""

    kind: str
    node: str
    address: str
    leads: bool
    cordoned: bool
    reported: bool
    epoch: int
    instances: int
    active: int
    slots: int
    host_pool_bytes: int
    checkpoints: int
    roles: list[str]
    host_fingerprints: list[str]
    ssd_fingerprints: list[str]
    starting: list[str]


class Span(Printed):
    """One part of a start, on the machine's monotonic clock."""

    name: str
    begin_s: float
    end_s: float
    size_bytes: int
    tier: str


class Timeline(Printed):
    """What happened to a request; moments that have not come are 0."""

    request_id: str
    model: str
    cold: bool
    arrived_s: float
    spans: list[Span]
    first_token_s: float
    end_s: float
    prompt_tokens: int
    generated_tokens: int
    outcome: str
    instance_id: str
    node: str
    beside: int
    start_of: str


class Term(Printed):
    """One part of an estimate, and the numbers that it was made of."""

    kind: str
    name: str
    seconds: Duration
    inputs: dict[str, Duration]


class Candidate(Printed):
    """What a node could have done."""

    kind: str
    node: str
    action: str
    tier: str
    estimate_s: Duration
    terms: list[Term]
    leaving: list[str]
    possible: bool


class Flip(Printed):
    """The smallest change with which another candidate would have been chosen."""

    kind: str
    node: str
    term: str
    from_s: Duration
    to_s: Duration
    text: str


class MovedAnswer(Printed):
    """A running answer that went on elsewhere to make room."""

    kind: str
    request_id: str
    model: str
    node: str
    tokens: int
    rounds: int


class Decision(Printed):
    """One decision of the Scheduler, best candidate first."""

    kind: str
    request_id: str
    model: str
    policy: str
    reason: str
    candidates: list[Candidate]
    more: int
    chosen: Candidate | None
    runner_up: Candidate | None
    flip: Flip | None
    given_up: list[str]
    waited_s: float
    predicted_s: Duration
    observed_s: float
    outcome: str
    moved: list[MovedAnswer]
    made_room_s: float
    fetched_s: float


class AskedNode(Printed):
    """The node that is asked: requests that wait by model, failed starts by reason, migrations by outcome."""

    node: str
    version: str
    ready: bool
    waiting: dict[str, int]
    failed_starts: dict[str, int]
    migrations: dict[str, int]
    lag_faults: int


class TopModel(Printed):
    """A registration, and how far a load of it is."""

    name: str
    fingerprint: str
    architecture: str
    dtype: str
    size_bytes: int
    base: str
    chat: bool
    generates: bool
    state: str
    instances: int
    loading_bytes: int


class TopInstance(Printed):
    """A running instance, and how many requests it answers."""

    instance_id: str
    model: str
    node: str
    active: int


class TopTierEntry(Printed):
    """One checkpoint in one tier."""

    models: list[str]
    size_bytes: int
    done_bytes: int
    leases: int
    pinned: bool


class TopTiers(Printed):
    """What the tiers of the asked node hold."""

    host: list[TopTierEntry]
    host_free_bytes: int
    host_bytes: int
    ssd: list[TopTierEntry]
    ssd_used_bytes: int
    ssd_quota_bytes: int
