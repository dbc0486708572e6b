"""`sllm-node deploy`: what is said of a registration, and the several that a file of ServerlessLLM's makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from sllm_actor.cli.client import NodeClient
from sllm_actor.cli.pull import default_name
from sllm_actor.cli.show import err, out, print_json, purpose_of
from sllm_actor.cli.sllm_config import OWNER_AND_NAME, Deployment
from sllm_actor.units import format_bytes


def registration(source: str, name: str, keep_alive: str, *, base: str, replace: bool) -> dict[str, Any]:
    """Give the body of a registration; a folder's name is made absolute here, as the node runs elsewhere."""
    if ":" not in source or source.startswith((".", "/", "~")):
        folder = Path(source).expanduser()
        if OWNER_AND_NAME.fullmatch(source) and not folder.exists():
            raise typer.BadParameter(f"there is no folder {source}; did you mean hf://{source}?", param_hint="SOURCE")
        source = str(folder.absolute())
    chosen = name or (default_name(source) if ":" in source else Path(source).name)
    body: dict[str, Any] = {"name": chosen, "source": source, "replace": replace} | ({"base": base} if base else {})
    return body | {"keep_alive": keep_alive} if keep_alive else body


async def deploy_one(client: NodeClient, body: dict[str, Any], *, as_json: bool) -> dict[str, Any]:
    """Register a model and give the answer.

    No weights move meanwhile, which `pull` has a bar for: config, tokenizer and headers do, from however far away.
    """
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=as_json or not err.is_terminal) as progress:
        progress.add_task(f"looking at {escape(body['source'])}")
        return await client.call("POST", "/admin/models", body)


def print_deployed(model: dict[str, Any]) -> None:
    """Say what was registered."""
    kind = f"adapter of {model['base']}" if model["base"] else model["architecture"]
    facts = f"{kind}, {model['dtype']}, {format_bytes(model['size_bytes'])}"
    out.print(f"deployed [bold]{model['name']}[/bold]: {facts}{purpose_of(model)}")


async def deploy_all(client: NodeClient, plan: Deployment, *, replace: bool, as_json: bool) -> None:
    """Register a model, then its adapters; the first refusal ends it, and what was registered before stays."""
    made = []
    warnings = list(plan.warnings)
    for body in (plan.model, *plan.adapters):
        answer = await deploy_one(client, body | {"replace": replace}, as_json=as_json)
        made.append(answer["model"])
    if plan.dtype and made[0]["dtype"] != plan.dtype:
        warnings.append(
            f"backend_config.torch_dtype: served as it is stored, {made[0]['dtype']}, and not as {plan.dtype}"
        )
    if as_json:
        print_json({"model": made[0], "adapters": made[1:], "warnings": warnings})
        return
    for warning in warnings:
        err.print(f"[yellow]warning:[/yellow] {escape(warning)}")
    for model in made:
        print_deployed(model)
