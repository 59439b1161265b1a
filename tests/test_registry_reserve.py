"""On a full disk a rollback and a freeze still get through, by what was set aside for them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from cltrain.api import Deployment
from cltrain.config import from_dict
from cltrain.registry import aliases
from cltrain.registry.reserve import RESERVE_BYTES, make_reserve, remake_reserve, reserve_freed
from tests.command import promoted_home, run_cltrain
from tests.test_bad_machine import Disk, small_tmpfs


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with small_tmpfs(tmp_path / "state", "16m") as disk:
        yield disk


@pytest.mark.parametrize("command", ["rollback", "freeze"])
def test_an_emergency_is_written_on_a_full_disk_with_every_process_down(disk: Disk, command: str) -> None:
    base, release = promoted_home(disk.path)
    assert make_reserve(disk.path)
    disk.fill()
    done = run_cltrain(command, f"--home={disk.path}", "--json")
    assert done.code == 0, done.err
    assert shutil.disk_usage(disk.path).free > 0, "the room was used, and not taken again"
    disk.free()
    deployment = Deployment(from_dict({"home": str(disk.path)}))
    assert aliases.read_alias(deployment.store, "support").release == {"rollback": base, "freeze": release}[command]
    assert aliases.frozen_reason(deployment.store, "support") is not None


def test_without_the_reserve_the_same_rollback_says_that_the_disk_is_full(disk: Disk) -> None:
    promoted_home(disk.path)
    disk.fill()
    done = run_cltrain("rollback", f"--home={disk.path}", "--json")
    assert done.code == 3, done
    assert "free some" in done.json["message"] or "check its space" in done.json["message"]


def test_an_open_deployment_freezes_on_a_full_disk_too(disk: Disk) -> None:
    promoted_home(disk.path)
    deployment = Deployment(from_dict({"home": str(disk.path)}))
    assert deployment.keep_room()
    disk.fill()
    deployment.freeze("the disk is full " + "x" * 400)
    assert "the disk is full" in (aliases.frozen_reason(deployment.store, "support") or "")


def test_a_disk_without_room_for_all_of_it_keeps_none(disk: Disk) -> None:
    num_bytes = shutil.disk_usage(disk.path).free - RESERVE_BYTES // 2
    (disk.path / "data").write_bytes(bytes(num_bytes))
    assert not make_reserve(disk.path)
    assert {path.name for path in disk.path.iterdir()} == {"data"}


def test_the_reserve_is_not_taken_again_while_the_disk_is_short(disk: Disk) -> None:
    num_bytes = shutil.disk_usage(disk.path).free - 2 * RESERVE_BYTES
    (disk.path / "data").write_bytes(bytes(num_bytes))
    remake_reserve(disk.path)
    assert {path.name for path in disk.path.iterdir()} == {"data"}
    (disk.path / "data").unlink()
    remake_reserve(disk.path)
    assert {path.name for path in disk.path.iterdir()} == {"reserve"}


def test_the_reserve_is_there_again_after_an_emergency_and_never_where_nobody_asked(tmp_path: Path) -> None:
    with reserve_freed(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
    assert make_reserve(tmp_path)
    with reserve_freed(tmp_path):
        assert list(tmp_path.iterdir()) == []
    assert [path.stat().st_size for path in tmp_path.iterdir()] == [RESERVE_BYTES]
