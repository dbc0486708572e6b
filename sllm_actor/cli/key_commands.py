"""The verbs under `sllm-node keys`, and their options."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from sllm_actor.cli import keys
from sllm_actor.cli.asking import Json, refusals
from sllm_actor.config import resolve
from sllm_actor.errors import ConfigInvalid
from sllm_actor.frontend.keys import KNOB

app = typer.Typer(no_args_is_help=True, help="Make, list and revoke API keys in the file that api_key_file names.")

ConfigFile = Annotated[Path | None, typer.Option("--config", envvar="SLLM_CONFIG", help="A TOML file of knobs.")]
KeyFile = Annotated[str | None, typer.Option("--api-key-file", help="The file of keys; the knob's by default.")]
Bound = Annotated[int | None, typer.Option(min=1)]


@contextmanager
def _file(config: Path | None, given: str | None, *, as_json: bool) -> Iterator[str]:
    """Give the file's name, and turn what is wrong with it into a message and exit code 1."""
    with refusals(as_json=as_json):
        flags = {} if given is None else {KNOB: given}
        path = resolve(config, os.environ, flags).config.api_key_file
        if not path:
            raise ConfigInvalid(f"{KNOB} names no file; use --api-key-file", param=KNOB)
        yield path


@app.command("create")
def create(
    name: str, requests_per_minute: Bound = None, tokens_per_minute: Bound = None, concurrent_requests: Bound = None,
    min_priority: Annotated[int | None, typer.Option(help="Its requests have no priority below this number.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="A model that it may use; repeat for more.")] = None,
    admin: Annotated[bool, typer.Option("--admin", help="It may deploy, remove and look at everything.")] = False,
    api_key_file: KeyFile = None, config: ConfigFile = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Make a key and print it once.

    Example: sllm-node keys create alice --requests-per-minute 60 --model demo
    """
    bounds = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "concurrent_requests": concurrent_requests,
        "min_priority": min_priority,
        "models": model or None,
        "admin": admin or None,
    }
    with _file(config, api_key_file, as_json=as_json) as path:
        keys.create(path, name, bounds, as_json=as_json)


@app.command("list")
def list_keys(api_key_file: KeyFile = None, config: ConfigFile = None, as_json: Json = False) -> None:
    """List the keys and what each may do.

    Example: sllm-node keys list --api-key-file keys.toml
    """
    with _file(config, api_key_file, as_json=as_json) as path:
        keys.show(path, as_json=as_json)


@app.command("revoke")
def revoke(name: str, api_key_file: KeyFile = None, config: ConfigFile = None, as_json: Json = False) -> None:
    """Take a key out; a running node refuses it within seconds.

    Example: sllm-node keys revoke alice
    """
    with _file(config, api_key_file, as_json=as_json) as path:
        keys.revoke(path, name, as_json=as_json)
