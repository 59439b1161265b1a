"""Two gateway processes on one store: an episode goes on through either, both see a swap, a key's end and each other's
records, and what one of them acknowledged is there once when the other is killed.
"""

from __future__ import annotations

import re
import sqlite3
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import httpx
import pytest
from sqlalchemy import func, select

from cltrain.experience.recording import read_trajectories
from cltrain.gateway import keys
from cltrain.store.database import STORE_FILE, Store, open_store
from cltrain.store.schema import records
from tests.command import free_port
from tests.gateway_load import Load, check
from tests.gateway_parts import R1, R2, FakeServer, add_release, point_alias, served

SEEN_S = 1.0  # within which a change must be seen at both


class Gateways:
    """Processes over one state directory, and clients of them."""

    def __init__(self, home: Path, fake: FakeServer, upstream: str, count: int, **settings: Any) -> None:
        self.fake = fake
        self.urls: list[str] = []
        self.processes: list[Popen[bytes]] = []
        self.logs: list[Path] = []
        for number in range(count):
            port = free_port()
            given = {"home": home, "server.url": upstream, "gateway.port": port, **settings}
            command = [sys.executable, "-m", "cltrain.gateway"]
            for key, value in given.items():
                command += ["--set", f"{key}={value}"]
            log = home.parent / f"gateway-{number}.log"
            with log.open("w") as out:
                self.processes.append(Popen(command, stdout=out, stderr=out))
            self.urls.append(f"http://127.0.0.1:{port}")
            self.logs.append(log)

    def wait_until_up(self) -> None:
        deadline = time.monotonic() + 60
        for url, process, log in zip(self.urls, self.processes, self.logs, strict=True):
            while True:
                try:
                    if httpx.get(f"{url}/health", timeout=5, trust_env=False).json()["store"] == "ok":
                        break
                except httpx.TransportError:
                    pass
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.02)

    def kill(self, number: int) -> None:
        self.processes[number].kill()
        self.processes[number].wait()

    def chat(self, number: int, *contents: str, **headers: str) -> httpx.Response:
        roles = ("user", "assistant") * len(contents)
        messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
        body = {"model": "support", "messages": messages}
        return httpx.post(f"{self.urls[number]}/v1/chat/completions", json=body, headers=headers, timeout=20)


@contextmanager
def gateways(tmp_path: Path, count: int = 2, **settings: Any) -> Iterator[tuple[Gateways, Store]]:
    """With two releases and the alias on the first. The processes are the first to open the store, all at once."""
    home = tmp_path / "home"
    with ExitStack() as stack:
        fake = FakeServer()
        both = Gateways(home, fake, stack.enter_context(served(fake.app)), count, **settings)
        for number in range(count):
            stack.callback(both.kill, number)
        both.wait_until_up()
        store = open_store(home)
        stack.callback(store.close)
        for name in (R1, R2):
            add_release(store, name)
        point_alias(store, R1)
        yield both, store


def release_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-cltrain-recorded"] == "1"
    return answer.headers["x-cltrain-adapter"]


def said_by(answer: httpx.Response) -> str:
    return str(answer.json()["choices"][0]["message"]["content"])


def test_an_episode_goes_on_through_the_other_gateway_with_its_release(tmp_path: Path) -> None:
    with gateways(tmp_path) as (both, store):
        first = both.chat(0, "hello")
        named = both.chat(1, "good day", **{"X-Session-Id": "s"})
        assert release_of(first) == release_of(named) == R1
        point_alias(store, R2)
        second = both.chat(1, "hello", said_by(first), "more")
        third = both.chat(0, "hello", said_by(first), "more", said_by(second), "and more")
        of_session = both.chat(0, "something else", **{"X-Session-Id": "s"})
        assert [release_of(a) for a in (second, third, of_session)] == [R1] * 3
        assert len({a.headers["x-cltrain-trajectory"] for a in (first, second, third)}) == 1
        assert of_session.headers["x-cltrain-trajectory"] == named.headers["x-cltrain-trajectory"]
        assert [release_of(both.chat(n, f"new {n}")) for n in (0, 1)] == [R2, R2]  # seen by the next request
        episode = first.headers["x-cltrain-trajectory"]
        (kept,) = [t for t in read_trajectories(store, "support") if t.id == episode]
        assert [m["content"] for m in kept.messages if m["role"] == "user"] == ["hello", "more", "and more"]
        assert len(kept.generations) == 3


def test_two_that_go_on_with_one_turn_at_once_lose_neither(tmp_path: Path) -> None:
    """Each looked before the other's commit: one goes on, the other is a branch of the same episode."""
    with gateways(tmp_path) as (both, store):
        first = both.chat(0, "hello")
        got: dict[int, httpx.Response] = {}

        def ask(number: int) -> None:
            got[number] = both.chat(number, "hello", said_by(first), "wait 1")

        threads = [threading.Thread(target=ask, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [release_of(got[n]) for n in (0, 1)] == [R1, R1]
        episode = first.headers["x-cltrain-trajectory"]
        kept = [t for t in read_trajectories(store, "support") if t.id.split("~")[0] == episode]
        assert sorted(len(t.generations) for t in kept) == [1, 2]
        stored = {g.id for t in kept for g in t.generations}
        assert {got[n].headers["x-cltrain-record"] for n in (0, 1)} <= stored


def test_what_is_sent_to_both_at_once_is_stored_once(tmp_path: Path) -> None:
    with gateways(tmp_path) as (both, store):
        target = both.chat(0, "hello").headers["x-cltrain-record"]
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        answers: list[bool] = []

        def post(number: int, path: str, body: dict[str, Any]) -> None:
            answer = httpx.post(f"{both.urls[number]}{path}", json=body, timeout=20)
            assert answer.status_code == 200, answer.text
            answers.append(answer.json()["duplicate"])

        sent = [
            threading.Thread(target=post, args=(number, *what))
            for k in range(10)
            for what in (
                ("/v1/trajectories", {"id": f"t{k}", "messages": messages}),
                ("/v1/feedback", {"id": f"f{k}", "target": target, "score": 1}),
            )
            for number in (0, 1)
        ]
        for thread in sent:
            thread.start()
        for thread in sent:
            thread.join()
        assert sorted(answers) == [False] * 20 + [True] * 20
        with store.read() as connection:
            assert connection.scalar(select(func.count()).select_from(records)) == 11


def test_a_key_ends_at_both_and_each_has_its_own_limit(tmp_path: Path) -> None:
    home = tmp_path / "home"
    key, secret = keys.add_key(home, "app", ["infer"], now=1.0)
    with gateways(tmp_path, **{"gateway.max_in_flight": 1}) as (both, _):
        headers = {"authorization": f"Bearer {secret}"}
        assert [both.chat(n, "hello", **headers).status_code for n in (0, 1)] == [200, 200]
        busy = threading.Thread(target=both.chat, args=(0, "hold"), kwargs=headers)
        busy.start()
        try:
            deadline = time.monotonic() + 20
            while len(both.fake.bodies) < 3 and time.monotonic() < deadline:
                time.sleep(0.01)
            full = both.chat(0, "hello", **headers)
            assert (full.status_code, full.headers["retry-after"]) == (429, "1")
            assert both.chat(1, "hello", **headers).status_code == 200
        finally:
            both.fake.lets_go.set()
            busy.join()
        keys.revoke_key(home, key.id, now=2.0)
        assert [both.chat(n, "hello", **headers).status_code for n in (0, 1)] == [401, 401]


def test_a_swap_and_a_kill_under_load_lose_and_double_nothing(tmp_path: Path) -> None:
    with gateways(tmp_path) as (both, store):
        with Load(*both.urls, num_clients=4) as load:
            wait_for(load, 40)
            point_alias(store, R2)
            time.sleep(SEEN_S)
            moved = set(load.acknowledged.answers)
            wait_for(load, len(load.acknowledged) + 40)
            both.kill(1)
            alive = len(load.acknowledged)
            wait_for(load, alive + 40)  # by the one that is left
        assert load.failures == []
        check(tmp_path / "home", load.acknowledged)
        releases: dict[str, set[str]] = defaultdict(set)
        begun_late: set[str] = set()
        for record, (trajectory, text) in load.acknowledged.answers.items():
            releases[trajectory].add(text.split()[0])
            if record not in moved and re.search(r" 0$", text):  # the first turn of an episode
                begun_late.add(text.split()[0])
        assert {len(names) for names in releases.values()} == {1}, "an episode changed its release"
        assert set.union(*releases.values()) == {R1, R2}
        assert begun_late == {R2}
        with store.read() as connection:
            assert connection.scalar(select(func.count()).select_from(records).where(records.c.is_mixed)) == 0


def wait_for(load: Load, count: int) -> None:
    deadline = time.monotonic() + 40
    while len(load.acknowledged) < count:
        assert time.monotonic() < deadline, f"{len(load.acknowledged)} of {count}; {load.failures}"
        time.sleep(0.02)


@pytest.mark.parametrize("count", [6])
def test_any_number_may_open_a_fresh_store_at_once(tmp_path: Path, count: int) -> None:
    code = """
import pathlib, sys
from cltrain.store.database import open_store
print("there", flush=True)
sys.stdin.readline()
open_store(pathlib.Path(sys.argv[1]))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "home")]
    opened = [Popen(command, stdin=PIPE, stdout=PIPE) for _ in range(count)]
    for process in opened:
        assert process.stdout is not None
        process.stdout.readline()
    for process in opened:  # all have imported what they need
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
    assert [process.wait() for process in opened] == [0] * count


def test_a_fresh_store_that_somebody_holds_for_a_moment_is_waited_for(tmp_path: Path) -> None:
    holder = sqlite3.connect(tmp_path / STORE_FILE, isolation_level=None, check_same_thread=False)
    holder.execute("CREATE TABLE t (a)")
    holder.execute("BEGIN IMMEDIATE")  # for which the switch to WAL does not wait by itself
    release = threading.Timer(0.5, holder.close)
    release.start()
    open_store(tmp_path).close()
    release.join()
