"""What a node writes to its log: lines for people, or one JSON object a line for programs."""

from __future__ import annotations

import logging

import msgspec

from sllm_actor.frontend.access_log import FIELDS, request_id

MAX_MESSAGE_CHARACTERS = 8192
TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class JsonLines(logging.Formatter):
    """Writes a record as `{"time", "level", "logger", "message"}`, with `request_id` where it is of a request."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage()[:MAX_MESSAGE_CHARACTERS],
        }
        asked = request_id()
        if asked:
            line["request_id"] = asked
        fields = getattr(record, FIELDS, None)
        if fields is not None:
            line |= {"message": "request", **fields}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)[-MAX_MESSAGE_CHARACTERS:]
        return msgspec.json.encode(line).decode()


def configure(level: str, form: str) -> None:
    """Send all logs to standard error, as `text` or `json`."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if form == "json" else logging.Formatter(TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
