"""Real nodes around a real etcd, each a process of its own that can be killed, held up and started again."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from sllm_actor.testing.etcd import EtcdCluster, running_etcd
from sllm_actor.testing.node_process import NodeProcess, living, running_node


class NodeCluster:
    """The nodes that run, by name; the data folder of one that ends is its successor's."""

    def __init__(self, folder: Path, etcd: EtcdCluster, knobs: Sequence[str]) -> None:
        self.etcd = etcd
        self.nodes: dict[str, NodeProcess] = {}
        self._folder = folder
        self._knobs = list(knobs)
        self._contexts: dict[str, AbstractContextManager[NodeProcess]] = {}
        self._logs = ExitStack()

    def start(self, *names: str, knobs: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> None:
        """Start nodes, all at once, and wait until they are ready.

        Raises:
            RuntimeError: one of them does not start; the message says what it said.
        """
        with ThreadPoolExecutor(len(names)) as pool:
            for _ in pool.map(lambda name: self._start(name, knobs, environment), names):
                pass

    def _start(self, name: str, knobs: Sequence[str], environment: Mapping[str, str] | None) -> None:
        log = self._logs.enter_context(self.log(name).open("a"))
        context = running_node(
            self._folder / name, f"node_id={name}", f"metadata={self.etcd.url()}", *self._knobs, *knobs,
            log=log, log_level="info", environment=environment,
        )  # fmt: skip
        self.nodes[name] = context.__enter__()
        self._contexts[name] = context

    def log(self, name: str) -> Path:
        """Give the file that a node logs to."""
        return self._folder / f"{name}.log"

    def kill(self, name: str) -> list[int]:
        """End a node as a lost machine does; give those of its children that outlive it."""
        node = self.nodes.pop(name)
        children = node.children()
        node.process.kill()
        node.process.wait()
        self._contexts.pop(name).__exit__(None, None, None)
        return living(children)

    def stop_node(self, name: str) -> tuple[int, list[int]]:
        """Stop a node with SIGTERM; give its exit status and the processes that it left behind."""
        stopped = self.nodes.pop(name).stop()
        self._contexts.pop(name).__exit__(None, None, None)
        return stopped

    def hold_up(self, name: str) -> None:
        """Stop a node's process in the middle of what it does."""
        self.nodes[name].process.send_signal(signal.SIGSTOP)

    def go_on(self, name: str) -> None:
        """Let one that was held up go on."""
        self.nodes[name].process.send_signal(signal.SIGCONT)

    def shown(self, asked: str) -> dict[str, dict[str, Any]]:
        """Give what a node says of all nodes, by name."""
        nodes: list[dict[str, Any]] = self.nodes[asked].call("GET", "/admin/nodes")["nodes"]
        return {node["node"]: node for node in nodes}

    def leader(self, asked: str) -> str:
        """Give who leads, as a node sees it; empty where nobody does."""
        return next((name for name, node in self.shown(asked).items() if node["leads"]), "")

    def stop(self) -> None:
        """End every node."""
        for name in list(self.nodes):
            self.go_on(name)
            self.kill(name)
        self._logs.close()


@contextmanager
def running_cluster(
    folder: Path, unpacked: Path, names: Sequence[str], knobs: Sequence[str], members: int = 1
) -> Iterator[NodeCluster]:
    """Run nodes, and an etcd of so many members; `unpacked` is as for `running_etcd`.

    Raises:
        ConfigInvalid, RuntimeError: etcd or a node does not start.
    """
    with running_etcd(folder, unpacked, members) as etcd:
        cluster = NodeCluster(folder, etcd, knobs)
        try:
            cluster.start(*names)
            yield cluster
        finally:
            cluster.stop()
