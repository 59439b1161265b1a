"""Two replicas on machines of their own, one cut off in the middle of a rollout: clients see the old release, then the
new one, and nothing else; no request fails; after healing the lost one is loaded, proved, and serves again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from cltrain import plans
from cltrain.api import Deployment
from cltrain.deploy import readiness
from cltrain.deploy.client import ServerClient
from cltrain.gateway.app import create_gateway
from cltrain.gateway.upstream import Upstream
from cltrain.loop import Attempt, conclude
from cltrain.models.adapter import read_adapter
from cltrain.models.base import Base, load_base
from cltrain.records import Check, Code, Decision, Verdict
from cltrain.registry import aliases, releases
from cltrain.rooms import prove, tidy_server
from cltrain.store.schema import updates
from cltrain.tending import make_missing_probes
from cltrain.worker import Worker
from tests.deployments import config_for, worker
from tests.gateway_parts import served
from tests.namespaces import machine, server_in, why_not
from tests.serving import random_adapter

BETTER = Check("gain in suite", Code.GAIN, Verdict.PROMOTE, "+0.2", 0.9, 0.7, 0.2, 0.1, 0.3, 40)
ASKED = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 4}


@dataclass(frozen=True)
class Row:
    """One request as its client saw it; times by the clock of this machine."""

    client: int
    began: float
    ended: float
    status: int
    release: str
    replica: str
    text: str


class Clients:
    """Each asks again as soon as it is answered, in a new episode every time."""

    def __init__(self, url: str, count: int) -> None:
        self.rows: list[Row] = []
        self._stop = threading.Event()
        self._url = url
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def _run(self, client: int) -> None:
        with httpx.Client(base_url=self._url, timeout=120.0, trust_env=False) as http:
            for number in range(1_000_000):
                if self._stop.is_set():
                    return
                began, headers = time.time(), {"X-Session-Id": f"{client}-{number}", "X-Session-Done": "1"}
                answer = http.post("/v1/chat/completions", json={"model": "support", **ASKED}, headers=headers)
                text = answer.json()["choices"][0]["message"]["content"] if answer.status_code == 200 else answer.text
                seen = [answer.headers.get(f"x-cltrain-{what}", "") for what in ("adapter", "replica")]
                self.rows.append(Row(client, began, time.time(), answer.status_code, seen[0], seen[1], text))
                time.sleep(0.02)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def until(holds: Callable[[], bool], what: str, timeout_s: float = 300.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def sealed(learner: Worker, base: Base, home: Path, seed: int, parent: str) -> str:
    made = random_adapter(base, home / f"made-{seed}", seed)
    found = releases.seal(learner.store, learner.config.state_dir, "support", made, parent, {}, now=time.time())
    return found.name


def nothing() -> None:
    pass


def roll_out(
    learner: Worker,
    name: str,
    was: str,
    before_proof: Callable[[], None] = nothing,
    before_flip: Callable[[], None] = nothing,
) -> tuple[float, float]:
    """Load everywhere, prove on each, and conclude as the loop does after the gate's yes. When the alias moved."""
    rooms = learner.rooms
    directory = releases.release_dir(learner.config.state_dir, releases.get(learner.store, name))
    assert directory is not None
    with rooms.server_lock:
        tidy_server(rooms)
        rooms.server.load(name, directory)
    before_proof()
    old = releases.release_dir(learner.config.state_dir, releases.get(learner.store, was))
    before = None if old is None else read_adapter(old)
    prove(rooms, name, read_adapter(directory), before, rooms.anchors, was)
    release, alias = releases.get(learner.store, name), aliases.read_alias(learner.store, "support")
    plan = plans.Plan(
        id=name, agent="support", number=release.number, parent=was, alias=alias, is_trial=False, seed=0,
        work_dir=learner.config.state_dir / "work" / name, window=(), fresh=(), replay=(), set_aside=(), notes=(),
        suspicious=(), refusal=None, manifest={"config": "c", "base": "b", "anchors": "a", "settings": {}},
    )  # fmt: skip
    row = {"id": name, "agent": "support", "number": release.number, "state": "judging", "parent": was, "mode": "auto"}
    with learner.store.write() as connection:
        more = {"candidate": name, "fence": rooms.fence, "manifest": {}, "started_at": time.time()}
        connection.execute(updates.insert().values(**row, **more))
    before_flip()
    began = time.time()
    summary = conclude(rooms, plan, Attempt((), Decision(Verdict.PROMOTE, ("better",), (BETTER,)), release=release))
    assert summary["is_served"], summary["reasons"]
    return began, time.time()


@pytest.mark.chaos
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("when", ["before_proof", "before_flip"])
def test_a_replica_cut_off_in_the_middle_of_a_rollout_shows_no_mixed_fleet_and_comes_back(
    tmp_path: Path, when: str
) -> None:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    base = load_base(None)
    with ExitStack() as stack:
        machines = [stack.enter_context(machine(letter, 41 + i)) for i, letter in enumerate("ab")]
        for number, where in enumerate(machines):
            stack.enter_context(server_in(where, tmp_path / f"of-server-{number}"))
        urls = [where.url for where in machines]
        trainer = {"num_anchors": 4, "num_steps": 2, "checkpoint_every": 1}
        config = config_for(tmp_path / "demo", urls[0], trainer=trainer)
        server = {**config.server.model_dump(), "url": None, "urls": tuple(urls), "timeout_s": 20.0}
        config = config.model_copy(update={"server": type(config.server)(**server)})
        store = Deployment(config).store
        learner = stack.enter_context(worker(config, store))

        def is_ready(url: str, release: str) -> bool:
            with store.read() as connection:
                rows = readiness.rows_of(connection, url)
            return rows[readiness.ITSELF].state == "up" and release in rows and rows[release].state == "proved"

        bare = aliases.read_alias(store, "support").release
        old = sealed(learner, base, tmp_path, 1, bare)
        roll_out(learner, old, bare)
        make_missing_probes(learner.rooms)
        until(lambda: all(is_ready(url, old) for url in urls), "the fleet did not become ready for the first release")

        new = sealed(learner, base, tmp_path, 2, old)
        texts = {}
        with ServerClient(urls[0], "base", 30) as client:
            for name in (old, new):
                directory = releases.release_dir(config.state_dir, releases.get(store, name))
                assert directory is not None
                client.load(name, directory)
                said = client.generate(name, ASKED["messages"], max_tokens=4)
                texts[name] = said.message["content"]
            client.unload(new)
        assert texts[old] != texts[new]

        upstreams = [Upstream(url, base_model="base", timeout_s=60.0) for url in urls]
        gateway = stack.enter_context(served(create_gateway(store, config, upstreams)))
        clients = Clients(gateway, 4)
        stack.callback(clients.stop)
        until(lambda: {row.replica for row in clients.rows} == set(urls), "not every replica answers")

        lost = machines[1]
        began, ended = roll_out(learner, new, old, **{when: lost.cut})
        until(lambda: not is_ready(lost.url, new), "nobody saw that it is gone")
        until(lambda: sum(row.release == new for row in clients.rows) >= 50, "nobody is answered by the new release")
        cut_off = len(clients.rows)
        lost.heal()
        until(lambda: is_ready(lost.url, new), "the lost replica was not brought back")
        assert is_ready(lost.url, old), "what a rollback would go to is not there"
        until(lambda: any(row.replica == lost.url for row in clients.rows[cut_off:]), "it does not serve again")
        clients.stop()

    rows = clients.rows
    assert [row for row in rows if row.status != 200] == []
    assert [row for row in rows if row.text != texts[row.release]] == [], "an answer by other weights than it says"
    assert {row.release for row in rows} == {old, new}
    assert [row for row in rows if row.began > ended and row.release != new] == []
    assert [row for row in rows if row.ended < began and row.release != old] == []
    for client in range(4):
        seen = [row.release for row in rows if row.client == client]
        assert seen == sorted(seen), "a client went back from the new release to the old one"
    assert {row.replica for row in rows[cut_off:]} == set(urls)
    retried = [row for row in rows if row.ended - row.began > 1.0 and row.began < ended]
    print(f"{len(rows)} requests, {len(retried)} took more than a second around the cut, none failed")
