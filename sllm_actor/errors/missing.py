"""What is not there, or not for who asks; the tree is drawn with the others."""

from __future__ import annotations

from sllm_actor.errors.base import SllmError


class NotFound(SllmError):
    code = "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class NodeNotFound(NotFound):
    code = "node_not_found"


class RequestNotFound(NotFound):
    code = "request_not_found"


class StreamNotFound(NotFound):
    code = "stream_not_found"
