"""How much memory this machine, or the container around this process, can still give."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from sllm_actor.units import MIB

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")


def reserved_bytes() -> int:
    """Return the bytes of reserved huge pages (2 MiB) that nobody has; they count as memory in use elsewhere."""
    with contextlib.suppress(OSError, ValueError):
        return int((_HUGE_PAGES / "free_hugepages").read_text()) * 2 * MIB
    return 0


def available_bytes(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int:
    """Return the bytes that can be taken without the kernel ending a process for it."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo.read_text(), re.MULTILINE)
    assert found is not None, "Linux has told this since 3.14"
    available = int(found.group(1)) * 1024
    # Absent outside a container, or "max" where it has no limit.
    with contextlib.suppress(OSError, ValueError):
        limit = int((cgroup / "memory.max").read_text())
        available = min(available, limit - int((cgroup / "memory.current").read_text()))
    return available
