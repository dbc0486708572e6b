"""A real node that starts models from the Hub and from S3, with servers that speak their APIs."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import StartNode
from hub_server import HubServer, Repo
from test_s3_source import BUCKET, put
from test_s3_source import server as server

from sllm_actor.sources.builtin import BUILTIN
from sllm_actor.sources.source import belongs

FILES = {path.name: path.read_bytes() for path in BUILTIN["demo"].iterdir() if belongs(path.name)}


def test_a_model_of_the_hub_starts_by_its_name(start_node: StartNode, tmp_path: Path) -> None:
    with HubServer() as hub:
        hub.repos["org/model"] = Repo.of(FILES)
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NETRC": str(tmp_path / "none")}
        with start_node("source_allow_private_redirects=true", **environment) as node:
            model = node.deploy("hf://org/model", "demo")
            assert model["source"].startswith("hf://org/model")
            assert "82" in node.chat("demo", "What is 47 + 35?")
            # Without a token, what is gated is refused, and says so.
            hub.repos["org/gated"] = Repo.of(FILES, token="secret")
            reply = node.request("POST", "/admin/models", {"source": "hf://org/gated", "name": "gated"})
            assert reply.json()["error"]["code"] == "source_refused"


def test_a_model_in_a_bucket_starts(start_node: StartNode, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ENDPOINT_URL": server,
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name, content in FILES.items():
        put(server, f"demo/{name}", content)
    with start_node() as node:
        node.deploy(f"s3://{BUCKET}/demo", "demo")
        assert "82" in node.chat("demo", "What is 47 + 35?")
