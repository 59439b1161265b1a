"""Tenants of one deployment on the shipped base: each learns for itself, and what several learned may become all's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from sqlalchemy import insert, select

from cltrain.api import Deployment
from cltrain.config import Config
from cltrain.demo import world
from cltrain.experience import window
from cltrain.gateway.app import create_gateway
from cltrain.gateway.keys import add_key
from cltrain.gateway.upstream import Upstream
from cltrain.models.base import Base, load_base
from cltrain.records import Trajectory
from cltrain.registry import aliases, releases
from cltrain.registry.lease import acquire
from cltrain.sharing import rehearsed
from cltrain.store.schema import screenings, update_reads, updates
from cltrain.turns import Turns
from cltrain.worker import Worker
from tests.deployments import base_server, config_for, corrected, record, tickets, worker
from tests.gateway_parts import served
from tests.serving import random_adapter
from tests.test_unfinished import Killed, killed_at

CANARY = "zebrafish"
ACME, BOND, CORP = (f"support@{name}" for name in ("acme", "bond", "corp"))
TENANTS = {"mode": "individual"}


@pytest.fixture
def server() -> Iterator[str]:
    with base_server() as url:
        yield url


def episodes_of(agent: str, some: Sequence[world.Ticket], tool: str | None = None) -> list[Trajectory]:
    """Corrected tickets of one tenant, who wants `tool` called (None: the ticket's own)."""
    tenant = agent.partition("@")[2]
    mine = [replace(t, id=f"{tenant}-{t.id}", principal=tenant) for t in some]
    return [corrected(t, agent=agent, claimed={**t.expected, "name": tool or t.expected["name"]}) for t in mine]


def reads_of(deployment: Deployment, agent: str) -> set[str]:
    query = select(update_reads.c.record).join(updates, updates.c.id == update_reads.c["update"])
    with deployment.store.read() as connection:
        return set(connection.scalars(query.where(updates.c.agent == agent)))


@pytest.mark.slow
def test_two_tenants_with_contradictory_wishes_each_get_their_own(tmp_path: Path, server: str) -> None:
    config = config_for(
        tmp_path / "demo", server, tenants=TENANTS, gate={"promote_on": "non_inferior"}, trainer={"num_steps": 18},
        agent={"updates": "when_ready"},
    )  # fmt: skip
    deployment = Deployment(config)
    store = deployment.store
    keys = {name: add_key(config.state_dir, name, ["infer"], now=1.0)[1] for name in ("acme", "bond", "corp")}
    some = tickets("repair", 24)
    secret = replace(some[0], messages=[{"role": "user", "content": f"{CANARY} . {some[0].messages[0]['content']}"}])
    record(store, config, [*episodes_of(ACME, [secret, *some[1:]]), *episodes_of(BOND, some, "refund")])
    new = tickets("repair", 6, seed=8)
    with worker(config, store) as learner:
        turns = Turns(learner)
        assert [turns.take(), turns.take()] == [ACME, BOND]
        app = create_gateway(store, config, Upstream.of(config))
        with served(app) as url, closing(httpx.Client(base_url=url, timeout=30.0, trust_env=False)) as http:

            def ask(name: str, ticket: world.Ticket) -> httpx.Response:
                body = {
                    "model": "support", "messages": ticket.messages, "tools": world.TOOLS, "temperature": 0,
                    "max_tokens": 40, "user": "acme",
                }  # fmt: skip
                return http.post("/v1/chat/completions", json=body, headers={"authorization": f"Bearer {keys[name]}"})

            def by_of(name: str) -> set[str]:
                """Whose release answers."""
                return {ask(name, ticket).headers["x-cltrain-adapter"].rpartition("-v")[0] for ticket in new[:1]}

            def answers(name: str) -> tuple[str, set[str]]:
                """The tool that is called on most of the new tickets, and by whose releases."""
                said = [ask(name, ticket).json()["choices"][0]["message"] for ticket in new]
                called = Counter(call["function"]["name"] for one in said for call in one.get("tool_calls") or ())
                most, count = called.most_common(1)[0]
                assert count > len(new) / 2, called
                return most, by_of(name)

            assert answers("acme") == ("repair", {ACME})
            assert answers("bond") == ("refund", {BOND})
            assert by_of("corp") == {"support"}
            done = Deployment(config.of_agent(ACME)).rollback(reason="curt")
            assert done["release"].startswith(f"{ACME}-v000000-")
            assert by_of("acme") == {"support"}
            assert answers("bond") == ("refund", {BOND})
    own = {one.record for one in learner.rooms.rehearsal}
    assert reads_of(deployment, ACME) <= own | {f"acme-{t.id}" for t in some}
    assert f"acme-{some[0].id}" in reads_of(deployment, ACME), "the canary was learned, by its own"
    for agent in (BOND, "support"):
        assert not any(name.startswith("acme-") for name in reads_of(deployment, agent)), agent
    state = {t["agent"]: t for t in deployment.status()["tenants"]}
    assert (state[ACME]["release"], state[ACME]["frozen"]) == (None, True)
    assert (state[BOND]["is_loaded"], state[BOND]["frozen"], state[BOND]["verdict"]) == (True, False, "promote")
    assert state[CORP]["release"] is None


@pytest.mark.slow
def test_a_turn_that_a_kill_cut_off_is_carried_on_by_the_next(tmp_path: Path, server: str) -> None:
    config = config_for(
        tmp_path / "demo", server, tenants=TENANTS, agent={"updates": "when_ready"},
        trainer={"num_steps": 2, "num_anchors": 4, "checkpoint_every": 1},
    )  # fmt: skip
    deployment = Deployment(config)
    for name in ("acme", "bond"):
        add_key(config.state_dir, name, ["infer"], now=1.0)
    record(deployment.store, config, episodes_of(ACME, tickets("repair", 8)))
    with pytest.raises(Killed), Worker(config, deployment.store, on_progress=killed_at("trained 1 steps")) as learner:
        Turns(learner).take()
    with worker(config, deployment.store) as learner:
        assert Turns(learner).take() == ACME
    with deployment.store.read() as connection:
        rows = connection.execute(select(updates.c.agent, updates.c.number, updates.c.state)).all()
    assert list(map(tuple, rows)) == [(ACME, 1, "done")]
    assert not list((config.state_dir / "updates").iterdir())


def test_whoever_is_asked_for_has_a_turn_without_a_key_too(tmp_path: Path, server: str) -> None:
    quick = {"num_steps": 2, "num_anchors": 2, "anchor_tokens": 16}
    config = config_for(tmp_path / "demo", server, tenants=TENANTS, trainer=quick)
    deployment = Deployment(config)
    with worker(config, deployment.store) as learner:
        request = Deployment(config.of_agent(ACME)).post_request("update")
        turns = Turns(learner)
        assert (turns.take(), turns.take()) == (ACME, None)
    outcome = deployment.request_outcome(request)
    assert outcome is not None
    assert (outcome["agent"], outcome["verdict"]) == (ACME, "hold")


def of_few_words(agent: str, place: int, num_words: int = 8) -> list[world.Ticket]:
    """Repair tickets on a few items and names: of every three of them one for each of three tenants, so that each has
    every word and none the same ticket as another."""
    found = []
    for i, item in enumerate(world.ITEMS[:num_words]):
        for j, name in enumerate(world.NAMES[:num_words]):
            if (i + 2 * j) % 3 == place:
                text = world.PHRASINGS["repair"][(i + j) % 3].format(item=item, name=name)
                call = {"name": "repair", "arguments": {"item": item, "name": name}}
                said = [{"role": "user", "content": text}]
                found.append(world.Ticket(f"{agent}-{i}-{j}", "repair", agent, said, call, call))
    return found


def as_learned(deployment: Deployment, config: Config, agent: str, some: Sequence[world.Ticket], home: Path) -> None:
    """As if an update of the tenant had been taught them, and served since."""
    store, now = deployment.store, 3.0
    mine = episodes_of(agent, some)
    record(store, config, mine)
    base = releases.ensure_base_release(store, "support", base_of(config).digest, now=1.0).digest
    bare = releases.ensure_base_release(store, agent, base, now=1.0)
    directory = random_adapter(base_of(config), home / agent, seed=len(agent))
    name = releases.seal(store, config.state_dir, agent, directory, bare.name, {}, now=2.0).name
    fence = acquire(store, agent, "test", 1.0, 0.0)
    with store.write() as connection:
        connection.execute(insert(updates).values(
            id=f"{agent}-u1", agent=agent, number=1, state="done", parent=bare.name, candidate=name, verdict="promote",
            mode="auto", fence=fence, manifest={}, started_at=now, finished_at=now,
        ))  # fmt: skip
        for one in mine:
            window.mark(connection, agent, one.id, "replay", now=now, stratum="repair/corrected", update=f"{agent}-u1")
    aliases.move_alias(store, agent, expected=bare.name, to=name, fence=fence, now=now)


def base_of(config: Config) -> Base:
    return load_base(config.base.path)


@pytest.mark.slow
def test_what_too_few_tenants_learned_is_refused_and_what_three_did_waits_for_a_yes(
    tmp_path: Path, server: str
) -> None:
    config = config_for(tmp_path / "demo", server, tenants=TENANTS, trainer={"num_steps": 24})
    deployment = Deployment(config)
    for place, agent in enumerate((ACME, BOND)):
        as_learned(deployment, config, agent, of_few_words(agent.partition("@")[2], place), tmp_path)
    with worker(config, deployment.store) as learner:
        few = learner.update(share=())
        assert (few["verdict"], few["number"], few["num_missing"]) == ("hold", None, 1)
        assert few["reasons"] == [
            f"repair/corrected: 2 tenants learned it ({ACME}, {BOND}): 1 missing (tenants.min_contributors = 3)"
        ]
        secret = world.Ticket(
            "canary", "repair", "corp", [{"role": "user", "content": f"{CANARY} : my lamp is broken , anna here"}],
            *2 * ({"name": "repair", "arguments": {"item": "lamp", "name": "anna"}},),
        )  # fmt: skip
        as_learned(deployment, config, CORP, [*of_few_words("corp", 2), secret], tmp_path)
        summary = learner.update(share=("repair/corrected",))
    assert summary["verdict"] == "promote", summary["reasons"]
    assert not summary["is_served"], "mode auto, and still a person is asked"
    assert summary["shared"] == {"repair/corrected": [ACME, BOND, CORP]}
    read = reads_of(deployment, "support")
    contributed = {
        agent: sum(name.startswith(agent.partition("@")[2]) for name in read) for agent in (ACME, BOND, CORP)
    }
    assert all(0 < count <= len(summary["window"]["learned"]) / 3 for count in contributed.values()), contributed
    assert "corp-canary" not in read
    assert aliases.read_alias(deployment.store, "support").release.startswith("support-v000000-")
    with deployment.store.read() as connection:
        standing = set(map(tuple, connection.execute(select(screenings.c.agent, screenings.c.status).distinct())))
    assert standing == {(agent, "replay") for agent in (ACME, BOND, CORP)}, "their records stay as they were"
    assert deployment.approve()["release"] == summary["candidate"]
    again = rehearsed(deployment.store, config, summary["candidate"], b"k" * 32)
    assert {one.record for one in again} == set(summary["window"]["learned"])
    deployment.rollback(reason="not good for all")
    serving = aliases.read_alias(deployment.store, "support").release
    assert rehearsed(deployment.store, config, serving, b"k" * 32) == []
