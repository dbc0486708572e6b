"""What an engine fails with."""

from __future__ import annotations

from sllm_actor.errors.base import SllmError


class EngineError(SllmError):
    code = "engine_error"


class EngineStartFailed(EngineError):
    code = "engine_start_failed"


class EngineDied(EngineError):
    code = "engine_died"


class GenerationFailed(EngineError):
    code = "generation_failed"
