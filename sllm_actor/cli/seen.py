"""What the command line reads of a node's events, typed: the parts that `top` draws, and no more of them.

A newer node may tell more; what it tells otherwise is refused. Declarations alone.
"""

from __future__ import annotations

import msgspec


class _Read(msgspec.Struct, kw_only=True):
    """Fields that are not named here are passed over."""


class Moment(_Read):
    """One moment by both clocks of the node."""

    wall_s: float
    monotonic_s: float


class SeenNode(_Read):
    """The node that is asked."""

    node: str
    ready: bool
    waiting: dict[str, int]
    failed_starts: dict[str, int]


class SeenMember(_Read):
    """A node of the cluster."""

    node: str
    leads: bool
    cordoned: bool
    reported: bool
    instances: int
    active: int
    slots: int
    host_pool_bytes: int
    roles: tuple[str, ...]
    host_fingerprints: tuple[str, ...]
    ssd_fingerprints: tuple[str, ...]
    starting: tuple[str, ...]


class SeenModel(_Read):
    """A registered model."""

    name: str
    fingerprint: str
    size_bytes: int
    state: str
    loading_bytes: int


class SeenTiers(_Read):
    """How full the tiers of the asked node are."""

    host_bytes: int
    host_free_bytes: int
    ssd_used_bytes: int
    ssd_quota_bytes: int


class SeenInstance(_Read):
    """A running instance."""

    instance_id: str
    model: str
    node: str
    active: int


class SeenRequest(_Read):
    """A request of the asked gateway; moments that have not come are 0."""

    request_id: str
    model: str
    node: str
    instance_id: str
    arrived_s: float
    first_token_s: float
    end_s: float
    generated_tokens: int


class Seen(_Read):
    """All that was told so far; what a node could not look up yet is empty."""

    node: SeenNode
    nodes: tuple[SeenMember, ...] = ()
    models: tuple[SeenModel, ...] = ()
    instances: tuple[SeenInstance, ...] = ()
    requests: tuple[SeenRequest, ...] = ()
    tiers: SeenTiers | None = None
    problems: dict[str, str] = {}
