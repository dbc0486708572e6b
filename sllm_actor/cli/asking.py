"""What every verb that asks a node shares: its options, and errors as messages and exit codes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, NoReturn, TypeVar

import typer
from rich.markup import escape

from sllm_actor.cli.client import NodeClient, NodeRefused, NodeUnreachable
from sllm_actor.cli.exit_codes import ExitCode
from sllm_actor.cli.hints import HINTS, hint_for
from sllm_actor.cli.show import err, print_json
from sllm_actor.errors import SllmError

T = TypeVar("T")
Url = Annotated[str, typer.Option("--url", envvar="SLLM_URL", help="The node to ask.")]
Key = Annotated[str, typer.Option("--api-key", envvar="SLLM_API_KEY", help="Its API key, where it wants one.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def fail(
    message: str,
    exit_code: ExitCode = ExitCode.REFUSED,
    *,
    as_json: bool = False,
    code: str = "",
    param: str | None = None,
    hint: str = "",
) -> NoReturn:
    """Say what went wrong and what to do next, and end with the exit code."""
    if as_json:
        print_json({"error": {"message": message, "code": code, "param": param, "hint": hint}})
    else:
        err.print(f"[bold red]error:[/bold red] {escape(message)}")
        if hint:
            err.print(f"[bold]next:[/bold] {escape(hint)}")
    raise typer.Exit(exit_code)


def ask(url: str, key: str, work: Callable[[NodeClient], Awaitable[T]], *, as_json: bool, about: str = "") -> T:
    """Run `work` with a client; errors become messages and exit codes. `about` is what it was asked to work on."""

    async def connected() -> T:
        async with NodeClient(url, key) as client:
            try:
                return await work(client)
            except NodeRefused as error:
                error.hint = await hint_for(client, error, about)
                raise

    try:
        return asyncio.run(connected())
    except NodeUnreachable as error:
        fail(str(error), ExitCode.NO_NODE, as_json=as_json, code="node_unreachable")
    except NodeRefused as error:
        fail(str(error), as_json=as_json, code=error.code, param=error.param, hint=error.hint)


@contextmanager
def refusals(*, as_json: bool) -> Iterator[None]:
    """Turn typed errors into a message and exit code 1."""
    try:
        yield
    except SllmError as error:
        hint = HINTS.get(error.code, "")
        fail(error.message, as_json=as_json, code=error.code, param=error.param, hint=hint)
