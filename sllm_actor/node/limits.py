"""Knobs that reach the children through the fork server's environment."""

from __future__ import annotations

ENGINE_THREADS = "SLLM_CHILD_ENGINE_THREADS"
MAX_FRAME_BYTES = "SLLM_CHILD_MAX_FRAME_BYTES"
GRAMMAR_BYTES = "SLLM_CHILD_GRAMMAR_BYTES"
GRAMMAR_MEMORY_BYTES = "SLLM_CHILD_GRAMMAR_MEMORY_BYTES"
