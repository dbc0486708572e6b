"""What `sllm-node doctor` says of a node that runs on the data folder already: what that one holds is no fault."""

from __future__ import annotations

import asyncio
from pathlib import Path
from urllib.parse import urlsplit

from sllm_actor.cli.client import NodeClient, NodeRefused, NodeUnreachable
from sllm_actor.cli.findings import Finding
from sllm_actor.config import Config
from sllm_actor.errors import DataFolderInUse, SllmError
from sllm_actor.node.data_folder import DataFolder, Holder, last_holder

# A person waits for the answer.
TIMEOUT_S = 3.0
# What a node takes at its start, so that a second start would not find it.
HELD = ("host memory", "port", "data folder")


def serving_on(config: Config) -> Holder | None:
    """Give the living process that holds the data folder and serves; a start or a calibration does not."""
    path = Path(config.data_dir).expanduser().absolute()
    try:
        DataFolder.open(path).close()
    except DataFolderInUse:
        holder = last_holder(path)
        return holder if holder and holder.url else None
    except SllmError:
        # Its own check says why.
        return None
    return None


def running(holder: Holder | None) -> Finding:
    """Say whether a node runs on the data folder, and whether it answers."""
    if holder is None:
        return Finding("node", "ok", "none serves on this data folder")
    found = f"process {holder.pid} serves at {holder.url}"
    if trouble := asyncio.run(_trouble(holder.url)):
        return Finding("node", "warning", f"{found}, and does not answer: {trouble}", f"kill {holder.pid}; start again")
    return Finding("node", "ok", found)


def beside(holder: Holder, finding: Finding, config: Config) -> Finding:
    """Put a finding right whose cause is that the node which runs has what it looked for."""
    if finding.level == "ok" or finding.check not in HELD:
        return finding
    if finding.check == "port" and urlsplit(holder.url).port != config.port:
        return finding
    return Finding(finding.check, "ok", f"process {holder.pid}, the node that runs, has it")


async def _trouble(url: str) -> str:
    try:
        async with asyncio.timeout(TIMEOUT_S), NodeClient(url, "") as client:
            await client.call("GET", "/health")
    except TimeoutError:
        return f"silence for {TIMEOUT_S:g} s"
    except (NodeUnreachable, NodeRefused) as error:
        return str(error)
    return ""
