"""`sllm-node pull`: a model to the node's SSD, with a progress bar."""

from __future__ import annotations

import asyncio
from typing import Any

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from sllm_actor.cli.client import NodeClient, NodeUnreachable
from sllm_actor.cli.show import err, out, print_json
from sllm_actor.units import format_bytes

GO_ON = "the same command goes on from there"


def default_name(source: str) -> str:
    """Give the name under which a source is registered where none is given: the last part of it, or OWNER/NAME."""
    scheme, _, rest = source.partition(":")
    rest = rest.strip("/")
    if scheme == "hf":
        return rest.partition("@")[0]
    return rest.rpartition("/")[2]


async def pull_model(client: NodeClient, body: dict[str, Any], *, as_json: bool) -> None:
    """Pull and show how far that is, on standard error; with `as_json`, print each line of the answer as it comes."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    model: dict[str, Any] = {}
    reached = ""
    with Progress(*columns, console=err, disable=as_json or not err.is_terminal, transient=True) as progress:
        task = progress.add_task(body["name"], total=None)
        try:
            async for line in client.lines("/admin/pull", body):
                if as_json:
                    print_json(line)
                if line["status"] == "registered":
                    model = line["model"]
                elif line["status"] == "pulling":
                    done_bytes, total_bytes = line["completed"], line["total"]
                    # What an earlier pull has brought is no part of this one's speed.
                    change = progress.update if reached else progress.reset
                    change(task, completed=done_bytes, total=total_bytes)
                    reached = f" at {format_bytes(done_bytes)} of {format_bytes(total_bytes)}"
        except NodeUnreachable as error:
            if not model:
                raise
            raise NodeUnreachable(f"{error}{reached}; {GO_ON}") from error
        except asyncio.CancelledError:
            if model:
                progress.stop()
                err.print(f"stopped{reached}; {GO_ON}")
            raise
    if not as_json and not model["card"]:
        out.print(
            f"registered [bold]{model['name']}[/bold]: a local folder is served from where it lies, {model['path']}"
        )
    elif not as_json:
        out.print(f"pulled [bold]{model['name']}[/bold]: {format_bytes(model['size_bytes'])} from {model['source']}")
