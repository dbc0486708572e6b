"""Moving a running request to another node: gateway to MigrationCoordinator."""

from __future__ import annotations

from sllm_actor.domain import NodeId, RequestId
from sllm_actor.messages.declare import message


@message("migration.ask")
class MigrateRequest:
    """Move a running request to the node `to`.

    Fails with `RequestNotFound`, `NodeNotFound`, or `AlreadyThere`.
    """

    request_id: RequestId
    to: NodeId
