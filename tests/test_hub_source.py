"""The Hub source against a local server that speaks the Hub's API: huggingface_hub asks it, and our reader reads."""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_proxy import Fault, FaultProxy
from hub_server import HubServer, Repo, blob_id, commit_of
from sources import HASTY, OPTIONS, WEIGHTS, descriptors, opened, read, until
from test_http_source import BAD_NAMES

from sllm_actor.errors import (
    SourceChanged,
    SourceInvalid,
    SourceMissing,
    SourceRefused,
    SourceUnreachable,
    SourceViolation,
)
from sllm_actor.sources.hub import HubSource
from sllm_actor.sources.source import SourceFile

STOCK = {
    "config.json": b"{}",
    "model.safetensors": WEIGHTS,
    "tokenizer.json": b'{"a": 1}',
    "README.md": b"# read me",
    ".gitattributes": b"x",
    "modeling_of_theirs.py": b"import os",
    "pytorch_model.bin": b"pickled",
    "consolidated.safetensors": b"the same again",
    "onnx/model.safetensors": b"elsewhere",
    "original/params.json": b"{}",
}
COMMIT = commit_of("main")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        server.repos["org/model"] = Repo.of(STOCK)
        yield server


async def listed(name: str = "hf://org/model") -> tuple[SourceFile, ...]:
    async with opened(HubSource(name, OPTIONS)) as source:
        return await source.files()


async def test_a_model_comes_whole_pinned_to_its_commit(hub: HubServer) -> None:
    async with opened(HubSource("hf://org/model", OPTIONS)) as source:
        files = {file.name: file for file in await source.files()}
        assert list(files) == ["config.json", "model.safetensors", "tokenizer.json"]
        assert files["model.safetensors"].validator == f"{COMMIT}/{hashlib.sha256(WEIGHTS).hexdigest()}"
        assert files["config.json"].validator == f"{COMMIT}/{blob_id(b'{}')}"
        assert files["model.safetensors"].sha256 == hashlib.sha256(WEIGHTS).hexdigest()
        assert files["config.json"].sha256 == ""
        # The branch moves on, and what was listed is still what is read.
        hub.repos["org/model"].files[commit_of("later")] = {"config.json": b"[]", "model.safetensors": b"other"}
        hub.repos["org/model"].commits["main"] = commit_of("later")
        ranges = [(begin, min(50_000, len(WEIGHTS) - begin)) for begin in range(0, len(WEIGHTS), 50_000)]
        parts = await asyncio.gather(*(read(source, files["model.safetensors"], *part) for part in ranges))
        assert b"".join(parts) == WEIGHTS
        assert await read(source, files["config.json"]) == b"{}"
        assert source.parallel == OPTIONS.parallel_reads
    # A source that is opened later goes on with what the first one listed.
    async with opened(HubSource("hf:org/model", OPTIONS)) as source:
        assert await read(source, files["model.safetensors"], 7, 9) == WEIGHTS[7:16]


async def test_a_revision_may_be_a_branch_a_tag_or_a_commit(hub: HubServer) -> None:
    later = commit_of("later")
    hub.repos["org/model"].files[later] = {"config.json": b"{}", "model.safetensors": b"later"}
    hub.repos["org/model"].commits["refs/pr/1"] = later
    for revision in ("refs/pr/1", later):
        files = await listed(f"hf://org/model@{revision}")
        assert files[1].size_bytes == 5 and files[1].validator.startswith(later)
    with pytest.raises(SourceMissing, match="no such revision"):
        await listed("hf://org/model@v9")


async def test_shards_come_by_their_index_and_no_other_set_of_weights(hub: HubServer) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    files = {
        **STOCK, "model.safetensors.index.json": json.dumps(index).encode(),
        "model-00001-of-00002.safetensors": b"1", "model-00002-of-00002.safetensors": b"22",
        "model.fp16.safetensors.index.json": b"{}",
    }  # fmt: skip
    hub.repos["org/model"] = Repo.of(files)
    assert [file.name for file in await listed()] == [
        "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json", "tokenizer.json",
    ]  # fmt: skip
    del files["model-00002-of-00002.safetensors"]
    hub.repos["org/model"] = Repo.of(files)
    with pytest.raises(SourceInvalid, match=r"lists model-00002-of-00002\.safetensors and does not have it"):
        await listed()


async def test_a_converted_model_comes_as_its_manifest_lists_it(hub: HubServer) -> None:
    entries = [{"name": "model.safetensors", "size_bytes": len(WEIGHTS)}]
    others = [{"name": "config.json", "size_bytes": 2}]
    manifest = json.dumps({"files": entries, "others": others}).encode()
    hub.repos["org/model"] = Repo.of({**STOCK, "sllm.json": manifest})
    assert [file.name for file in await listed()] == ["config.json", "model.safetensors", "sllm.json"]
    hub.repos["org/model"] = Repo.of({**STOCK, "sllm.json": manifest, "model.safetensors": b"short"})
    with pytest.raises(SourceInvalid, match="has 5 bytes"):
        await listed()


async def test_what_is_no_checkpoint_is_said_by_name(hub: HubServer) -> None:
    for files, message in (
        ({"config.json": b"{}", "pytorch_model.bin": b"x"}, r"pytorch_model\.bin.*sllm-node convert"),
        ({"config.json": b"{}", "model.gguf": b"x"}, "has none of"),
        ({"model.safetensors": b"x"}, r"has no config\.json"),
        ({}, "has none of"),
    ):
        hub.repos["org/model"] = Repo.of(files)
        with pytest.raises(SourceInvalid, match=message):
            await listed()


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
async def test_a_name_outside_the_alphabet_is_never_listed(hub: HubServer, name: str) -> None:
    if "\0" in name:
        name = name.replace("\0", "\u2400")
    hub.repos["org/model"] = Repo.of({**STOCK, name: b"x"})
    assert name not in [file.name for file in await listed()]
    index = {"weight_map": {"a": "model-1.safetensors", "b": name}}
    hub.repos["org/model"] = Repo.of({
        **STOCK, name: b"x", "model-1.safetensors": b"x", "model.safetensors.index.json": json.dumps(index).encode()
    })  # fmt: skip
    with pytest.raises(SourceInvalid, match="can't be part of a checkpoint"):
        await listed()


@pytest.mark.parametrize(
    "lie",
    [
        {"size": None}, {"size": -1}, {"size": "7"}, {"size": 2**60}, {"lfs": None, "blobId": None},
        {"lfs": {"size": 1}},
        {"lfs": {"sha256": "../x", "size": 1, "pointerSize": 1}}, {"rfilename": None},
    ],
    ids=str,
)  # fmt: skip
async def test_a_listing_that_lies_is_refused(hub: HubServer, lie: dict[str, object]) -> None:
    hub.repos["org/model"].lies["model.safetensors"] = lie
    with pytest.raises((SourceViolation, SourceInvalid)):
        await listed()


async def test_a_token_goes_to_the_hub_and_never_to_its_storage(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["org/model"] = Repo.of(STOCK, token="hf_ours")
    with pytest.raises(SourceRefused, match=r"does not exist, or is not for this token .*HF_TOKEN"):
        await listed()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(SourceRefused, match="not for this token") as refused:
        await listed()
    assert "hf_wrong" not in str(refused.value)
    monkeypatch.setenv("HF_TOKEN", "hf_ours")
    async with opened(HubSource("hf://org/model", OPTIONS)) as source:
        weights = next(file for file in await source.files() if file.name == "model.safetensors")
        assert await read(source, weights) == WEIGHTS
    assert hub.hub.asked[-1].headers["authorization"] == "Bearer hf_ours"
    assert hub.storage.asked
    assert all("hf_ours" not in request.raw.decode() for request in hub.storage.asked)


async def test_gated_and_missing_models_are_said_to_be(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    hub.repos["org/model"] = Repo.of(STOCK, token="hf_ours", gated=True)
    with pytest.raises(SourceRefused, match="is gated"):
        await listed()
    with pytest.raises(SourceMissing, match=r"hf://org/nothing@main is not there"):
        await listed("hf://org/nothing")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(SourceRefused, match="is gated"):
        await listed()
    with pytest.raises(SourceRefused, match="does not exist, or is not for this token"):
        await listed("hf://org/nothing")


async def test_a_token_that_is_withdrawn_while_reading_is_refused(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_ours")
    hub.repos["org/model"] = Repo.of(STOCK, token="hf_ours")
    async with opened(HubSource("hf://org/model", OPTIONS)) as source:
        files = {file.name: file for file in await source.files()}
        hub.repos["org/model"].token = "hf_new"
        with pytest.raises(SourceRefused, match="refuses the credentials"):
            await read(source, files["config.json"])
        del hub.repos["org/model"]
        with pytest.raises(SourceMissing):
            await read(source, files["model.safetensors"])


async def test_a_signed_address_that_ran_out_is_asked_for_anew(hub: HubServer) -> None:
    async with opened(HubSource("hf://org/model", OPTIONS)) as source:
        weights = next(file for file in await source.files() if file.name == "model.safetensors")
        path = f"/org/model/resolve/{COMMIT}/model.safetensors"
        assert await read(source, weights, 0, 10) == WEIGHTS[:10]
        assert await read(source, weights, 10, 10) == WEIGHTS[10:20]
        parts = await asyncio.gather(*(read(source, weights, k, 9) for k in range(20)))
        assert parts == [WEIGHTS[k : k + 9] for k in range(20)]
        assert len(hub.hub.asked_for(path)) == 1
        before = descriptors()
        hub.signature = "signature=of-the-next-hour"
        assert await read(source, weights, 20, 10) == WEIGHTS[20:30]
        # Fewer, where the server has closed a connection that nobody used.
        await until(lambda: len(descriptors()) <= len(before))
        assert len(hub.hub.asked_for(path)) == 2
        parts = await asyncio.gather(*(read(source, weights, k, 9) for k in range(20)))
        assert parts == [WEIGHTS[k : k + 9] for k in range(20)]
        assert len(hub.hub.asked_for(path)) == 2


async def test_storage_at_a_private_address_is_refused(hub: HubServer) -> None:
    def private(address: str) -> bool:
        return address == "127.0.0.2"

    async with opened(HubSource("hf://org/model", OPTIONS, private=private)) as source:
        weights = next(file for file in await source.files() if file.name == "model.safetensors")
        with pytest.raises(SourceRefused, match=r"private address 127\.0\.0\.2"):
            await read(source, weights, 0, 10)
    assert not hub.storage.asked


async def test_a_hub_that_is_not_there_stalls_or_answers_nonsense(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultProxy(hub.hub.port, {1: Fault(stall_after_bytes=0), 2: Fault(cut_after_bytes=10)}) as proxy:
        monkeypatch.setenv("HF_ENDPOINT", proxy.url)
        for _ in range(2):
            async with opened(HubSource("hf://org/model", HASTY)) as source:
                with pytest.raises(SourceUnreachable, match="the Hub does not answer"):
                    await source.files()
        assert [file.name for file in await listed()]
    monkeypatch.setenv("HF_ENDPOINT", proxy.url)
    with pytest.raises(SourceUnreachable, match="the Hub does not answer"):
        await listed()
    monkeypatch.setenv("HF_ENDPOINT", "http://u:secret@host/")
    with pytest.raises(SourceInvalid, match="HF_ENDPOINT can't be used") as refused:
        await listed()
    assert "secret" not in str(refused.value)


async def test_offline_mode_is_said(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SourceRefused, match="HF_HUB_OFFLINE is set"):
        await listed()
    assert not hub.hub.asked


async def test_a_file_that_was_listed_by_another_source_is_not_read(hub: HubServer) -> None:
    async with opened(HubSource("hf://org/model", OPTIONS)) as source:
        with pytest.raises(SourceChanged, match="listed at no commit"):
            await read(source, SourceFile("model.safetensors", len(WEIGHTS), '"etag"'), 0, 10)


@pytest.mark.parametrize(
    "text",
    [
        "hf://", "hf://org", "hf://org/model/more", "hf://org/model@", "hf://org/../x", "hf://../model",
        "hf://org/mo del",
        "hf://org/model@../x", "hf://org/model@a..b", "hf://u:pw@org/model", "hf:///org/model", "hf://org/model?x=1",
        "hf://org/--model", "hf://org/m\u043edel", "hf://org/model\n", "hf://" + "o" * 200 + "/model", "hf://-org/model",
    ],
    ids=ascii,
)  # fmt: skip
def test_what_is_no_name_of_a_model_is_refused(text: str) -> None:
    with pytest.raises(SourceInvalid, match="hf://OWNER/NAME") as refused:
        HubSource(text, OPTIONS)
    assert "pw" not in str(refused.value)


async def test_equal_models_have_equal_urls() -> None:
    for text in ("hf://org/model", "hf:org/model", "hf://org/model@main"):
        async with opened(HubSource(text, OPTIONS)) as source:
            assert source.url == "hf://org/model"
    async with opened(HubSource("hf://org/model@v1", OPTIONS)) as source:
        assert source.url == "hf://org/model@v1"


def test_the_library_is_not_imported_before_it_is_needed() -> None:
    program = "import sys, sllm_actor.sources.open; print('huggingface_hub' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
