"""Names that the shell completes, asked of the running node within a second; never an error in somebody's prompt."""

from __future__ import annotations

import asyncio

import typer

from sllm_actor.cli.client import DEFAULT_URL, NodeClient
from sllm_actor.cli.names import Noun, known_names


def models(ctx: typer.Context, incomplete: str) -> list[str]:
    """Complete a model's name."""
    return _names(ctx, Noun.MODEL, incomplete)


def nodes(ctx: typer.Context, incomplete: str) -> list[str]:
    """Complete a node's name."""
    return _names(ctx, Noun.NODE, incomplete)


def requests(ctx: typer.Context, incomplete: str) -> list[str]:
    """Complete a request's id, those that run first."""
    return _names(ctx, Noun.REQUEST, incomplete)


def _names(ctx: typer.Context, noun: Noun, incomplete: str) -> list[str]:
    # What stands behind the word is not read yet; the variables are.
    url = str(ctx.params.get("url") or DEFAULT_URL)
    key = str(ctx.params.get("api_key") or "")
    return [name for name in asyncio.run(_ask(url, key, noun)) if name.startswith(incomplete)]


async def _ask(url: str, key: str, noun: Noun) -> list[str]:
    async with NodeClient(url, key) as client:
        return await known_names(client, noun)
