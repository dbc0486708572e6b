"""Actors on one event loop, and the processes beside it. Knows nothing of models."""

from __future__ import annotations

from sllm_actor.runtime.actor import Actor, handles
from sllm_actor.runtime.clock import Clock, SystemClock
from sllm_actor.runtime.system import ActorRef, ActorSystem

__all__ = ["Actor", "ActorRef", "ActorSystem", "Clock", "SystemClock", "handles"]
