"""Which replica answers a request, and when another one may be asked instead."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from cltrain.deploy import readiness
from cltrain.gateway.app import create_gateway
from cltrain.gateway.upstream import Upstream
from cltrain.gateway.upstreams import READ_S
from cltrain.store.database import open_store
from tests.command import free_port
from tests.gateway_parts import BASE, R1, R2, FakeServer, Gateway, add_release, config_in, point_alias, running, served
from tests.test_gateway_failures import until


class Fleet(Gateway):
    """A gateway over fake replicas; what a worker would have found is told by `ready` and `out`."""

    fakes: list[FakeServer]

    def ready(self, which: int, release: str = R1) -> None:
        readiness.note_listed(self.store, self.urls[which], {release: f"/{release}"}, time.time())
        readiness.mark_proved(self.store, self.urls[which], release, f"/{release}", time.time())

    def out(self, which: int) -> None:
        readiness.note_out(self.store, self.urls[which], time.time())

    def who(self, answer: Any) -> int:
        assert answer.status_code == 200, answer.text
        return self.urls.index(answer.headers["x-cltrain-replica"])


@contextmanager
def fleet_of(directory: Path, num_up: int = 2, num_dead: int = 0, timeout_s: float = 60.0) -> Iterator[Fleet]:
    """Replicas that are up, then addresses where nobody listens; every one is said to be ready for R1, which serves."""
    fakes = [FakeServer() for _ in range(num_up)]
    with ExitStack() as stack:
        urls = [stack.enter_context(served(fake.app)) for fake in fakes]
        urls += [f"http://127.0.0.1:{free_port()}" for _ in range(num_dead)]
        store = open_store(directory)
        stack.callback(store.close)
        for name in (BASE, R1, R2):
            add_release(store, name)
        point_alias(store, R1)
        upstreams = [Upstream(url, base_model="base", timeout_s=timeout_s) for url in urls]
        config = config_in(directory, server={"urls": urls})
        app = create_gateway(store, config, upstreams, time.time, base_release=BASE)
        fleet = Fleet(directory, stack.enter_context(served(app)), fakes[0], store, app)
        stack.callback(fleet.http.close)
        fleet.fakes, fleet.urls = fakes, urls
        for which in range(len(urls)):
            fleet.ready(which)
        yield fleet


def test_only_replicas_that_are_ready_for_exactly_that_release_answer(tmp_path: Path) -> None:
    with fleet_of(tmp_path, 3) as fleet:
        fleet.out(0)
        fleet.ready(2, R2)  # and R1 is gone there
        assert {fleet.who(fleet.chat("hello")) for _ in range(6)} == {1}
        assert [len(fake.bodies) for fake in fleet.fakes] == [0, 6, 0]
        point_alias(fleet.store, R2)
        answer = fleet.chat("hello")
        assert (fleet.who(answer), answer.headers["x-cltrain-adapter"], answer.json()["model"]) == (2, R2, R2)


def test_a_single_server_never_answers_as_what_failed_its_proof_there(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        for name in (BASE, R1):
            add_release(gateway.store, name)
        point_alias(gateway.store, R1)
        assert gateway.chat("hello").status_code == 200, "nobody looked at it yet"
        readiness.mark_failed(gateway.store, gateway.urls[0], R1, f"/{R1}", time.time())
        time.sleep(READ_S + 0.1)
        for asked in ({}, {"stream": True}, {"model": R1}):
            answer = gateway.chat("hello", **asked)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert answer.json()["error"]["code"] == "no_ready_replica"
        assert gateway.chat("hello", model=BASE).status_code == 200, "the base is what it was"
        readiness.note_out(gateway.store, gateway.urls[0], time.time())
        time.sleep(READ_S + 0.1)
        assert gateway.chat("hello").status_code == 200, "where one cannot say who it is, it answers"


def test_the_least_busy_one_is_asked(tmp_path: Path) -> None:
    with fleet_of(tmp_path) as fleet, ThreadPoolExecutor(2) as pool:
        slow = pool.submit(fleet.chat, "hold")
        while not any(fake.bodies for fake in fleet.fakes):
            time.sleep(0.01)
        busy = 0 if fleet.fakes[0].bodies else 1
        found = {fleet.who(fleet.chat(f"hello {i}")) for i in range(5)}
        fleet.fakes[busy].lets_go.set()
        assert found == {1 - busy}
        assert fleet.who(slow.result()) == busy
        assert {fleet.who(fleet.chat(f"again {i}")) for i in range(8)} == {0, 1}, "nothing was left in flight"


def test_an_ended_stream_is_in_flight_no_longer(tmp_path: Path) -> None:
    with fleet_of(tmp_path) as fleet:
        for order in ("hello", "break"):
            assert fleet.chat(order, stream=True).status_code == 200
        places = fleet.app.state.door.upstream.places
        until(lambda: [place.num_in_flight for place in places] == [0, 0], "a stream that ended is still in flight")


def test_an_episode_stays_where_it_was_until_that_one_is_not_ready(tmp_path: Path) -> None:
    session = {"X-Session-Id": "s1"}
    with fleet_of(tmp_path, 3) as fleet:
        first = fleet.who(fleet.chat("hello", headers=session))
        for _ in range(4):
            fleet.chat("others")
        assert {fleet.who(fleet.chat("more", headers=session)) for _ in range(4)} == {first}
        fleet.out(first)
        time.sleep(1.1)
        assert fleet.who(fleet.chat("more", headers=session)) != first


@pytest.mark.parametrize("is_streamed", [False, True])
def test_where_nobody_listens_another_one_answers(tmp_path: Path, is_streamed: bool) -> None:
    with fleet_of(tmp_path, 1, num_dead=2) as fleet:
        assert [fleet.who(fleet.chat(f"hello {i}", stream=is_streamed)) for i in range(6)] == [0] * 6
        assert len(fleet.fakes[0].bodies) == 6


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_release_that_was_lost_is_asked_of_another_and_that_one_left_alone(tmp_path: Path, is_streamed: bool) -> None:
    with fleet_of(tmp_path) as fleet:
        fleet.fakes[0].adapters.clear()  # restarted; no worker looked yet
        began = time.monotonic()
        assert {fleet.who(fleet.chat(f"hello {i}", stream=is_streamed)) for i in range(5)} == {1}
        assert 1 <= len(fleet.fakes[0].bodies) <= 1 + (time.monotonic() - began) / READ_S, "it was not left alone"
        fleet.fakes[0].adapters.append(R1)
        fleet.ready(0)  # loaded and proved again: back at once, at the next read
        time.sleep(1.1)
        assert {fleet.who(fleet.chat(f"more {i}")) for i in range(4)} == {0, 1}


def test_a_release_that_every_replica_lost_is_a_503_to_try_again(tmp_path: Path) -> None:
    with fleet_of(tmp_path) as fleet:
        for fake in fleet.fakes:
            fake.adapters.clear()
        answer = fleet.chat("hello")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.json()["error"]["code"] == "release_not_loaded"
        assert [len(fake.bodies) for fake in fleet.fakes] == [1, 1]


@pytest.mark.parametrize(("order", "code"), [("fail 500", 502), ("fail 400", 400), ("nonsense", 502)])
def test_what_was_answered_is_not_asked_again(tmp_path: Path, order: str, code: int) -> None:
    with fleet_of(tmp_path) as fleet:
        assert fleet.chat(order).status_code == code
        assert sum(len(fake.bodies) for fake in fleet.fakes) == 1


def test_after_a_first_byte_nothing_is_asked_again(tmp_path: Path) -> None:
    with fleet_of(tmp_path) as fleet:
        answer = fleet.chat("break", stream=True)
        assert "broke off before the answer was finished" in answer.text
        assert sum(len(fake.bodies) for fake in fleet.fakes) == 1


def test_a_replica_that_takes_too_long_is_no_reason_to_ask_twice(tmp_path: Path) -> None:
    with fleet_of(tmp_path, timeout_s=2) as fleet:
        assert fleet.chat("hold").status_code == 504
        for fake in fleet.fakes:
            fake.lets_go.set()
        assert sum(len(fake.bodies) for fake in fleet.fakes) == 1


def test_whoever_waits_for_a_replica_that_is_found_to_be_away_is_answered_by_another(tmp_path: Path) -> None:
    with fleet_of(tmp_path) as fleet, ThreadPoolExecutor(1) as pool:
        fleet.out(1)
        fleet.fakes[1].lets_go.set()
        waiting = pool.submit(fleet.chat, "hold")
        while not fleet.fakes[0].bodies:
            time.sleep(0.01)
        fleet.ready(1)
        fleet.out(0)
        try:
            assert fleet.who(waiting.result()) == 1
        finally:
            fleet.fakes[0].lets_go.set()


def test_where_nobody_is_ready_the_answer_is_503_in_the_apis_own_shape(tmp_path: Path) -> None:
    with fleet_of(tmp_path) as fleet:
        point_alias(fleet.store, R2)
        answer = fleet.chat("hello")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.json()["error"]["code"] == "no_ready_replica"
        assert R2 in answer.json()["error"]["message"]
        assert fleet.chat("hello", model=R2).status_code == 404, "named, and nobody has it"
        fleet.ready(1, R2)
        assert fleet.who(fleet.chat("hello")) == 1, "no request waits a second for what the store says already"


def test_the_bare_base_is_ready_wherever_a_server_answers(tmp_path: Path) -> None:
    with fleet_of(tmp_path, 3) as fleet:
        point_alias(fleet.store, BASE)
        fleet.out(2)
        answers = [fleet.chat(f"hello {i}") for i in range(6)]
        assert {fleet.who(answer) for answer in answers} == {0, 1}
        assert {answer.headers["x-cltrain-adapter"] for answer in answers} == {BASE}
        assert all(body["model"] == "base" for fake in fleet.fakes for body in fake.bodies)


def test_what_any_replica_lists_is_listed(tmp_path: Path) -> None:
    with fleet_of(tmp_path, 2, num_dead=1) as fleet:
        fleet.fakes[0].adapters, fleet.fakes[1].adapters = [R1], [R2]
        listed = fleet.http.get("/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["support", BASE, R1, R2]


def test_one_server_answers_everything_whatever_the_table_says(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        add_release(gateway.store, R1)
        point_alias(gateway.store, R1)
        (place,) = gateway.app.state.door.upstream.places
        readiness.note_out(gateway.store, place.upstream.url, 1.0)
        answer = gateway.chat("hello")
        assert (answer.status_code, answer.headers["x-cltrain-replica"]) == (200, place.upstream.url)
        gateway.fake.adapters.clear()
        assert gateway.chat("hello").json()["error"]["code"] == "release_not_loaded"
