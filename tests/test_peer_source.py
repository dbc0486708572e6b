"""A model that another node holds, as a source: two systems over real sockets, and processes that are killed."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from checkpoints import folder_of, noise
from reading import WEIGHTS, refused, weights_of, whole
from remote_pairs import FOR_EVER_S, QUICK, SECRET, nothing_left, outcome, until

from sllm_actor.actors import PeerServer
from sllm_actor.errors import (
    FrameInvalid,
    Overloaded,
    SllmError,
    SourceChanged,
    SourceInvalid,
    SourceMissing,
    SourceRefused,
    SourceUnreachable,
    SourceViolation,
)
from sllm_actor.runtime import Actor, ActorRef, ActorSystem, Blob, NodeAddress, Security, handles
from sllm_actor.sources.holdings import FolderHoldings, Held, HeldFolder
from sllm_actor.sources.peer import PEER_ACTOR, PIECE_BYTES, PeerSource, parse_peer_url
from sllm_actor.sources.peer_messages import (
    MAX_RANGE_BYTES,
    PEER_MESSAGES,
    ListPeerFiles,
    PeerFile,
    PeerModel,
    PeerRange,
    ReadPeerRange,
)
from sllm_actor.sources.source import MAX_FILES, SourceFile, SourceOptions

PATIENT = SourceOptions(connect_timeout_s=FOR_EVER_S, stall_timeout_s=FOR_EVER_S)
HASTY = SourceOptions(connect_timeout_s=0.05, stall_timeout_s=0.05)
SECURED = Security(secret=SECRET)
SCRIPT = Path(__file__).with_name("peer_source_process.py")


class Gated(HeldFolder):
    """Reads once the gate is open, and counts."""

    def __init__(self, path: Path, holdings: GatedHoldings) -> None:
        super().__init__(path, lambda _: "1d")
        self._holdings = holdings

    async def read(self, file: SourceFile, offset: int, into: memoryview) -> None:
        self._holdings.reading += 1
        try:
            await self._holdings.gate.wait()
            await super().read(file, offset, into)
        finally:
            self._holdings.reading -= 1


class GatedHoldings(FolderHoldings):
    """A folder whose reads a test holds up; counts what is held, too."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.gate, self.reading, self.held = folder, asyncio.Event(), 0, 0

    @asynccontextmanager
    async def hold(self, model: str) -> AsyncIterator[Held]:
        self.held += 1
        try:
            yield Gated(self.folder, self)
        finally:
            self.held -= 1


@asynccontextmanager
async def node(name: str, security: Security | None = None) -> AsyncIterator[ActorSystem]:
    """Run a system that listens and knows the conversation of peers."""
    system = ActorSystem(node_id=name, messages=PEER_MESSAGES, limits=QUICK, security=security)
    try:
        await system.listen("tcp://127.0.0.1:0")
        yield system
    finally:
        await system.close()


@asynccontextmanager
async def two(holder: Actor, options: SourceOptions = PATIENT) -> AsyncIterator[tuple[PeerSource, ActorRef]]:
    """Run `holder` on one node; give a source on another, and the reference that it asks. Nothing may be left."""
    async with nothing_left(), node("holder") as b, node("wanting") as a:
        await b.spawn(holder, PEER_ACTOR)
        source = PeerSource(a, b.address, "org/model", options)
        try:
            yield source, a.ref(PEER_ACTOR, at=b.address)
        finally:
            await source.close()


def folders(**known: Path) -> PeerServer:
    """Serve folders, by name."""

    async def find(name: str) -> Path | None:
        return known.get(name.rpartition("/")[2])

    return PeerServer(FolderHoldings(find, lambda path: f"id of {path.name}"), max_reads=16)


def reading(file: SourceFile, **changes: Any) -> ReadPeerRange:
    fields: dict[str, Any] = {
        "model": "org/model", "name": file.name, "size_bytes": file.size_bytes, "validator": file.validator,
        "offset": 0, "length": file.size_bytes,
    }  # fmt: skip
    return ReadPeerRange(**(fields | changes))


async def test_what_a_peer_lists_is_read_byte_by_byte_as_it_has_it(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", 1000, 2 * PIECE_BYTES + 17)
    async with two(folders(model=folder)) as (source, _):
        files = await source.files()
        assert source.model_id == "id of model"
        assert [file.name for file in files] == sorted(path.name for path in folder.iterdir())
        contents = await asyncio.gather(*(whole(source, file) for file in files))
        assert contents == [(folder / file.name).read_bytes() for file in files]
        into = bytearray(1000)
        await source.read(files[1], 77, memoryview(into)[10:900])
        expected = (folder / files[1].name).read_bytes()[77:967]
        assert bytes(into) == bytes(10) + expected + bytes(100)


async def test_a_model_of_this_very_node_is_read_without_a_connection(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", 1000)
    async with nothing_left(), node("alone") as alone:
        await alone.spawn(folders(model=folder), PEER_ACTOR)
        source = PeerSource.from_url(alone, f"sllm://alone@{alone.address.endpoint[6:]}/model", PATIENT)
        assert await whole(source, await weights_of(source)) == (folder / WEIGHTS).read_bytes()


async def test_a_url_names_the_node_and_the_model(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", 1000)
    async with two(folders(model=folder)) as (source, ref):
        assert source.url == f"sllm://holder@{ref.address.endpoint[6:]}/org/model"
        assert parse_peer_url(source.url) == (ref.address._replace(uid=0), "org/model")


@pytest.mark.parametrize(
    "url",
    ["sllm://n@h:1/m", "SLLM://node-1@10.0.0.7:8401/org/m", "sllm://n@[::1]:8401/m"],
)
def test_urls_of_peers_are_read(url: str) -> None:
    address, model = parse_peer_url(url)
    assert address == NodeAddress.parse(url.split("://")[1].partition("/")[0].replace("@", "@tcp://"))
    assert model == url.split("/", 3)[3]


@pytest.mark.parametrize(
    "url",
    [
        "", "sllm://", "sllm://h:1/m", "sllm://n@h/m", "sllm://n@h:1/", "sllm://n@h:1", "sllm://n@h:99999/m",
        "sllm://n@h:1/../m", "sllm://n@h:1/a/b/c", "sllm://../@h:1/m", "http://n@h:1/m", "sllm://n:secret@h:1/m",
        "sllm://n@h:1/m?x", "sllm://n@h:1/\u043c", "sllm://n@h:1/m\n", "sllm://n@" + "h" * 300 + ":1/m", "sllm://n@h:x/m",
    ],
)  # fmt: skip
def test_urls_that_name_no_peer_are_refused(url: str) -> None:
    with pytest.raises(SourceInvalid) as caught:
        parse_peer_url(url)
    assert caught.value.param == "source" and "secret" not in caught.value.message


# Refusals.


async def test_an_unknown_model_and_an_unknown_file_are_missing(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", 500)
    async with two(folders(other=folder)) as (source, _):
        error = await refused(SourceMissing, source.files())
        assert "org/model" in error.message
    async with two(folders(model=folder)) as (source, _):
        await refused(SourceMissing, whole(source, SourceFile("other.safetensors", 5, "5-1-1")))


async def test_a_file_beside_the_checkpoint_is_not_given_to_who_knows_its_name(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", 500)
    (folder / "secret.txt").write_bytes(b"secret")
    found = (folder / "secret.txt").stat()
    known = SourceFile("secret.txt", 6, f"6-{found.st_mtime_ns}-{found.st_ino}")
    async with two(folders(model=folder)) as (source, _):
        await refused(SourceMissing, whole(source, known))
        for name in ("../secret.txt", "/etc/passwd", "..", "a\0b"):
            await refused(SourceMissing, whole(source, SourceFile(name, 6, known.validator)))


async def test_a_file_that_the_peer_has_changed_is_noticed(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", 500)
    async with two(folders(model=folder)) as (source, _):
        file = await weights_of(source)
        (folder / WEIGHTS).write_bytes(noise(501, 3))
        await refused(SourceChanged, whole(source, file))
        (folder / WEIGHTS).unlink()
        await refused(SourceMissing, whole(source, file))
        assert await whole(source, next(iter(await source.files()))) == (folder / "config.json").read_bytes()


async def test_ranges_that_are_too_long_or_go_beyond_the_file_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", 500)
    async with two(folders(model=folder)) as (source, ref):
        file = await weights_of(source)
        large = 2 * MAX_RANGE_BYTES
        for changes, kind in (
            ({"size_bytes": large, "length": MAX_RANGE_BYTES + 1}, SourceInvalid),
            ({"offset": 1}, SourceInvalid),
            ({"offset": 500, "length": 1}, SourceInvalid),
            ({"size_bytes": large, "length": 501}, SourceChanged),
            ({"offset": -1}, FrameInvalid),
            ({"length": -1}, FrameInvalid),
            ({"length": 2**62}, FrameInvalid),
            ({"validator": "x" * 257}, FrameInvalid),
            ({"model": ""}, FrameInvalid),
        ):
            error = await outcome(ref.ask(reading(file, **changes), timeout_s=FOR_EVER_S))
            assert type(error) is kind, (changes, error)
        answer = await ref.ask(reading(file, offset=500, length=0), timeout_s=FOR_EVER_S)
        assert len(answer.data) == 0


@pytest.mark.parametrize("theirs", [Security(secret=b"another secret of 32 random byte"), None])
async def test_who_does_not_know_the_secret_is_refused(tmp_path: Path, theirs: Security | None) -> None:
    folder = folder_of(tmp_path / "model", 500)
    async with nothing_left(), node("holder", SECURED) as b, node("wanting", theirs) as a:
        await b.spawn(folders(model=folder), PEER_ACTOR)
        source = PeerSource(a, b.address, "model", PATIENT)
        await refused(SourceRefused, source.files())
        await refused(SourceRefused, whole(source, SourceFile(WEIGHTS, 500, "x")))
        await source.close()


async def test_who_knows_the_secret_reads(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", 500)
    async with nothing_left(), node("holder", SECURED) as b, node("wanting", SECURED) as a:
        await b.spawn(folders(model=folder), PEER_ACTOR)
        source = PeerSource(a, b.address, "model", PATIENT)
        assert await whole(source, await weights_of(source)) == (folder / WEIGHTS).read_bytes()
        await source.close()


async def test_another_node_at_the_address_is_refused(tmp_path: Path) -> None:
    async with nothing_left(), node("holder") as b, node("wanting") as a:
        source = PeerSource(a, b.address._replace(node="somebody-else", uid=0), "model", PATIENT)
        await refused(SourceRefused, source.files())
        await source.close()


async def test_a_node_that_gives_nothing_to_others_can_not_be_read_from() -> None:
    async with nothing_left(), node("holder"), node("bare") as b, node("wanting") as a:
        source = PeerSource(a, b.address, "model", PATIENT)
        await refused(SourceUnreachable, source.files())
        await source.close()


# Bounds and ends.


async def test_reads_beyond_the_bound_are_refused_and_run_none(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", 500)
    holdings = GatedHoldings(folder)
    async with two(PeerServer(holdings, max_reads=4)) as (source, ref):
        file = await weights_of(source)
        asks = [asyncio.ensure_future(outcome(ref.ask(reading(file), timeout_s=FOR_EVER_S))) for _ in range(10)]
        await until(lambda: sum(ask.done() for ask in asks) == 6, "six are refused")
        assert holdings.reading == holdings.held == 4
        error = await refused(SourceUnreachable, whole(source, file))
        assert error.retry_after_s == 0.1
        await refused(SourceUnreachable, source.files())
        holdings.gate.set()
        answers = await asyncio.gather(*asks)
        assert [type(answer) for answer in answers].count(Overloaded) == 6
        assert [answer.data.data for answer in answers if isinstance(answer, PeerRange)] == [
            (folder / WEIGHTS).read_bytes()
        ] * 4
        assert holdings.reading == holdings.held == 0
        assert await whole(source, file) == (folder / WEIGHTS).read_bytes()


async def test_a_reader_that_leaves_gives_its_place_and_its_hold_back(tmp_path: Path) -> None:
    holdings = GatedHoldings(folder_of(tmp_path / "model", 500))
    async with two(PeerServer(holdings, max_reads=1)) as (source, _):
        file = await weights_of(source)
        left = asyncio.ensure_future(whole(source, file))
        await until(lambda: holdings.reading == 1, "the read is under way")
        left.cancel()
        with pytest.raises(asyncio.CancelledError):
            await left
        await until(lambda: holdings.held == 0, "the hold has ended")
        holdings.gate.set()
        assert len(await whole(source, file)) == 500


async def test_closing_ends_what_is_being_read(tmp_path: Path) -> None:
    holdings = GatedHoldings(folder_of(tmp_path / "model", 500))
    async with two(PeerServer(holdings, max_reads=4)) as (source, _):
        file = await weights_of(source)
        reads = [asyncio.ensure_future(whole(source, file)) for _ in range(3)]
        await until(lambda: holdings.reading == 3, "the reads are under way")
        await source.close()
        for read in reads:
            await refused(SourceUnreachable, read)
        await until(lambda: holdings.held == 0, "the holds have ended")


async def test_a_peer_that_does_not_answer_is_given_up_on(tmp_path: Path) -> None:
    holdings = GatedHoldings(folder_of(tmp_path / "model", 500))
    async with two(PeerServer(holdings, max_reads=4), HASTY) as (source, _):
        file = await weights_of(source)
        await refused(SourceUnreachable, whole(source, file))
        await until(lambda: holdings.held == 0, "the hold has ended")


@asynccontextmanager
async def holding_process(folder: Path, held: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, NodeAddress]]:
    """Run a node in a process of its own, which never answers for the file `held`."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(SCRIPT), "holder", str(folder), held, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        yield process, NodeAddress.parse((await process.stdout.readline()).decode().strip())
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        process._transport.close()  # type: ignore[attr-defined]


async def test_a_peer_that_is_killed_in_the_middle_is_unreachable_at_once(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", 500)
    async with nothing_left(), node("wanting") as a, holding_process(folder, WEIGHTS) as (process, address):
        source = PeerSource(a, address, "model", PATIENT)
        file = await weights_of(source)
        assert await whole(source, next(iter(await source.files()))) == (folder / "config.json").read_bytes()
        read = asyncio.ensure_future(whole(source, file))
        assert process.stdout is not None
        assert await process.stdout.readline() == b"reading\n"
        process.kill()
        # Its patience is an hour: it is the lost connection that ends it.
        await asyncio.wait_for(refused(SourceUnreachable, read), 60)
        await asyncio.wait_for(refused(SourceUnreachable, source.files()), 60)
        await source.close()


# Peers that lie.


class Liar(Actor):
    """Answers whatever a test gives it."""

    def __init__(self, listed: tuple[Any, ...], answer: Callable[[ReadPeerRange], Any]) -> None:
        self._listed = listed
        self._answer = answer

    @handles(ListPeerFiles)
    async def list_files(self, _: ListPeerFiles) -> AsyncGenerator[Any, None]:
        for item in self._listed:
            yield item

    @handles(ReadPeerRange)
    async def read_range(self, message: ReadPeerRange) -> Any:
        return self._answer(message)


def listed(name: str = WEIGHTS, size_bytes: int = 500) -> PeerFile:
    return PeerFile(name=name, size_bytes=size_bytes, validator="v")


def model(files: int) -> PeerModel:
    return PeerModel(model_id="", files=files)


@pytest.mark.parametrize(
    ("items", "kind"),
    [
        ((), SourceViolation),
        ((model(0),), SourceMissing),
        ((listed(),), SourceViolation),
        ((model(2), listed()), SourceViolation),
        ((model(1), listed(), listed("config.json")), SourceViolation),
        ((model(2), listed(), listed()), SourceViolation),
        ((model(1), model(1)), SourceViolation),
        ((model(1), "text"), SourceViolation),
        ((model(1), listed("code.py")), SourceInvalid),
        ((model(1), listed("../up.safetensors")), SourceInvalid),
        ((model(1), listed("m\u043edel.safetensors")), SourceInvalid),
        ((model(1), listed("x" * 300 + ".safetensors")), SourceViolation),
        ((model(1), listed(size_bytes=-1)), SourceViolation),
        ((model(1), listed(size_bytes=2**62)), SourceViolation),
        ((model(MAX_FILES + 1),), SourceViolation),
    ],
)
async def test_a_listing_that_can_not_be_is_refused(items: tuple[Any, ...], kind: type[SllmError]) -> None:
    async with two(Liar(items, lambda _: None)) as (source, _):
        error = await refused(kind, source.files())
        assert source.url in error.message


async def test_a_read_that_fails_later_tells_how_much_has_come() -> None:
    def answer(asked: Any) -> PeerRange:
        return PeerRange(data=Blob(b"a" * (asked.length if asked.offset < 2 * PIECE_BYTES else 1)))

    async with two(Liar((), answer)) as (source, _):
        into, file = bytearray(4 * PIECE_BYTES), SourceFile(WEIGHTS, 4 * PIECE_BYTES, "v")
        error = await refused(SourceViolation, source.read(file, 0, memoryview(into)))
        assert isinstance(error, SourceViolation)
        assert error.came_bytes == into.count(b"a") == 2 * PIECE_BYTES


@pytest.mark.parametrize(
    "answer",
    [
        lambda asked: PeerRange(data=Blob(bytes(asked.length - 1))),
        lambda asked: PeerRange(data=Blob(bytes(asked.length + 1))),
        lambda asked: None,
        lambda asked: listed(),
    ],
)
async def test_a_range_that_was_not_asked_for_is_refused_and_not_written(answer: Callable[[Any], Any]) -> None:
    async with two(Liar((), answer)) as (source, _):
        into = bytearray(500)
        await refused(SourceViolation, source.read(SourceFile(WEIGHTS, 500, "v"), 0, memoryview(into)))
        assert into == bytes(500)
