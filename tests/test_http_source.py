"""The HTTP source against a real nginx and against origins that answer as they like: listing and reading."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import uvloop
from checkpoints import folder_of, noise
from fault_proxy import FaultProxy
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_server import RawServer, Request
from sources import FILES, OPTIONS, WEIGHTS, model_file, only, opened, origin, read
from web_server import PASSWORD, USER, WebServer

from sllm_actor.checkpoint.convert import convert
from sllm_actor.checkpoint.manifest import belongs as may_be_in_manifest
from sllm_actor.errors import SourceChanged, SourceInvalid, SourceMissing, SourceRefused, SourceViolation
from sllm_actor.sources.http import HttpSource
from sllm_actor.sources.source import MAX_SIZE_BYTES, SourceFile, belongs
from sllm_actor.units import MIB


def names_of(files: tuple[SourceFile, ...]) -> list[str]:
    return [file.name for file in files]


async def listed(answer_files: dict[str, bytes]) -> tuple[SourceFile, ...]:
    with RawServer(origin(answer_files)) as server:
        async with opened(HttpSource(f"{server.url}/m", OPTIONS)) as source:
            return await source.files()


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_checkpoint_comes_whole_from_nginx_in_ranges_at_once(web: WebServer, loop: object) -> None:
    folder = web.folder / "sharded"
    if not folder.exists():
        folder_of(folder, 5 * MIB, 3 * MIB)
        (folder / "tokenizer.json").write_text("{}")
        (folder / "README.md").write_text("not of it")

    async def pull() -> None:
        async with opened(HttpSource(web.url("sharded").rstrip("/"), OPTIONS)) as source:
            files = await source.files()
            assert names_of(files) == sorted({*(path.name for path in folder.iterdir())} - {"README.md"})
            assert source.parallel == OPTIONS.parallel_reads == 8
            for file in files:
                there = (folder / file.name).read_bytes()
                assert file.size_bytes == len(there)
                assert file.validator.startswith('"')
                ranges = [(begin, min(MIB, len(there) - begin)) for begin in range(0, len(there), MIB)]
                parts = await asyncio.gather(*(read(source, file, *part) for part in ranges))
                assert b"".join(parts) == there

    with asyncio.Runner(loop_factory=loop) as runner:  # type: ignore[arg-type]
        runner.run(pull())


async def test_an_origin_without_ranges_is_read_from_front_to_back(web: WebServer) -> None:
    folder = folder_of(web.folder / "in-order", 2 * MIB)
    there = (folder / "model.safetensors").read_bytes()
    with FaultProxy(web.port) as proxy:
        async with opened(HttpSource(f"{proxy.url}/whole/in-order/", OPTIONS)) as source:
            files = {file.name: file for file in await source.files()}
            weights, before = files["model.safetensors"], len(proxy.asked)
            assert await read(source, weights, 0, 1000) == there[:1000]
            assert source.parallel == 1
            assert await read(source, weights, 1000, 50_000) == there[1000:51_000]
            assert await read(source, weights, 90_000, 10) == there[90_000:90_010]
            # A request to learn that there are no ranges, and one for all three reads.
            assert len(proxy.asked) == before + 2
            assert await read(source, weights, 10, 10) == there[10:20]
            assert await read(source, files["config.json"]) == (folder / "config.json").read_bytes()
            assert await read(source, weights, 20) == there[20:]
            assert len(proxy.asked) == before + 4
            parts = [read(source, weights, begin, 70_000) for begin in range(0, 700_000, 70_000)]
            assert b"".join(await asyncio.gather(*parts)) == there[:700_000]


async def test_files_that_are_read_in_turns_from_front_to_back_are_not_mixed_up() -> None:
    """Not even where they have one validator: some origins give the same to all that was put there at once."""
    contents = {"model-1.safetensors": noise(100_000, 3), "model-2.safetensors": noise(100_000, 4)}

    def without_ranges(request: Request) -> None:
        request.reply(200, {"ETag": '"one"'}, contents[request.path.removeprefix("/m/")])

    with RawServer(without_ranges) as server:
        async with opened(HttpSource(f"{server.url}/m/", OPTIONS)) as source:
            for begin in (0, 10, 70_000):
                for name, content in contents.items():
                    assert (
                        await read(source, SourceFile(name, 100_000, '"one"'), begin, 10) == content[begin : begin + 10]
                    )


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(WEIGHTS)), st.integers(0, 5000)), max_size=8))
def test_whatever_is_read_in_whatever_order_is_what_is_there(ranges: list[tuple[int, int]]) -> None:
    def without_ranges(request: Request) -> None:
        request.reply(200, {"ETag": '"one"'}, WEIGHTS)

    async def check() -> None:
        with RawServer(only("model.safetensors", without_ranges)) as server:
            async with opened(HttpSource(f"{server.url}/m/", OPTIONS)) as source:
                for begin, size in ranges:
                    end = min(begin + size, len(WEIGHTS))
                    assert await read(source, model_file(), begin, end - begin) == WEIGHTS[begin:end]

    asyncio.run(check())


async def test_a_file_that_is_replaced_on_nginx_is_told_from_the_one_that_was_listed(web: WebServer) -> None:
    folder = folder_of(web.folder / "replaced", MIB)
    for under in ("ranges", "whole"):
        async with opened(HttpSource(web.url("replaced", under), OPTIONS)) as source:
            weights = next(file for file in await source.files() if file.name == "model.safetensors")
            await read(source, weights, 0, 100)
            (folder / "model.safetensors").write_bytes(noise(weights.size_bytes + 1, 7))
            with pytest.raises(SourceChanged, match=r"model\.safetensors"):
                await read(source, weights, weights.size_bytes // 2, 100) if under == "ranges" else await read(
                    source, weights, 0, 100
                )


async def test_a_converted_checkpoint_is_listed_as_its_manifest_has_it(web: WebServer, tmp_path: Path) -> None:
    convert(folder_of(tmp_path / "stock", MIB), web.folder / "converted")
    (web.folder / "converted" / "generation_config.json").write_text("{}")
    async with opened(HttpSource(web.url("converted"), OPTIONS)) as source:
        files = {file.name: file for file in await source.files()}
        assert sorted(files) == ["config.json", "model.safetensors", "sllm.json"]
        there = (web.folder / "converted" / "sllm.json").read_bytes()
        assert await read(source, files["sllm.json"]) == there
    (web.folder / "converted" / "model.safetensors").write_bytes(b"short")
    async with opened(HttpSource(web.url("converted"), OPTIONS)) as source:
        with pytest.raises(SourceInvalid, match=r"has 5 bytes, and sllm\.json lists it with"):
            await source.files()


async def test_a_password_comes_from_netrc_and_its_lack_is_said(
    web: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_of(web.folder / "secret", MIB)
    netrc = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(netrc))

    async def listing() -> tuple[SourceFile, ...]:
        async with opened(HttpSource(web.url("secret", "locked"), OPTIONS)) as source:
            return await source.files()

    with pytest.raises(SourceRefused, match=r"wants credentials .*401.*netrc"):
        await listing()
    netrc.write_text(f'machine 127.0.0.1 login {USER} password "{PASSWORD}"')
    assert "model.safetensors" in names_of(await listing())
    netrc.write_text(f"machine 127.0.0.1 login {USER} password wrong-one")
    with pytest.raises(SourceRefused, match="refuses the credentials") as refused:
        await listing()
    assert "wrong-one" not in str(refused.value)
    netrc.write_text("machine 127.0.0.1 login gibberish-secret oops")
    with pytest.raises(SourceRefused, match="can't be used, line 1") as refused:
        await listing()
    assert "gibberish" not in str(refused.value)


async def test_what_is_no_checkpoint_is_said_by_name() -> None:
    with pytest.raises(SourceMissing, match=r"has none of sllm\.json"):
        await listed({})
    with pytest.raises(SourceInvalid, match=r"weights and no config\.json"):
        await listed({"model.safetensors": b"x"})
    with pytest.raises(SourceInvalid, match=r"a config\.json and none of"):
        await listed({"config.json": b"{}"})
    with pytest.raises(SourceInvalid, match=r"pytorch_model\.bin.*sllm-node convert"):
        await listed({"config.json": b"{}", "pytorch_model.bin": b"x"})
    with pytest.raises(SourceInvalid, match=r"lists no config\.json"):
        entry = {"name": "model.safetensors", "size_bytes": 1}
        await listed({"sllm.json": json.dumps({"files": [entry], "others": []}).encode(), "model.safetensors": b"x"})
    with pytest.raises(SourceMissing, match=r"model-2\.safetensors is not there"):
        index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
        await listed({
            "config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode(),
            "model-1.safetensors": b"x",
        })  # fmt: skip


BAD_NAMES = [
    "../x.safetensors",
    "a/../x.safetensors",
    "..safetensors",
    "x..safetensors",
    "/etc/x.safetensors",
    "a\\b.safetensors",
    "sub/x.safetensors",
    "a\nb.safetensors",
    "a\0.safetensors",
    "\x7f.safetensors",
    "x" * 300 + ".safetensors",
    "m\u043edel.safetensors",
    "model.safetensor\uff53",
    "model\u2024safetensors",
    "\u202emodel.safetensors",
    ".safetensors",
    "",
    "model.safetensors ",
    "model.bin",
    "modeling.py",
    "tokenizer.py",
    "http://elsewhere/x.safetensors",
    "x.safetensors?y",
    "%2e%2e.safetensors",
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
async def test_a_name_outside_the_alphabet_is_refused_in_every_listing(name: str) -> None:
    assert not belongs(name)
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": name}}).encode()
    good = {"name": "model.safetensors", "size_bytes": len(WEIGHTS)}
    bad = {"name": name, "size_bytes": 1}
    for field in ("files", "others"):
        manifest = {"files": [good], "others": [{"name": "config.json", "size_bytes": 2}]}
        manifest[field] = [*manifest[field], bad]
        with pytest.raises(SourceInvalid, match=r"sllm\.json lists .*can't be part of a checkpoint"):
            await listed({**FILES, "sllm.json": json.dumps(manifest).encode()})
    with pytest.raises(SourceInvalid, match=r"index\.json lists .*can't be part of a checkpoint"):
        await listed({**FILES, "model.safetensors.index.json": index})


@settings(max_examples=300, deadline=None)
@given(st.one_of(
    st.text(max_size=300),
    st.from_regex(r"(?:vocab|merges|tokenizer|chat_template)\.[a-z]{1,8}", fullmatch=True),
    st.from_regex(r"[a-z.]{1,12}\.(?:model|tiktoken|json)", fullmatch=True),
))  # fmt: skip
def test_whatever_a_manifest_may_list_a_source_may_give(name: str) -> None:
    if may_be_in_manifest(name) and ".." not in name:
        assert belongs(name)
    if belongs(name):
        assert name.isascii() and "/" not in name and ".." not in name and not name.startswith(".")


@pytest.mark.parametrize(
    "raw", [b"", b"<html>", b"[1]", b"{}", b'{"files": [], "others": []}', b"[" * 100_000, b"\xff\xfe", b'{"files": 7}']
)
async def test_a_manifest_or_an_index_that_is_none_is_refused(raw: bytes) -> None:
    for name in ("sllm.json", "model.safetensors.index.json"):
        with pytest.raises(SourceInvalid, match=name):
            await listed({**FILES, name: raw})


async def test_listings_have_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"name": "model.safetensors", "size_bytes": MAX_SIZE_BYTES + 1}
    with pytest.raises(SourceInvalid, match=r"lists model\.safetensors with"):
        await listed({**FILES, "sllm.json": json.dumps({"files": [entry], "others": []}).encode()})
    with pytest.raises(SourceInvalid, match="twice"):
        twice = [{"name": "model.safetensors", "size_bytes": 1}] * 2
        await listed({**FILES, "sllm.json": json.dumps({"files": twice, "others": []}).encode()})
    with pytest.raises(SourceInvalid, match="13000 files, and 12000"):
        shards = {str(k): f"model-{k}.safetensors" for k in range(13_000)}
        await listed({**FILES, "model.safetensors.index.json": json.dumps({"weight_map": shards}).encode()})
    monkeypatch.setattr("sllm_actor.sources.http.MAX_MANIFEST_BYTES", 1000)
    for told in (5000, None):

        def long(request: Request, told: int | None = told) -> None:
            request.reply(200, {"Content-Length": told}, b" " * 5000)

        with RawServer(only("sllm.json", long)) as server:
            async with opened(HttpSource(f"{server.url}/m/", OPTIONS)) as source:
                with pytest.raises(SourceInvalid, match=r"sllm\.json is longer than 1000 bytes"):
                    await source.files()
    huge = {"Content-Length": MAX_SIZE_BYTES + 1}
    with RawServer(only("model.safetensors", lambda request: request.reply(200, huge), method="HEAD")) as server:
        async with opened(HttpSource(f"{server.url}/m/", OPTIONS)) as source:
            with pytest.raises(SourceInvalid, match="more than a file may have"):
                await source.files()


@pytest.mark.parametrize("status", [400, 403, 405, 501])
async def test_where_head_is_refused_a_range_of_one_byte_tells_the_size(status: int) -> None:
    files = {**FILES, "generation_config.json": b""}

    def answer(request: Request) -> None:
        if request.method == "HEAD":
            request.reply(status)
        elif request.path == "/m/generation_config.json":
            request.reply(416, {"Content-Range": "bytes */0"})
        else:
            origin(files)(request)

    with RawServer(answer) as server:
        async with opened(HttpSource(f"{server.url}/m/", OPTIONS)) as source:
            found = {file.name: file.size_bytes for file in await source.files()}
            assert found == {name: len(content) for name, content in files.items()}
            assert source.parallel == 8
            assert await read(source, SourceFile("generation_config.json", 0)) == b""


async def test_an_object_store_says_forbidden_for_what_is_not_there() -> None:
    with RawServer(origin(otherwise=lambda request: request.reply(403))) as server:
        async with opened(HttpSource(f"{server.url}/m/", OPTIONS)) as source:
            assert names_of(await source.files()) == sorted(FILES)
    with RawServer(lambda request: request.reply(403)) as server:
        async with opened(HttpSource(f"{server.url}/m/", OPTIONS)) as source:
            with pytest.raises(SourceRefused, match=r"config\.json wants credentials"):
                await source.files()


@pytest.mark.parametrize(
    ("headers", "validator"),
    [
        ({"ETag": '"strong"'}, '"strong"'),
        ({"ETag": 'W/"weak"'}, ""),
        ({"ETag": 'W/"weak"', "Last-Modified": "Sat, 01 Jan 2028 00:00:00 GMT"}, "Sat, 01 Jan 2028 00:00:00 GMT/2"),
        ({"ETag": "bare"}, ""),
        ({"ETag": '"' + "x" * 300 + '"'}, ""),
        ({}, ""),
    ],
)
async def test_a_version_is_told_by_what_can_tell_it(headers: dict[str, str], validator: str) -> None:
    def answer(request: Request) -> None:
        content = FILES.get(request.path.removeprefix("/m/"))
        request.reply(404) if content is None else request.reply_file(content, headers)

    with RawServer(answer) as server:
        async with opened(HttpSource(f"{server.url}/m/", OPTIONS)) as source:
            files = {file.name: file for file in await source.files()}
            assert files["config.json"].validator == validator
            await read(source, files["model.safetensors"], 5, 10)
            sent = server.asked[-1].headers
            assert sent["range"] == "bytes=5-14"
            assert sent.get("if-range", "") == (validator if validator.startswith('"') else "")
            assert sent["accept-encoding"] == "identity"


async def test_a_size_that_nobody_tells_and_an_encoded_answer_are_violations() -> None:
    def no_length(request: Request) -> None:
        request.reply(200, {"Content-Length": None}, b"{}")

    def encoded(request: Request) -> None:
        request.reply_file(WEIGHTS, {"Content-Encoding": "gzip"})

    with RawServer(no_length) as server:
        async with opened(HttpSource(f"{server.url}/m/", OPTIONS)) as source:
            with pytest.raises(SourceViolation, match="does not tell how long"):
                await source.files()
    with RawServer(only("model.safetensors", encoded)) as server:
        async with opened(HttpSource(f"{server.url}/m/", OPTIONS)) as source:
            with pytest.raises(SourceViolation, match="is sent encoded"):
                await read(source, model_file(), 0, 10)


SECRET = "hunter2-of-mine"


@pytest.mark.parametrize(
    "text",
    [
        f"http://user:{SECRET}@host/x",
        f"http://{SECRET}@host/",
        f"http://user:{SECRET}@host:99999/",
        f"http://host/m?token={SECRET}",
        f"http://host/m#{SECRET}",
        f"http://host/m/../{SECRET}",
        f"http://host/%2e%2e/{SECRET}",
        f"http://host:{SECRET}/",
        f"http://host\\@{SECRET}/",
        "http://",
        "http:///x",
        "http://host:0/",
        "http://host:99999/",
        "http://ho st/",
        "http://host/\n",
        "http://h\u043est/",
        "http://-host/",
        "http://[::1/",
        "http://" + "a" * 64 + "/",
        "http://" + "a." * 130 + "b/",
        "http://host/" + "x" * 5000,
        "ftp://host/",
    ],
)
def test_a_url_that_is_no_folder_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(SourceInvalid) as refused:
        HttpSource(text, OPTIONS)
    assert SECRET not in str(refused.value)
    assert refused.value.param == "source"


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://Host/m", "http://host/m/"),
        ("HTTP://host:80/m/", "http://host/m/"),
        ("https://host:443", "https://host/"),
        ("https://host:8443/a%20b", "https://host:8443/a%20b/"),
        ("http://[::1]:81/x", "http://[::1]:81/x/"),
    ],
)
async def test_equal_places_have_equal_urls(text: str, url: str) -> None:
    async with opened(HttpSource(text, OPTIONS)) as source:
        assert source.url == url
