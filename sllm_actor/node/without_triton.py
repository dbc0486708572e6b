"""Keep triton out of a process; imported before anything that imports torch.

xgrammar and torch's CUDA builds bring it along, and torch imports it wherever it lies. Engines compile no kernels: it
would only take time and memory in the fork server, and its bindings complain at every child's end.
"""

import sys

sys.modules.setdefault("triton", None)  # type: ignore[arg-type]  # An import of it fails as if it were not there.
