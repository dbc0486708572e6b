"""Where systemd-analyze is: on this machine, or where scripts/servers has unpacked it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

UNPACKED = Path(__file__).parent.parent / ".servers"


def systemd_analyze(unpacked: Path = UNPACKED) -> str:
    """Find the program; scripts/test brings it where it is missing."""
    program = shutil.which("systemd-analyze") or str(unpacked / "usr" / "bin" / "systemd-analyze")
    assert Path(program).exists(), (
        "systemd-analyze is not here: scripts/test brings it, and so does Debian's package systemd"
    )
    return program


def environment(unpacked: Path = UNPACKED) -> dict[str, str]:
    """Give the variables that it needs: an unpacked one is told where its libraries and systemd's own units are."""
    if shutil.which("systemd-analyze"):
        return dict(os.environ)
    libraries = {str(path.parent) for path in unpacked.rglob("lib*.so*") if path.is_file()}
    units = [str(unpacked / folder / "systemd" / "system") for folder in ("lib", "usr/lib")]
    return os.environ | {"LD_LIBRARY_PATH": ":".join(sorted(libraries)), "SYSTEMD_UNIT_PATH": ":".join(units)}
