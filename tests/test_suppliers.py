"""Several sources of one checkpoint: which is asked, what happens when one fails."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from checkpoints import folder_of
from scripted_source import Fault, ScriptedSource

from sllm_actor.errors import (
    CheckpointCorrupt,
    SllmError,
    SourceChanged,
    SourceMissing,
    SourceRefused,
    SourceUnreachable,
    SourceViolation,
)
from sllm_actor.loader.suppliers import MAX_FAILURES, MAX_WRONGS, Supplier, Suppliers, list_files
from sllm_actor.runtime.clock import LoopClock
from sllm_actor.sources.source import SourceFile
from sllm_actor.testing.virtual_loop import run_virtual

SIZE = 40_000
NAME = "model.safetensors"


def half() -> float:
    return 0.5


async def suppliers_of(*sources: ScriptedSource) -> Suppliers:
    known = [Supplier(source, {file.name: file for file in await source.files()}) for source in sources]
    return Suppliers(known, LoopClock(), half)


def failing(*faults: SllmError | None) -> Fault:
    """Raise one fault a read, then none."""
    left = list(faults)

    async def fail(file: SourceFile, offset: int, into: memoryview) -> None:
        fault = left.pop(0) if left else None
        if fault is not None:
            raise fault

    return fail


def taking(duration_s: float) -> Fault:
    async def wait(file: SourceFile, offset: int, into: memoryview) -> None:
        await asyncio.sleep(duration_s)

    return wait


def read(folder: Path, *sources: ScriptedSource, times: int = 1) -> tuple[list[str], float]:
    """Read the file `times` times, one after another; give who answered each, and the virtual time it took."""

    async def work() -> tuple[list[str], float]:
        begun_s, suppliers = asyncio.get_running_loop().time(), await suppliers_of(*sources)
        expected = (folder / NAME).read_bytes()
        answered = []
        for _ in range(times):
            found = bytearray(SIZE)
            answered += [giver.source.url for giver in await suppliers.read(NAME, 0, memoryview(found))]
            assert found == expected
        return answered, asyncio.get_running_loop().time() - begun_s

    return run_virtual(work)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folder_of(tmp_path, SIZE)


@pytest.mark.parametrize("fault", [SourceUnreachable("gone"), SourceViolation("odd")])
def test_a_source_that_fails_for_a_moment_is_asked_again_later(folder: Path, fault: SllmError) -> None:
    source = ScriptedSource(folder)
    source.before = failing(fault, fault)
    answered, took_s = read(folder, source)
    assert answered == [source.url]
    assert took_s == pytest.approx(0.1 + 0.2)


def test_a_source_that_asks_for_patience_gets_it(folder: Path) -> None:
    source = ScriptedSource(folder)
    source.before = failing(SourceUnreachable("busy", retry_after_s=3.0))
    assert read(folder, source)[1] == pytest.approx(3.0)


def test_a_source_that_fails_again_and_again_is_given_up_with_what_it_said(folder: Path) -> None:
    source = ScriptedSource(folder)
    source.before = failing(*[SourceUnreachable(f"try {k}") for k in range(1, 99)])
    with pytest.raises(SourceUnreachable, match=f"try {MAX_FAILURES}$"):
        read(folder, source)


@pytest.mark.parametrize("fault", [SourceChanged("new"), SourceRefused("no"), SourceMissing("none")])
def test_a_source_that_no_longer_has_it_is_not_asked_again(folder: Path, fault: SllmError) -> None:
    source = ScriptedSource(folder)
    source.before = failing(fault)
    with pytest.raises(type(fault)):
        read(folder, source)
    assert source.reads == []


def test_another_source_goes_on_where_one_fails(folder: Path) -> None:
    near, far = ScriptedSource(folder, "test://near"), ScriptedSource(folder, "test://far")
    near.before = failing(None, SourceUnreachable("dead"), *[SourceUnreachable("dead")] * 99)
    answered, took_s = read(folder, near, far, times=3)
    assert answered[0] == near.url
    assert answered[1:] == [far.url, far.url]
    assert took_s == 0.0, "nobody waits for the one that fails"


def test_the_source_that_is_expected_soonest_is_asked(folder: Path) -> None:
    slow, fast = ScriptedSource(folder, "test://slow"), ScriptedSource(folder, "test://fast")
    slow.before, fast.before = taking(2.0), taking(0.5)
    answered, _ = read(folder, slow, fast, times=8)
    assert answered[:2] == [slow.url, fast.url], "each is tried once"
    assert set(answered[2:]) == {fast.url}


def test_a_source_has_no_more_reads_at_once_than_it_wants(folder: Path) -> None:
    source = ScriptedSource(folder, parallel=2)
    source.before = taking(1.0)

    async def work() -> float:
        begun_s, suppliers = asyncio.get_running_loop().time(), await suppliers_of(source)
        reads = [suppliers.read(NAME, 0, memoryview(bytearray(SIZE))) for _ in range(6)]
        await asyncio.gather(*reads)
        return asyncio.get_running_loop().time() - begun_s

    assert run_virtual(work) == pytest.approx(3.0)


def test_wrong_bytes_from_the_only_source_are_an_error_in_the_end(folder: Path) -> None:
    async def work() -> int:
        suppliers = await suppliers_of(ScriptedSource(folder))
        tries = 0
        with pytest.raises(CheckpointCorrupt):
            while True:
                (supplier,) = await suppliers.read(NAME, 0, memoryview(bytearray(SIZE)))
                tries += 1
                suppliers.blame(supplier, CheckpointCorrupt("wrong"))
        return tries

    assert run_virtual(work) == MAX_WRONGS


def test_a_list_is_asked_for_again_until_it_comes(folder: Path) -> None:
    source = ScriptedSource(folder)
    plain, failures = source.files, [SourceUnreachable("busy")] * 3

    async def files() -> tuple[SourceFile, ...]:
        if failures:
            raise failures.pop()
        return await plain()

    source.files = files  # type: ignore[method-assign]

    async def work() -> tuple[SourceFile, ...]:
        return await list_files(source, LoopClock(), half)

    assert [file.name for file in run_virtual(work)] == ["config.json", NAME]
    failures.extend([SourceUnreachable("busy")] * 99)
    with pytest.raises(SourceUnreachable):
        run_virtual(work)


def test_an_outage_that_ends_all_reads_at_once_counts_as_one_failure(folder: Path) -> None:
    source = ScriptedSource(folder, parallel=8)
    begun = 0

    async def restart(file: SourceFile, offset: int, into: memoryview) -> None:
        nonlocal begun
        begun += 1
        first = begun <= 8
        await asyncio.sleep(1)
        if first:
            raise SourceUnreachable("restarting")

    source.before = restart

    async def work() -> None:
        suppliers = await suppliers_of(source)
        await asyncio.gather(*(suppliers.read(NAME, 0, memoryview(bytearray(SIZE))) for _ in range(8)))

    run_virtual(work)
    assert len(source.reads) == 8
