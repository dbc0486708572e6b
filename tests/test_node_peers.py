"""A real node that others read its models from, and what it takes for it to listen."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL
from reading import refused, whole
from remote_pairs import QUICK, nothing_left

from sllm_actor import Config, Node
from sllm_actor.errors import AddressInUse, ConfigInvalid, SourceMissing, SourceRefused
from sllm_actor.runtime import ActorSystem, NodeAddress, Security
from sllm_actor.sources.builtin import BUILTIN
from sllm_actor.sources.peer import PeerSource
from sllm_actor.sources.peer_messages import PEER_MESSAGES
from sllm_actor.sources.source import SourceOptions, belongs
from sllm_actor.testing.node_process import NodeProcess, running_node

pytestmark = pytest.mark.usefixtures("warm_starts")

SECRET = "a secret that two nodes share"
OPTIONS = SourceOptions()


def secret_file(folder: Path, secret: str = SECRET) -> Path:
    path = folder / "secret"
    path.touch(mode=0o600)
    path.write_text(f"{secret}\n")
    return path


@pytest.fixture(scope="module")
def holder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A node that listens to others, with the demo model registered."""
    folder = tmp_path_factory.mktemp("holder")
    knobs = ("node_id=holder", "listen=tcp://127.0.0.1:0", f"cluster_secret_file={secret_file(folder)}")
    with running_node(folder / "data", *SMALL, *knobs) as node:
        node.deploy("builtin:demo", "org/demo")
        yield node


def system(secret: str) -> ActorSystem:
    return ActorSystem(
        node_id="wanting", messages=PEER_MESSAGES, limits=QUICK, security=Security(secret=secret.encode())
    )


async def test_a_registered_model_is_read_from_a_node_by_another(holder: NodeProcess) -> None:
    async with nothing_left():
        wanting = system(SECRET)
        source = PeerSource(wanting, NodeAddress.parse(holder.address), "org/demo", OPTIONS)
        files = await source.files()
        demo = BUILTIN["demo"]
        assert [file.name for file in files] == sorted(path.name for path in demo.iterdir() if belongs(path.name))
        assert "config.json" in [file.name for file in files]
        for file in files:
            assert await whole(source, file) == (demo / file.name).read_bytes()
        await refused(SourceMissing, PeerSource(wanting, source_address(holder), "demo", OPTIONS).files())
        await source.close()
        await wanting.close()


def source_address(holder: NodeProcess) -> NodeAddress:
    assert holder.address.startswith("holder@tcp://127.0.0.1:")
    return NodeAddress.parse(holder.address)


async def test_a_node_does_not_talk_to_one_that_does_not_know_the_secret(holder: NodeProcess) -> None:
    async with nothing_left():
        wanting = system("a secret that nobody else knows")
        source = PeerSource(wanting, source_address(holder), "org/demo", OPTIONS)
        await refused(SourceRefused, source.files())
        await source.close()
        await wanting.close()


async def start(folder: Path, **knobs: Any) -> None:
    """Start a node that is expected to refuse."""
    async with Node(Config(data_dir=str(folder / "data"), port=0, **knobs)):
        raise AssertionError("it has started")


@pytest.mark.parametrize(
    ("knobs", "param"),
    [
        ({"listen": "tcp://0.0.0.0:0"}, "listen"),
        ({"listen": "tcp://192.0.2.1:0"}, "listen"),
        ({"listen": "127.0.0.1:8401"}, "listen"),
        ({"listen": "tcp://127.0.0.1:0", "advertise": "nowhere"}, "advertise"),
    ],
)
async def test_an_endpoint_that_may_not_be_listened_at_is_refused(
    tmp_path: Path, knobs: dict[str, str], param: str
) -> None:
    async with nothing_left():
        with pytest.raises(ConfigInvalid) as caught:
            await start(tmp_path, **knobs)
    assert caught.value.param == param


async def test_every_interface_needs_an_endpoint_to_advertise(tmp_path: Path) -> None:
    async with nothing_left():
        with pytest.raises(ConfigInvalid) as caught:
            await start(tmp_path, listen="tcp://0.0.0.0:0", cluster_secret_file=str(secret_file(tmp_path)))
    assert caught.value.param == "advertise"


async def test_an_endpoint_in_use_is_refused(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        async with nothing_left():
            with pytest.raises(AddressInUse) as caught:
                await start(tmp_path, listen=f"tcp://127.0.0.1:{taken.getsockname()[1]}")
    assert caught.value.param == "listen"


def test_a_secret_that_is_short_absent_or_readable_by_others_is_refused(tmp_path: Path) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.write_text(SECRET)
    open_to_all.chmod(0o644)
    for path, reason in (
        (secret_file(tmp_path, "short"), "16 bytes"),
        (open_to_all, "chmod 600"),
        (tmp_path / "nowhere", "can't be read"),
    ):
        with pytest.raises(ConfigInvalid, match=reason) as caught:
            Node(Config(data_dir=str(tmp_path / "data"), cluster_secret_file=str(path)))
        assert caught.value.param == "cluster_secret_file"


def test_something_to_advertise_without_listening_is_refused() -> None:
    with pytest.raises(ConfigInvalid) as caught:
        Config(advertise="tcp://10.0.0.7:8401")
    assert caught.value.param == "advertise"
