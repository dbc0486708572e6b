"""A migration as the cluster knows it while it is under way."""

from __future__ import annotations

import msgspec

from sllm_actor.domain.names import ModelName, NodeId, RequestId


class MigrationRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Who moves what, from where to where. Fields that a later version adds are passed over by this one.

    `destination` is empty while one is sought (`state` is `placing`); from then on it is `resuming`. It ends with the
    migration, or with the lease of the node `coordinator`.
    """

    migration_id: str
    request_id: RequestId
    model: ModelName
    source: NodeId
    destination: NodeId
    coordinator: NodeId
    state: str
