"""Kill a process that writes at a seeded moment, look at what it has left, and go on with that; many times.

`python -m sllm_actor.testing.kill_storm --points 200 [--seed S] [--folder F]`. A point is a moment at random, or the
n-th call that changes the file system: just before it, just after it, or in the middle of what it writes. Each process
is forked from this one, which has no threads. What the dead have told, the living hold them to: what was published is
there, what was evicted is not, what was pinned still is.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sllm_actor.loader.ssd_tier import SsdTier
from sllm_actor.runtime.clock import SystemClock
from sllm_actor.testing.register_storm import NAMES, operate, witness_registrations
from sllm_actor.testing.tier_storm import KnownModel, Tell, known_models, quota_of, same, use, witness

# What changes the file system; of `open`, only what makes a file.
_CALLS = ("open", "pwrite", "fsync", "rename", "replace", "mkdir", "rmdir", "unlink", "posix_fallocate", "utime")
_MOST_CALLS = 1000
_LONGEST_S = 0.12


class Killer:
    """Ends this process at one call, or by the clock."""

    def __init__(self, draw: random.Random) -> None:
        self.how = draw.choices(("before", "after", "torn", "clock"), (4, 4, 2, 3))[0]
        # Mostly early: the opening is as dangerous as the rest.
        self._at = int(_MOST_CALLS ** draw.random()) if draw.random() < 0.5 else draw.randrange(_MOST_CALLS)
        self._after_s = draw.uniform(0.001, _LONGEST_S)
        self._seen = 0
        self._lock = threading.Lock()

    def arm(self) -> None:
        """Begin to count."""
        if self.how == "clock":
            # The default of SIGALRM ends a process as SIGKILL does: no code of it runs any more.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, self._after_s)
            return
        for name in _CALLS:
            setattr(os, name, self._counted(name, getattr(os, name)))

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and not args[1] & os.O_CREAT:
                return call(*args, **kwargs)
            with self._lock:
                mine = self._seen == self._at
                self._seen += 1
            if mine and self.how == "before":
                _die()
            if mine and self.how == "torn" and name == "pwrite":
                call(args[0], bytes(args[1][: len(args[1]) // 2]), args[2])
            if mine and self.how == "torn":
                _die()
            result = call(*args, **kwargs)
            if mine:
                _die()
            return result

        return counted


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Told:
    """What processes have told of their doings, and what therefore must hold."""

    def __init__(self) -> None:
        self.present: set[str] = set()
        self.absent: set[str] = set()
        self.pinned: set[str] = set()
        # For each name the number of its model, or None for none, as long as it is certain.
        self.registered: dict[str, int | None] = dict.fromkeys(NAMES)

    def take(self, lines: list[str]) -> None:
        """Follow the reports of one process, from its start to its end."""
        beginning = 0
        for line in lines:
            what, model_id = line.split()
            if what == "beginning":
                # From here on it may evict anything that is not pinned.
                beginning += 1
                self.present &= self.pinned
            elif what == "begun":
                beginning -= 1
            elif what == "publishing":
                self.absent.discard(model_id)
            elif what == "published" and not beginning:
                self.present.add(model_id)
            elif what == "evicting":
                self.present.discard(model_id)
            elif what == "evicted":
                self.absent.add(model_id)
            elif what == "pinned":
                self.pinned.add(model_id)
                self.present.add(model_id)
            elif what == "unpinning":
                self.pinned.discard(model_id)
                self.present.discard(model_id)
            elif what == "registering":
                self.registered.pop(model_id, None)
            elif what == "registered":
                name, _, number = model_id.rpartition(":")
                self.registered[name] = int(number)
            elif what == "removed":
                self.registered[model_id] = None


def _in_a_process(work: Callable[[Callable[[str], None]], str]) -> tuple[int, list[str]]:
    """Fork, work, and report: return how the process ended and the lines that it told."""
    reading, writing = os.pipe()
    write, leave = os.write, os._exit
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            result = work(lambda line: (write(writing, line.encode() + b"\n"), None)[1])
            write(writing, f"= {result}\n".encode())
            leave(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        leave(1)
    os.close(writing)
    with os.fdopen(reading) as reports:
        lines = reports.read().splitlines()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), lines


def run(points: int, seed: int, folder: Path) -> str:
    """Kill at `points` moments; return a line of what was seen.

    Raises:
        AssertionError: something was lost, torn or left; stderr has what, this has the seed and the point.
    """
    models, told, seen = known_models(seed), Told(), Counter[str]()
    for point in range(points):
        draw = random.Random(f"{seed}/{point}")
        killer, acting = Killer(draw), random.Random(draw.random())

        def act(tell: Callable[[str], None], killer: Killer = killer, acting: random.Random = acting) -> str:
            killer.arm()
            asyncio.run(_storm(folder, models, acting, tell))
            return ""

        status, lines = _in_a_process(act)
        assert status in (0, -signal.SIGKILL, -signal.SIGALRM), f"seed {seed}, point {point}: it failed by itself"
        told.take([line for line in lines if not line.startswith("=")])
        seen[killer.how if status else "ended before"] += 1
        _look(folder, models, told, draw, seen, f"seed {seed}, point {point} ({killer.how})")
    kinds = ", ".join(f"{seen[kind]} {kind}" for kind in ("before", "after", "torn", "clock", "ended before"))
    return (
        f"{points} points of seed {seed} ({kinds}): {seen['whole']} times a model was whole, {seen['partial']} times "
        f"one could be resumed, {seen['resumed']} were completed with {seen['kept']} chunks of before, "
        f"{seen['registered']} times a name was registered; "
        "nothing torn or lost"
    )


async def _storm(folder: Path, models: list[KnownModel], draw: random.Random, tell: Tell) -> None:
    tier = await SsdTier.open(folder / "ssd", quota_of(models), SystemClock())
    drawn = random.Random(draw.random()), random.Random(draw.random())
    used, registered = models[: 2 * len(models) // 3], models[2 * len(models) // 3 :]
    await asyncio.gather(use(tier, used, drawn[0], tell), operate(folder, tier, registered, drawn[1], tell))
    await tier.close()


async def _witness(folder: Path, models: list[KnownModel], draw: random.Random, tell: Tell, told: Told) -> str:
    open_before = len(os.listdir("/proc/self/fd"))
    tier = await SsdTier.open(folder / "ssd", quota_of(models), SystemClock())
    seen = await witness(tier, models, draw, tell, told.present, told.absent, told.pinned)
    registered = await witness_registrations(folder, tier, models, told.registered)
    await tier.close()
    gc.collect()
    same(len(os.listdir("/proc/self/fd")), open_before, "open descriptors")
    same(set(os.listdir(folder)) - {"cards"}, {"ssd", "metadata.db"}, "the node's folder")
    return f"{seen} {registered}"


def _look(
    folder: Path, models: list[KnownModel], told: Told, draw: random.Random, seen: Counter[str], where: str
) -> None:
    def look(tell: Callable[[str], None]) -> str:
        return asyncio.run(_witness(folder, models, draw, tell, told))

    status, lines = _in_a_process(look)
    assert status == 0, f"{where}: what it left is wrong"
    told.take([line for line in lines if not line.startswith("=")])
    for kind, count in zip(("whole", "partial", "resumed", "kept", "registered"), lines[-1].split()[1:], strict=True):
        seen[kind] += int(count)


def main() -> None:
    """Run from the command line; the exit code says whether all held."""
    parser = argparse.ArgumentParser(description="Kill a process that registers, pulls and evicts models.")
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to work; by default in memory, which is as good for kills")
    arguments = parser.parse_args()
    memory = Path("/dev/shm")
    parent = arguments.folder or (memory if os.access(memory, os.W_OK) else None)
    folder = Path(tempfile.mkdtemp(prefix="sllm-kill-storm-", dir=parent))
    try:
        print(run(arguments.points, arguments.seed, folder / "node"))
    except AssertionError as wrong:
        sys.exit(f"{wrong}; what is there is kept in {folder}")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    with contextlib.suppress(OSError):
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
