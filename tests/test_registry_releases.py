"""Sealing: named by content, read-only, whole or not there at all."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from cltrain.errors import ConflictError, DataError
from cltrain.records import Release
from cltrain.registry import releases as module
from cltrain.registry.aliases import move_alias, read_alias
from cltrain.registry.lease import acquire
from cltrain.registry.releases import (
    delete_release,
    ensure_base_release,
    get,
    list_releases,
    release_dir,
    seal,
    set_status,
    verify_release,
)
from cltrain.store.database import Store, open_store

BASE_DIGEST = "ab" * 32
BASE = f"support-v000000-{BASE_DIGEST[:12]}"


def _candidate(directory: Path, weights: bytes = b"weights") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text('{"r": 8}')
    (directory / "adapter_model.safetensors").write_bytes(weights)
    return directory


def _store(tmp_path: Path) -> Store:
    store = open_store(tmp_path / "state")
    ensure_base_release(store, "support", BASE_DIGEST, now=1.0)
    return store


def _seal(store: Store, tmp_path: Path, candidate: Path, parent: str = BASE) -> Release:
    return seal(store, tmp_path / "state", "support", candidate, parent, {"seed": 7}, now=2.0)


def test_a_release_is_named_by_agent_number_and_the_content_of_both_files(tmp_path: Path) -> None:
    store = _store(tmp_path)
    release = _seal(store, tmp_path, _candidate(tmp_path / "c"))
    lines = "".join(
        f"{name}\0{hashlib.sha256(data).hexdigest()}\n"
        for name, data in (("adapter_config.json", b'{"r": 8}'), ("adapter_model.safetensors", b"weights"))
    )
    assert release.name == f"support-v000001-{hashlib.sha256(lines.encode()).hexdigest()[:12]}"
    assert (release.status, release.parent, release.number) == ("candidate", BASE, 1)
    other = _seal(store, tmp_path, _candidate(tmp_path / "d", b"other weights"))
    assert other.number == 2
    assert other.digest != release.digest


def test_a_sealed_directory_is_read_only_and_carries_its_manifest(tmp_path: Path) -> None:
    store = _store(tmp_path)
    release = _seal(store, tmp_path, _candidate(tmp_path / "c"))
    directory = release_dir(tmp_path / "state", release)
    assert directory is not None
    assert sorted(p.name for p in directory.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
    ]
    for path in (directory, *directory.iterdir()):
        assert not path.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH)
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest == release.manifest
    assert manifest["seed"] == 7
    weights = (directory / "adapter_model.safetensors").read_bytes()
    assert manifest["files"]["adapter_model.safetensors"] == hashlib.sha256(weights).hexdigest()


def test_sealing_the_same_candidate_again_gives_the_same_release(tmp_path: Path) -> None:
    store = _store(tmp_path)
    first = _seal(store, tmp_path, _candidate(tmp_path / "c"))
    again = _seal(store, tmp_path, _candidate(tmp_path / "copy"))
    assert again == first
    assert [r.name for r in list_releases(store, "support")] == [BASE, first.name]


def test_a_sealed_release_that_was_touched_is_noticed(tmp_path: Path) -> None:
    store = _store(tmp_path)
    release = _seal(store, tmp_path, _candidate(tmp_path / "c"))
    directory = release_dir(tmp_path / "state", release)
    assert directory is not None
    verify_release(tmp_path / "state", release)
    directory.chmod(0o755)
    (directory / "adapter_model.safetensors").chmod(0o644)
    (directory / "adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(DataError, match="changed after it was sealed"):
        verify_release(tmp_path / "state", release)


def test_bad_input_to_sealing_is_a_clear_error(tmp_path: Path) -> None:
    store = _store(tmp_path)
    incomplete = _candidate(tmp_path / "c")
    (incomplete / "adapter_model.safetensors").unlink()
    with pytest.raises(DataError, match=r"adapter_model\.safetensors is missing"):
        _seal(store, tmp_path, incomplete)
    with pytest.raises(DataError, match="no-such is not a release"):
        _seal(store, tmp_path, _candidate(tmp_path / "d"), parent="no-such")
    with pytest.raises(DataError, match="no release nothing"):
        get(store, "nothing")
    with pytest.raises(DataError, match="adapters do not carry over"):
        ensure_base_release(store, "support", "cd" * 32, now=1.0)
    assert ensure_base_release(store, "support", BASE_DIGEST, now=9.0).created_at == 1.0


STEPS = ("seal", "_place", "_sync", "_remove_orphans", "_insert")


class _Crash:
    """Ends the process before the n-th line that runs in the functions that seal."""

    def __init__(self, line: int) -> None:
        self.left = line

    def __call__(self, frame: FrameType, event: str, _argument: Any) -> Any:
        if frame.f_code.co_filename != module.__file__ or frame.f_code.co_name not in STEPS:
            return None
        if event == "line":
            self.left -= 1
            if self.left < 0:
                os._exit(9)
        return self


def _seal_and_crash(state: Path, candidate: Path, line: int) -> bool:
    """True when the child died before it was done."""
    child = os.fork()
    if child == 0:
        store = open_store(state)
        sys.settrace(_Crash(line))
        seal(store, state, "support", candidate, BASE, {}, now=2.0)
        sys.settrace(None)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_a_crash_between_any_two_steps_of_sealing_leaves_no_row_without_directory(tmp_path: Path) -> None:
    store = _store(tmp_path)
    state = tmp_path / "state"
    home = state / "releases" / "support"
    _seal(store, tmp_path, _candidate(tmp_path / "first"))
    line, has_crashed = 0, True
    while has_crashed:
        candidate = _candidate(tmp_path / f"c{line}", f"weights {line}".encode())
        has_crashed = _seal_and_crash(state, candidate, line)
        for row in list_releases(store, "support"):
            verify_release(state, row)  # raises when a row has no directory, or not all of it
        release = seal(store, state, "support", candidate, BASE, {}, now=3.0)
        verify_release(state, release)
        names = [r.name for r in list_releases(store, "support")]
        assert sorted(p.name for p in home.iterdir() if p.is_dir()) == names[1:]
        assert names[-1] == release.name
        assert release.number == line + 2
        line += 1
    assert line > 50


def test_the_next_sealing_removes_leftovers_and_live_releases_stay(tmp_path: Path) -> None:
    store = _store(tmp_path)
    release = _seal(store, tmp_path, _candidate(tmp_path / "c"))
    leftover = tmp_path / "state" / "releases" / "support" / ".staging-x"
    _candidate(leftover)
    leftover.chmod(0o555)
    _seal(store, tmp_path, _candidate(tmp_path / "d", b"other weights"))
    assert not leftover.exists()
    verify_release(tmp_path / "state", release)


def test_what_the_alias_refers_to_cannot_be_deleted(tmp_path: Path) -> None:
    store = _store(tmp_path)
    first = _seal(store, tmp_path, _candidate(tmp_path / "c"))
    fence = acquire(store, "support", "worker", 60.0, 2.0)
    move_alias(store, "support", expected=read_alias(store, "support"), to=first.name, fence=fence, now=3.0)
    second = _seal(store, tmp_path, _candidate(tmp_path / "d", b"two"), parent=first.name)
    for name in (BASE, first.name):
        with pytest.raises(ConflictError, match="stays"):
            delete_release(store, tmp_path / "state", name, now=4.0)
    delete_release(store, tmp_path / "state", second.name, now=4.0)
    assert get(store, second.name).status == "deleted"
    assert not (tmp_path / "state" / "releases" / "support" / second.name).exists()
    assert get(store, second.name).manifest == second.manifest
    with pytest.raises(DataError, match="not kept on disk"):
        verify_release(tmp_path / "state", get(store, second.name))
    again = _seal(store, tmp_path, _candidate(tmp_path / "d", b"two"), parent=first.name)
    assert again.number == 3


def test_a_release_becomes_released_only_by_moving_the_alias(tmp_path: Path) -> None:
    store = _store(tmp_path)
    release = _seal(store, tmp_path, _candidate(tmp_path / "c"))
    with pytest.raises(ConflictError, match="only moving the alias"):
        set_status(store, release.name, "released", now=3.0)
    assert set_status(store, release.name, "held", now=3.0).status == "held"
    assert set_status(store, release.name, "candidate", now=3.0).status == "candidate"
    assert set_status(store, release.name, "rejected", now=3.0).status == "rejected"
    with pytest.raises(ConflictError, match="rejected and cannot become candidate"):
        set_status(store, release.name, "candidate", now=3.0)
