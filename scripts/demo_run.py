"""The demo: a node, two cold models, questions over HTTP with streaming, and what each start was made of."""

from __future__ import annotations

import argparse
import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

from sllm_actor.cli.client import NodeClient
from sllm_actor.cli.show import first_token_s, out, timeline_parts
from sllm_actor.testing.node_process import CLI, NodeProcess, running_node
from sllm_actor.units import format_seconds

DATA = Path("../shared/data")
QUESTIONS = (("What is 47 + 35?", "82"), ("Subtract 58 from 31.", "-27"), ("How much is 64 plus 79?", "143"))
PROMPT = "The quick brown fox"


async def ask(client: NodeClient, model: str, prompt: str, chat: bool) -> tuple[str, dict[str, Any]]:
    """Ask with streaming, printing the answer as it comes; give it and the request's timeline."""
    body: dict[str, Any] = {"model": model, "stream": True, "max_tokens": 24}
    if chat:
        path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": prompt}]
    else:
        path, body["prompt"], body["temperature"] = "/v1/completions", prompt, 0
    out.print(f"  {prompt} [bold]→[/bold] ", end="")
    request_id, text = f"demo-{secrets.token_hex(6)}", ""
    async for event in client.events(path, body, request_id):
        for choice in event["choices"]:
            piece = choice["delta"].get("content", "") if chat else choice["text"]
            text += piece
            print(piece, end="", flush=True)
    print()
    return text, await client.call("GET", f"/admin/requests/{request_id}")


def print_beside(cold: dict[str, Any], warm: dict[str, Any]) -> None:
    """Print the timelines of a cold and of a warm request side by side."""
    spent = {part.label: format_seconds(max(0.0, part.end_s - part.begin_s)) for part in timeline_parts(warm)}
    out.print(f"\n  {'timeline of ' + cold['model']:<32}{'cold':>10}{'warm':>10}")
    for part in timeline_parts(cold):
        begin, duration = format_seconds(max(0.0, part.begin_s)), format_seconds(max(0.0, part.end_s - part.begin_s))
        moved = f"   {part.moved}" if part.moved else ""
        out.print(f"  {part.label:<32}{duration:>10}{spent.get(part.label, '-'):>10}   [dim]from {begin}[/dim]{moved}")
    total = (format_seconds(first_token_s(cold)), format_seconds(first_token_s(warm)))
    out.print(f"  [bold]{'request to first token':<32}{total[0]:>10}{total[1]:>10}[/bold]\n")


async def converse(node: NodeProcess) -> bool:
    """Ask both models, first cold, then warm; true if every sum was right."""
    right = True
    async with NodeClient(node.url, "") as client:
        out.print("\n[bold]demo[/bold] (0.9 M parameters, trained to add, subtract and count)")
        timelines = []
        for question, result in QUESTIONS:
            text, timeline = await ask(client, "demo", question, chat=True)
            right = right and text.split()[-1:] == [result]
            timelines.append(timeline)
        print_beside(timelines[0], timelines[1])
        out.print("[bold]opt-125m[/bold] (its real shape, random weights, so its words mean nothing)")
        _, cold = await ask(client, "opt-125m", PROMPT, chat=False)
        _, warm = await ask(client, "opt-125m", PROMPT, chat=False)
        print_beside(cold, warm)
    return right


def forget_in_page_cache(folder: Path) -> None:
    """Drop a folder's files from the page cache, so that the demo reads them from the disk."""
    for path in folder.iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def main() -> None:
    """Run the demo; the exit status tells whether everything was as it should be."""
    import asyncio

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, default=Path(".demo"), help="where the demo keeps its files")
    parser.add_argument("--shapes", type=Path, default=DATA / "model_layouts", help="folder with real model shapes")
    parser.add_argument("--tokenizers", type=Path, default=DATA / "tokenizers", help="folder with real tokenizers")
    arguments = parser.parse_args()
    opt = arguments.work_dir / "opt-125m"
    if not opt.exists():
        out.print("writing a checkpoint of OPT-125M's shape with random weights …")
    command = [sys.executable, "-m", "sllm_actor.testing.shapes", str(opt)]
    command += ["--shapes", str(arguments.shapes), "--tokenizers", str(arguments.tokenizers)]
    subprocess.run(command, check=True, env=os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"})
    forget_in_page_cache(opt)

    out.print("starting a node …")
    with running_node(arguments.work_dir / "data", "host_pool_bytes=512MiB") as node:
        out.print(f"node ready at [bold]{node.url}[/bold]")
        for source, name in (("builtin:demo", "demo"), (str(opt), "opt-125m")):
            subprocess.run([CLI, "deploy", source, "--name", name, "--replace", "--url", node.url], check=True)
        right = asyncio.run(converse(node))
        status, left = node.stop()
    out.print(f"node stopped: exit status {status}, processes left: {len(left)}")
    if not right:
        raise SystemExit("an answer was wrong")
    if status or left:
        raise SystemExit("the node did not stop cleanly")
    out.print("[bold green]the demo is done[/bold green]; next: .venv/bin/sllm-node start, and README.md")


if __name__ == "__main__":
    main()
