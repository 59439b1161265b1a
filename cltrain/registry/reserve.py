"""A few megabytes that a deployment sets aside, so that a rollback or a freeze can still be written on a full disk.

It makes room once and promises nothing beyond that: whoever else writes to the disk may take the room first.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RESERVE_BYTES = 4 * 2**20  # a transaction over some thousand records, with the log and index that SQLite opens for it
SPARE = 4  # times as much must be free before it is taken again


def make_reserve(state_dir: Path) -> bool:
    """Set the room aside where it is not yet; returns whether it is there. A disk too full for all of it keeps none."""
    file = _file(state_dir)
    try:
        if file.exists() and file.stat().st_size == RESERVE_BYTES:
            return True
        state_dir.mkdir(parents=True, exist_ok=True)
        file.write_bytes(os.urandom(RESERVE_BYTES))  # what a file system cannot compress away
    except OSError:
        _free(file)
        return False
    return True


def remake_reserve(state_dir: Path) -> None:
    """Set the room aside again after an emergency, where there is plenty of space: never while the disk is short."""
    try:
        if shutil.disk_usage(state_dir).free >= SPARE * RESERVE_BYTES:
            make_reserve(state_dir)
    except OSError:  # a directory that went away: whoever needs it next says so
        return


@contextmanager
def reserve_freed(state_dir: Path) -> Iterator[None]:
    """The room is free inside; what was there is set aside again afterwards if there is space."""
    was_there = _free(_file(state_dir))
    try:
        yield
    finally:
        if was_there:
            make_reserve(state_dir)


def _free(file: Path) -> bool:
    try:
        file.unlink()
    except OSError:  # none there, or a disk that nothing can be done on: opening the store says what is wrong
        return False
    return True


def _file(state_dir: Path) -> Path:
    return state_dir / "reserve"
