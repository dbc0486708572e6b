"""Reserve huge pages for the time of a run, and give them back when it ends, also when it is killed.

As a process: `python -m benchmarks.huge_pages FILE COUNT` adds to the number in FILE, says so with an empty line, and
sets it back as soon as its standard input ends, which the end of its parent is.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from sllm_actor.loader.memory import reserved_bytes
from sllm_actor.units import MIB

RESERVED = Path("/proc/sys/vm/nr_hugepages")
PAGE_BYTES = 2 * MIB


def reserve(stack: ExitStack, needed_bytes: int) -> str:
    """See to it that so much memory is free in reserved huge pages until `stack` ends; say why not, or nothing."""
    missing = -(-(needed_bytes - reserved_bytes()) // PAGE_BYTES)
    if missing <= 0:
        return ""
    with ExitStack() as kept:
        if refused := keep(kept, missing, RESERVED):
            return refused
        if (found_bytes := reserved_bytes()) < needed_bytes:
            return f"the kernel found {found_bytes} of {needed_bytes} bytes for huge pages"
        stack.push(kept.pop_all())
    return ""


def keep(stack: ExitStack, missing: int, reserved: Path) -> str:
    """Have a process add to the number in `reserved` until `stack` or this process ends; say why not, or nothing."""
    # A session of its own: neither Ctrl-C nor the end of this process' group reaches it.
    keeper = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.huge_pages", str(reserved), str(missing)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert keeper.stdin is not None and keeper.stdout is not None
    stack.callback(keeper.wait)
    stack.callback(keeper.stdout.close)
    stack.callback(keeper.stdin.close)
    return keeper.stdout.readline().decode().strip()


def _keep(reserved: Path, missing: int) -> None:
    try:
        before = reserved.read_text()
        reserved.write_text(str(int(before) + missing))
    except OSError as wrong:
        print(f"huge pages can't be reserved: {wrong.strerror}", flush=True)
        return
    try:
        print(flush=True)
        sys.stdin.read()
    finally:
        reserved.write_text(before)


if __name__ == "__main__":
    _keep(Path(sys.argv[1]), int(sys.argv[2]))
