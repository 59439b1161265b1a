"""What is asked of a running worker is answered, handed over or refused: nobody waits for a worker that is gone."""

from __future__ import annotations

import threading
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from cltrain.api import Deployment, Progress
from cltrain.config import Config, load
from cltrain.errors import CltrainError, ConfigError, ConflictError, DataError, ServerError, UnavailableError, failure
from cltrain.models.base import load_base
from cltrain.registry import lease, requests
from cltrain.registry.releases import ensure_base_release
from cltrain.store.database import Store, open_store
from cltrain.store.schema import agents
from cltrain.store.schema import requests as asked
from tests.command import Command, cltrain

__all__ = ["cltrain"]  # a fixture

ANSWER = {"verdict": "hold", "reasons": ["nothing new"], "num_missing": 0, "forecast_s": None, "number": 7}
QUICK = ("trainer.num_anchors=2", "trainer.anchor_tokens=16")


def config_of(home: Path, *settings: str) -> Config:
    return load((), [f"home={home}", *QUICK, *settings])


def taken(store: Store, config: Config, ttl_s: float = 60.0) -> None:
    """A worker elsewhere has the lease and learns with this configuration."""
    lease.acquire(store, "support", "elsewhere:1", ttl_s, time.time(), settings=config.shaping())


class Answering:
    """Whoever has the lease answers what is asked, once it is."""

    def __init__(self, store: Store, answer: dict[str, Any] = ANSWER) -> None:
        self._store, self._answer, self._stop = store, answer, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            with self._store.write() as connection:
                connection.execute(update(asked).where(asked.c.outcome.is_(None)).values(outcome=self._answer))


def all_asked(store: Store) -> list[Any]:
    with store.read() as connection:
        return list(connection.execute(select(asked)))


def test_who_asks_hears_that_the_worker_is_gone_and_the_request_is_withdrawn(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    taken(store, config_of(tmp_path), ttl_s=0.3)
    said: list[str] = []
    number = requests.post(store, "support", "update", {}, time.time())
    began = time.monotonic()
    with pytest.raises(ServerError, match="no worker answers for support any more"):
        requests.wait_for(store, "support", number, wait_s=60.0, on_progress=said.append, gone_s=0.5)
    assert 0.7 < time.monotonic() - began < 10.0
    assert "lease ran out" in said[0]
    assert "withdrawn" in requests.outcome_of(store, number)["error"]


def test_a_worker_that_is_back_in_time_answers_what_was_asked_of_the_one_before(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    taken(store, config_of(tmp_path), ttl_s=0.2)
    number = requests.post(store, "support", "update", {}, time.time())

    def come_back(line: str) -> None:
        assert "lease ran out" in line
        lease.acquire(store, "support", "elsewhere:2", 60.0, time.time())
        answering.__enter__()

    answering = Answering(store)
    try:
        assert requests.wait_for(store, "support", number, wait_s=30.0, on_progress=come_back, gone_s=5.0) == ANSWER
    finally:
        answering.__exit__()


class Overtaken(Deployment):
    """Another worker takes the lease while this process gets ready to learn by itself."""

    def _own_server(self, on_progress: Progress) -> AbstractContextManager[None]:
        taken(self.store, self.config)
        return nullcontext()


def test_an_update_is_handed_to_a_worker_that_was_being_started_when_it_was_asked_for(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    deployment = Overtaken(config)
    ensure_base_release(deployment.store, "support", load_base(None).digest, now=1.0)
    with Answering(deployment.store):
        assert deployment.update() == ANSWER
    assert [row.kind for row in all_asked(deployment.store)] == ["update"]


def test_settings_that_the_running_worker_does_not_learn_with_are_refused(cltrain: Command, tmp_path: Path) -> None:
    store = open_store(tmp_path)
    taken(store, config_of(tmp_path, "trainer.lr=0.001"))
    home = f"--home={tmp_path}"
    done = cltrain("update", home, "--set=trainer.method=ewc", "--set=trainer.lr=0.001")
    assert done.code == 2, done
    assert 'trainer.method = "bounded_replay", not "ewc"' in done.err
    assert "trainer.lr" not in done.err
    assert "Stop it" in done.err
    assert all_asked(store) == []
    with Answering(store):
        for words in ((), ("--set=trainer.lr=1e-3",), ("--set=gateway.port=1",)):
            assert cltrain("update", home, *words).code == 10
    assert len(all_asked(store)) == 3


@pytest.mark.parametrize("kind", [ConflictError, DataError, ConfigError, UnavailableError, ValueError])
def test_who_asks_ends_with_the_kind_of_error_that_the_worker_met(
    cltrain: Command, tmp_path: Path, kind: type[Exception]
) -> None:
    store = open_store(tmp_path)
    taken(store, config_of(tmp_path))
    with Answering(store, failure(kind("as it is"))):
        done = cltrain("update", f"--home={tmp_path}")
    code = kind.exit_code if issubclass(kind, CltrainError) else ServerError.exit_code
    assert (done.code, "could not do it" in done.err, "as it is" in done.err) == (code, True, True), done


def test_the_status_shows_the_mode_of_the_running_worker_and_where_it_is_another(
    cltrain: Command, tmp_path: Path
) -> None:
    store = open_store(tmp_path)
    ensure_base_release(store, "support", "ab" * 32, now=1.0)
    words = ["status", f"--home={tmp_path}", "--set=agent.mode=observe"]
    assert cltrain(*words).out.startswith("agent      support  mode observe\n")
    taken(store, config_of(tmp_path, "agent.mode=approve"))
    assert "mode approve of the running worker, observe by this config\n" in cltrain(*words).out
    assert cltrain(*words, "--json").json["mode"] == "approve"
    assert "mode approve\n" in cltrain(*words, "--set=agent.mode=approve").out
    with store.write() as connection:
        connection.execute(update(agents).values(lease_until=1.0))  # it is gone
    assert cltrain(*words).out.startswith("agent      support  mode observe\n")


def test_a_tenant_is_worked_on_by_the_worker_that_holds_the_shared_lease(cltrain: Command, tmp_path: Path) -> None:
    store = open_store(tmp_path)
    of_worker = config_of(tmp_path, "trainer.lr=0.001", "rollout.kind=canary")
    for agent in ("support", "support@acme"):
        ensure_base_release(store, agent, load_base(None).digest, now=1.0)
    of_tenant = of_worker.of_agent("support@acme").shaping()
    lease.acquire(store, "support@acme", "elsewhere:1", 1.0, 1.0, settings={**of_tenant, "trainer": {"lr": 1.0}})
    tenant = (f"--home={tmp_path}", "--agent=support@acme")
    assert cltrain("status", *tenant, "--json").json["processes"]["worker"] == "down", "its last turn is long over"
    taken(store, of_worker)
    assert cltrain("status", *tenant, "--json").json["processes"]["worker"] == "up"
    with Answering(store):
        assert cltrain("update", *tenant, "--set=trainer.lr=0.001", "--set=rollout.kind=canary").code == 10
        unlike = cltrain("update", *tenant, "--set=trainer.lr=1.0")
    assert (unlike.code, "trainer.lr = 0.001, not 1.0" in unlike.err) == (2, True), unlike
    assert [row.agent for row in all_asked(store)] == ["support@acme"]
    number = requests.post(store, "support@acme", "update", {}, time.time())
    with pytest.raises(ServerError, match="did not answer request"):
        requests.wait_for(store, "support@acme", number, wait_s=0.5, on_progress=pytest.fail, gone_s=0.1)


def test_the_next_holder_of_the_lease_speaks_for_itself(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    taken(store, config_of(tmp_path, "trainer.lr=0.001"), ttl_s=0.0)
    lease.acquire(store, "support", "elsewhere:2", 60.0, time.time() + 1)
    assert lease.settings_of(store, "support") is None
