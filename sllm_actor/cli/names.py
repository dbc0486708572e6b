"""The names that a node knows, for who has mistyped one or wants it completed; never a reason to wait or to fail."""

from __future__ import annotations

import asyncio
import difflib
import enum
from collections.abc import Iterable

from sllm_actor.cli.client import NodeClient, NodeRefused, NodeUnreachable

TIMEOUT_S = 1.0
MAX_NAMES = 1000


class Noun(enum.Enum):
    """What is named; the value is the code of the error for a name that is not there."""

    MODEL = "model_not_found"
    NODE = "node_not_found"
    REQUEST = "request_not_found"


async def known_names(client: NodeClient, noun: Noun) -> list[str]:
    """Give the names of this kind; none where the node does not tell them, or not in time."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            if noun is Noun.MODEL:
                found = [model["id"] for model in (await client.call("GET", "/v1/models"))["data"]]
            elif noun is Noun.NODE:
                found = [node["node"] for node in (await client.call("GET", "/admin/nodes"))["nodes"]]
            else:
                listed = (await client.call("GET", "/admin/requests"))["requests"]
                found = [one["request_id"] for one in sorted(listed, key=lambda one: bool(one["end_s"]))]
    except (NodeRefused, NodeUnreachable, TimeoutError, KeyError, TypeError, ValueError):
        return []
    return [str(name) for name in found[:MAX_NAMES]]


def nearest(name: str, names: Iterable[str]) -> str:
    """Ask whether the one was meant that begins with `name` or is most like it; empty where none is."""
    known = list(names)
    found = [one for one in known if one.startswith(name)] or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {found[0]}?" if found else ""
