"""One line in the log for each request, at its end: names, numbers and codes, nothing of what was asked or answered."""

from __future__ import annotations

import logging

from sllm_actor.frontend.visit import VISIT, Visit

log = logging.getLogger(__name__)

# The attribute of a log record that has the line's fields.
FIELDS = "sllm_fields"


def request_id() -> str:
    """Give the id of the request that the running task is for; nothing where it is for none."""
    visit = VISIT.get(None)
    return visit.request_id if visit is not None else ""


def write(visit: Visit) -> None:
    """Log a request that has ended."""
    if not log.isEnabledFor(logging.INFO):
        return
    fields = _fields(visit)
    text = " ".join(f"{name}={value}" for name, value in fields.items())
    log.info("request %s", text, extra={FIELDS: fields})


def _fields(visit: Visit) -> dict[str, object]:
    fields: dict[str, object] = {
        "request_id": visit.request_id,
        "method": visit.method,
        "route": visit.route,
        "status": visit.status,
        "took_s": round(visit.end_s - visit.begin_s, 6),
        "key": visit.key.name if visit.key is not None else "",
        "model": visit.model,
        "code": visit.code,
        "finish": visit.finish,
        "prompt_tokens": visit.prompt_tokens,
        "generated_tokens": visit.generated_tokens,
    }
    if visit.first_token_s:
        fields["first_token_s"] = round(visit.first_token_s - visit.begin_s, 6)
    return {name: value for name, value in fields.items() if value not in ("", 0) or name == "status"}
