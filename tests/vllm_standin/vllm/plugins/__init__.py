"""Plugins, found by the entry points of what is installed."""

from __future__ import annotations

from importlib.metadata import entry_points

loaded = False


def load_general_plugins() -> None:
    """Load those of the default group, once in a process."""
    global loaded
    if not loaded:
        loaded = True
        for plugin in entry_points(group="vllm.general_plugins"):
            plugin.load()()
