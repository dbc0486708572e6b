"""`sllm-node doctor`, on a machine in which something is really wrong."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
from conftest import StartNode
from fake_cuda import build_fake
from metadata_stores import UNPACKED

from sllm_actor.loader.libc import huge_page_refusal
from sllm_actor.node.data_folder import DataFolder
from sllm_actor.testing.etcd import EtcdCluster, running_etcd
from sllm_actor.testing.node_process import CLI

MIB = 1024 * 1024
PR_SET_THP_DISABLE = 41


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    with running_etcd(tmp_path_factory.mktemp("etcd"), UNPACKED) as cluster:
        yield cluster


def doctor(
    folder: Path,
    *arguments: str,
    is_fit: bool = True,
    limits: dict[int, int] | None = None,
    before: Callable[[], None] = lambda: None,
    **environment: str,
) -> dict[str, Any]:
    """Run it under limits of its own, and give its findings by the check's name."""

    def lower() -> None:
        for kind, most in (limits or {}).items():
            resource.setrlimit(kind, (most, most))
        before()

    words: list[str | Path] = [
        CLI,
        "doctor",
        "--port",
        "0",
        "--data-dir",
        folder,
        "--set",
        "host_pool_bytes=64MiB",
        *arguments,
        "--json",
    ]
    ran = subprocess.run(
        words, capture_output=True, text=True, timeout=120, env=os.environ | environment, preexec_fn=lower
    )
    answer = msgspec.json.decode(ran.stdout)
    levels = {check["level"] for check in answer["checks"]}
    assert ran.returncode == (1 if "error" in levels else 4 if "warning" in levels else 0), ran
    assert answer["healthy"] == is_fit, ran
    return {check["check"]: check for check in answer["checks"]}


def cluster(url: str) -> tuple[str, ...]:
    return ("--metadata", url, "--listen", "tcp://127.0.0.1:0")


def test_limits_that_are_too_low_are_warnings_that_say_how_to_raise_them(tmp_path: Path) -> None:
    low = {resource.RLIMIT_NOFILE: 1000, resource.RLIMIT_MEMLOCK: MIB}
    found = doctor(tmp_path, "--set", "lock_host_pool=true", limits=low)
    assert found["open files"]["level"] == found["memory locking"]["level"] == "warning"
    assert found["open files"]["found"] == "limit 1000"
    assert "ulimit -Hn 4096" in found["open files"]["mend"]
    assert "LimitMEMLOCK=infinity" in found["memory locking"]["mend"]


def test_huge_pages_are_tried_and_a_refusal_says_what_would_give_some(tmp_path: Path) -> None:
    refused = huge_page_refusal()
    found = doctor(tmp_path)["huge pages"]
    assert found["level"] == ("warning" if refused else "ok")
    assert ("the kernel makes none" if refused else "the kernel puts them together") in found["found"]

    def without() -> None:
        assert ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0

    found = doctor(tmp_path, before=without)["huge pages"]
    assert found["level"] == "warning"
    assert found["found"].endswith("the kernel makes none: Invalid argument")
    assert found["mend"] == "a kernel of 6.1 or later, or sysctl vm.nr_hugepages=32"
    assert doctor(tmp_path, "--set", "huge_pages=false")["huge pages"]["found"] == "not wanted"


def test_a_port_that_is_taken_is_an_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        found = doctor(tmp_path, "--port", str(taken.getsockname()[1]), is_fit=False)
    assert [check["check"] for check in found.values() if check["level"] == "error"] == ["port"]


def test_beside_ones_own_node_what_that_holds_is_well_and_it_is_named(start_node: StartNode, tmp_path: Path) -> None:
    with start_node() as node:
        port = str(urlsplit(node.url).port)
        found = doctor(tmp_path / "data", "--port", port)
        assert (found["node"]["level"], found["node"]["found"]) == (
            "ok",
            f"process {node.process.pid} serves at {node.url}",
        )
        for check in ("port", "data folder"):
            assert (found[check]["level"], found[check]["mend"]) == ("ok", "")
            assert f"process {node.process.pid}, " in found[check]["found"]
        with socket.create_server(("127.0.0.1", 0)) as taken:
            other = doctor(tmp_path / "data", "--port", str(taken.getsockname()[1]), is_fit=False)
        assert (other["port"]["level"], other["data folder"]["level"]) == ("error", "ok")
        assert doctor(tmp_path / "another", "--port", port, is_fit=False)["port"]["level"] == "error"
        node.process.send_signal(signal.SIGSTOP)
        assert doctor(tmp_path / "data")["node"]["level"] == "warning"
        node.process.kill()
        node.process.wait()
        assert doctor(tmp_path / "data", "--port", port)["node"]["found"] == "none serves on this data folder"


def test_a_data_folder_whose_holder_does_not_serve_is_an_error(tmp_path: Path) -> None:
    held = DataFolder.open(tmp_path)
    try:
        found = doctor(tmp_path, is_fit=False)
    finally:
        held.close()
    assert found["data folder"]["level"] == "error"
    assert f"process {os.getpid()}" in found["data folder"]["found"]
    assert found["node"]["found"] == "none serves on this data folder"


def test_a_store_that_is_there_grants_a_lease_and_tells_its_version(tmp_path: Path, etcd: EtcdCluster) -> None:
    found = doctor(tmp_path, *cluster(etcd.url()))["metadata"]
    assert found["level"] in ("ok", "warning")  # The latter where a busy machine makes it slow.
    assert found["found"].startswith("etcd 3.")
    assert "grants leases" in found["found"]


def test_a_store_that_is_not_there_is_an_error_that_says_what_to_start(tmp_path: Path) -> None:
    found = doctor(tmp_path, *cluster("etcd://127.0.0.1:9"), is_fit=False)["metadata"]
    assert found["level"] == "error"
    assert "--metadata etcd://HOST:PORT" in found["mend"]


def test_a_node_that_is_alone_needs_no_store(tmp_path: Path) -> None:
    assert doctor(tmp_path)["metadata"]["level"] == "ok"


def test_the_drivers_devices_are_named(tmp_path: Path) -> None:
    build_fake(tmp_path / "libcuda.so.1")
    found = doctor(tmp_path / "data", LD_LIBRARY_PATH=str(tmp_path))["CUDA driver"]
    assert found["level"] == "ok"
    assert found["found"].startswith("device 0: ")
    assert "driver for CUDA" in found["found"]


def test_a_driver_that_is_too_old_is_a_warning(tmp_path: Path) -> None:
    build_fake(tmp_path / "libcuda.so.1", "-DFAKE_CUDA_BEFORE_11")
    found = doctor(tmp_path / "data", LD_LIBRARY_PATH=str(tmp_path))["CUDA driver"]
    assert found["level"] == "warning"
    assert "CUDA 11 or later" in found["mend"]


def test_a_driver_that_does_not_come_up_is_a_warning_with_its_reason(tmp_path: Path) -> None:
    build_fake(tmp_path / "libcuda.so.1")
    found = doctor(tmp_path / "data", LD_LIBRARY_PATH=str(tmp_path), FAKE_CUDA_INIT_RESULT="999")["CUDA driver"]
    assert found["level"] == "warning"
    assert "CUDA_ERROR_UNKNOWN" in found["found"]
    assert "nvidia-smi" in found["mend"]


def test_a_file_that_is_no_driver_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "libcuda.so.1").write_bytes(b"no library")
    assert doctor(tmp_path / "data", LD_LIBRARY_PATH=str(tmp_path))["CUDA driver"]["level"] == "ok"


def test_the_clock_is_looked_at(tmp_path: Path) -> None:
    found = doctor(tmp_path)["clock"]
    assert (found["level"] == "warning") == bool(found["mend"])


def test_a_data_folder_below_a_file_is_an_error_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = doctor(tmp_path / "file" / "data", is_fit=False)
    assert [check["check"] for check in found.values() if check["level"] == "error"] == ["data folder"]
    assert found["direct reads"]["level"] == "warning"
