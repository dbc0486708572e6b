"""Tokens out of a model: engine processes, and the node's handle on them.

The node imports only what is free of torch from here: `architectures`, `client`, `pool`.
"""
