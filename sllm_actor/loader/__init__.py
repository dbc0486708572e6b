"""Bytes of a checkpoint up the tiers: from files into the host pool, from the host pool into an engine.

Import the modules: `loader` for a node, `mapping` for an engine, which brings neither asyncio nor torch.
"""
