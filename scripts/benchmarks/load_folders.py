"""The checkpoints that `load` reads, made once and kept, and what of them is in the page cache."""

from __future__ import annotations

import mmap
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.actors_process import Child
from benchmarks.load_cases import BIN, OPTIMIZED, SHARDED, SHARDS, TENSORS, Case
from benchmarks.load_limits import Machine, whole_pages
from sllm_actor.checkpoint.convert import convert
from sllm_actor.cli.show import out
from sllm_actor.units import MIB

CONFIGS = Path("../shared/data/model_layouts/derived_configs")
_FILES = {BIN: "pytorch_model.bin", TENSORS: "model.tensors"}
_BLOCK_BYTES = 16 * MIB
_MADV_POPULATE_READ = 22
# Dirty pages that fsync has only just cleaned may need a second asking.
_EVICTIONS = 3
# A kernel may take pages back at any time, with much memory free, too.
_FILLS = 8


def read_over(path: Path) -> None:
    """Have the processor read every byte of a file once, in order."""
    buffer = bytearray(_BLOCK_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def use(path: Path) -> None:
    """Use every page of a file as someone who maps it would, then have the processor's caches forget that.

    On a virtual machine the first access through a mapping to memory that only the device and the kernel have used can
    take ten times as long as any later one, whoever makes it: here nobody who is measured does.
    """
    read_over(path)
    if path.stat().st_size:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
            _ = mapped[:: mmap.PAGESIZE]
    read_over(path)


def huge_bytes(path: Path) -> int:
    """Map a cached file, and count what huge pages map of it; 0 where the kernel can't map beforehand (5.14)."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
        try:
            mapped.madvise(_MADV_POPULATE_READ)
        except OSError:
            return 0
        found = re.findall(
            r"^(\S+-\S+ .*)|^FilePmdMapped: +(\d+) kB", Path("/proc/self/smaps").read_text(), re.MULTILINE
        )
    here, count = False, 0
    for mapping, huge_kib in found:
        here = mapping.endswith(f" {path.resolve()}") if mapping else here
        count += int(huge_kib) * 1024 if huge_kib and here else 0
    return count


class Folders:
    """The folders of one run, under `root`."""

    def __init__(self, root: Path, machine: Machine) -> None:
        self.root = root
        self._machine = machine
        # Why a layout is not there.
        self.failed: dict[str, str] = {}

    def make(self, cases: Sequence[Case], tiny: bool, peers_python: str | None) -> None:
        """Write every folder that the cases read and that is not there yet."""
        self.root.mkdir(parents=True, exist_ok=True)
        wanted = sorted({(case.shape, case.layout) for case in cases})
        names = {shape for shape, _ in wanted} | {f"{s}:{SHARDS}" for s, layout in wanted if layout == SHARDED}
        command = [sys.executable, "-m", "sllm_actor.testing.random_checkpoints", str(self.root), *sorted(names)]
        subprocess.run([*command, "--configs", str(CONFIGS), *(["--tiny"] if tiny else [])], check=True)
        self._convert([shape for shape, layout in wanted if layout == OPTIMIZED])
        written = [(shape, layout) for shape, layout in wanted if layout in _FILES]
        if peers_python is not None and written:
            with ExitStack() as stack:
                self._write(stack, written, peers_python)
        for folder in self.root.iterdir():
            if folder.is_dir():
                self.evict(folder.name)

    def _convert(self, shapes: Sequence[str]) -> None:
        for shape in shapes:
            target = self.root / f"{shape}-{OPTIMIZED}"
            if not target.exists():
                out.print(f"converting {shape}")
                convert(self.root / shape, target)

    def _write(self, stack: ExitStack, written: Sequence[tuple[str, str]], python: str) -> None:
        child: Child | None = None
        for shape, layout in written:
            folder = self.root / f"{shape}-{layout}"
            if (folder / _FILES[layout]).exists():
                continue
            folder.mkdir(exist_ok=True)
            out.print(f"writing {folder.name}")
            child = child or Child(stack, "load_peers", "writer", python=python)
            unfinished = folder / "unfinished"
            reason = child.call(
                "write",
                system="tensorizer" if layout == TENSORS else "torch.load",
                folder=str(self.root / shape),
                target=str(unfinished),
            )
            if reason:
                self.failed[layout] = reason
            else:
                unfinished.rename(folder / _FILES[layout])

    def path(self, folder: str) -> str:
        """Give where a folder is."""
        return str(self.root / folder)

    def weights(self, folder: str) -> list[Path]:
        """List the files of a folder that hold weights: the large ones."""
        endings = (".safetensors", *_FILES.values())
        return [path for path in sorted((self.root / folder).iterdir()) if path.name.endswith(endings)]

    def evict(self, folder: str) -> None:
        """See to it that nothing of a folder is in the page cache."""
        for path in (self.root / folder).iterdir():
            self._evict(path)

    def _evict(self, path: Path) -> None:
        if not path.is_file():
            return
        for _ in range(_EVICTIONS):
            if self._machine.resident_bytes(path) == 0:
                return
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
        if left_bytes := self._machine.resident_bytes(path):
            raise SystemExit(f"{path} can't be made cold: {left_bytes} bytes of it stay in the page cache")

    def fill(self, folder: str) -> None:
        """See to it that all of a folder is in the page cache, and nothing of any other."""
        for other in self.root.iterdir():
            if other.is_dir() and other.name != folder:
                self.evict(other.name)
        # Read each time, cached or not: who comes next finds the processor's caches as anybody else does, and not what
        # the one before him has left there of the same file.
        for path in (self.root / folder).iterdir():
            use(path)
            self._fill(path)

    def _fill(self, path: Path) -> None:
        whole_bytes, found_bytes = whole_pages(path.stat().st_size), 0
        for _ in range(_FILLS):
            found_bytes = self._machine.resident_bytes(path)
            if found_bytes == whole_bytes:
                return
            read_over(path)
        raise SystemExit(f"{path} does not stay in the page cache: {found_bytes} of {whole_bytes} bytes do")

    def huge_share(self, folder: str) -> float:
        """Tell which share of a folder's weights the page cache holds so that huge pages map it.

        That is the kernel's choice when it fills its cache: where free memory is in pieces, its folios are small, and
        to map the same bytes takes whoever does it twenty times as many page faults.
        """
        sizes = [(huge_bytes(path), path.stat().st_size) for path in self.weights(folder)]
        return sum(huge for huge, _ in sizes) / max(1, sum(size for _, size in sizes))

    def cached_bytes(self, folder: str) -> int:
        """Count what of a folder's weights is in the page cache."""
        return sum(self._machine.resident_bytes(path) for path in self.weights(folder))
