"""`sllm-node run`: one answer, or a chat at the terminal."""

from __future__ import annotations

import asyncio
import secrets
import signal
import sys
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
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
    err.print(f"chat with {model}: an empty line, /bye or Ctrl-D ends it; Ctrl-C ends an answer")
    while True:
        try:
            line = await asyncio.to_thread(input, ">>> ")
        except EOFError:
            return
        if line.strip() in ("", "/bye"):
            return
        try:
            with _interruptible():
                answer = await _answer(client, model, turns, line, chat, options, timeline, as_json)
        except _Interrupted:
            sys.stdout.write("\n")
            continue
        except NodeRefused as error:
            err.print(f"[bold red]error:[/bold red] {error}")
            continue
        if chat:
            turns += [{"role": "user", "content": line}, {"role": "assistant", "content": answer}]


class _Interrupted(Exception):
    """Ctrl-C has ended an answer."""


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C end the block alone."""
    task, interrupted = asyncio.current_task(), False
    assert task is not None

    def on_signal() -> None:
        nonlocal interrupted
        interrupted = True
        task.cancel()

    loop, before = asyncio.get_running_loop(), signal.getsignal(signal.SIGINT)
    loop.add_signal_handler(signal.SIGINT, on_signal)
    try:
        yield
    except asyncio.CancelledError:
        if not interrupted:
            raise
        task.uncancel()
        raise _Interrupted from None
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, before)


async def _has_chat(client: NodeClient, model: str) -> bool:
    """Tell whether the model brings a chat template; one that does not exist is refused by the request itself."""
    models = (await client.call("GET", "/admin/models"))["models"]
    return next((status["model"]["chat"] for status in models if status["model"]["name"] == model), True)


class _Waiting:
    """A line at the terminal that says what an answer waits for, gone when the answer begins."""

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown
        self._written = False

    def tell(self, text: str) -> None:
        if self._shown:
            self._written = True
            sys.stderr.write(f"\r\033[K{text}")
            sys.stderr.flush()

    def clear(self) -> None:
        if self._written:
            self.tell("")
            self._written = False


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
    waiting = _Waiting(shown=err.is_terminal and not as_json)
    async with aclosing(client.events(path, body, request_id, waiting.tell)) as events:
        async for event in events:
            waiting.clear()
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
