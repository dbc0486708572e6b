"""What tests of several nodes share: who runs where, waiting for it, and streams as clients read them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from sllm_actor.testing.node_cluster import NodeCluster
from sllm_actor.testing.node_process import NodeProcess

NAMES = ("n1", "n2", "n3")
QUESTION, ANSWER = "What is 2 + 3?", "2 + 3 = 5"
LONG = "Count from 1 to 500."
PATIENCE_S = 60.0
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.002, 0.05
CHAT = "/v1/chat/completions"


def eventually(holds: Callable[[], bool]) -> None:
    """Wait until something holds.

    Each look costs its node as much as the test. So what takes long is looked at more and more seldom, and the
    processor left to who brings it about.
    """
    end_s = time.monotonic() + PATIENCE_S
    pause_s = SHORTEST_PAUSE_S
    while not holds():
        assert time.monotonic() < end_s, "it never came true"
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.5, LONGEST_PAUSE_S)


def whole(cluster: NodeCluster) -> None:
    """Have all nodes run, know each other, and nothing run on them."""
    missing = [name for name in NAMES if name not in cluster.nodes]
    if missing:
        cluster.start(*missing)
    eventually(lambda: all(is_whole(cluster, name) for name in NAMES))
    for name in NAMES:
        for model in "abc":
            cluster.nodes[name].call("POST", f"/admin/models/{model}/unload")


def is_whole(cluster: NodeCluster, asked: str) -> bool:
    """Tell whether a node knows that all are there, and who leads."""
    shown = cluster.shown(asked)
    return len(shown) == len(NAMES) and all(node["reported"] for node in shown.values()) and cluster.leader(asked) != ""


def home_of(cluster: NodeCluster, model: str, asked: str) -> str:
    """Give the node where a model runs."""
    instances = cluster.nodes[asked].call("GET", "/admin/instances")["instances"]
    (home,) = {str(one["node"]) for one in instances if one["model"] == model}
    return home


def placed_on(cluster: NodeCluster, model: str, home: str) -> None:
    """Have a model run on one node."""
    others = [name for name in NAMES if name != home]
    for name in others:
        cluster.nodes[home].call("POST", f"/admin/nodes/{name}/cordon")
    eventually(lambda: all(cluster.shown(home)[name]["cordoned"] for name in others))
    assert cluster.nodes[home].chat(model, QUESTION) == ANSWER
    for name in others:
        cluster.nodes[home].call("POST", f"/admin/nodes/{name}/uncordon")
    assert home_of(cluster, model, home) == home


def ask(model: str, prompt: str = QUESTION) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": prompt}]}


def under_way(node: NodeProcess) -> int:
    """Give how many tokens the newest request has, if it runs."""
    newest = node.call("GET", "/admin/requests")["requests"][:1]
    return sum(int(one["generated_tokens"]) for one in newest if one["outcome"] == "running")


def streamed(node: NodeProcess, model: str, prompt: str, **more: Any) -> tuple[str, Any]:
    """Ask for a stream; give its text and its error, if it ended by one."""
    connection = node.connect()
    body = json.dumps(ask(model, prompt) | {"stream": True} | more)
    connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        return "", json.loads(response.read())["error"]
    text, error = "", None
    for line in response:
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            error = event.get("error", error)
            text += "".join(choice["delta"].get("content", "") for choice in event.get("choices", ()))
    connection.close()
    return text, error
