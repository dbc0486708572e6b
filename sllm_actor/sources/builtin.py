"""The models that come with the package: `builtin:demo` does sums and counts."""

from __future__ import annotations

from pathlib import Path

_MODELS = Path(__file__).parent.parent / "models"

BUILTIN = {"demo": _MODELS / "demo"}
