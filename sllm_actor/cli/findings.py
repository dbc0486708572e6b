"""What one check of `sllm-node doctor` has found."""

from __future__ import annotations

from typing import NamedTuple


class Finding(NamedTuple):
    """One check. `level`: ok, warning (works, slower or smaller), or error (a node would not start)."""

    check: str
    level: str
    found: str
    mend: str = ""
