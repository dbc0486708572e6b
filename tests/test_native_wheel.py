"""The wheels: one for every Python on this kind of machine, and a pure one that works by itself."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from sllm_actor.loader import native

ROOT = Path(__file__).parents[1]
LIBRARY = "sllm_actor/loader/libsllm_native.so"
ASK = "from sllm_actor.loader.choice import use_native; print(use_native())"
VERSION = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).sllm_abi_version())"


def build_wheel(into: Path, **env: str) -> Path:
    """Build a wheel from a copy of the tree, as a user would; into a folder of its own."""
    ignored = shutil.ignore_patterns(
        ".git", ".*_cache", ".venv", "build", "dist", "__pycache__", "tests", "docs", "scripts", ".demo", ".venv*"
    )
    shutil.copytree(ROOT, into / "tree", ignore=ignored)
    # What an earlier build in place has left must not find its way into a wheel.
    (into / "tree" / LIBRARY).write_bytes(b"stale")
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("scikit_build_core") else []
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", *isolation, "-w", into, into / "tree"],
        env={**clean_env(), **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = into.glob("*.whl")
    return wheel


def clean_env() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("SLLM_NO_NATIVE", "PYTHONPATH")}


def unpack(wheel: Path, into: Path) -> Path:
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(into)
    return into


def ask(installed: Path, question: str = ASK) -> subprocess.CompletedProcess[str]:
    # Without `site`, so that no editable install of the project comes before what was unpacked.
    packages = sysconfig.get_paths()["purelib"]
    return subprocess.run(
        [sys.executable, "-S", "-c", question],
        env={**clean_env(), "PYTHONPATH": f"{installed}:{packages}"},
        cwd=installed,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def native_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("pure"), SLLM_NO_NATIVE="1")


def pythons() -> list[str]:
    folders = [Path(folder) for folder in os.environ["PATH"].split(os.pathsep)]
    folders += sorted(Path.home().glob(".pyenv/versions/*/bin"))
    found: dict[str, str] = {}
    for path in (path for folder in folders for path in folder.glob("python3.*")):
        # A shim of pyenv is there for versions that are not.
        if re.fullmatch(r"python3\.\d+", path.name) and path.name not in found and runs(path):
            found[path.name] = str(path)
    return list(found.values())


def runs(python: Path) -> bool:
    return subprocess.run([python, "-c", ""], check=False, capture_output=True).returncode == 0


def test_the_wheel_serves_every_python_3_on_its_kind_of_machine(native_wheel: Path) -> None:
    assert re.fullmatch(r"sllm_actor-[^-]+-py3-none-linux_[a-z0-9_]+\.whl", native_wheel.name)


def test_the_wheel_brings_the_package_and_nothing_else(native_wheel: Path) -> None:
    names = zipfile.ZipFile(native_wheel).namelist()
    assert LIBRARY in names and "sllm_actor/loader/native.py" in names
    assert {name.split("/")[0] for name in names} == {
        "sllm_actor",
        f"{native_wheel.name.split('-py3')[0]}.dist-info",
    }


def test_only_the_c_abi_leaves_the_library(native_wheel: Path, tmp_path: Path) -> None:
    library = unpack(native_wheel, tmp_path) / LIBRARY
    listed = subprocess.run(["nm", "-D", "--defined-only", library], check=True, capture_output=True, text=True)
    symbols = {line.split()[-1] for line in listed.stdout.splitlines()}
    header = (ROOT / "native/include/sllm_native.h").read_text()
    assert symbols == set(re.findall(r"\b(sllm_\w+)\(", re.sub(r"//.*", "", header)))


def test_the_library_loads_in_every_python_that_is_here(native_wheel: Path, tmp_path: Path) -> None:
    library = unpack(native_wheel, tmp_path) / LIBRARY
    assert pythons()
    for python in pythons():
        said = subprocess.run(
            [python, "-c", VERSION, library], check=False, capture_output=True, text=True, env=clean_env()
        )
        assert said.stdout == f"{native.ABI_VERSION}\n", (python, said.stderr)


def test_an_installed_native_wheel_uses_its_library(native_wheel: Path, tmp_path: Path) -> None:
    said = ask(unpack(native_wheel, tmp_path))
    assert said.stdout == "True\n", said.stderr


def test_a_native_wheel_that_lost_its_library_says_so(native_wheel: Path, tmp_path: Path) -> None:
    (unpack(native_wheel, tmp_path) / LIBRARY).unlink()
    said = ask(tmp_path)
    assert said.returncode == 1 and "is not built" in said.stderr


def test_a_wheel_built_without_native_is_pure(pure_wheel: Path) -> None:
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    assert LIBRARY not in zipfile.ZipFile(pure_wheel).namelist()


def test_a_pure_wheel_works_by_itself(pure_wheel: Path, tmp_path: Path) -> None:
    said = ask(unpack(pure_wheel, tmp_path))
    assert said.stdout == "False\n", said.stderr


def test_a_tree_without_a_library_is_no_pure_wheel(pure_wheel: Path, tmp_path: Path) -> None:
    for record in unpack(pure_wheel, tmp_path).glob("*.dist-info"):
        shutil.rmtree(record)
    said = ask(tmp_path)
    assert said.returncode == 1 and "is not built" in said.stderr


def test_cibuildwheel_builds_one_wheel_for_each_kind_of_machine() -> None:
    program = Path(sys.executable).with_name("cibuildwheel")
    said = subprocess.run(
        [program, "--platform", "linux", "--print-build-identifiers", ROOT],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert said.stdout.split() == ["cp311-manylinux_x86_64", "cp311-manylinux_aarch64"]
