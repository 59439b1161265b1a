"""The worker goes on whatever an update or a server does, answers who asked, and keeps its lease."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from sqlalchemy import insert, select

from cltrain import tending
from cltrain.api import Deployment
from cltrain.errors import ConflictError, DataError
from cltrain.registry import aliases, lease, releases
from cltrain.registry.lease import LEASE_S
from cltrain.registry.reserve import RESERVE_BYTES
from cltrain.store.schema import agents, requests, updates
from cltrain.worker import Worker
from tests.chaos_checks import half_done
from tests.deployments import base_server, config_for, corrected, record, tickets, worker
from tests.serving import random_adapter
from tests.test_loop_crash import CUT_OFF, run_sql
from tests.test_unfinished import Killed, killed_at
from tests.windows import standing


@pytest.fixture(scope="module")
def server():
    with base_server() as url:
        yield url


@pytest.fixture
def made(tmp_path, server):
    config = config_for(tmp_path / "demo", server, trainer={"num_steps": 2, "num_anchors": 4, "checkpoint_every": 1})
    deployment = Deployment(config)
    record(deployment.store, config, [corrected(ticket) for ticket in tickets("repair", 8)])
    return config, deployment


@pytest.fixture
def keeps_signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run_until(learner: Worker, is_done: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """`run`, until `is_done` says so or time is over."""

    has_ended = threading.Event()

    def stop() -> None:
        deadline = time.monotonic() + timeout_s
        while not has_ended.wait(0.05) and not is_done() and time.monotonic() < deadline:
            pass
        learner._stop.set()

    watcher = threading.Thread(target=stop)
    watcher.start()
    try:
        learner.run()
    finally:
        has_ended.set()
        watcher.join()


# ---------------------------------------------------------------- updates that fail


@pytest.mark.parametrize(
    "error", [MemoryError("no more"), RuntimeError("CUDA out of memory"), KeyError("x"), ConflictError("seal again")]
)
def test_whatever_an_update_dies_of_is_its_verdict_and_the_worker_answers_and_goes_on(made, keeps_signals, error):
    config, deployment = made
    failures = [error]

    def fail_once(line: str) -> None:
        if "trained" in line and failures:
            raise failures.pop()

    first, second = deployment.post_request("update"), deployment.post_request("update")
    with worker(config, deployment.store) as learner:
        learner.rooms.on_progress = fail_once
        run_until(learner, lambda: deployment.request_outcome(second) is not None)
    failed = deployment.request_outcome(first)
    assert (failed["verdict"], failed["number"]) == ("error", 1)
    assert type(error).__name__ in failed["reasons"][0]
    assert deployment.request_outcome(second)["number"] == 2
    assert half_done(deployment.store, config.state_dir) == []


def test_a_worker_neither_starts_nor_updates_on_anchors_that_fail_their_hash(made):
    config, deployment = made
    with worker(config, deployment.store) as learner:
        (pinned,) = (config.state_dir / "anchors").iterdir()
        whole = pinned.read_bytes()
        pinned.write_bytes(whole.replace(b"1.0]", b"0.5]", 1))
        with pytest.raises(DataError, match="changed since they were pinned"):
            learner.update()
        (notice,) = deployment.status()["notices"]
        assert f"the anchors {pinned} were changed" in notice
        pinned.unlink()
        with pytest.raises(DataError, match="cannot be read"):
            learner.update()
        pinned.write_bytes(whole + b"\n")
    with pytest.raises(DataError, match="changed since they were pinned"), worker(config, deployment.store):
        pass
    with deployment.store.read() as connection:
        assert connection.execute(select(updates)).all() == []
    pinned.write_bytes(whole)
    assert deployment.status()["notices"] == []
    with worker(config, deployment.store) as learner:
        assert learner.update()["number"] == 1


def test_records_of_an_update_that_failed_wait_and_the_incumbent_stays(made):
    config, deployment = made

    def fail(line: str) -> None:
        if "trained" in line:
            raise MemoryError

    with worker(config, deployment.store) as learner:
        learner.rooms.on_progress = fail
        assert learner.update()["verdict"] == "error"
    assert {status for status, _ in standing(deployment.store).values()} == {"waiting"}
    assert aliases.read_alias(deployment.store, "support").release.startswith("support-v000000-")


def test_a_conclusion_that_cannot_be_written_is_answered_and_made_up_for(made):
    config, deployment = made
    number = deployment.post_request("update")
    run_sql(deployment, CUT_OFF)
    with worker(config, deployment.store) as learner:
        assert learner._answer_request()
        assert "cut off" in deployment.request_outcome(number)["error"]
        run_sql(deployment, "DROP TRIGGER cut_off")
        learner.finish_interrupted()
    (update,) = deployment.status()["updates"]
    assert update["state"] == "done"
    assert half_done(deployment.store, config.state_dir) == []


def test_one_request_is_one_update_when_at_first_neither_verdict_nor_answer_could_be_written(made):
    config, deployment = made
    number = deployment.post_request("update")
    run_sql(deployment, CUT_OFF)
    run_sql(deployment, CUT_OFF.replace("cut_off", "mute").replace("INSERT ON outbox", "UPDATE ON requests"))
    with Worker(config, deployment.store, on_progress=lambda line: None, retry_s=0.0) as learner:
        assert learner._answer_request()
        assert deployment.request_outcome(number) is None
        run_sql(deployment, "DROP TRIGGER cut_off")
        run_sql(deployment, "DROP TRIGGER mute")
        assert learner._answer_request()
    assert deployment.request_outcome(number)["number"] == 1
    (update,) = deployment.status()["updates"]
    assert (update["number"], update["state"]) == (1, "done")


def test_an_answer_that_cannot_be_written_is_not_tried_again_at_once(made):
    config, deployment = made
    deployment.post_request("update")
    run_sql(deployment, "CREATE TRIGGER mute BEFORE UPDATE ON requests BEGIN SELECT RAISE(ABORT, 'mute'); END")
    with worker(config, deployment.store) as learner:
        deployment.freeze("so that it is quick")
        assert learner._answer_request()
        assert not learner._answer_request()


def test_the_worker_sets_room_aside_again_after_an_emergency(made, keeps_signals):
    config, deployment = made
    with worker(config, deployment.store) as learner:
        assert not (config.state_dir / "reserve").exists()
        run_until(learner, (config.state_dir / "reserve").exists, timeout_s=10.0)
    assert (config.state_dir / "reserve").stat().st_size == RESERVE_BYTES


def test_probes_that_cannot_be_made_keep_nobody_waiting(made, keeps_signals, tmp_path, caplog):
    config, deployment = made
    store = deployment.store
    with worker(config, store) as learner:
        serving = aliases.read_alias(store, "support")
        weights = random_adapter(learner.rooms.base, tmp_path / "made", 1)
        name = releases.seal(store, config.state_dir, "support", weights, serving.release, {}, now=2.0).name
        aliases.move_alias(store, "support", expected=serving, to=name, fence=None, now=3.0, is_human=True)
        learner.rooms = replace(learner.rooms, base=None)  # whatever a forward dies of
        deployment.freeze("so that it is quick")
        number = deployment.post_request("update")
        run_until(learner, lambda: deployment.request_outcome(number) is not None, timeout_s=5.0)
        answer = deployment.request_outcome(number)
        assert ("frozen" in answer["error"], answer["exit_code"]) == (True, ConflictError.exit_code)
        assert not tending.make_missing_probes(learner.rooms)
        said = [line for line in caplog.records if "cannot be proved" in line.getMessage()]
        assert [line.exc_info is not None for line in said] == [True], "said once, with where it happened"
        learner.rooms = None
        learner._probes.wait(0.0)
        with pytest.raises(AttributeError):
            learner._keep_probes()
        learner._keep_probes()  # not again at once


def test_a_lost_lease_stops_the_worker(made, keeps_signals):
    config, deployment = made
    with worker(config, deployment.store) as learner:
        lease.acquire(deployment.store, "support", "elsewhere:1", LEASE_S, time.time(), lambda holder: False)
        with pytest.raises(ConflictError, match="not the newest"):
            run_until(learner, lambda: False, timeout_s=10.0)


# ---------------------------------------------------------------- requests


def test_a_request_that_nobody_waits_for_any_more_is_not_run(made):
    config, deployment = made
    with deployment.store.write() as connection:
        old = {"agent": "support", "kind": "update", "options": {}, "created_at": time.time() - 7200}
        number = connection.execute(insert(requests).values(**old)).inserted_primary_key[0]
    with worker(config, deployment.store) as learner:
        assert learner._answer_request()
    assert "120 minutes ago" in deployment.request_outcome(number)["error"]
    assert deployment.status()["updates"] == []


def test_a_request_whose_worker_died_is_answered_with_its_own_update_and_not_run_again(made):
    config, deployment = made
    number = deployment.post_request("update")
    with worker(config, deployment.store) as learner:
        learner.rooms.on_progress = killed_at("trained 1 steps")
        with pytest.raises(Killed):
            learner._answer_request()
    with worker(config, deployment.store) as learner:
        learner.finish_interrupted()
        assert learner._answer_request()
    assert deployment.request_outcome(number)["number"] == 1
    with deployment.store.read() as connection:
        assert list(connection.scalars(select(updates.c.number))) == [1]


# ---------------------------------------------------------------- the lease


class Hanging(ThreadingHTTPServer):
    """A server that takes requests and answers none of them, /health only once `is_well` is set."""

    daemon_threads = True

    def __init__(self) -> None:
        self.is_well, self.is_over = threading.Event(), threading.Event()
        super().__init__(("127.0.0.1", 0), Request)


class Request(BaseHTTPRequestHandler):
    server: Hanging

    def do_GET(self) -> None:
        (self.server.is_well if self.path == "/health" else self.server.is_over).wait()
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    with Hanging() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.is_well.set()
        server.is_over.set()
        server.shutdown()


def lease_until(deployment: Deployment) -> float:
    with deployment.store.read() as connection:
        return connection.execute(select(agents.c.lease_until)).scalar() or 0.0


def times_renewed(deployment: Deployment, for_s: float) -> int:
    seen = set()
    for _ in range(int(for_s / 0.1)):
        seen.add(lease_until(deployment))
        time.sleep(0.1)
    return len(seen - {0.0}) - 1


def test_the_lease_is_renewed_while_the_worker_still_waits_for_its_server(tmp_path, hanging):
    config = config_for(tmp_path / "demo", f"http://127.0.0.1:{hanging.server_port}")
    deployment = Deployment(config)
    renewed = []

    def watch() -> None:
        while not lease_until(deployment):
            time.sleep(0.05)
        renewed.append(times_renewed(deployment, 5.0))
        hanging.is_well.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    with worker(config, deployment.store):
        watcher.join()
    assert renewed[0] >= 2


def test_a_server_that_hangs_does_not_cost_the_lease(tmp_path, hanging):
    config = config_for(tmp_path / "demo", f"http://127.0.0.1:{hanging.server_port}", server={"timeout_s": 20.0})
    hanging.is_well.set()
    deployment = Deployment(config)
    with worker(config, deployment.store):
        assert times_renewed(deployment, 8.0) >= 3
        hanging.is_over.set()


def test_a_worker_that_could_not_start_gives_its_lease_back(tmp_path, server):
    config = config_for(tmp_path / "demo", server)
    missing = config.experience.model_copy(update={"rehearsal": tmp_path / "nowhere.jsonl"})
    deployment = Deployment(config)
    with pytest.raises(DataError), worker(config.model_copy(update={"experience": missing}), deployment.store):
        pass
    assert lease_until(deployment) == 0.0
