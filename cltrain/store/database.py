"""One engine per process: SQLite in WAL mode with full sync, short write transactions begun IMMEDIATE.

A commit that returned is on disk, in the file that lies at the path. A full disk, a locked database or a file that went
away raises DataError with what to do. A home that lost its store gets no empty one in its place.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DatabaseError, OperationalError

from cltrain.errors import DataError
from cltrain.store.schema import metadata

BUSY_TIMEOUT_S = 30.0
STORE_FILE = "store.db"
SECRET_FILE = "secret"
MADE_AFTER_IT = (SECRET_FILE, "releases", f"{STORE_FILE}-wal")  # by whoever has the store open: it was there first


class Store:
    """The database of one deployment. Cheap to open; safe to share between threads."""

    def __init__(self, engine: Engine, path: Path) -> None:
        self.engine = engine
        self.path, self._file = path, _identity(path)

    def require_there(self) -> None:
        """Raise DataError unless the file at the path is the one that was opened: what goes to another is lost."""
        if _identity(self.path) != self._file:
            raise DataError(
                f"{self.path} is not the file that was opened: it was moved, removed or replaced. Put it back with "
                "its -wal and -shm, or end all processes before another takes its place"
            )

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A snapshot for reading; never blocks writers."""
        self.require_there()
        with _explained(self.engine), self.engine.connect() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """One short transaction; committed and synced when the block ends, rolled back when it raises."""
        self.require_there()
        with _explained(self.engine), self.engine.connect() as connection:
            if connection.dialect.name == "sqlite":
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            with connection.begin() if connection.dialect.name != "sqlite" else _sqlite_transaction(connection):
                yield connection
                self.require_there()  # else rolled back: nobody would find what is committed

    def close(self) -> None:
        self.engine.dispose()


@contextmanager
def _sqlite_transaction(connection: Connection) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with suppress(OperationalError):  # on a full disk SQLite has rolled back by itself
            connection.exec_driver_sql("ROLLBACK")
        raise
    connection.exec_driver_sql("COMMIT")


@contextmanager
def _explained(engine: Engine) -> Iterator[None]:
    try:
        yield
    except (OperationalError, DatabaseError) as error:
        reason = str(error.orig)
        if "full" in reason:
            raise DataError(
                f"no space left for the store {engine.url.database}: free some, nothing was lost"
            ) from error
        if "locked" in reason or "busy" in reason:
            raise DataError(
                f"the store {engine.url.database} stayed locked for {BUSY_TIMEOUT_S:g} s: who else holds it?"
            ) from error
        if "disk I/O error" in reason:
            raise DataError(
                f"the disk refused to read or write {engine.url.database}: check its space, quota and health"
            ) from error
        if "readonly" in reason or "unable to open" in reason:
            raise DataError(
                f"the store {engine.url.database} cannot be written ({reason}): "
                "make it and its directory writable for this user, and the file system too"
            ) from error
        if "malformed" in reason or "not a database" in reason:
            raise DataError(
                f"{engine.url.database} is not a readable store ({reason}): restore it from a backup"
            ) from error
        raise


def require_not_lost(state_dir: Path) -> None:
    """Raise DataError where the store is missing or empty, and what is made after it is there."""
    left = [name for name in MADE_AFTER_IT if _size(state_dir / name)]
    size = _size(state_dir / STORE_FILE)  # looked at last: whoever starts beside us makes it first
    if not left or size:
        return
    names = " and ".join(filter(None, [", ".join(left[:-1]), left[-1]]))
    raise DataError(
        f"{state_dir / STORE_FILE} is {'missing' if size is None else 'empty'}, and {names} beside it "
        f"{'is' if len(left) == 1 else 'are'} of a deployment whose records and decisions it held: put it back, or "
        f"restore {state_dir} from a backup; to start anew without them, move {names} away too"
    )


def open_store(state_dir: Path) -> Store:
    """Open (and on first use create) the store in `state_dir`. Raises DataError where it cannot be written, or was lost
    (`require_not_lost`)."""
    require_not_lost(state_dir)
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot use {state_dir} for state: {error.strerror}") from None
    path = state_dir / STORE_FILE
    mode = "rwc"

    def connect() -> sqlite3.Connection:
        uri = f"{path.absolute().as_uri()}?mode={mode}"
        return sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT_S, check_same_thread=False)

    engine = create_engine(f"sqlite:///{path}", creator=connect)
    event.listen(engine, "connect", _configure)
    with _explained(engine), engine.connect():
        store = Store(engine, path)
    mode = "rw"  # it is made: no later connection makes an empty one where it was moved away
    with store.write() as connection:  # looking and making are one step: processes may open a fresh store at once
        metadata.create_all(connection)
    return store


def _size(path: Path) -> int | None:
    """Bytes of a file or entries of a directory; None where nothing lies there that could be looked at."""
    try:
        return sum(1 for _ in path.iterdir()) if path.is_dir() else path.stat().st_size
    except OSError:
        return None


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file lies there; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _configure(connection: sqlite3.Connection, _record: Any) -> None:
    connection.isolation_level = None  # transactions are ours: BEGIN IMMEDIATE, never the driver's deferred ones
    cursor = connection.cursor()
    _set_wal(cursor)
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _set_wal(cursor: sqlite3.Cursor) -> None:
    """SQLite waits for nobody here: whoever opens a fresh store beside others must ask again."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
