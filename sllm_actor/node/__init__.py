"""The composition root: a node made of all the rooms below."""

from __future__ import annotations

from sllm_actor.node.node import Node

__all__ = ["Node"]
