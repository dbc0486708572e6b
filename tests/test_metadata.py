"""The SQLite store: what is put is there, whole, also after a kill; a file of another kind is refused."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sllm_actor.errors import DataFolderInUse, LeaseLost, MetadataCompacted, MetadataFailed
from sllm_actor.metadata import SqliteStore
from sllm_actor.metadata.sqlite import APPLICATION_ID, FROM_LAYOUT_1

REPOSITORY = Path(__file__).parent.parent


async def test_everything_is_there_after_reopening(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "m.db")
    await store.put("a", b"1")
    await store.put("a", b"2")
    await store.close()
    await store.close()
    again = await SqliteStore.open(tmp_path / "m.db")
    listing = await again.list("")
    assert [(fact.key, fact.value, fact.created, fact.changed) for fact in listing.facts] == [("a", b"2", 2, 3)]
    assert listing.revision == 3
    assert await again.put("b", b"") == 4
    await again.close()


async def test_what_was_held_under_a_lease_is_gone_after_reopening_and_its_revision_is_not_used_again(
    tmp_path: Path,
) -> None:
    store = await SqliteStore.open(tmp_path / "m.db")
    lease = await store.grant(3600)
    await store.put("leased", b"1", lease.id)
    await store.put("free", b"2")
    last = await store.put("freed", b"3", lease.id)
    freed = await store.put("freed", b"4")
    assert freed == last + 1
    await store.close()
    again = await SqliteStore.open(tmp_path / "m.db")
    listing = await again.list("")
    assert [fact.key for fact in listing.facts] == ["free", "freed"] and listing.revision == freed + 1
    with pytest.raises(LeaseLost):
        await again.keep_alive(lease.id)
    # What changed before this process is not known to it.
    with pytest.raises(MetadataCompacted):
        await anext(again.watch("", freed))
    await again.close()


def make_layout_1(path: Path, facts: dict[str, bytes]) -> None:
    """Write a file as the first version did."""
    with closing(sqlite3.connect(path, isolation_level=None)) as earlier:
        earlier.execute("PRAGMA journal_mode=WAL")
        earlier.execute("CREATE TABLE facts (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID")
        earlier.execute(f"PRAGMA application_id={APPLICATION_ID}")
        earlier.execute("PRAGMA user_version=1")
        earlier.executemany("INSERT INTO facts VALUES (?, ?)", facts.items())


async def test_a_file_of_the_first_layout_is_taken_over_with_all_that_is_in_it(tmp_path: Path) -> None:
    facts = {"models/b": b"\0\xff", "models/a": b"", "models/\u00e9": b"3"}
    make_layout_1(tmp_path / "m.db", facts)
    for _ in range(2):
        store = await SqliteStore.open(tmp_path / "m.db")
        found = (await store.list("models/")).facts
        assert {fact.key: fact.value for fact in found} == facts
        assert [fact.key for fact in found] == ["models/a", "models/b", "models/\u00e9"]
        await store.close()
    store = await SqliteStore.open(tmp_path / "m.db")
    assert await store.delete("models/a")
    await store.close()
    store = await SqliteStore.open(tmp_path / "m.db")
    assert await store.get("models/a") is None
    await store.close()


async def test_a_taking_over_that_fails_leaves_the_first_layout_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_layout_1(tmp_path / "m.db", {"a": b"1"})
    monkeypatch.setattr("sllm_actor.metadata.sqlite.FROM_LAYOUT_1", (*FROM_LAYOUT_1, "SELECT * FROM absent"))
    with pytest.raises(MetadataFailed):
        await SqliteStore.open(tmp_path / "m.db")
    with closing(sqlite3.connect(tmp_path / "m.db")) as earlier:
        assert earlier.execute("SELECT * FROM facts").fetchall() == [("a", b"1")]
        assert earlier.execute("PRAGMA user_version").fetchone() == (1,)
        assert earlier.execute("SELECT count(*) FROM sqlite_master").fetchone() == (1,)
    monkeypatch.undo()
    store = await SqliteStore.open(tmp_path / "m.db")
    assert [(fact.key, fact.value) for fact in (await store.list("")).facts] == [("a", b"1")]
    await store.close()


async def test_a_process_that_does_not_know_of_anothers_writes_does_not_write_over_them(tmp_path: Path) -> None:
    first = await SqliteStore.open(tmp_path / "m.db")
    second = await SqliteStore.open(tmp_path / "m.db")
    await first.put("a", b"1")
    with pytest.raises(MetadataFailed, match="another process has written"):
        await second.put("a", b"2")
    await first.put("b", b"")
    await first.close()
    await second.close()


async def test_a_write_that_nobody_waits_for_any_more_is_made_all_the_same(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "m.db")
    writing = asyncio.ensure_future(store.put("a", b"1"))
    await asyncio.sleep(0)
    writing.cancel()
    await asyncio.wait([writing])
    await store.put("b", b"2")
    await store.close()
    again = await SqliteStore.open(tmp_path / "m.db")
    assert [fact.key for fact in (await again.list("")).facts] == ["a", "b"]
    await again.close()


@settings(max_examples=20, deadline=None)
@given(
    entries=st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=10),
        st.binary(max_size=50),
        max_size=8,
    )
)
async def test_any_key_and_value_come_back(tmp_path_factory: pytest.TempPathFactory, entries: dict[str, bytes]) -> None:
    store = await SqliteStore.open(tmp_path_factory.mktemp("store") / "m.db")
    for key, value in entries.items():
        await store.put(key, value)
    found = [(fact.key, fact.value) for fact in (await store.list("")).facts]
    assert found == sorted(entries.items(), key=lambda item: item[0].encode())
    for key in entries:
        assert key in [fact.key for fact in (await store.list(key[:1])).facts]
    await store.close()


async def test_a_file_that_is_no_database_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "m.db"
    path.write_bytes(b"precious, and no database" * 1000)
    with pytest.raises(MetadataFailed, match="file is not a database"):
        await SqliteStore.open(path)
    assert path.read_bytes() == b"precious, and no database" * 1000


async def test_a_database_of_another_program_or_layout_is_refused(tmp_path: Path) -> None:
    foreign = sqlite3.connect(tmp_path / "foreign.db")
    foreign.execute("CREATE TABLE facts (other)")
    foreign.close()
    await (await SqliteStore.open(tmp_path / "later.db")).close()
    later = sqlite3.connect(tmp_path / "later.db")
    later.execute("PRAGMA user_version=99")
    later.close()
    for name in ("foreign.db", "later.db"):
        with pytest.raises(MetadataFailed, match="no metadata file of this version"):
            await SqliteStore.open(tmp_path / name)


async def test_a_path_that_can_not_be_opened_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent" / "m.db"):
        with pytest.raises(MetadataFailed):
            await SqliteStore.open(path)


async def test_a_file_that_is_damaged_later_gives_a_typed_error(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "m.db")
    for k in range(200):
        await store.put(f"key-{k}", bytes(500))
    await store.close()
    with (tmp_path / "m.db").open("r+b") as opened:
        opened.seek(4096)
        opened.write(b"\xff" * 4096 * 8)
    with pytest.raises(MetadataFailed):
        store = await SqliteStore.open(tmp_path / "m.db")
        try:
            await store.list("")
        finally:
            await store.close()


async def test_a_file_that_another_program_holds_is_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sllm_actor.metadata.sqlite.BUSY_TIMEOUT_S", 0.01)
    store = await SqliteStore.open(tmp_path / "m.db")
    holder = sqlite3.connect(tmp_path / "m.db", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(DataFolderInUse):
        await store.put("a", b"1")
    holder.execute("ROLLBACK")
    await store.put("a", b"1")
    fact = await store.get("a")
    assert fact is not None and fact.value == b"1"
    holder.close()
    await store.close()


WRITER = """
import asyncio, sys
from pathlib import Path
from sllm_actor.metadata import SqliteStore

async def main():
    store = await SqliteStore.open(Path(sys.argv[1]))
    for k in range(10**9):
        await store.put("one", k.to_bytes(8, "big") * 8000)
        await store.put("two", k.to_bytes(8, "big") * 8000)
        print(k, flush=True)

asyncio.run(main())
"""


async def test_a_writer_that_is_killed_leaves_whole_values_and_loses_none_that_it_reported(tmp_path: Path) -> None:
    path = tmp_path / "m.db"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    for wanted in (1, 7, 20):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, env=environment)
        assert writer.stdout is not None
        with writer.stdout:
            reported = -1
            while reported < wanted:
                reported = int(writer.stdout.readline())
            writer.kill()
            reported = max([reported, *map(int, writer.stdout.read().split(b"\n")[:-1])])
        assert writer.wait() == -signal.SIGKILL
        store = await SqliteStore.open(path)
        for key in ("one", "two"):
            fact = await store.get(key)
            assert fact is not None
            value = fact.value
            number = int.from_bytes(value[:8], "big")
            assert value == number.to_bytes(8, "big") * 8000
            assert number >= reported
        await store.close()
