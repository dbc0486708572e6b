"""One sentence model, deployed from every kind of place: the same vectors as from the folder as it was published."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import SMALL
from hub_server import HubServer, Repo
from sentence_models import save_sentence_model
from test_embeddings import SENTENCES, embed, mean_of
from test_node_peers import secret_file
from test_s3_source import BUCKET, put
from test_s3_source import server as server
from test_s3_source import settings_of_s3 as settings_of_s3
from web_server import WebServer

from sllm_actor.checkpoint.convert import convert
from sllm_actor.testing.node_process import CLI, NodeProcess, running_node


class Places(NamedTuple):
    """A model's folder, a node that others read from, and one that can reach all the places."""

    folder: Path
    holder: NodeProcess
    node: NodeProcess
    hub: HubServer
    converted: Path


def contents_of(folder: Path) -> dict[str, bytes]:
    """All files of a folder and below it, by their names."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def places(
    warm_starts: None, server: str, web: WebServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Places]:
    root = tmp_path_factory.mktemp("places")
    folder = save_sentence_model(root / "model")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    shutil.copytree(folder, web.folder / "sentences")
    files = contents_of(folder)
    with contextlib.ExitStack() as stack:
        hub = stack.enter_context(HubServer())
        hub.repos["org/sentences"] = Repo.of(files)
        environment = {
            "HF_ENDPOINT": hub.url, "HF_HOME": str(root / "home"), "NETRC": str(root / "none"),
            "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true", "AWS_ENDPOINT_URL": server,
        }  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            for name, content in files.items():
                put(server, f"sentences/{name}", content)
        knobs = (*SMALL, "listen=tcp://127.0.0.1:0", f"cluster_secret_file={secret_file(root)}")
        holder = stack.enter_context(running_node(root / "holder", *knobs, "node_id=holder"))
        wanting = (*knobs, "node_id=wanting", "source_allow_private_redirects=true")
        node = stack.enter_context(running_node(root / "wanting", *wanting, environment=environment))
        holder.deploy(folder, "org/sentences")
        node.deploy(folder, "local")
        convert(folder, root / "converted")
        holder.deploy(root / "converted", "converted")
        yield Places(folder, holder, node, hub, root / "converted")
        shutil.rmtree(web.folder / "sentences")


PLACES: dict[str, Callable[[Places, WebServer], str]] = {
    "web server": lambda _, web: web.url("sentences"),
    "web server without ranges": lambda _, web: web.url("sentences", "whole"),
    "hub": lambda _places, _: "hf://org/sentences",
    "bucket": lambda _places, _: f"s3://{BUCKET}/sentences",
    "converted": lambda places, _: str(places.converted),
    "peer": lambda places, _: f"sllm://{places.holder.address.replace('tcp://', '')}/org/sentences",
    "peer, converted": lambda places, _: f"sllm://{places.holder.address.replace('tcp://', '')}/converted",
}


@pytest.mark.parametrize("place", PLACES)
def test_a_sentence_model_embeds_alike_wherever_it_comes_from(places: Places, web: WebServer, place: str) -> None:
    node = places.node
    model = node.deploy(PLACES[place](places, web), "there")
    try:
        assert model["embedding"] == {
            "pooling": "mean", "normalize": True, "dimensions": 32, "max_tokens": 16, "lower_case": True,
            "matryoshka": False, "matryoshka_dimensions": [],
        }  # fmt: skip
        vectors = torch.tensor(embed(node, SENTENCES, "there"))
        here = torch.tensor(embed(node, SENTENCES, "local"))
        torch.testing.assert_close(vectors, here, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(vectors, mean_of(places.folder, SENTENCES), rtol=2e-4, atol=2e-5)
    finally:
        node.call("DELETE", "/admin/models/there")


def test_a_pulled_sentence_model_embeds_from_the_ssd_without_its_source_and_another_node_gets_it_from_there(
    places: Places, web: WebServer
) -> None:
    served = shutil.copytree(places.folder, web.folder / "pulled")
    command = [str(CLI), "pull", web.url("pulled"), "--name", "pulled", "--url", places.node.url]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    shutil.rmtree(served)
    here = embed(places.node, SENTENCES, "local")
    try:
        torch.testing.assert_close(torch.tensor(embed(places.node, SENTENCES, "pulled")), torch.tensor(here))
        places.holder.deploy(f"sllm://{places.node.address.replace('tcp://', '')}/pulled", "third")
        torch.testing.assert_close(torch.tensor(embed(places.holder, SENTENCES, "third")), torch.tensor(here))
    finally:
        places.holder.request("DELETE", "/admin/models/third")
        places.node.request("DELETE", "/admin/models/pulled")


def test_a_pooling_of_another_name_travels_and_what_is_wrong_with_one_is_said(places: Places) -> None:
    def deployed(files: dict[str, bytes]) -> str:
        places.hub.repos["org/changed"] = Repo.of(files)
        reply = places.node.request("POST", "/admin/models", {"source": "hf://org/changed", "name": "changed"})
        return "" if reply.status < 300 else str(reply.json()["error"]["message"])

    files = contents_of(places.folder)
    pooling = files.pop("1_Pooling/config.json")
    own = files | {"modules.json": files["modules.json"].replace(b"1_Pooling", b"own"), "own/config.json": pooling}
    assert deployed(own) == ""
    assert len(embed(places.node, SENTENCES, "changed")) == len(SENTENCES)
    places.node.call("DELETE", "/admin/models/changed")
    assert "1_Pooling/config.json is missing" in deployed(files)
    assert "1_Pooling/config.json is missing" in deployed(files | {"1_Pooling": b"a file"})
    assert "1_Pooling/config.json has 100001 bytes" in deployed(files | {"1_Pooling/config.json": b" " * 100_001})
    up = {"modules.json": files["modules.json"].replace(b"1_Pooling", b"1_Pooling/../x"), "x/config.json": pooling}
    assert "in one below it" in deployed(files | up)
    assert "can't be used" in deployed(files | {"1_Pooling/config.json": b"{"})


def test_a_node_that_reads_from_a_peer_is_told_of_a_link_that_leads_out(places: Places, tmp_path: Path) -> None:
    folder = shutil.copytree(places.folder, tmp_path / "linked")
    places.holder.deploy(folder, "linked")
    os.rename(folder / "1_Pooling", tmp_path / "outside")
    (folder / "1_Pooling").symlink_to(tmp_path / "outside")
    source = f"sllm://{places.holder.address.replace('tcp://', '')}/linked"
    reply = places.node.request("POST", "/admin/models", {"source": source, "name": "linked"})
    assert reply.json()["error"]["code"] == "source_invalid"
    assert "out of the folder" in reply.json()["error"]["message"]
    places.holder.call("DELETE", "/admin/models/linked")
