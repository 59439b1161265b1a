"""Who answers while a candidate is tried: its share of new episodes, no old one, and nobody at all in the shadow."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Any

import pytest
from fastapi import Request
from fastapi.responses import Response
from scipy.stats import binom
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from cltrain.config_rollout import RolloutConfig
from cltrain.deploy import readiness
from cltrain.experience.recording import read_trajectories
from cltrain.gateway.split import Tried, read_tried, takes
from cltrain.registry import aliases, lease, rollouts
from cltrain.store.schema import named_records
from tests.gateway_parts import BASE, R1, R2, FakeServer, Gateway, add_release, point_alias, running, set_release
from tests.rollout_parts import FIND, say_ready, until
from tests.test_gateway_replicas import fleet_of

SHADOW = {"kind": "shadow", "weights": [0.999999]}


class Broken(FakeServer):
    """Under one release it calls tools with what is no JSON, never answers, or fails with that status."""

    def __init__(self, release: str, *, hangs: bool = False, status: int | None = None) -> None:
        super().__init__()
        self.release, self.hangs, self.status = release, hangs, status

    async def _answer(
        self, request: Request, body: dict[str, Any], order: str, message: dict[str, Any], kind: str
    ) -> Response:
        if body["model"] == self.release and self.hangs:
            while not self.lets_go.is_set():
                await asyncio.sleep(0.01)
        if body["model"] == self.release and self.status is not None:
            return Response("broken", self.status)
        if body["model"] == self.release and message.get("tool_calls"):
            message["tool_calls"][0]["function"]["arguments"] = '{"item": '
        return await super()._answer(request, body, order, message, kind)


def serve_r1(gateway: Gateway) -> None:
    for name in (BASE, R1):
        add_release(gateway.store, name)
    point_alias(gateway.store, R1)


def try_r2(gateway: Gateway, **settings: Any) -> None:
    """Beside R1, on the only server, which holds and proved both."""
    with contextlib.suppress(IntegrityError):
        add_release(gateway.store, R2, "candidate")
    say_ready(gateway.store, gateway.urls[0], R1, R2)
    now = time.time()
    fence = lease.acquire(gateway.store, "support", "worker", 60.0, now)
    config = RolloutConfig(**{"kind": "canary", **settings}).model_dump(mode="json")
    expected = aliases.read_alias(gateway.store, "support")
    with gateway.store.write() as connection:
        rollouts.start_in(
            connection, expected, release=R2, update_id="u", settings=config, raises_high_water=False, fence=fence,
            now=now,
        )  # fmt: skip


def begin(gateway: Gateway, **settings: Any) -> None:
    serve_r1(gateway)
    try_r2(gateway, **settings)


def adapter(answer: Any) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.headers["x-cltrain-adapter"])


def said(answer: Any) -> dict[str, Any]:
    return answer.json()["choices"][0]["message"]


@pytest.mark.parametrize("weight", [0.05, 0.25, 0.9])
def test_the_keyed_hash_takes_its_share_and_a_larger_weight_takes_the_same_and_more(weight: float) -> None:
    units = [f"{i:032x}" for i in range(4000)]
    small, large = (Tried(1, "canary", R2, R1, share, True) for share in (weight, weight + 0.05))
    taken = {unit for unit in units if takes(small, b"secret", unit)}
    low, high = binom.ppf([0.0005, 0.9995], len(units), weight)
    assert low <= len(taken) <= high
    assert taken <= {unit for unit in units if takes(large, b"secret", unit)}
    assert taken != {unit for unit in units if takes(small, b"another secret", unit)}
    assert taken != {unit for unit in units if takes(Tried(2, "canary", R2, R1, weight, True), b"secret", unit)}


def test_a_canary_answers_its_share_of_the_new_episodes(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        begin(gateway, weights=[0.25])
        found = [adapter(gateway.chat(f"hello {i}")) for i in range(120)]
        low, high = binom.ppf([0.0005, 0.9995], 120, 0.25)
        assert low <= found.count(R2) <= high
        assert set(found) == {R1, R2}
        kept = [str(one.release) for one in read_trajectories(gateway.store, "support")]
        assert sorted(kept) == sorted(found)


def test_an_episode_stays_where_it_began_over_turns_weights_and_restarts_of_the_gateway(tmp_path: Path) -> None:
    fake = FakeServer()
    sessions = [{"X-Session-Id": f"s{i}"} for i in range(24)]
    with running(tmp_path, fake=fake) as gateway:
        begin(gateway, weights=[0.4, 0.8])
        first = [gateway.chat("one", headers=session) for session in sessions]
        began = [adapter(answer) for answer in first]
        assert set(began) == {R1, R2}
        second = [gateway.chat("one", said(a), "two", headers=s) for a, s in zip(first, sessions, strict=True)]
        assert [adapter(answer) for answer in second] == began
        found = rollouts.read_open(gateway.store, "support")
        assert found is not None
        with gateway.store.write() as connection:
            rollouts.step_up_in(connection, found, reason="more", now=1.0)
    with running(tmp_path, fake=fake) as gateway:
        third = [
            gateway.chat("one", said(a), "two", said(b), "three", headers=s)
            for a, b, s in zip(first, second, sessions, strict=True)
        ]
        assert [adapter(answer) for answer in third] == began
        assert [t.is_mixed for t in read_trajectories(gateway.store, "support")] == [False] * 24


def test_an_episode_that_began_before_never_moves_to_the_canary(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        serve_r1(gateway)
        first = gateway.chat("one", headers={"X-Session-Id": "old"})
        try_r2(gateway, weights=[0.999999])
        second = gateway.chat("one", said(first), "two", headers={"X-Session-Id": "old"})
        assert [adapter(a) for a in (first, second, gateway.chat("new"))] == [R1, R1, R2]


def test_no_client_can_ask_for_the_canary(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        begin(gateway, weights=[0.5])
        answer = gateway.chat("me first", model=R2)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_an_episode_is_known_whose_client_named_the_incumbent_when_it_began(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        begin(gateway, weights=[0.000001])
        answers = [gateway.chat("one", model=model) for model in (R1, "support", "support")]
        for first, model in zip(answers, ("support", R1, "support"), strict=True):  # as what is asked for later
            gateway.chat("one", said(first), "two", model=model)
        with gateway.store.read() as connection:
            named = list(connection.scalars(select(named_records.c.record)))
        assert named == [answers[0].headers["x-cltrain-trajectory"]]


def test_new_episodes_get_the_incumbent_while_no_replica_is_ready_for_the_canary(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        begin(gateway, weights=[0.999999])
        assert adapter(gateway.chat("hello")) == R2
        readiness.note_out(gateway.store, gateway.urls[0], 2.0)
        assert adapter(gateway.chat("hello")) == R1
        say_ready(gateway.store, gateway.urls[0], R1)
        assert adapter(gateway.chat("hello")) == R1


@pytest.mark.parametrize("kind", ["canary", "shadow"])
@pytest.mark.parametrize("what", ["worker", "time"])
def test_nobody_new_gets_the_candidate_once_no_worker_would_take_it_back(tmp_path: Path, kind: str, what: str) -> None:
    with running(tmp_path) as gateway:
        begin(gateway, kind=kind, weights=[0.999999], max_hours=1.0)

        def tried(later_s: float) -> bool:
            with gateway.store.read() as connection:
                return read_tried(connection, "support", gateway.urls, time.time() + later_s) is not None

        if what == "worker":  # its lease of 60 s is not renewed
            assert [tried(later_s) for later_s in (0.0, 110.0, 130.0)] == [True, True, False]
            lease.acquire(gateway.store, "support", "worker", 60.0, time.time() - 130.0)
        else:
            lease.acquire(gateway.store, "support", "worker", 1e4, time.time())
            assert [tried(later_s) for later_s in (0.0, 3500.0, 3700.0)] == [True, True, False]
            with gateway.store.write() as connection:
                connection.exec_driver_sql("UPDATE rollouts SET started_at = started_at - 3700")
        assert [adapter(gateway.chat(f"hello {i}")) for i in range(3)] == [R1] * 3
        assert {body["model"] for body in gateway.fake.bodies} == {R1}


def test_an_episode_that_a_candidate_began_goes_on_with_it_while_no_worker_looks(tmp_path: Path) -> None:
    session = {"X-Session-Id": "s"}
    with running(tmp_path) as gateway:
        begin(gateway, weights=[0.999999])
        first = gateway.chat("one", headers=session)
        lease.release_lease(gateway.store, "support", 1)
        second = gateway.chat("one", said(first), "two", headers=session)
        assert [adapter(a) for a in (first, second, gateway.chat("new"))] == [R2, R2, R1]


def test_a_replica_that_is_cut_off_in_the_middle_fails_no_request_of_either_arm(tmp_path: Path) -> None:
    with fleet_of(tmp_path, 1, num_dead=1) as fleet:
        set_release(fleet.store, R2, "candidate")
        try_r2(fleet, weights=[0.5])
        for url in fleet.urls:  # as the worker saw it before one was cut off
            say_ready(fleet.store, url, R1, R2)
        answers = [fleet.chat(f"hello {i}") for i in range(16)]
        assert {adapter(answer) for answer in answers} == {R1, R2}
        assert all(answer.json()["model"] == adapter(answer) for answer in answers)
        assert {answer.headers["x-cltrain-replica"] for answer in answers} == {fleet.urls[0]}


def test_what_was_taken_back_answers_nobody_from_the_next_turn_on(tmp_path: Path) -> None:
    session = {"X-Session-Id": "s"}
    with running(tmp_path) as gateway:
        begin(gateway, weights=[0.999999])
        first = gateway.chat("one", headers=session)
        aliases.rollback(gateway.store, "support", now=5.0, reason="rude", freeze=False)
        second = gateway.chat("one", said(first), "two", headers=session)
        assert [adapter(a) for a in (first, second, gateway.chat("new"))] == [R2, R1, R1]
        mixed = {one.id: one.is_mixed for one in read_trajectories(gateway.store, "support")}
        assert mixed[first.headers["x-cltrain-trajectory"]] is True


# ---------------------------------------------------------------- shadow


def outcomes(gateway: Gateway) -> list[tuple[str, bool]]:
    with gateway.store.read() as connection:
        return [(row.arm, row.fault) for row in rollouts.outcomes_of(connection, 1)]


def without_ids(answer: Any) -> tuple[bytes, str, str]:
    """What a client gets, but for what names this very request."""
    content = answer.content
    for header in ("x-cltrain-record", "x-cltrain-trajectory"):
        content = content.replace(answer.headers[header].encode(), b"ID")
    return content, answer.headers["x-cltrain-adapter"], answer.headers["content-type"]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_shadow_changes_no_byte_of_an_answer_and_leaves_nothing_to_learn(tmp_path: Path, is_streamed: bool) -> None:
    asked = {"tools": [FIND], "stream": is_streamed, "temperature": 0}
    with running(tmp_path, fake=Broken(R2)) as gateway:
        serve_r1(gateway)
        alone = [without_ids(gateway.chat(order, **asked)) for order in ("call find", "say hello")]
        try_r2(gateway, **SHADOW)
        shadowed = [without_ids(gateway.chat(order, **asked)) for order in ("call find", "say hello")]
        assert shadowed == alone
        until(lambda: len(outcomes(gateway)) == 4, "the candidate was not asked")
        assert outcomes(gateway)[:2] == [("incumbent", False), ("candidate", True)]
        copies = [body for body in gateway.fake.bodies if body["model"] == R2]
        assert [body["messages"][-1]["content"] for body in copies] == ["call find", "say hello"]
        assert not any(body.get("stream") for body in copies)
        kept = read_trajectories(gateway.store, "support")
        assert {g.release for one in kept for g in one.generations} == {R1}
        assert R2 not in str([one.messages for one in kept])


def test_no_answer_waits_for_a_shadow_that_hangs(tmp_path: Path) -> None:
    fake = Broken(R2, hangs=True)
    with running(tmp_path, fake=fake, rollout={"shadow_in_flight": 2}) as gateway:
        begin(gateway, **SHADOW)
        answers = [gateway.chat(f"hello {i}") for i in range(6)]
        assert {adapter(answer) for answer in answers} == {R1}
        assert outcomes(gateway) == [], "the copies do not hang"
        assert shadowed(gateway, "dropped") == 4  # two copies hang, and no more are made
        fake.lets_go.set()
        until(lambda: len(outcomes(gateway)) == 4, "the copies were lost")


@pytest.mark.parametrize("status", [None, 500, 502, 504])
def test_a_copy_without_an_answer_is_missing_as_the_incumbents_would_be(tmp_path: Path, status: int | None) -> None:
    fake = Broken(R2, hangs=status is None, status=status)
    with running(tmp_path, fake=fake, rollout={"shadow_timeout_s": 0.2}) as gateway:
        begin(gateway, **SHADOW)
        assert adapter(gateway.chat("hello")) == R1
        until(lambda: shadowed(gateway, "missing") == 1, "it is never given up")
        assert outcomes(gateway) == []


def test_a_copy_of_a_request_that_cuts_its_answer_short_is_missing(tmp_path: Path) -> None:
    class CutsR2(FakeServer):
        async def chat(self, request: Request) -> Response:
            answer = await super().chat(request)
            is_r2 = b"support-v000002" in bytes(answer.body)
            return Response(bytes(answer.body).replace(b'"stop"', b'"length"') if is_r2 else answer.body)

    with running(tmp_path, fake=CutsR2()) as gateway:
        begin(gateway, **SHADOW)
        assert adapter(gateway.chat("say <tool_call>", max_tokens=1)) == R1
        assert adapter(gateway.chat("say <tool_call>")) == R1
        until(lambda: shadowed(gateway, "missing") == 1, "the copy was not counted")
        assert outcomes(gateway) == []
        assert len([body for body in gateway.fake.bodies if body["model"] == R2]) == 1


def test_a_note_that_the_database_refuses_is_counted_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with running(tmp_path) as gateway:
        begin(gateway, **SHADOW)
        with gateway.store.write() as connection:
            connection.exec_driver_sql("ALTER TABLE rollout_outcomes RENAME TO gone")
        assert adapter(gateway.chat("hello")) == R1
        until(lambda: shadowed(gateway, "missing") == 1, "it is lost")
    assert f"what {R2} said in the shadow is not kept" in caplog.text


def shadowed(gateway: Gateway, outcome: str) -> float:
    registry = gateway.app.state.door.metrics.registry
    return float(registry.get_sample_value("cltrain_shadowed_total", {"outcome": outcome}) or 0.0)


def test_a_copy_that_no_replica_could_answer_is_missing_and_no_fault(tmp_path: Path) -> None:
    fake = FakeServer(adapters=(R1,))  # R2 was lost and nobody noticed yet
    with running(tmp_path, fake=fake) as gateway:
        begin(gateway, **SHADOW)
        assert adapter(gateway.chat("hello")) == R1
        until(lambda: shadowed(gateway, "missing") == 1, "the copy was not counted")
        assert outcomes(gateway) == []
