"""One small checkpoint of sentence-transformers in each kind of place, as a source of that kind."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
from hub_server import HubServer, Repo
from raw_server import RawServer
from sources import OPTIONS, origin
from test_peer_source import folders, two
from test_s3_source import BUCKET, put

from sllm_actor.sources.http import HttpSource
from sllm_actor.sources.hub import HubSource
from sllm_actor.sources.local import FolderSource
from sllm_actor.sources.s3 import S3Source
from sllm_actor.sources.source import Source

KINDS = ("folder", "http", "hub", "s3", "peer")
Files = Mapping[str, bytes]
OpenPlace = Callable[[Files], AbstractAsyncContextManager[Source]]


def written(folder: Path, files: Files) -> Path:
    """Write the files of a checkpoint, those below its folder too."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


@asynccontextmanager
async def _in_folder(folder: Path, files: Files) -> AsyncIterator[Source]:
    source = FolderSource(written(folder, files))
    yield source
    await source.close()


@asynccontextmanager
async def _on_web_server(files: Files) -> AsyncIterator[Source]:
    with RawServer(origin(files)) as server:
        source = HttpSource(f"{server.url}/m", OPTIONS)
        yield source
        await source.close()


@asynccontextmanager
async def _on_hub(files: Files, home: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Source]:
    with HubServer() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("NETRC", str(home / "no-netrc"))
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(home / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        hub.repos["org/model"] = Repo.of(files)
        source = HubSource("hf://org/model", OPTIONS)
        yield source
        await source.close()


@asynccontextmanager
async def _in_bucket(files: Files, server: str, prefix: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Source]:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    for name, content in files.items():
        put(server, f"{prefix}/{name}", content)
    source = S3Source(f"s3://{BUCKET}/{prefix}", OPTIONS)
    yield source
    await source.close()


@asynccontextmanager
async def _on_peer(folder: Path, files: Files) -> AsyncIterator[Source]:
    async with two(folders(model=written(folder, files))) as (source, _):
        yield source


def opener(kind: str, request: pytest.FixtureRequest, home: Path, monkeypatch: pytest.MonkeyPatch) -> OpenPlace:
    """Say how a place of a kind is opened with files in it; each is of use once."""
    match kind:
        case "folder":
            return lambda files: _in_folder(home / "model", files)
        case "http":
            return _on_web_server
        case "hub":
            return lambda files: _on_hub(files, home, monkeypatch)
        case "s3":
            server, prefix = request.getfixturevalue("server"), str(abs(hash(request.node.name)))
            return lambda files: _in_bucket(files, server, prefix, monkeypatch)
        case _:
            return lambda files: _on_peer(home / "model", files)
