"""Metadata in one SQLite file, written through to the disk (WAL, synchronous=FULL).

The file belongs to one process, which the lock of its data folder sees to. That process has all facts in memory, and
a commit is in the file before it is in there. SQLite blocks, so its one connection lives on one thread of its own.
A lease can't outlive the process that was to keep it alive: what was held under one is deleted when the file is opened.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from sllm_actor.errors import DataFolderInUse, MetadataFailed
from sllm_actor.metadata.facts import Facts, Plan
from sllm_actor.metadata.limits import StoreLimits
from sllm_actor.metadata.local import LocalStore
from sllm_actor.metadata.store import Fact
from sllm_actor.runtime import Clock, SystemClock

T = TypeVar("T")
# Written into the file's header: whose file it is, and in which layout.
APPLICATION_ID = 0x534C4C4D
LAYOUT = 2
BUSY_TIMEOUT_S = 5.0
HELD_ELSEWHERE = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
# Keys are bytes, as etcd has them: any prefix is then a range.
SCHEMA = (
    "CREATE TABLE {facts} (key BLOB PRIMARY KEY, value BLOB NOT NULL, created INTEGER NOT NULL,"
    " changed INTEGER NOT NULL, leased INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE TABLE state (revision INTEGER NOT NULL)",
    "INSERT INTO state VALUES (1)",
)
FROM_LAYOUT_1 = (
    "INSERT INTO facts_2 SELECT CAST(key AS BLOB), value, 1, 1, 0 FROM facts",
    "DROP TABLE facts",
    "ALTER TABLE facts_2 RENAME TO facts",
)


class SqliteFile:
    """The file, on its own thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="metadata")
        self._connection: sqlite3.Connection | None = None
        self._closed = False

    async def open(self) -> tuple[list[Fact], int]:
        """Open or create the file, and give what is in it with its revision.

        Raises:
            DataFolderInUse, MetadataFailed: as `SqliteStore.open` does.
        """
        return await self._run(self._open)

    async def write(self, plan: Plan) -> None:
        """Write a plan's changes in one transaction.

        Raises:
            DataFolderInUse: another program holds the file.
            MetadataFailed: it can't be written, or another process has written to it.
        """
        await self._run(lambda: self._write(plan))

    async def close(self) -> None:
        """Close the file; doing it twice does nothing."""
        if not self._closed:
            self._closed = True
            await self._run(self._disconnect)
            self._thread.shutdown()

    async def _run(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except sqlite3.Error as error:
            kind = DataFolderInUse if error.sqlite_errorcode in HELD_ELSEWHERE else MetadataFailed
            raise kind(f"the metadata file {self._path}: {error}") from error

    def _execute(self, statement: str, *values: object) -> sqlite3.Cursor:
        assert self._connection is not None
        return self._connection.execute(statement, values)

    def _atomically(self, work: Callable[[], T]) -> T:
        self._execute("BEGIN IMMEDIATE")
        try:
            result = work()
            self._execute("COMMIT")
        except BaseException:
            assert self._connection is not None
            if self._connection.in_transaction:
                self._execute("ROLLBACK")
            raise
        return result

    def _open(self) -> tuple[list[Fact], int]:
        self._connection = sqlite3.connect(self._path, BUSY_TIMEOUT_S, isolation_level=None)
        self._layout()
        self._execute("PRAGMA journal_mode=WAL")
        self._execute("PRAGMA synchronous=FULL")
        self._atomically(self._upgrade)
        self._atomically(self._end_leases)
        rows = self._execute("SELECT key, value, created, changed FROM facts").fetchall()
        facts = [
            Fact(bytes(key).decode(), bytes(value), created, changed, None) for key, value, created, changed in rows
        ]
        return facts, self._revision()

    def _layout(self) -> int:
        """Give the layout of the file, 0 for an empty one."""
        if self._execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
            return 0
        marks = [int(self._execute(f"PRAGMA {name}").fetchone()[0]) for name in ("application_id", "user_version")]
        if marks[0] != APPLICATION_ID or not 1 <= marks[1] <= LAYOUT:
            raise MetadataFailed(f"{self._path} is no metadata file of this version")
        return marks[1]

    def _upgrade(self) -> None:
        """Bring the file to this layout, if it is of an earlier one or empty."""
        layout = self._layout()
        if layout == LAYOUT:
            return
        for statement in SCHEMA:
            self._execute(statement.format(facts="facts_2" if layout else "facts"))
        for statement in FROM_LAYOUT_1 if layout else ():
            self._execute(statement)
        self._execute(f"PRAGMA application_id={APPLICATION_ID}")
        self._execute(f"PRAGMA user_version={LAYOUT}")

    def _end_leases(self) -> None:
        if self._execute("DELETE FROM facts WHERE leased").rowcount:
            self._execute("UPDATE state SET revision = revision + 1")

    def _revision(self) -> int:
        row = self._execute("SELECT revision FROM state").fetchone()
        if row is None:
            raise MetadataFailed(f"the metadata file {self._path} has lost its revision")
        return int(row[0])

    def _write(self, plan: Plan) -> None:
        self._atomically(lambda: self._write_changes(plan))

    def _write_changes(self, plan: Plan) -> None:
        if self._revision() != plan.outcome.revision - 1:
            raise MetadataFailed(f"another process has written to the metadata file {self._path}")
        for change in plan.changes:
            fact = change.fact
            if fact is None:
                self._execute("DELETE FROM facts WHERE key = ?", change.key.encode())
            else:
                row = (fact.key.encode(), fact.value, fact.created, fact.changed, fact.lease is not None)
                self._execute("INSERT OR REPLACE INTO facts VALUES (?, ?, ?, ?, ?)", *row)
        self._execute("UPDATE state SET revision = ?", plan.outcome.revision)

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class SqliteStore(LocalStore):
    """A `Store` on one machine, for one process."""

    def __init__(self, file: SqliteFile, facts: Facts, clock: Clock, limits: StoreLimits) -> None:
        super().__init__(facts, clock, limits)
        self._file = file

    @classmethod
    async def open(cls, path: Path, clock: Clock | None = None, limits: StoreLimits | None = None) -> SqliteStore:
        """Open or create the file; one of an earlier layout is brought to this one.

        Raises:
            DataFolderInUse: another program holds it.
            MetadataFailed: it can't be opened, is damaged, or is no metadata file of this version.
        """
        file, limits = SqliteFile(path), limits or StoreLimits()
        try:
            known, revision = await file.open()
        except BaseException:
            await file.close()
            raise
        return cls(file, Facts(limits, known, revision), clock or SystemClock(), limits)

    async def _keep(self, plan: Plan) -> None:
        await self._file.write(plan)

    async def close(self) -> None:
        await super().close()
        await self._file.close()
