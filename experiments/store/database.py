"""The connection to a store's database: opening, transactions that wait with a limit, and errors for people."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote

from experiments.store.errors import StoreBusy, StoreError
from experiments.store.journal import Journal, choose_journal
from experiments.store.schema import migrate

DATABASE = "store.sqlite"
PATIENCE = 60.0
"""Seconds that a transaction waits for other processes before it gives up."""
_BUSY = 5.0
Mode = Literal["r", "w"]
T = TypeVar("T")


class Database:
    """One process's connection to ``store.sqlite``; a forked child gets a connection of its own.

    Not for several threads: a thread opens its own.
    """

    def __init__(self, file: Path, mode: Mode, *, patience: float = PATIENCE, journal: Journal = "auto") -> None:
        self.file = file
        self.mode = mode
        self.patience = patience
        self._journal = journal
        self._inherited: list[sqlite3.Connection] = []  # closing a parent's connection would disturb it
        self._process = os.getpid()
        self._connection: sqlite3.Connection | None = self._open()

    def close(self) -> None:
        """Close the connection; the object is of no use afterwards."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @property
    def connection(self) -> sqlite3.Connection:
        """The connection of this process.

        Raises:
            StoreError: it was closed.
        """
        if self._connection is None:
            raise StoreError(f"{self.file}: the store was closed; open it again")
        if self._process != os.getpid():
            self._inherited.append(self._connection)
            self._connection, self._process = self._open(), os.getpid()
        return self._connection

    def read(self, sql: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> list[sqlite3.Row]:
        """All rows of a query."""
        return self._patiently(lambda: self.connection.execute(sql, values).fetchall())

    def read_tuples(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows of a query as plain tuples: for tables of hundreds of thousands of rows."""

        def fetch() -> list[tuple[Any, ...]]:
            cursor = self.connection.cursor()
            cursor.row_factory = None
            return cursor.execute(sql, values).fetchall()

        return self._patiently(fetch)

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Several questions about one moment, whatever others write meanwhile."""
        connection = self.connection
        self._patiently(lambda: connection.execute("BEGIN"))
        try:
            self._patiently(lambda: connection.execute("SELECT count(*) FROM sqlite_schema").fetchone())
            yield connection
        except sqlite3.Error as error:
            raise explained(error, self.file) from error
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction that holds the write lock from its start; undone as a whole by any exception.

        Raises:
            StoreBusy: others held the lock for longer than the patience.
            StoreError: opened for reading, the disk is full, or the file is damaged.
        """
        if self.mode == "r":
            raise StoreError(f"{self.file}: was opened for reading; open the store with mode 'w' to change it")
        connection = self.connection
        self._patiently(lambda: connection.execute("BEGIN IMMEDIATE"))
        try:
            yield connection
            self._patiently(lambda: connection.execute("COMMIT"))
        except BaseException as error:
            self._undo(connection)
            if isinstance(error, sqlite3.Error):
                raise explained(error, self.file) from error
            raise

    def _undo(self, connection: sqlite3.Connection) -> None:
        try:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        except sqlite3.Error:  # SQLite itself rolls back what is left when the file is opened again
            connection.close()
            self._connection = self._open()

    def _patiently(self, action: Callable[[], T]) -> T:
        """Try until the lock is free or the patience is over."""
        limit = time.monotonic() + self.patience
        pause = 0.01
        while True:
            try:
                return action()
            except sqlite3.OperationalError as error:
                if not _is_busy(error):
                    raise explained(error, self.file) from error
                if time.monotonic() >= limit:
                    raise StoreBusy(
                        f"{self.file}: other processes held the store for more than {self.patience:.0f} s; look for a "
                        "runner that hangs, then run the command again"
                    ) from error
            except sqlite3.Error as error:
                raise explained(error, self.file) from error
            time.sleep(pause)
            pause = min(2 * pause, 0.5)

    def _open(self) -> sqlite3.Connection:
        try:
            return self._patiently(self._connect)
        except OSError as error:
            raise StoreError(f"{self.file}: cannot be opened: {error.strerror}") from error

    def _connect(self) -> sqlite3.Connection:
        if self.mode == "r":
            connection = _read_only(self.file)
        else:
            connection = sqlite3.connect(
                self.file, timeout=min(_BUSY, self.patience), isolation_level=None, check_same_thread=False
            )
        try:
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA foreign_keys = ON")
            if self.mode == "w":
                choose_journal(connection, self.file, self._journal)
                connection.execute("PRAGMA cache_size = -16000")
            migrate(connection, self.file, writable=self.mode == "w")
        except BaseException:
            connection.close()
            raise
        return connection


def _read_only(file: Path) -> sqlite3.Connection:
    """A connection that cannot write; folders that cannot be written to are read as they lie there."""
    address = f"file:{quote(str(file.resolve()))}?mode=ro"
    beside = [file.with_name(file.name + end) for end in ("-wal", "-shm")]
    if not os.access(file.parent, os.W_OK) and not any(path.exists() for path in beside):
        address += "&immutable=1"
    return sqlite3.connect(address, uri=True, timeout=_BUSY, isolation_level=None, check_same_thread=False)


def _is_busy(error: sqlite3.OperationalError) -> bool:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED) or "locked" in str(error)


def explained(error: sqlite3.Error, file: Path) -> StoreError:
    """A database error in words, with the remedy."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    text = str(error)
    if code == sqlite3.SQLITE_FULL or "full" in text:
        return StoreError(f"{file}: the disk is full; free space and run the command again, nothing was half-written")
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM) or "readonly" in text:
        return StoreError(f"{file}: may not be written to; change the rights of its folder, or use another folder")
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return StoreError(f"{file}: is not a store's database, or is damaged ({text}); restore it from a copy")
    if code == sqlite3.SQLITE_CANTOPEN:
        return StoreError(f"{file}: cannot be opened; check that the folder exists and may be read and written")
    if code == sqlite3.SQLITE_IOERR:
        return StoreError(f"{file}: the disk refuses ({text}); check space and quota, then run the command again")
    return StoreError(f"{file}: {text}; if it stays, check the store with `mergebound grid verify`")


def present(connection: sqlite3.Connection, table: str, column: str, names: Sequence[str]) -> set[str]:
    """Those of some names that a column has; ``table`` and ``column`` come from the code, never from a user."""
    found: set[str] = set()
    for start in range(0, len(names), 500):
        part = names[start : start + 500]
        marks = ", ".join("?" * len(part))
        question = f"SELECT {column} FROM {table} WHERE {column} IN ({marks})"
        found |= {row[0] for row in connection.execute(question, part)}
    return found
