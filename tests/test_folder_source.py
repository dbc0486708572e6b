"""A folder as a source: what it lists, what it gives, and what it does when somebody changes it meanwhile."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from checkpoints import folder_of, noise
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reading import WEIGHTS, refused, weights_of, whole
from remote_pairs import MIB, nothing_left

from sllm_actor.errors import (
    ReadFailed,
    SllmError,
    SourceChanged,
    SourceInvalid,
    SourceMissing,
    SourceRefused,
    SourceUnreachable,
)
from sllm_actor.sources.local import STEP_BYTES, FolderSource
from sllm_actor.sources.source import MAX_FILES, SourceFile


async def test_what_is_listed_is_what_is_read(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a model", 1000, STEP_BYTES * 2 + 17)
    async with nothing_left():
        source = FolderSource(folder)
        files = await source.files()
        assert source.url == (tmp_path / "a model").as_uri()
        assert [file.name for file in files] == sorted(path.name for path in folder.iterdir())
        for file in files:
            assert await whole(source, file) == (folder / file.name).read_bytes()
        assert await source.files() == files
        await source.close()


async def test_one_file_is_found_as_it_is_listed_and_nothing_else_is(tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"secret")
    folder = folder_of(tmp_path / "model", 1000, 2000)
    (folder / "tokenizer.json").mkdir()
    (folder / "merges.txt").symlink_to("../outside")
    (folder / "notes.md").write_text("of nobody's business")
    source = FolderSource(folder)
    assert (await refused(SourceInvalid, source.find("merges.txt"))).message.count("out of the folder") == 1
    for name in ("vocab.json", "tokenizer.json", "notes.md", "../outside", ""):
        assert str(folder) in (await refused(SourceMissing, source.find(name))).message
    (folder / "merges.txt").unlink()
    assert [await source.find(file.name) for file in await source.files()] == list(await source.files())
    await source.close()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(data=st.data())
def test_any_range_is_that_of_the_file(tmp_path: Path, data: st.DataObject) -> None:
    content = noise(10_000, 1)
    (tmp_path / WEIGHTS).write_bytes(content)
    begin = data.draw(st.integers(0, 10_000))
    end = data.draw(st.integers(begin, 10_000))

    async def read() -> bytes:
        source = FolderSource(tmp_path)
        into = bytearray(end - begin)
        await source.read(await weights_of(source), begin, memoryview(into))
        return bytes(into)

    assert asyncio.run(read()) == content[begin:end]


async def test_only_files_of_a_checkpoint_are_listed(tmp_path: Path) -> None:
    for name in (
        "config.json",
        WEIGHTS,
        "modeling.py",
        "pytorch_model.bin",
        ".hidden.json",
        "a b.safetensors",
        "x.txt",
    ):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "vocab.json").mkdir()
    os.mkfifo(tmp_path / "merges.txt")
    assert [file.name for file in await FolderSource(tmp_path).files()] == ["config.json", WEIGHTS]


async def test_a_file_that_is_not_part_of_a_checkpoint_is_not_read_either(tmp_path: Path) -> None:
    for name in ("code.py", "../x.safetensors", "a/b.safetensors"):
        await refused(SourceInvalid, FolderSource(tmp_path).read(SourceFile(name, 0), 0, memoryview(bytearray())))


async def test_nothing_and_something_else_are_missing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for name in ("nowhere", "file", "empty", "file/below"):
        error = await refused(SourceMissing, FolderSource(tmp_path / name).files())
        assert name in error.message


async def test_a_link_within_the_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "one").write_bytes(b"content")
    (tmp_path / WEIGHTS).symlink_to("parts/one")
    source = FolderSource(tmp_path)
    assert await whole(source, await weights_of(source)) == b"content"


async def test_a_link_out_of_the_folder_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"secret")
    folder = folder_of(tmp_path / "model", 500)
    (folder / "tokenizer.json").symlink_to("../outside")
    error = await refused(SourceInvalid, FolderSource(folder).files())
    assert str(folder / "tokenizer.json") in error.message and "out of the folder" in error.message


@pytest.mark.parametrize("target", ["nowhere", "tokenizer.json"])
async def test_a_link_to_nothing_and_one_to_itself_are_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / "tokenizer.json").symlink_to(target)
    error = await refused(SourceInvalid, FolderSource(tmp_path).files())
    assert "leads nowhere" in error.message


def snapshot(cache: Path, model: str, content: bytes) -> Path:
    """Lay out one file as a Hugging Face cache has it: a link in a snapshot to a blob."""
    blobs, revision = cache / model / "blobs", cache / model / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    revision.mkdir(parents=True)
    (blobs / "d1ge57").write_bytes(content)
    (revision / WEIGHTS).symlink_to("../../blobs/d1ge57")
    return revision


async def test_a_snapshot_of_a_hugging_face_cache_is_read_through_its_links(tmp_path: Path) -> None:
    source = FolderSource(snapshot(tmp_path, "models--org--name", b"content"))
    assert await whole(source, await weights_of(source)) == b"content"


async def test_the_blobs_of_another_model_are_out_of_the_folder(tmp_path: Path) -> None:
    folder = snapshot(tmp_path, "models--org--name", b"content")
    snapshot(tmp_path, "models--org--other", b"theirs")
    (folder / "config.json").symlink_to("../../../models--org--other/blobs/d1ge57")
    await refused(SourceInvalid, FolderSource(folder).files())


async def test_a_link_that_was_turned_outside_after_the_list_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"content")
    folder = tmp_path / "model"
    folder.mkdir()
    os.link(tmp_path / "outside", folder / WEIGHTS)
    source = FolderSource(folder)
    file = await weights_of(source)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("../outside")
    # The same inode, size and time: only the way to it is another.
    await refused(SourceInvalid, whole(source, file))


async def test_more_files_than_a_source_may_have_are_refused(tmp_path: Path) -> None:
    for number in range(MAX_FILES + 1):
        (tmp_path / f"{number}.safetensors").touch()
    await refused(SourceInvalid, FolderSource(tmp_path).files())


# Changes.


def overwrite(path: Path) -> None:
    path.write_bytes(noise(500, 9))
    os.utime(path, ns=(1, 1))


def replace(path: Path) -> None:
    """Put another file of the same size and time in its place."""
    found = path.stat()
    path.with_suffix(".new").write_bytes(bytes(found.st_size))
    os.utime(path.with_suffix(".new"), ns=(found.st_atime_ns, found.st_mtime_ns))
    path.with_suffix(".new").rename(path)


def scribble(path: Path) -> None:
    """Write into the file, which keeps its size and its inode."""
    with path.open("r+b") as opened:
        opened.write(noise(100, 8))
    os.utime(path, ns=(1, 1))


def truncate(path: Path) -> None:
    os.truncate(path, 100)


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


CHANGES = [overwrite, scribble, replace, truncate, make_pipe]


@pytest.mark.parametrize("change", CHANGES)
async def test_a_file_that_has_changed_since_the_list_is_not_read(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    source = FolderSource(folder_of(tmp_path / "model", 500))
    file = await weights_of(source)
    async with nothing_left():
        change(tmp_path / "model" / WEIGHTS)
        error = await refused(SourceChanged, whole(source, file))
        assert WEIGHTS in error.message


@pytest.mark.parametrize("change", [scribble, truncate])
async def test_a_file_that_changes_while_it_is_read_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / WEIGHTS).write_bytes(noise(2 * STEP_BYTES, 1))
    source = FolderSource(folder)
    file = await weights_of(source)
    preadv = os.preadv
    steps: list[int] = []

    def disturbed(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if steps:
            change(folder / WEIGHTS)
        steps.append(offset)
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", disturbed)
    async with nothing_left():
        await refused(SourceChanged, whole(source, file))
    assert len(steps) == 2


async def test_a_file_that_has_gone_is_missing(tmp_path: Path) -> None:
    source = FolderSource(folder_of(tmp_path / "model", 500))
    file = await weights_of(source)
    (tmp_path / "model" / WEIGHTS).unlink()
    error = await refused(SourceMissing, whole(source, file))
    assert WEIGHTS in error.message


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EIO, ReadFailed),
        (errno.ESTALE, SourceUnreachable),
        (errno.ETIMEDOUT, SourceUnreachable),
        (errno.EACCES, SourceRefused),
    ],
)
async def test_what_the_disk_says_becomes_a_typed_error_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[SllmError]
) -> None:
    source = FolderSource(folder_of(tmp_path / "model", 500))
    file = await weights_of(source)

    def fail(*_: object) -> int:
        raise OSError(number, "from the disk")

    monkeypatch.setattr(os, "preadv", fail)
    async with nothing_left():
        error = await refused(kind, whole(source, file))
    assert WEIGHTS in error.message


# Ends.


class Gate:
    """Holds a reading thread inside the kernel's call, as a slow disk does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.open, self.calls = threading.Event(), threading.Event(), 0
        self._preadv = os.preadv
        monkeypatch.setattr(os, "preadv", self._held)

    def _held(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.calls += 1
        self.begun.set()
        self.open.wait()
        return self._preadv(fd, buffers, offset)

    async def entered(self) -> None:
        assert await asyncio.get_running_loop().run_in_executor(None, self.begun.wait, 60)


async def test_who_is_cancelled_gets_the_buffer_back_only_when_no_thread_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / WEIGHTS).write_bytes(bytes(3 * STEP_BYTES))
    source = FolderSource(tmp_path)
    file = await weights_of(source)
    gate = Gate(monkeypatch)
    async with nothing_left():
        reading = asyncio.get_running_loop().create_task(whole(source, file))
        await gate.entered()
        for _ in range(3):
            reading.cancel()
            for _ in range(20):
                await asyncio.sleep(0)
            assert not reading.done()
        gate.open.set()
        with pytest.raises(asyncio.CancelledError):
            await reading
    # The rest of the file was not read for nobody.
    assert gate.calls == 1


async def test_closing_ends_the_reads_and_waits_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / WEIGHTS).write_bytes(bytes(3 * STEP_BYTES))
    source = FolderSource(tmp_path)
    file = await weights_of(source)
    gate = Gate(monkeypatch)
    async with nothing_left():
        loop = asyncio.get_running_loop()
        reading = loop.create_task(whole(source, file))
        await gate.entered()
        closing = loop.create_task(source.close())
        for _ in range(20):
            await asyncio.sleep(0)
        assert not reading.done() and not closing.done()
        gate.open.set()
        await closing
        await refused(SourceUnreachable, reading)
    await refused(SourceUnreachable, whole(source, file))
    await refused(SourceUnreachable, source.files())
    assert gate.calls == 1 and STEP_BYTES >= MIB
