"""Fixtures: one shared node with the demo model, and nodes of a test's own."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from web_server import WebServer, running_web_server

from sllm_actor.runtime import fork_template
from sllm_actor.runtime.forking import ENVIRONMENT
from sllm_actor.testing.node_process import NodeProcess, running_node

# Before anything imports torch: two workers on two cores, each with two threads that spin, hinder each other.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
# An import of torch leaves it behind, and a template that began without it declines whoever has it.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), "torchinductor"))
# Small, so that many nodes start quickly; engines with one thread, so that the tests fit two cores. What a slow machine
# takes long for is no fault.
SMALL = (
    "host_pool_bytes=64MiB", "chunk_bytes=1MiB", "engine_threads=1",
    "drain_timeout_s=300", "ask_timeout_s=60", "text_timeout_s=120",
)  # fmt: skip
# How quickly examples are made says something of the machine only.
settings.register_profile("any machine", suppress_health_check=[HealthCheck.too_slow], deadline=None)
settings.load_profile("any machine")
# Begun first, slowest first: a worker that is left with one of them at the end has the other wait.
SLOW_FILES = (
    "test_node_faults", "test_cluster_faults", "test_migration", "test_simulated_cluster",
    "test_remote_models", "test_cut_links", "test_read_faults", "test_lost_cards", "test_scheduler_moves",
    "test_cluster_streams", "test_kill_storm", "test_engine", "test_moves_at_every_token", "test_keeping",
    "test_native_wheel", "test_cluster", "test_simulated_rooms", "test_evaluation", "test_remote_kinds",
    "test_http_source", "test_hub_source", "test_streams", "test_roles", "test_loader", "test_parked", "test_device",
    "test_page",
)  # fmt: skip
SHARED_TEMPLATE = "TESTS_SHARED_TEMPLATE"
StartNode = Callable[..., AbstractContextManager[NodeProcess]]


def warm_template() -> AbstractContextManager[str]:
    return fork_template.running_template("sllm_actor.node.children", ENVIRONMENT)


def pytest_configure(config: pytest.Config) -> None:
    """Warm one template for all workers, while they collect."""
    if config.getoption("numprocesses", None):
        template = ExitStack()
        os.environ[SHARED_TEMPLATE] = template.enter_context(warm_template())
        config.add_cleanup(template.close)


@pytest.fixture(scope="session")
def warm_starts() -> Iterator[None]:
    """From here on nodes get fork servers from a warm one: 9 s of processor time less for each."""
    shared = os.environ.get(SHARED_TEMPLATE)
    with nullcontext(shared) if shared else warm_template() as path:
        os.environ[fork_template.VARIABLE] = path
        yield
        del os.environ[fork_template.VARIABLE]


@pytest.fixture
def cold_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node of this test starts a fork server of its own, as it does at a user's."""
    monkeypatch.delenv(fork_template.VARIABLE, raising=False)


@pytest.fixture(scope="session")
def node(warm_starts: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A node that all tests share, with the demo model deployed; they leave it as they found it."""
    folder = tmp_path_factory.mktemp("node")
    with (folder / "log").open("w") as log, running_node(folder / "data", *SMALL, log=log) as running:
        running.deploy("builtin:demo", "demo")
        yield running


@pytest.fixture(scope="session")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServer]:
    """A real nginx; each test serves a subfolder of its own in `web.folder`."""
    with running_web_server(tmp_path_factory.mktemp("web")) as running:
        yield running


@pytest.fixture
def start_node(warm_starts: None, tmp_path: Path) -> StartNode:
    """Start a node of the test's own, in the same data folder each time: `with start_node("knob=value") as node`."""

    def start(*knobs: str, **environment: str) -> AbstractContextManager[NodeProcess]:
        return running_node(tmp_path / "data", *SMALL, *knobs, environment=environment)

    return start


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the slow files first; the rest keeps its order."""
    places = {name: place for place, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_collection_finish() -> None:
    """Leave what was imported so far out of every search for garbage: tests that look for leaks begin with one."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let the interpreter clear what it would have cleared: libraries tell of what is left at its end."""
    gc.unfreeze()
