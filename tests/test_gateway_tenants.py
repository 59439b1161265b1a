"""Who is answered by which adapter: a tenant by its own once a server proved it, and only with its own key."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select

from cltrain.gateway.keys import add_key
from cltrain.store.schema import aliases, records, releases, replicas
from tests.gateway_parts import BASE, R1, R2, FakeServer, Gateway, add_release, point_alias, running, set_release

ACME1 = "support@acme-v000001-333333333333"
ACME2 = "support@acme-v000002-555555555555"
ZORG1 = "support@zorg-v000001-444444444444"


@dataclass(frozen=True)
class Door:
    gateway: Gateway
    keys: dict[str, str]

    def ask(self, principal: str | None, text: str, **given: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.keys[principal]}"} if principal else {}
        return self.gateway.chat(text, headers={**headers, **given.pop("headers", {})}, **given)

    def served(self, principal: str, text: str = "hello", **given: Any) -> str:
        return str(self.ask(principal, text, **given).headers["x-cltrain-adapter"])

    def records_of(self, agent: str) -> list[Any]:
        with self.gateway.store.read() as connection:
            return list(connection.execute(select(records).where(records.c.agent == agent)))


def own(gateway: Gateway, name: str, *, state: str | None = "proved") -> None:
    """The tenant's alias points at that release, which the server holds in that state (None: not at all)."""
    agent, number = name.rpartition("-v")[0], int(name.split("-v")[1][:6])
    url = str(gateway.app.state.door.upstream.places[0].upstream.url)
    row = {"release": name, "anchor": BASE, "high_water": BASE, "version": 1, "fence": 0, "changed_at": 0.0}
    with gateway.store.write() as connection:
        connection.execute(releases.insert().values(
            name=name, agent=agent, number=number, digest=name[-12:], manifest={}, path=f"releases/{agent}/{name}",
            status="released", created_at=1.0,
        ))  # fmt: skip
        connection.execute(aliases.delete().where(aliases.c.agent == agent))
        connection.execute(aliases.insert().values(agent=agent, **row))
        if state is not None:
            connection.execute(replicas.insert().values(url=url, release=name, root="/x", state=state, seen_at=1.0))


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    names = ("acme", "zorg", "late", "Ödd/../Name")
    keys = {name: add_key(tmp_path, name, ["infer", "feedback"], now=1.0)[1] for name in names}
    fake = FakeServer((R1, R2, ACME1, ACME2, ZORG1))
    with running(tmp_path, fake=fake, tenants={"mode": "individual"}) as gateway:
        for name in (BASE, R1, R2):
            add_release(gateway.store, name)
        point_alias(gateway.store, R1)
        own(gateway, ACME1)
        own(gateway, ZORG1)
        yield Door(gateway, keys)


def test_each_tenant_has_its_own_adapter_and_whoever_has_none_the_shared_one(door: Door) -> None:
    found = {name: door.served(name) for name in door.keys}
    assert found == {"acme": ACME1, "zorg": ZORG1, "late": R1, "Ödd/../Name": R1}
    assert [row.principal for row in door.records_of("support@acme")] == ["acme"]
    assert [row.principal for row in door.records_of("support@late")] == ["late"], (
        "its own, though all's adapter answered"
    )
    assert [row.principal for row in door.records_of("support")] == ["Ödd/../Name"], "no tenant can be called that"


def test_nothing_but_the_key_makes_a_request_another_tenants(door: Door) -> None:
    assert door.served("zorg", "one", user="acme") == ZORG1
    forged = door.ask("zorg", "two", headers={"x-cltrain-principal": "acme"})
    assert (forged.status_code, forged.json()["error"]["code"]) == (403, "wrong_principal")
    for model in ("support@acme", ACME1):
        refused = door.ask("zorg", "three", model=model)
        assert refused.status_code == 404, model
        assert ACME1 not in refused.text.replace(model, "")
    assert door.ask(None, "four", headers={"x-cltrain-principal": "acme"}, user="acme").status_code == 401
    assert door.records_of("support@acme") == []
    for model in ("support@acme", ACME1, "support"):
        assert door.served("acme", f"mine as {model}", model=model) == ACME1
    assert door.served("acme", "what all have", model=R1) == R1, "a name pins, of the shared agent's too"


def test_a_tenant_cannot_judge_or_post_for_another(door: Door) -> None:
    record = door.ask("acme", "hello").headers["x-cltrain-record"]
    said = {"target": record, "score": -1, "source": "user"}
    post = door.gateway.http.post
    theirs = post("/v1/feedback", json=said, headers={"authorization": f"Bearer {door.keys['zorg']}"})
    mine = post("/v1/feedback", json=said, headers={"authorization": f"Bearer {door.keys['acme']}"})
    assert (theirs.status_code, mine.status_code) == (404, 200)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    for agent, expected in ((None, 200), ("support", 200), ("support@zorg", 200), ("support@acme", 400)):
        body = {"id": f"t-{agent}", "messages": turns, **({"agent": agent} if agent else {})}
        headers = {"authorization": f"Bearer {door.keys['zorg']}"}
        assert post("/v1/trajectories", json=body, headers=headers).status_code == expected, agent
    assert {row.id for row in door.records_of("support@zorg")} == {"t-None", "t-support", "t-support@zorg"}
    assert len(door.records_of("support@acme")) == 1


def test_a_taken_id_says_nothing_of_whom_it_belongs_to(door: Door) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    answers = {}
    for name in ("acme", "zorg"):
        headers = {"authorization": f"Bearer {door.keys[name]}"}
        target = door.ask(name, "hello").headers["x-cltrain-record"]
        for path, body in (("trajectories", {"id": "x1", "messages": turns}), ("feedback", {"id": "F", "score": 1})):
            given = {**body, "target": target} if path == "feedback" else body
            answers[name, path] = door.gateway.http.post(f"/v1/{path}", json=given, headers=headers)
    assert [answer.status_code for answer in answers.values()] == [200, 200, 409, 409]
    said = [answers["zorg", path].json()["error"]["message"] for path in ("trajectories", "feedback")]
    assert said == [
        "'x1' is taken: use a new id",
        "feedback 'F' is already stored and says something else: use a new id",
    ]


@pytest.mark.parametrize("state", [None, "loaded", "draining", "failed", "out"])
def test_an_adapter_that_no_server_proved_waits_and_the_shared_one_answers(door: Door, state: str | None) -> None:
    own(door.gateway, ACME2, state=state)
    session = {"headers": {"x-session-id": "s1"}}
    assert door.served("acme", "first", **session) == R1
    with door.gateway.store.write() as connection:
        url = door.gateway.app.state.door.upstream.places[0].upstream.url
        connection.execute(replicas.delete().where(replicas.c.release == ACME2))
        connection.execute(replicas.insert().values(url=url, release=ACME2, root="/x", state="proved", seen_at=2.0))
    assert door.served("acme", "second", **session) == R1, "an episode stays where it began"
    assert door.served("acme", "another") == ACME2
    assert {row.release for row in door.records_of("support@acme")} == {R1, ACME2}


def test_what_another_server_proved_long_ago_counts_for_nothing(door: Door) -> None:
    with door.gateway.store.write() as connection:
        connection.execute(replicas.update().where(replicas.c.release == ACME1).values(url="http://gone:1"))
    assert door.served("acme") == R1


def test_a_rolled_back_tenant_is_answered_by_the_shared_release_at_its_next_turn(door: Door) -> None:
    session = {"headers": {"x-session-id": "s1"}}
    assert door.served("acme", "first", **session) == ACME1
    with door.gateway.store.write() as connection:
        connection.execute(releases.update().where(releases.c.name == ACME1).values(status="rolled_back"))
        connection.execute(
            aliases.update().where(aliases.c.agent == "support@acme").values(release="support@acme-v000000-a")
        )
    assert door.served("acme", "second", **session) == R1
    assert door.served("zorg") == ZORG1


def test_with_the_store_gone_a_name_is_good_for_whoever_it_was_good_for(door: Door) -> None:
    assert (door.served("acme", "a", model=ACME1), door.served("zorg", "b")) == (ACME1, ZORG1)
    assert door.served("late", "c", model=R2) == R2
    door.gateway.app.state.door.episodes.watch.failed("for this test")
    assert door.served("zorg", "d", model=R2) == R2, "the shared agent's is everybody's"
    refused = [("zorg", ACME1), ("late", ACME1), ("acme", ZORG1), ("acme", R1)]
    assert [door.ask(who, f"e {who}", model=name).status_code for who, name in refused] == [503] * 4
    assert door.served("acme", "f", model=ACME1) == ACME1
    assert [door.served(who, f"g {who}") for who in ("acme", "zorg", "late")] == [ACME1, ZORG1, R1]


def test_with_the_store_gone_nobody_gets_what_was_seen_undone_or_never_served(door: Door) -> None:
    assert door.served("late", "a", model=R2) == R2
    set_release(door.gateway.store, R2, "rolled_back")
    assert door.ask("zorg", "b", model=R2).status_code == 404
    door.gateway.app.state.door.episodes.watch.failed("for this test")
    assert door.ask("late", "c", model=R2).status_code == 503
    assert door.served("late", "d") == R1


def test_each_sees_its_own_models_only(door: Door) -> None:
    def listed(principal: str) -> dict[str, str]:
        headers = {"authorization": f"Bearer {door.keys[principal]}"}
        return {m["id"]: m["root"] for m in door.gateway.http.get("/v1/models", headers=headers).json()["data"]}

    assert listed("acme") == {"support": ACME1, BASE: BASE, R1: R1, R2: R2, ACME1: ACME1}
    assert listed("late") == {"support": R1, BASE: BASE, R1: R1, R2: R2}


def test_idle_episodes_of_tenants_end_too(door: Door) -> None:
    door.served("acme")
    swept = door.gateway.app.state.door.recorder.sweep_idle("support", idle_s=10.0, now=5000.0)
    assert swept.result(5) == 1
    assert [row.status for row in door.records_of("support@acme")] == ["ended"]


def test_only_those_listed_are_tenants_and_without_the_mode_nobody_is(tmp_path: Path) -> None:
    for number, (tenants, expected) in enumerate(
        [({"mode": "individual", "principals": ["zorg"]}, R1), ({"mode": "off"}, R1), ({"mode": "individual"}, ACME1)]
    ):
        home = tmp_path / str(number)
        key = add_key(home, "acme", ["infer"], now=1.0)[1]
        with running(home, fake=FakeServer((R1, ACME1)), tenants=tenants) as gateway:
            add_release(gateway.store, R1)
            point_alias(gateway.store, R1)
            own(gateway, ACME1)
            door = Door(gateway, {"acme": key})
            assert door.served("acme") == expected
            assert len(door.records_of("support@acme")) == (expected == ACME1)
