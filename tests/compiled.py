"""Small native programs and libraries for tests, made by the same compiler that makes the library."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

NATIVE = Path(__file__).parents[1] / "native"
_FLAGS = ("-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-pthread")


def shared_library(into: Path, name: str, *sources: str) -> Path:
    """Compile `sources` of `native/` into a shared library in the folder `into`."""
    library = into / f"lib{name}.so"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    paths = [NATIVE / source for source in sources]
    made = subprocess.run(
        [*compiler, *_FLAGS, f"-I{NATIVE / 'src'}", *paths, "-o", library, "-ldl"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    return library
