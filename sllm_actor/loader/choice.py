"""Which byte mover this process uses: the native library, or the portable one where asked for by name.

It is asked for with SLLM_NO_NATIVE=1, now or when the installed wheel was built. Nothing else leads to it: a
library that is merely missing is an error, so that nobody takes Python threads for the native reader.
"""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

from sllm_actor.errors import ConfigInvalid
from sllm_actor.loader import native

_PACKAGE = "sllm_actor"
_YES = frozenset({"1", "true", "yes", "on"})


def use_native() -> bool:
    """Return whether the native library is to be used.

    Raises:
        ConfigInvalid: it is missing, and nobody asked to do without it.
    """
    if os.environ.get("SLLM_NO_NATIVE", "").strip().lower() in _YES:
        return False
    if native.LIBRARY.exists():
        return True
    if _installed_as_pure_wheel():
        return False
    raise ConfigInvalid(
        f"{native.LIBRARY} is not built. Build it with `pip install -e .`, or with `cmake -S native "
        "-B build/native -DSKBUILD_STATE=editable && cmake --build build/native`; "
        "or set SLLM_NO_NATIVE=1 to do without it"
    )


def _installed_as_pure_wheel() -> bool:
    # The installer keeps the wheel's own record beside the package, so the build need not write another.
    try:
        found = metadata.distribution(_PACKAGE)
        package = Path(str(found.locate_file(_PACKAGE)))
        here = package.samefile(Path(native.__file__).parent.parent)
    except (metadata.PackageNotFoundError, OSError):
        return False
    return here and "Root-Is-Purelib: true" in (found.read_text("WHEEL") or "")
