"""Server, disk or judging process gone in the middle of a gate: an error, the incumbent serves, the next gate works."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from cltrain.api import Deployment
from cltrain.config import Config
from cltrain.deploy.client import ServerClient
from cltrain.errors import DataError
from cltrain.registry import aliases, releases
from tests.chaos_checks import broken_serving, half_done
from tests.command import free_port
from tests.deployments import base_server, config_for, corrected, record, tickets, worker
from tests.judging import chat_server
from tests.test_bad_machine import small_tmpfs

MID_GATE = "judged on 0 of"
QUICK = {"num_steps": 2, "num_anchors": 4, "checkpoint_every": 1}


def settings(home: Path, url: str, **gate: Any) -> Config:
    gate = {"items_per_gate": 60, "margin": 0.1, "filter_and_retry": False, **gate}
    return config_for(home, url, trainer=QUICK, gate=gate)


def made(home: Path, url: str, **gate: Any) -> tuple[Config, Deployment]:
    config = settings(home, url, **gate)
    deployment = Deployment(config)
    record(deployment.store, config, [corrected(ticket) for ticket in tickets("repair", 8)])
    return config, deployment


def once_mid_gate(act: Callable[[], None]) -> Callable[[str], None]:
    """Progress that does something the first time that a gate has begun to judge."""
    done: list[str] = []

    def on_progress(line: str) -> None:
        if MID_GATE in line and not done:
            done.append(line)
            act()

    return on_progress


def is_whole(deployment: Deployment, config: Config) -> bool:
    return not broken_serving(deployment.store, config.state_dir) and not half_done(deployment.store, config.state_dir)


def start_server(port: int, home: Path) -> subprocess.Popen[bytes]:
    words = ["run", "--only=server", f"--home={home}", f"--set=server.port={port}"]
    started = subprocess.Popen([sys.executable, "-m", "cltrain", *words], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    with ServerClient(f"http://127.0.0.1:{port}", "base") as client:
        while not client.health():
            assert started.poll() is None, "the server ended at its start"
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.2)
    return started


def test_a_server_killed_in_the_middle_of_a_gate(tmp_path: Path) -> None:
    port = free_port()
    server = start_server(port, tmp_path / "of-server")
    config, deployment = made(tmp_path / "demo", f"http://127.0.0.1:{port}")

    def kill() -> None:
        os.kill(server.pid, signal.SIGKILL)
        server.wait()

    try:
        with worker(config, deployment.store) as learner:
            base = aliases.read_alias(deployment.store, "support").release
            learner.rooms.evidence.on_progress = once_mid_gate(kill)
            failed = learner.update()
            assert (failed["verdict"], failed["decision"]["codes"]) == ("error", ["outage"]), failed["reasons"]
            assert aliases.read_alias(deployment.store, "support").release == base
            assert is_whole(deployment, config)
            server = start_server(port, tmp_path / "of-server")
            again = learner.update()
            assert again["verdict"] in ("promote", "hold", "reject"), again["reasons"]
            assert again["decision"]["items_used"]
            assert is_whole(deployment, config)
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def url():
    with base_server() as url:
        yield url


def test_a_judge_killed_in_the_middle_of_a_gate(tmp_path: Path, url: str) -> None:
    port, judged = free_port(), tmp_path / "judged.jsonl"
    rows = [{"id": f"j{i}", "messages": [{"role": "user", "content": f"thanks {i}"}]} for i in range(8)]
    judged.write_text("".join(json.dumps({**row, "scorer": "judge", "rubric": "is polite"}) + "\n" for row in rows))
    judge = {"url": f"http://127.0.0.1:{port}/v1", "model": "grader"}
    config, deployment = made(
        tmp_path / "demo", url, judge=judge, suites=[{"name": "judged", "path": str(judged), "items": "retention"}]
    )
    with worker(config, deployment.store) as learner, ExitStack() as alive:
        base = aliases.read_alias(deployment.store, "support").release
        alive.enter_context(chat_server(lambda _: '{"score": 1}', port))
        learner.rooms.evidence.on_progress = once_mid_gate(alive.close)
        failed = learner.update()
        assert (failed["verdict"], failed["decision"]["codes"]) == ("error", ["outage"]), failed["reasons"]
        assert "the judge grader" in failed["reasons"][0]
        assert aliases.read_alias(deployment.store, "support").release == base
        assert is_whole(deployment, config)
        with chat_server(lambda _: '{"score": 1}', port) as server:
            again = learner.update()
            assert server.asked
        assert again["verdict"] in ("promote", "hold", "reject"), again["reasons"]
        assert any(item.startswith("j") for item in again["decision"]["items_used"])


def test_a_disk_that_fills_in_the_middle_of_a_gate(tmp_path: Path, url: str, caplog: pytest.LogCaptureFixture) -> None:
    with small_tmpfs(tmp_path / "disk", "24m") as disk:
        config, deployment = made(disk.path, url)
        with worker(config, deployment.store) as learner:
            base = aliases.read_alias(deployment.store, "support").release
            learner.rooms.evidence.on_progress = once_mid_gate(disk.fill)
            with pytest.raises(DataError, match="free some"):
                learner.update()
            assert aliases.read_alias(deployment.store, "support").release == base
            assert "the gate could not judge" in caplog.text
            (full,) = deployment.status()["updates"]
            assert (full["state"], full["verdict"]) == ("judging", None), "nobody could write down that it was an error"
            disk.free()
            learner.finish_interrupted()
        (first,) = deployment.status()["updates"]
        assert (first["state"], first["verdict"]) in [("done", v) for v in ("promote", "hold", "reject")], first
        assert is_whole(deployment, config)
        record(deployment.store, config, [corrected(ticket) for ticket in tickets("gift", 8)])
        with worker(config, deployment.store) as learner:
            again = learner.update()
        assert again["verdict"] in ("promote", "hold", "reject"), again["reasons"]
        deployment.store.close()


def die_mid_gate(home: str, url: str) -> None:
    """One update in this process, which kills itself as soon as the gate judges."""
    config = settings(Path(home), url)
    with worker(config, Deployment(config).store) as learner:
        learner.rooms.evidence.on_progress = once_mid_gate(lambda: os.kill(os.getpid(), signal.SIGKILL))
        learner.update()


def test_the_judging_process_killed_in_the_middle_of_a_gate(tmp_path: Path, url: str) -> None:
    home = tmp_path / "demo"
    config, deployment = made(home, url)
    code = f"from tests.test_gate_outages import die_mid_gate; die_mid_gate({str(home)!r}, {url!r})"
    died = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    (update,) = deployment.status()["updates"]
    assert update["state"] == "judging"
    base = releases.list_releases(deployment.store, "support")[0].name
    assert aliases.read_alias(deployment.store, "support").release == base
    with worker(config, deployment.store) as learner:
        learner.finish_interrupted()
    (update,) = deployment.status()["updates"]
    assert update["state"] == "done"
    assert update["verdict"] in ("promote", "hold", "reject")
    assert is_whole(deployment, config)
