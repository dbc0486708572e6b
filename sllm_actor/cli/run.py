"""`sllm-node run`: one answer, or a chat at the terminal."""

from __future__ import annotations

import asyncio
import secrets
import sys
from typing import Any

from sllm_actor.cli.client import NodeClient, NodeRefused
from sllm_actor.cli.show import err, out, print_json, print_timeline

Turns = list[dict[str, str]]


async def run_model(
    client: NodeClient,
    model: str,
    prompt: str | None,
    *,
    system: str,
    options: dict[str, Any],
    timeline: bool,
    as_json: bool,
) -> None:
    """Answer `prompt`, or hold a chat where there is none.

    Raises:
        NodeUnreachable, NodeRefused.
    """
    chat = await _has_chat(client, model)
    turns: Turns = [{"role": "system", "content": system}] if system else []
    if prompt is not None:
        await _answer(client, model, turns, prompt, chat, options, timeline, as_json)
        return
    err.print(f"chat with {model}: an empty line or Ctrl-D ends it")
    while True:
        try:
            line = await asyncio.to_thread(input, ">>> ")
        except EOFError:
            return
        if not line.strip():
            return
        try:
            answer = await _answer(client, model, turns, line, chat, options, timeline, as_json)
        except NodeRefused as error:
            err.print(f"[bold red]error:[/bold red] {error}")
            continue
        if chat:
            turns += [{"role": "user", "content": line}, {"role": "assistant", "content": answer}]


async def _has_chat(client: NodeClient, model: str) -> bool:
    """Tell whether the model brings a chat template; one that does not exist is refused by the request itself."""
    models = (await client.call("GET", "/admin/models"))["models"]
    return next((status["model"]["chat"] for status in models if status["model"]["name"] == model), True)


async def _answer(
    client: NodeClient,
    model: str,
    turns: Turns,
    prompt: str,
    chat: bool,
    options: dict[str, Any],
    timeline: bool,
    as_json: bool,
) -> str:
    """Print the answer as it comes, and give it whole."""
    body: dict[str, Any] = {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True},
    } | options
    if chat:
        path = "/v1/chat/completions"
        body["messages"] = [*turns, {"role": "user", "content": prompt}]
    else:
        path = "/v1/completions"
        body["prompt"] = prompt
        body.setdefault("max_tokens", 128)
    request_id = f"run-{secrets.token_hex(8)}"
    text, finish, usage = "", None, None
    async for event in client.events(path, body, request_id):
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            piece = choice["delta"].get("content", "") if chat else choice["text"]
            finish = choice["finish_reason"] or finish
            text += piece
            if not as_json:
                sys.stdout.write(piece)
                sys.stdout.flush()
    record = await client.call("GET", f"/admin/requests/{request_id}") if timeline or as_json else None
    if as_json:
        print_json({"model": model, "text": text, "finish_reason": finish, "usage": usage, "timeline": record})
    else:
        sys.stdout.write("\n")
        if record is not None:
            out.print()
            print_timeline(record)
    return text
