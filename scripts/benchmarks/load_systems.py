"""The processes of `load`, each started when it is first needed, and one measurement after another in them."""

from __future__ import annotations

import re
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.actors_process import Child, ChildEnded
from benchmarks.load_cases import (
    CACHED,
    COLD,
    COPIES,
    LIMIT,
    LIMITS,
    MEMCPY,
    OURS,
    PEERS,
    POOL,
    SMALL,
    STEP,
    STEPS,
    STOCK,
    TWO,
    WATCHED,
    Case,
)
from benchmarks.load_folders import Folders, use
from sllm_actor.units import MIB

# `scripts/bench` makes it; what could not be installed there is in the file `failed`.
PEERS_FOLDER = Path(".venv-peers-load")
PEERS_PYTHON = str(PEERS_FOLDER / "bin/python")
LIMIT_THREADS = 4
# A cold load has the device read at least so much of its bytes, and one from the page cache at most so much: of 2.6 GB
# already 1 % takes longer than to map all the rest.
COLD_SHARE, CACHED_SHARE = 0.95, 0.001
CACHED_TRIES = 5
WATCH_PERIOD_S = 0.001
# Of which pages a pool is: as the machine gives them by default, or surely small ones.
GIVEN, SMALL_PAGES = "given", "small"
_ANON = re.compile(r"^(?:RssAnon|VmPTE):\s+(\d+) kB$", re.MULTILINE)


class Sizes(NamedTuple):
    """How large pools are: the one that is loaded into, and those that hold one checkpoint and are mapped from."""

    pool_bytes: int
    one_pool_bytes: int
    chunk_bytes: int


class Unavailable(Exception):
    """A system can't be measured; the message says why."""


class Systems:
    """Every system of one run, by its name."""

    def __init__(self, stack: ExitStack, library: Path, folders: Folders, sizes: Sizes, peers: bool) -> None:
        self._stack = stack
        self._library = str(library)
        self._folders = folders
        self._sizes = sizes
        self._peers = peers
        self._children: dict[str, Child] = {}
        self.versions: dict[str, str] = {}
        # How much of the pool that is loaded into lies in huge pages.
        self.huge_share = 0.0
        # Whether a system maps the files of a folder instead of copying them, as `warm` has found.
        self.maps_files: dict[tuple[str, str], bool] = {}
        self._past_cache: set[str] = set()
        # Why a system, or a layout that only one reads, is measured no more.
        self.failed: dict[str, str] = {}

    def measure(self, case: Case, digest: bool = False) -> dict[str, Any]:
        """Bring the machine into the case's state, see that it is, and measure.

        Raises:
            Unavailable: this system can't be measured, now and later.
        """
        if case.system in self.failed:
            raise Unavailable(self.failed[case.system])
        if reason := self._folders.failed.get(case.layout):
            raise Unavailable(f"its files could not be written: {reason}")
        run = {COLD: self._cold, WATCHED: self._watched, TWO: self._two, CACHED: self._cached, POOL: self._in_pool}
        try:
            if case.system in PEERS:
                self._peer(case.system)
            answer: dict[str, Any] = run[case.state](case, digest)
            if "failed" in answer:
                raise Unavailable(answer["failed"])
        except (ChildEnded, Unavailable) as wrong:
            if case.system in (OURS, SMALL, STEP, LIMIT, MEMCPY):
                raise SystemExit(f"{case.label}, {case.state}: {wrong}") from wrong
            self.failed[case.system] = str(wrong)
            raise Unavailable(str(wrong)) from wrong
        return answer

    def warm(self, case: Case) -> dict[str, Any]:
        """Load once without measuring, whatever the state, for what only the first time costs and for the digest."""
        if case.system in (LIMIT, MEMCPY) or case.state in (TWO, WATCHED):
            return {}
        return self.measure(case if case.state == POOL else case._replace(state=CACHED), digest=True)

    def _cold(self, case: Case, digest: bool) -> dict[str, Any]:
        self._folders.evict(case.folder)
        try:
            if case.system == LIMIT:
                return self._limit(case)
            answer = self._load(case, digest)
        finally:
            self._folders.evict(case.folder)
        if "failed" not in answer and answer["device_bytes"] < COLD_SHARE * answer["size_bytes"]:
            read = f"{answer['device_bytes']} of {answer['size_bytes']} bytes were read"
            raise SystemExit(f"{case.label}: not cold: {read}")
        return answer

    def _cached(self, case: Case, digest: bool) -> dict[str, Any]:
        if case.system == MEMCPY:
            return self._copy(case)
        for _ in range(CACHED_TRIES):
            self._folders.fill(case.folder)
            huge_share = self._folders.huge_share(case.folder)
            answer = self._load(case, digest) | {"huge_share": huge_share}
            # Pages that the kernel took back meanwhile spoil a run.
            if "failed" in answer or answer["device_bytes"] <= CACHED_SHARE * answer["size_bytes"]:
                return answer
            if case.system in self._past_cache:
                return answer
        # This one reads the device whatever is cached; its row says so.
        self._past_cache.add(case.system)
        return answer

    def _load(self, case: Case, digest: bool) -> dict[str, Any]:
        path = self._folders.path(case.folder)
        answer: dict[str, Any]
        if case.system in (OURS, SMALL):
            answer = self._node(_pages_of(case)).call("load", folder=path, digest=digest)
        elif case.system == STEP:
            answer = self._step(case, path, digest)
        else:
            answer = self._peer(case.system).call("load", folder=path, digest=digest)
        return answer

    def _step(self, case: Case, path: str, digest: bool) -> dict[str, Any]:
        step = case.variant.partition(" ")[2]
        assert step in STEPS
        answer: dict[str, Any]
        if step in ("pool", "pipeline"):
            options = {"in_place": False, "overlap": step == "pipeline"}
            answer = self._node(GIVEN).call("load", folder=path, digest=digest, **options)
        else:
            answer = self._engine().call("step", folder=path, name=step, digest=digest)
        return answer

    def _limit(self, case: Case) -> dict[str, Any]:
        limits = self._limits()
        sizes_bytes = seconds = 0.0
        for path in self._folders.weights(case.folder):
            arguments = {"block_bytes": LIMITS[case] * MIB, "threads": LIMIT_THREADS}
            seconds += limits.call("read", path=str(path), **arguments)
            sizes_bytes += path.stat().st_size
        return {"s": seconds, "size_bytes": sizes_bytes}

    def _copy(self, case: Case) -> dict[str, Any]:
        size_bytes = sum(path.stat().st_size for path in self._folders.weights(case.folder))
        return {"s": self._limits().call("copy", length=size_bytes, threads=COPIES[case]), "size_bytes": size_bytes}

    def _watched(self, case: Case, digest: bool) -> dict[str, Any]:
        """Measure the memory beyond the pool, by looking at the process every millisecond, and at the page cache after.

        It is anonymous memory and page tables at their peak, less what they were, and what is left in the page cache.
        """
        self._folders.evict(case.folder)
        node = self._node(GIVEN)
        seen_kib: list[int] = []
        status = Path(f"/proc/{node.pid}/status")

        def look() -> None:
            seen_kib.append(sum(int(size) for size in _ANON.findall(status.read_text())))

        look()
        path = self._folders.path(case.folder)
        answer: dict[str, Any] = node.watch(look, WATCH_PERIOD_S, "load", folder=path, digest=digest)
        cached_bytes = self._folders.cached_bytes(case.folder)
        beyond_mib = (max(seen_kib) - seen_kib[0]) / 1024 + cached_bytes / MIB
        return answer | {"beyond_pool_mib": beyond_mib, "looks": len(seen_kib)}

    def _two(self, case: Case, digest: bool) -> dict[str, Any]:
        folders = [case.folder, case._replace(layout=STOCK).folder]
        for folder in folders:
            self._folders.evict(folder)
        paths = [self._folders.path(folder) for folder in folders]
        answer: dict[str, Any] = self._node(GIVEN).call("load_both", folders=paths)
        return answer

    def _in_pool(self, case: Case, digest: bool) -> dict[str, Any]:
        node = self._node(_pages_of(case))
        held = node.call("hold", folder=self._folders.path(case.folder))
        use(Path(held["pool"]))  # As what is page-cached was.
        answer: dict[str, Any] = self._engine().call("attach", **held, digest=digest)
        node.call("let_go")
        return answer | {"in_huge_pages": case.system == OURS and self.huge_share == 1.0}

    def _node(self, pages: str) -> Child:
        pool_bytes = self._sizes.pool_bytes if pages == GIVEN else self._sizes.one_pool_bytes
        arguments = (self._library, str(pool_bytes), str(self._sizes.chunk_bytes), pages)
        node = self._child(f"node, {pages} pages", "load_ours", "node", *arguments)
        self.huge_share = node.ready["huge_bytes"] / pool_bytes if pages == GIVEN else self.huge_share
        return node

    def _engine(self) -> Child:
        return self._child("engine", "load_ours", "engine", self._library)

    def _limits(self) -> Child:
        return self._child("limits", "load_limits", "limits", self._library)

    def _peer(self, system: str) -> Child:
        if not self._peers:
            raise Unavailable("left out by --without-peers")
        if not Path(PEERS_PYTHON).exists():
            raise Unavailable(f"{PEERS_FOLDER} is not there: scripts/bench makes it")
        child = self._child(system, "load_peers", "peer", system, self._library, python=PEERS_PYTHON)
        if "failed" in child.ready:
            noted = PEERS_FOLDER / "failed"
            why = [line for line in noted.read_text().splitlines() if line.startswith(system)] if noted.exists() else []
            raise Unavailable("; ".join([*why, child.ready["failed"]]))
        if child.ready["torch"] != version("torch"):
            raise SystemExit(f"{system} runs on torch {child.ready['torch']}, ours on {version('torch')}")
        self.versions[child.ready["distribution"]] = child.ready["version"]
        return child

    def _child(self, name: str, module: str, *arguments: str, python: str | None = None) -> Child:
        if name not in self._children:
            options = {} if python is None else {"python": python}
            self._children[name] = Child(self._stack, module, *arguments, **options)
        return self._children[name]


def _pages_of(case: Case) -> str:
    return SMALL_PAGES if case.system == SMALL else GIVEN
