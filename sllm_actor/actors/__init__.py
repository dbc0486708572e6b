"""The actors of a node: thin shells around policies, engines and the loader."""

from __future__ import annotations

from sllm_actor.actors.inference_worker import InferenceWorker
from sllm_actor.actors.migration_coordinator import MigrationCoordinator
from sllm_actor.actors.model_manager import ModelManager
from sllm_actor.actors.peer_server import PeerServer
from sllm_actor.actors.router import Router
from sllm_actor.actors.scheduler import Scheduler

__all__ = ["InferenceWorker", "MigrationCoordinator", "ModelManager", "PeerServer", "Router", "Scheduler"]
