"""A CUDA driver of ours for tests, built here from `native/tests/fake_cuda.cc`, which says what it can be told."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[1] / "native"
LIMIT_MS = 60_000
LIVING = ("contexts", "allocations", "imports", "registrations", "streams", "events", "stack", "abandoned")


def compile_native(*arguments: str | Path) -> None:
    """Run the C++ compiler with the flags of the house; its complaints are the test's."""
    compiler = os.environ.get("CXX", "c++")
    flags = ("-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", "-D_GNU_SOURCE")
    folders = (f"-I{NATIVE / 'include'}", f"-I{NATIVE / 'src'}")
    command = [compiler, *flags, *folders, *(str(argument) for argument in arguments)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr


def build_fake(path: Path, *flags: str) -> Path:
    compile_native("-shared", "-fPIC", "-fvisibility=hidden", *flags, NATIVE / "tests" / "fake_cuda.cc", "-o", path)
    return path


@pytest.fixture(scope="session")
def fake_cuda_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fake(tmp_path_factory.mktemp("fake_cuda") / "built.so")


class FakeCuda:
    """One fake driver, fresh as after a reboot: a copy of the library has a state of its own."""

    def __init__(self, library: Path, into: Path) -> None:
        self.path = str(shutil.copy(library, into / "libcuda.so.1"))
        self._loaded = ctypes.CDLL(self.path)
        self._loaded.fake_cuda_get.restype = ctypes.c_int64
        self._loaded.fake_cuda_get.argtypes = (ctypes.c_char_p,)
        self._loaded.fake_cuda_set.argtypes = (ctypes.c_char_p, ctypes.c_int64)
        self._loaded.fake_cuda_wait.argtypes = (ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64)
        self.refusals = 0  # How many calls the test means to be refused.

    def set(self, name: str, value: int) -> None:
        assert self._loaded.fake_cuda_set(name.encode(), value) == 0, name

    def get(self, name: str) -> int:
        return int(self._loaded.fake_cuda_get(name.encode()))

    def wait(self, name: str, at_least: int) -> None:
        """Wait until a counter has come so far."""
        assert self._loaded.fake_cuda_wait(name.encode(), at_least, LIMIT_MS) == 0, f"{name} is {self.get(name)}"

    def lose(self, ordinal: int, result: int) -> None:
        """End the context of a device, as an illegal access of some kernel would."""
        self._loaded.fake_cuda_lose(ordinal, result)

    def left_behind(self) -> dict[str, int]:
        return {name: count for name in LIVING if (count := self.get(name))}


@pytest.fixture
def fake_cuda(fake_cuda_library: Path, tmp_path: Path) -> Iterator[FakeCuda]:
    """A fake driver in which nothing may be left, and nothing refused that the test did not mean to be."""
    fake = FakeCuda(fake_cuda_library, tmp_path)
    yield fake
    assert fake.left_behind() == {}
    assert fake.get("refused") == fake.refusals
