"""The crash harness itself: what was synced stays, what was not is gone, whatever kind of write it was."""

from __future__ import annotations

import sqlite3
import sys
import time
from pathlib import Path

import pytest

from tests.crash import Crashable, build_library

APPEND = """
import os, sys, time
from pathlib import Path
d = Path(sys.argv[1])
out = os.open(d / "appended", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.write(out, b"one "); os.write(out, b"two "); os.fsync(out); os.write(out, b"three "); os.write(out, b"four ")
(d / "kept").write_bytes(b"old content"); fd = os.open(d / "kept", os.O_RDWR); os.fsync(fd)
os.pwrite(fd, b"NEW", 0); os.pwrite(fd, b"LONGER", 8); os.ftruncate(fd, 2); os.writev(fd, [b"ab", b"cd"])
(d / "emptied").write_bytes(b"was here"); fd = os.open(d / "emptied", os.O_RDWR); os.fdatasync(fd)
(d / "emptied").write_bytes(b"short")
draft = os.open(d / "draft", os.O_WRONLY | os.O_CREAT); os.write(draft, b"renamed "); os.fsync(draft)
os.write(draft, b"lost"); os.rename(d / "draft", d / "renamed")
(d / "gone").write_bytes(b"x" * 100); os.unlink(d / "gone"); (d / "next").write_bytes(b"y" * 10)
fd = os.open(d / "next", os.O_RDWR); os.fsync(fd)
Path(sys.argv[2]).write_bytes(b"outside, unsynced, kept")
(Path(sys.argv[2]).parent / "ready").touch()
time.sleep(60)
"""

SQLITE = """
import sqlite3, sys, time
from pathlib import Path
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("PRAGMA journal_mode=WAL"); db.execute("PRAGMA synchronous=" + sys.argv[2])
db.execute("CREATE TABLE t (n)")
for n in range(300):
    db.execute("INSERT INTO t VALUES (?)", (n,))
Path(sys.argv[3]).touch()
time.sleep(60)
"""


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)


def test_writes_since_the_last_sync_are_lost_and_all_others_stay(tmp_path: Path) -> None:
    state, outside = tmp_path / "state", tmp_path / "outside"
    with Crashable(build_library(tmp_path), state, tmp_path / "log") as child:
        child.start([sys.executable, "-c", APPEND, str(state), str(outside)])
        wait_for(tmp_path / "ready")
        assert (state / "appended").read_bytes() == b"one two three four "  # a mere kill would have kept it
        dropped = child.crash()
    assert (state / "appended").read_bytes() == b"one two "
    assert (state / "kept").read_bytes() == b"old content"
    assert (state / "emptied").read_bytes() == b"was here"
    assert (state / "renamed").read_bytes() == b"renamed "
    assert (state / "next").read_bytes() == b"y" * 10
    assert outside.read_bytes() == b"outside, unsynced, kept"
    assert dropped.num_files == 4
    assert dropped.num_writes >= 9


@pytest.mark.parametrize(("synchronous", "num_kept"), [("FULL", 300), ("OFF", 0)])
def test_sqlite_keeps_its_commits_only_with_full_sync(tmp_path: Path, synchronous: str, num_kept: int) -> None:
    state = tmp_path / "state"
    with Crashable(build_library(tmp_path), state, tmp_path / "log") as child:
        child.start([sys.executable, "-c", SQLITE, str(state / "t.db"), synchronous, str(tmp_path / "ready")])
        wait_for(tmp_path / "ready")
        child.crash()
    database = sqlite3.connect(state / "t.db")
    has_table = database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    assert (database.execute("SELECT count(*) FROM t").fetchone()[0] if has_table else 0) == num_kept
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()
