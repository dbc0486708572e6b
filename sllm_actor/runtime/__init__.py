"""Actors on one event loop, their messages between nodes, and the processes beside them. Knows nothing of models."""

from __future__ import annotations

from sllm_actor.runtime.actor import Actor, ActorContext, handles
from sllm_actor.runtime.calls import Backlog, current_trace, tracing
from sllm_actor.runtime.clock import Clock, LoopClock, SystemClock
from sllm_actor.runtime.limits import Limits
from sllm_actor.runtime.network import Network, SocketNetwork
from sllm_actor.runtime.references import ActorRef, NodeAddress
from sllm_actor.runtime.security import Security
from sllm_actor.runtime.supervision import Ended, Supervision
from sllm_actor.runtime.system import ActorSystem
from sllm_actor.runtime.values import Blob, FreeForm

__all__ = [
    "Actor",
    "ActorContext",
    "ActorRef",
    "ActorSystem",
    "Backlog",
    "Blob",
    "Clock",
    "Ended",
    "FreeForm",
    "Limits",
    "LoopClock",
    "Network",
    "NodeAddress",
    "Security",
    "SocketNetwork",
    "Supervision",
    "SystemClock",
    "current_trace",
    "handles",
    "tracing",
]
