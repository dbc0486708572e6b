"""Every knob, with its unit, default and bounds, and where its value came from."""

from __future__ import annotations

from sllm_actor.config.knobs import Config
from sllm_actor.config.load import Resolved, resolve

__all__ = ["Config", "Resolved", "resolve"]
