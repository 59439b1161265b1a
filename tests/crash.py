"""kill -9 plus a power cut: run a process whose unsynced writes can be taken back, kill it, take them back.

`Crashable` starts a command under tests/unsynced/unsynced.c; `crash` kills its whole process group and reverts every
write under the watched directory that no fsync has covered. SQLite's -shm files (mapped memory) are deleted.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import struct
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "unsynced" / "unsynced.c"
HEAD = struct.Struct("=QQQ")  # offset, size before, number of old bytes that follow


def build_library(directory: Path) -> Path:
    """Compile the preload library into `directory`. Skips the test where there is no C compiler."""
    compiler = next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    if compiler is None:
        pytest.skip("no C compiler: unsynced writes cannot be dropped")
    library = directory / "unsynced.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-o", str(library), str(SOURCE), "-ldl"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


@dataclass(frozen=True)
class Dropped:
    """What a power cut took."""

    num_files: int
    num_writes: int


class Crashable:
    """One process at a time over `watched`; `start`, `crash`, `start` again. Use as a context manager."""

    def __init__(self, library: Path, watched: Path, log: Path) -> None:
        watched.mkdir(parents=True, exist_ok=True)
        log.mkdir(parents=True, exist_ok=True)
        self.library = library
        self.watched = watched
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Crashable:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.kill()

    def start(self, command: Sequence[str], env: Mapping[str, str] = {}, output: Path | None = None) -> None:
        """Start `command` in its own process group; its children are watched and killed with it."""
        assert self.process is None, "crash or kill the running process first"
        preload = {
            "LD_PRELOAD": str(self.library),
            "UNSYNCED_DIR": str(self.watched),
            "UNSYNCED_LOG": str(self.log),
        }
        out = subprocess.DEVNULL if output is None else output.open("ab")
        try:
            self.process = subprocess.Popen(
                list(command),
                env={**os.environ, **env, **preload},
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        finally:
            if not isinstance(out, int):
                out.close()

    def kill(self) -> None:
        """kill -9 the process group and wait; nothing is taken back."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def crash(self) -> Dropped:
        """kill -9, then lose every write since the last fsync of its file."""
        self.kill()
        return drop_unsynced(self.watched, self.log)


def drop_unsynced(watched: Path, log: Path, is_lost: Callable[[Path], bool] | None = None) -> Dropped:
    """Play every undo log backwards, newest write first, and empty it. No process may be writing.

    With `is_lost` other processes live on, stopped: only files that it names are taken back, and -shm files stay.
    """
    by_inode: dict[str, Path] = {}
    for path in watched.rglob("*"):
        if path.name.endswith("-shm"):
            if is_lost is None:
                path.unlink()
        elif path.is_file() and not path.is_symlink():
            about = path.stat()
            by_inode[f"{about.st_dev}-{about.st_ino}"] = path
    num_files = num_writes = 0
    for undo in sorted(log.iterdir()):
        target = by_inode.get(undo.name)
        if is_lost is not None and (target is None or not is_lost(target)):
            continue
        changes = _changes(undo.read_bytes()) if target is not None else []
        if target is not None and changes:
            num_files += 1
            num_writes += len(changes)
            _revert(target, changes)
        undo.unlink()
    return Dropped(num_files, num_writes)


def _revert(target: Path, changes: list[tuple[int, int, bytes]]) -> None:
    with target.open("r+b") as file:
        for offset, size, old in reversed(changes):
            file.truncate(size)
            file.seek(offset)
            file.write(old)


def _changes(raw: bytes) -> list[tuple[int, int, bytes]]:
    """(offset, size before, old bytes) per write. A record cut short belongs to a write that never happened."""
    changes = []
    at = 0
    while at + HEAD.size <= len(raw):
        offset, size, count = HEAD.unpack_from(raw, at)
        at += HEAD.size
        if at + count > len(raw):
            break
        changes.append((offset, size, raw[at : at + count]))
        at += count
    return changes
