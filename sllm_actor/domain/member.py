"""A node as the cluster knows it."""

from __future__ import annotations

import msgspec

from sllm_actor.domain.names import NodeId


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """What a node tells of itself when it joins. Fields that a later version adds are passed over by this one.

    `endpoint` is where other nodes connect. `start` is new at each start of the process. `ttl_s` is the time that its
    lease has: a node whose machine is lost is a member for so long.
    """

    node: NodeId
    endpoint: str
    roles: tuple[str, ...]
    start: str
    ttl_s: int
    host_pool_bytes: int
    max_instances: int
