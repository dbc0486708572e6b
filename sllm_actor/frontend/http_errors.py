"""Typed errors as HTTP: status, and a body in OpenAI's shape."""

from __future__ import annotations

import math
from typing import Any

from sllm_actor import errors
from sllm_actor.errors import SllmError

_STATUS: dict[type[SllmError], int] = {
    errors.InvalidInput: 400,
    errors.RequestTimeout: 408,
    errors.KeyInvalid: 401,
    errors.AccessDenied: 403,
    errors.NotFound: 404,
    errors.Conflict: 409,
    errors.Overloaded: 503,
    errors.QueueFull: 429,
    errors.MailboxFull: 429,
    errors.RateLimited: 429,
    errors.DeadlineExceeded: 504,
    errors.MetadataUnavailable: 503,
    errors.SourceError: 502,
    SllmError: 500,
}
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    502: "upstream_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def status_of(error: SllmError) -> int:
    """Give the HTTP status of an error: that of its nearest class in the tree."""
    return next(_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS)


def body(message: str, status: int, *, code: str, param: str | None = None) -> dict[str, Any]:
    """Give an error body: `{"error": {"message", "type", "param", "code"}}`."""
    kind = _TYPES.get(status, "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def body_of(error: SllmError) -> dict[str, Any]:
    """Give the body of a typed error."""
    return body(error.message, status_of(error), code=error.code, param=error.param)


def headers_of(error: SllmError) -> dict[str, str]:
    """Give `Retry-After`, in whole seconds, where trying again may help."""
    if error.retry_after_s is None:
        return {}
    return {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
