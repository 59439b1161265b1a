"""kill -9 under load, every unsynced write lost: nothing that was acknowledged is lost or doubled."""

from __future__ import annotations

import random
import socket
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.crash import Crashable, build_library
from tests.gateway_load import Load, check
from tests.gateway_parts import FakeServer, served


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def wait_until_up(url: str, log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            if httpx.get(f"{url}/health", timeout=5.0, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline, f"the gateway did not come up:\n{log.read_text()}"
        time.sleep(0.02)


@pytest.mark.chaos
def test_what_a_killed_gateway_acknowledged_is_there_once(tmp_path: Path) -> None:
    rng = random.Random(20)
    state, log, port = tmp_path / "state", tmp_path / "gateway.log", free_port()
    url = f"http://127.0.0.1:{port}"
    with served(FakeServer().app) as upstream, Crashable(build_library(tmp_path), state, tmp_path / "undo") as gateway:
        settings = {"home": state, "server.url": upstream, "gateway.port": port, "agent.name": "support"}
        command = [sys.executable, "-m", "cltrain.gateway"]
        for key, value in settings.items():
            command += ["--set", f"{key}={value}"]
        gateway.start(command, output=log)
        wait_until_up(url, log)
        with Load(url, num_clients=6) as load:
            for _ in range(5):
                before = len(load.acknowledged)
                time.sleep(rng.uniform(0.3, 1.0))
                dropped = gateway.crash()
                acknowledged = len(load.acknowledged)
                print(f"acknowledged {acknowledged - before}, dropped {dropped.num_writes} writes")
                check(state, load.acknowledged)
                gateway.start(command, output=log)
                wait_until_up(url, log)
            deadline = time.monotonic() + 30  # and it goes on working
            while len(load.acknowledged) < acknowledged + 20:
                assert time.monotonic() < deadline, "nothing was acknowledged after the last crash"
                time.sleep(0.02)
        gateway.crash()
        check(state, load.acknowledged)
    assert load.failures == []
    assert load.num_resent > 0
    assert len(load.acknowledged.trajectories) > 20
    assert len(load.acknowledged.feedback) > 20
    assert len(load.acknowledged.answers) > 20
