"""Who computes a model's tokens."""

from __future__ import annotations

import enum


class Backend(enum.StrEnum):
    """Our own engine, or vLLM's in an environment of its own."""

    SLLM = "sllm"
    VLLM = "vllm"
