"""What every verb that asks a node shares: its options, and errors as messages and exit codes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, TypeVar

import typer
from rich.markup import escape

from sllm_actor.cli.client import NodeClient, NodeRefused, NodeUnreachable
from sllm_actor.cli.show import err, print_json
from sllm_actor.errors import SllmError

T = TypeVar("T")
Url = Annotated[str, typer.Option("--url", envvar="SLLM_URL", help="The node to ask.")]
Key = Annotated[str, typer.Option("--api-key", envvar="SLLM_API_KEY", help="Its API key, where it wants one.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def fail(message: str, exit_code: int = 1, *, as_json: bool = False, code: str = "", param: str | None = None) -> None:
    """Say what went wrong and end with the exit code."""
    if as_json:
        print_json({"error": {"message": message, "code": code, "param": param}})
    else:
        err.print(f"[bold red]error:[/bold red] {escape(message)}", markup=True)
    raise typer.Exit(exit_code)


def ask(url: str, key: str, work: Callable[[NodeClient], Awaitable[T]], *, as_json: bool) -> T:
    """Run `work` with a client; errors become messages and exit codes."""

    async def connected() -> T:
        async with NodeClient(url, key) as client:
            return await work(client)

    try:
        return asyncio.run(connected())
    except NodeUnreachable as error:
        fail(str(error), 3, as_json=as_json, code="node_unreachable")
    except NodeRefused as error:
        fail(str(error), 1, as_json=as_json, code=error.code, param=error.param)
    raise AssertionError("unreachable")


@contextmanager
def refusals(*, as_json: bool) -> Iterator[None]:
    """Turn typed errors into a message and exit code 1."""
    try:
        yield
    except SllmError as error:
        fail(error.message, 1, as_json=as_json, code=error.code, param=error.param)
