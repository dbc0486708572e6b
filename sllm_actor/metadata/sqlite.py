"""Metadata in one SQLite file, written through to the disk (WAL, synchronous=FULL).

SQLite blocks, so its one connection lives on one thread of its own.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from sllm_actor.errors import DataFolderInUse, MetadataFailed

T = TypeVar("T")
# Written into the file's header: whose file it is, and in which layout.
APPLICATION_ID = 0x534C4C4D
LAYOUT = 1
BUSY_TIMEOUT_S = 5.0
HELD_ELSEWHERE = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
SCHEMA = "CREATE TABLE facts (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID"


class SqliteStore:
    """A `Store` on one machine. Belongs to one event loop."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="metadata")
        self._connection: sqlite3.Connection | None = None
        self._closed = False

    @classmethod
    async def open(cls, path: Path) -> SqliteStore:
        """Open or create the file.

        Raises:
            DataFolderInUse: another program holds it.
            MetadataFailed: it can't be opened, is damaged, or is no metadata file of this version.
        """
        store = cls(path)
        try:
            await store._run(store._connect)
        except BaseException:
            await store.close()
            raise
        return store

    def _connect(self) -> None:
        self._connection = sqlite3.connect(self._path, BUSY_TIMEOUT_S, isolation_level=None)
        empty = self._execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
        if not empty and (self._mark("application_id"), self._mark("user_version")) != (APPLICATION_ID, LAYOUT):
            raise MetadataFailed(f"{self._path} is no metadata file of this version")
        self._execute("PRAGMA journal_mode=WAL")
        self._execute("PRAGMA synchronous=FULL")
        if empty:
            self._execute("BEGIN IMMEDIATE")
            self._execute(SCHEMA)
            self._execute(f"PRAGMA application_id={APPLICATION_ID}")
            self._execute(f"PRAGMA user_version={LAYOUT}")
            self._execute("COMMIT")

    def _mark(self, name: str) -> int:
        return int(self._execute(f"PRAGMA {name}").fetchone()[0])

    async def _run(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except sqlite3.Error as error:
            kind = DataFolderInUse if error.sqlite_errorcode in HELD_ELSEWHERE else MetadataFailed
            raise kind(f"the metadata file {self._path}: {error}") from error

    def _execute(self, statement: str, *values: object) -> sqlite3.Cursor:
        assert self._connection is not None
        return self._connection.execute(statement, values)

    async def get(self, key: str) -> bytes | None:
        row = await self._run(lambda: self._execute("SELECT value FROM facts WHERE key = ?", key).fetchone())
        return None if row is None else bytes(row[0])

    async def put(self, key: str, value: bytes) -> None:
        await self._run(lambda: self._execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", key, value))

    async def put_new(self, key: str, value: bytes) -> bool:
        cursor = await self._run(lambda: self._execute("INSERT OR IGNORE INTO facts VALUES (?, ?)", key, value))
        return cursor.rowcount == 1

    async def delete(self, key: str) -> bool:
        cursor = await self._run(lambda: self._execute("DELETE FROM facts WHERE key = ?", key))
        return cursor.rowcount == 1

    async def list(self, prefix: str) -> dict[str, bytes]:
        statement = "SELECT key, value FROM facts WHERE substr(key, 1, ?) = ? ORDER BY key"
        rows = await self._run(lambda: self._execute(statement, len(prefix), prefix).fetchall())
        return {key: bytes(value) for key, value in rows}

    async def close(self) -> None:
        """Close the file; doing it twice does nothing."""

        def disconnect() -> None:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

        if not self._closed:
            self._closed = True
            await self._run(disconnect)
            self._thread.shutdown()
