"""The SQLite store: what is put is there, whole, also after a kill; a file of another kind is refused."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sllm_actor.errors import DataFolderInUse, MetadataFailed
from sllm_actor.metadata import SqliteStore

REPOSITORY = Path(__file__).parent.parent


async def test_values_are_put_got_and_deleted(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "m.db")
    assert await store.get("a") is None
    await store.put("a", b"1")
    await store.put("empty", b"")
    assert await store.get("a") == b"1"
    assert await store.get("empty") == b""
    assert await store.get("A") is None
    await store.put("a", b"2" * 100_000)
    assert await store.get("a") == b"2" * 100_000
    assert await store.delete("a")
    assert not await store.delete("a")
    assert await store.get("a") is None
    await store.close()


async def test_put_new_writes_only_where_nothing_is(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "m.db")
    assert await store.put_new("a", b"first")
    assert not await store.put_new("a", b"second")
    assert await store.get("a") == b"first"
    await store.delete("a")
    assert await store.put_new("a", b"third")
    await store.close()


async def test_a_listing_has_the_keys_of_a_prefix_in_order_and_no_others(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "m.db")
    for key in ("models/b", "models/a", "models", "models_x", "nodes/a", "models/%", "models/a/c", "Models/a"):
        await store.put(key, key.encode())
    assert list(await store.list("models/")) == ["models/%", "models/a", "models/a/c", "models/b"]
    assert await store.list("models/a") == {"models/a": b"models/a", "models/a/c": b"models/a/c"}
    assert await store.list("%") == {}
    assert await store.list("model_/") == {}
    assert len(await store.list("")) == 8
    await store.close()


async def test_everything_is_there_after_reopening(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "m.db")
    await store.put("a", b"1")
    await store.close()
    await store.close()
    again = await SqliteStore.open(tmp_path / "m.db")
    assert await again.list("") == {"a": b"1"}
    await again.close()


@settings(max_examples=20, deadline=None)
@given(
    entries=st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=10), st.binary(max_size=50), max_size=8
    )
)
async def test_any_key_and_value_come_back(tmp_path_factory: pytest.TempPathFactory, entries: dict[str, bytes]) -> None:
    store = await SqliteStore.open(tmp_path_factory.mktemp("store") / "m.db")
    for key, value in entries.items():
        await store.put(key, value)
    assert await store.list("") == dict(sorted(entries.items(), key=lambda item: item[0].encode()))
    for key in entries:
        assert key in await store.list(key[:1])
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
    assert await store.get("a") == b"1"
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
            value = await store.get(key)
            assert value is not None
            number = int.from_bytes(value[:8], "big")
            assert value == number.to_bytes(8, "big") * 8000
            assert number >= reported
        await store.close()
