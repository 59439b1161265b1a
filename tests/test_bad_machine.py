"""Taken ports, full disks, processes that keep ending: each gets a clear word, and nothing is lost."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import select

from cltrain import launch
from cltrain.config import from_dict
from cltrain.errors import ConfigError, DataError
from cltrain.experience.recording import read_trajectories
from cltrain.registry.aliases import read_alias
from cltrain.store.database import open_store
from cltrain.store.schema import updates
from cltrain.worker import Worker
from tests.command import Command, cltrain, free_port, promoted_home
from tests.deployments import base_server, corrected, tickets
from tests.gateway_parts import running
from tests.windows import options, standing, with_records

__all__ = ["cltrain"]  # a fixture


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with base_server() as url:
        yield url


# ---------------------------------------------------------------- ports


@pytest.mark.parametrize("name", ["server", "gateway"])
@pytest.mark.parametrize("command", ["run", "serve"])
def test_a_busy_port_ends_with_code_2_and_names_the_setting(
    cltrain: Command, tmp_path: Path, name: str, command: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ports = {"server": free_port(), "gateway": free_port(), name: port}
        settings = [f"--set={each}.port={number}" for each, number in ports.items()]
        done = cltrain(command, f"--home={tmp_path / 'home'}", *settings)
    assert done.code == 2
    assert not (tmp_path / "home").exists(), "what is refused leaves nothing behind"
    assert f"{name}.port = {port} cannot be used on 127.0.0.1" in done.err
    assert f"--set {name}.port=PORT" in done.err


@pytest.mark.parametrize("name", ["server", "gateway"])
def test_a_busy_port_of_one_process_alone_names_the_setting_too(cltrain: Command, tmp_path: Path, name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = cltrain("run", f"--only={name}", f"--home={tmp_path}", f"--set={name}.port={port}")
    assert (done.code, f"{name}.port = {port}" in done.err) == (2, True), done


def test_a_port_that_nobody_could_find_is_refused(cltrain: Command, tmp_path: Path) -> None:
    done = cltrain("serve", f"--home={tmp_path}", "--set=gateway.port=0", "--set=server.url=http://127.0.0.1:9")
    assert (done.code, "gateway.port = 0" in done.err) == (2, True), done


def test_what_a_process_ends_with_at_its_start_is_what_the_command_ends_with(cltrain: Command, tmp_path: Path) -> None:
    """The embedded server cannot load this base: data, not a server that is away."""
    words = ("update", f"--home={tmp_path}", f"--base={tmp_path}", f"--set=server.port={free_port()}", "--json")
    done = cltrain(*words)
    assert (done.code, done.json["error"]) == (3, "DataError"), done
    assert "not a model directory" in done.json["message"]


@pytest.mark.parametrize("words", [("run",), ("serve",), ("run", "--only=gateway")])
def test_a_base_that_is_none_is_refused_before_anything_is_made(
    cltrain: Command, tmp_path: Path, words: tuple[str, ...]
) -> None:
    ports = [f"--set={name}.port={free_port()}" for name in ("server", "gateway")]
    done = cltrain(*words, f"--home={tmp_path / 'home'}", f"--set=base.path={tmp_path}", *ports)
    assert (done.code, "not a model directory" in done.err) == (3, True), done
    assert not (tmp_path / "home").exists()


# ---------------------------------------------------------------- a full disk


@dataclass
class Disk:
    """A place that can be filled and freed again."""

    path: Path
    fill: Callable[[], None]
    free: Callable[[], None]


@contextmanager
def small_tmpfs(path: Path, size: str) -> Iterator[Disk]:
    """A real file system of that size; skips where none may be mounted."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("no file system may be mounted here")

    def fill() -> None:
        with (path / "filler").open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        assert shutil.disk_usage(path).free == 0

    try:
        yield Disk(path, fill, lambda: (path / "filler").unlink())
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@contextmanager
def limited_files(path: Path) -> Iterator[Disk]:
    """Files that may not grow beyond what the store's log has now: what anybody can have for a full disk."""
    path.mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, ((path / "store.db-wal").stat().st_size, hard))

    def free() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    try:
        yield Disk(path, fill, free)
    finally:
        free()


@pytest.mark.parametrize("kind", ["tmpfs", "limit"])
def test_on_a_full_disk_answers_go_out_unrecorded_and_the_store_stays_whole(tmp_path: Path, kind: str) -> None:
    with ExitStack() as stack:
        where = tmp_path / "state"
        disk = stack.enter_context(small_tmpfs(where, "4m") if kind == "tmpfs" else limited_files(where))
        gateway = stack.enter_context(running(disk.path, gateway={"record_timeout_s": 2.0}))
        before = [gateway.chat(f"before {i}") for i in range(3)]
        disk.fill()
        during = [gateway.chat(f"during {i} " + "x" * 20_000) for i in range(3)]
        during += [gateway.chat("streamed " + "x" * 20_000, stream=True)]
        refused = gateway.http.post(
            "/v1/feedback", json={"target": before[0].headers["x-cltrain-record"], "text": "x" * 20_000}
        )
        disk.free()
        threading.Event().wait(2.1)  # the gateway looks again after two seconds
        after = [gateway.chat(f"after {i}") for i in range(3)]
        assert {a.status_code for a in [*before, *during, *after]} == {200}
        assert [a.headers["x-cltrain-recorded"] for a in [*before, *during[:3], *after]] == [*"111", *"000", *"111"]
        assert "heard during 0" in during[0].json()["choices"][0]["message"]["content"]
        assert '"recorded":0' in during[3].text
        assert refused.status_code >= 500
        acknowledged = {a.headers["x-cltrain-trajectory"] for a in [*before, *after]}
        assert {t.id for t in read_trajectories(gateway.store, "support")} == acknowledged
        with sqlite3.connect(disk.path / "store.db") as database:
            assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_an_update_on_a_full_disk_says_so_and_works_once_there_is_space(
    cltrain: Command, tmp_path: Path, url: str
) -> None:
    with small_tmpfs(tmp_path / "state", "16m") as disk:
        store = with_records(disk.path, [corrected(ticket) for ticket in tickets("repair", 4)])
        assert cltrain("status", f"--home={disk.path}").code == 0
        disk.fill()
        done = cltrain("update", *options(disk.path, url))
        assert done.code == 3, done
        assert "free some" in done.json["message"]
        assert cltrain("status", f"--home={disk.path}").code == 0
        disk.free()
        done = cltrain("update", *options(disk.path, url))
        assert done.code in (0, 10, 11), done
        assert done.json["num_kept"] == 4
        store.close()


def test_a_disk_that_fills_during_training_loses_no_record_and_moves_nothing(tmp_path: Path, url: str) -> None:
    with small_tmpfs(tmp_path / "state", "16m") as disk:
        store = with_records(disk.path, [corrected(ticket) for ticket in tickets("repair", 4)])
        config = from_dict(
            {
                "home": str(disk.path),
                "agent": {"mode": "auto"},
                "server": {"url": url},
                "experience": {"min_window": 1, "principal_quota": 1.0},
                "trainer": {"num_steps": 3, "checkpoint_every": 1, "num_anchors": 2, "anchor_tokens": 16},
            }
        )
        filled: list[str] = []

        def fill_once(line: str) -> None:
            if "trained" in line and not filled:
                filled.append(line)
                disk.fill()

        with Worker(config, store, on_progress=fill_once) as worker:
            with pytest.raises(DataError, match="free some"):
                worker.update()
            disk.free()
        assert filled
        assert read_alias(store, "support").release.startswith("support-v000000-")
        with Worker(config, store, on_progress=lambda _: None) as worker:
            worker.finish_interrupted()
        with store.read() as connection:
            rows = connection.execute(select(updates.c.state, updates.c.verdict)).all()
        assert {row.state for row in rows} <= {"done", "discarded"}
        assert {status for status, _ in standing(store).values()} <= {"waiting", "replay"}
        store.close()


def test_a_state_directory_that_cannot_be_written_is_explained(cltrain: Command, tmp_path: Path) -> None:
    with small_tmpfs(tmp_path / "state", "16m") as disk:
        promoted_home(disk.path)
        subprocess.run(["mount", "-o", "remount,ro", str(disk.path)], check=True)
        for words in (["status"], ["rollback"], ["update"]):
            done = cltrain(*words, f"--home={disk.path}")
            assert (done.code, "cannot be written" in done.err) == (3, True), (words, done)
        done = cltrain("doctor", f"--home={disk.path}", "--json")
        bad = {finding["what"]: finding["detail"] for finding in done.json["findings"] if finding["state"] == "bad"}
        assert done.code == 1
        assert {"state", "decisions"} <= bad.keys()
        assert "cannot be written" in bad["state"]


def test_a_store_that_is_no_file_is_explained(tmp_path: Path) -> None:
    (tmp_path / "store.db").mkdir()
    with pytest.raises(DataError, match="cannot be written"):
        open_store(tmp_path)


# ---------------------------------------------------------------- processes that keep ending


class Ending(launch.Fleet):
    """Processes that end at once, as one does whose settings are wrong."""

    def start(self, name: str) -> None:
        self.log_file(name).parent.mkdir(parents=True, exist_ok=True)
        self.log_file(name).write_text("it ended\n")
        self.processes[name] = subprocess.Popen([sys.executable, "-S", "-c", ""])

    def wait_until_up(self, name: str, timeout_s: float = 120.0) -> None:
        self.processes[name].wait()


def test_a_sigterm_in_the_middle_of_a_start_leaves_no_process_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    born: list[subprocess.Popen[bytes]] = []

    class Interrupted(subprocess.Popen[bytes]):
        def __init__(self, *_: object, **__: object) -> None:
            super().__init__([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
            born.append(self)
            os.kill(os.getpid(), signal.SIGTERM)  # it exists, and nobody has it yet

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as ended, launch.Fleet(from_dict({"home": str(tmp_path)}), (), ("worker",)):
            pass
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (ended.value.code, len(born)) == (128 + signal.SIGTERM, 1)
    assert born[0].poll() == -signal.SIGTERM


def test_a_fleet_that_cannot_start_leaves_the_signals_as_they_were(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        fleet = launch.Fleet(from_dict({"home": str(tmp_path), "gateway": {"port": 0}}), (), ("gateway",))
        with pytest.raises(ConfigError, match="name a port"), fleet:
            pass
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_start_says_what_it_waits_for(tmp_path: Path) -> None:
    said: list[str] = []
    with Ending(from_dict({"home": str(tmp_path)}), (), ("worker",), on_event=said.append):
        assert said == ["starting worker ..."]


def test_a_worker_that_keeps_ending_is_given_up_and_serving_goes_on(tmp_path: Path) -> None:
    said: list[str] = []
    fleet = Ending(from_dict({"home": str(tmp_path)}), (), ("worker",), on_event=said.append)
    fleet.start("worker")
    for _ in range(launch.MAX_RESTARTS + 1):
        fleet.processes["worker"].wait()
        fleet.revive()
    assert said[0] == "worker ended with code 0 (it ended); starting it again"
    assert fleet.revive() == []
    assert fleet.processes == {}
    assert "serving goes on" in said[-1]
