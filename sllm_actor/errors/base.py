"""The base of every typed error."""

from __future__ import annotations

from typing import ClassVar


class SllmError(Exception):
    """Base of every typed error; `param` names the input that was wrong, where one was."""

    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
