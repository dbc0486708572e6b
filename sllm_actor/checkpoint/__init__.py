"""A checkpoint on disk: which files, which tensors, where. Blocking functions; no torch, no threads."""
