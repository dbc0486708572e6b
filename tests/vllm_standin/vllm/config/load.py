"""Where loaders find their configuration."""

from __future__ import annotations

from vllm.config import LoadConfig

__all__ = ["LoadConfig"]
