"""An update that is cut off at its worst moments: nothing is half true, and the next worker carries on at once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
from sqlalchemy.exc import DBAPIError

from cltrain import plans
from cltrain.api import Deployment
from cltrain.registry import aliases, lease, releases
from cltrain.registry.lease import is_alive
from tests.chaos_checks import broken_serving, half_done
from tests.deployments import base_server, config_for, corrected, record, tickets, worker

# the event is the last thing that an update writes
CUT_OFF = "CREATE TRIGGER cut_off BEFORE INSERT ON outbox BEGIN SELECT RAISE(ABORT, 'cut off'); END"


@pytest.fixture
def server():
    with base_server() as url:
        yield url


@pytest.fixture
def made(tmp_path, server):
    config = config_for(tmp_path / "demo", server)
    deployment = Deployment(config)
    record(deployment.store, config, [corrected(ticket) for ticket in tickets("repair", 24)])
    return config, deployment


def run_sql(deployment: Deployment, statement: str) -> None:
    with deployment.store.write() as connection:
        connection.exec_driver_sql(statement)


def test_an_update_cut_off_while_its_verdict_is_written_has_not_swapped_and_carries_on(made):
    config, deployment = made
    run_sql(deployment, CUT_OFF)
    with worker(config, deployment.store) as learner:
        with pytest.raises(DBAPIError, match="cut off"):
            learner.update()
        assert aliases.read_alias(deployment.store, "support").release.startswith("support-v000000-")
        assert releases.list_releases(deployment.store, "support")[-1].status == "candidate"
        run_sql(deployment, "DROP TRIGGER cut_off")
    with worker(config, deployment.store) as learner:
        learner.finish_interrupted()
    (done,) = deployment.status()["updates"]
    assert (done["state"], done["verdict"]) == ("done", "promote")
    assert aliases.read_alias(deployment.store, "support").release == done["candidate"]
    assert broken_serving(deployment.store, config.state_dir) == []
    assert half_done(deployment.store, config.state_dir) == []


def test_an_interrupted_update_is_discarded_whole_when_the_alias_moved_on(made):
    config, deployment = made
    with worker(config, deployment.store) as learner:
        first = learner.update()
        assert first["verdict"] == "promote", first["reasons"]
        record(deployment.store, config, [corrected(ticket) for ticket in tickets("gift", 24)])
        run_sql(deployment, "CREATE TRIGGER cut_off BEFORE INSERT ON outbox BEGIN SELECT RAISE(ABORT, 'cut off'); END")
        with pytest.raises(DBAPIError, match="cut off"):
            learner.update()
        run_sql(deployment, "DROP TRIGGER cut_off")
        deployment.rollback(keep_learning=True)
        learner.finish_interrupted()
    second = deployment.status()["updates"][0]
    assert second["state"] == "discarded"
    assert second["candidate"] not in (None, first["candidate"])
    assert releases.get(deployment.store, second["candidate"]).status == "rejected"
    assert half_done(deployment.store, config.state_dir) == []


def test_what_a_concluded_update_left_on_disk_goes_at_the_next_start(made):
    config, deployment = made
    with worker(config, deployment.store) as learner:
        summary = learner.update()
        left = config.state_dir / "updates" / summary["update"]
        left.mkdir()
        (left / plans.ROWS_FILE).write_text(json.dumps({}))
        learner.finish_interrupted()
    assert not left.exists()


def test_the_lease_of_a_worker_that_was_killed_here_is_not_waited_for(tmp_path):
    deployment = Deployment(config_for(tmp_path / "demo", "http://127.0.0.1:9"))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = socket.gethostname()
    first = lease.acquire(deployment.store, "support", f"{host}:{dead.pid}", 60.0, 0.0, is_alive)
    assert lease.acquire(deployment.store, "support", "next", 60.0, 1.0, is_alive) > first
    assert is_alive(f"{host}:{os.getpid()}")
    assert is_alive(f"elsewhere:{dead.pid}")
