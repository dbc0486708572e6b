"""`sllm-node status`, `cordon`, `uncordon`, `drain`, `notice`, `migrate`: a cluster, asked through any node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import quote

import typer

from sllm_actor.cli import completion
from sllm_actor.cli.asking import Json, Key, Url, ask
from sllm_actor.cli.client import DEFAULT_URL
from sllm_actor.cli.fitting import Column
from sllm_actor.cli.show import out, print_json, table
from sllm_actor.units import format_bytes

To = Annotated[
    str,
    typer.Option(
        "--to", help="The node to move it to; by default where that is soonest.", autocompletion=completion.nodes
    ),
]
Node = Annotated[str, typer.Argument(help="Its name, as 'status' shows it.", autocompletion=completion.nodes)]

NODES = (
    Column("NODE"), Column("STATE", 1, wraps=True), Column("ROLES", 5), Column("INSTANCES", 2), Column("REQUESTS", 4),
    Column("CHECKPOINTS", 7), Column("HOST POOL", 6), Column("LISTENS AT", 3),
)  # fmt: skip


def status(url: Url = DEFAULT_URL, api_key: Key = "", as_json: Json = False) -> None:
    """List the nodes of the cluster: who leads, what runs where, and what is cordoned.

    Example: sllm-node status
    """
    answer = ask(url, api_key, lambda client: client.call("GET", "/admin/nodes"), as_json=as_json)
    if as_json:
        print_json(answer)
        return
    rows = [
        (
            node["node"], _state(node), "all" if len(node["roles"]) == 3 else ",".join(node["roles"]),
            f"{node['instances']}/{node['slots']}", str(node["active"]), str(node["checkpoints"]),
            format_bytes(node["host_pool_bytes"]), node["address"].partition("@")[2],
        )
        for node in answer["nodes"]
    ]  # fmt: skip
    table(NODES, rows)


def _state(node: Mapping[str, Any]) -> str:
    words = ["ready" if node["reported"] else "unknown"]
    words += ["leads"] * node["leads"] + ["cordoned"] * node["cordoned"]
    return ", ".join(words)


def cordon(node: Node, url: Url = DEFAULT_URL, api_key: Key = "", as_json: Json = False) -> None:
    """Let nothing be started on a node from now on, over restarts too; what runs there goes on.

    Example: sllm-node cordon n2
    """
    _change(node, "cordon", url, api_key, as_json=as_json)


def uncordon(node: Node, url: Url = DEFAULT_URL, api_key: Key = "", as_json: Json = False) -> None:
    """Let models be started on a node again.

    Example: sllm-node uncordon n2
    """
    _change(node, "uncordon", url, api_key, as_json=as_json)


def drain(node: Node, url: Url = DEFAULT_URL, api_key: Key = "", as_json: Json = False) -> None:
    """Cordon a node and stop its instances: running answers go on elsewhere, and what can't is finished first.

    Example: sllm-node drain n2 && systemctl stop sllm-node
    """
    answer = _change(node, "drain", url, api_key, as_json=as_json)
    if not as_json:
        out.print(f"{answer['stopped']} instances were stopped")


def notice(
    node: Node,
    seconds: Annotated[float, typer.Option("--seconds", min=1.0, max=3600.0, help="After these it will be gone.")],
    url: Url = DEFAULT_URL,
    api_key: Key = "",
    as_json: Json = False,
) -> None:
    """Say that a node will soon be taken away, as of a spot instance: its running answers go on elsewhere.

    Example: sllm-node notice n2 --seconds 120
    """
    path = f"/admin/nodes/{quote(node, safe='')}/notice?seconds={seconds:g}"
    answer = ask(url, api_key, lambda client: client.call("POST", path), as_json=as_json, about=node)
    if as_json:
        print_json(answer)
        return
    out.print(f"{answer['moved']} answers went on elsewhere, {answer['stopped']} instances were stopped")
    if answer["left"]:
        out.print(f"{answer['left']} answers are still generated there")


def migrate(
    request: Annotated[
        str, typer.Argument(help="The request's id, as 'top' shows it.", autocompletion=completion.requests)
    ],
    to: To = "",
    url: Url = DEFAULT_URL,
    api_key: Key = "",
    as_json: Json = False,
) -> None:
    """Move a running request to another node; its client sees one stream.

    Example: sllm-node migrate req-6f1c2a --to n2
    """
    path = f"/admin/requests/{quote(request, safe='')}/migrate"
    answer = ask(url, api_key, lambda client: client.call("POST", path, {"to": to}), as_json=as_json, about=request)
    if as_json:
        print_json(answer)
        return
    moved = format_bytes(answer["bytes_moved"])
    out.print(f"{request} goes on at {answer['node']}: {answer['tokens']} tokens in {answer['rounds']} rounds, {moved}")


def _change(node: str, verb: str, url: str, api_key: str, *, as_json: bool) -> dict[str, Any]:
    path = f"/admin/nodes/{quote(node, safe='')}/{verb}"
    answer = ask(url, api_key, lambda client: client.call("POST", path), as_json=as_json, about=node)
    if as_json:
        print_json(answer)
    else:
        out.print(f"{node} is {'un' if verb == 'uncordon' else ''}cordoned")
    return answer
