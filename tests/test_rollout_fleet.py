"""Rolling and blue/green over replicas; and a whole update, from records to a canary that is promoted."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from cltrain.api import Deployment
from cltrain.config import from_dict
from cltrain.deploy import readiness
from cltrain.deploy.proof import NotProvedError
from cltrain.errors import ConflictError
from cltrain.gateway.app import create_gateway
from cltrain.gateway.upstream import Upstream
from cltrain.registry import aliases, releases, rollouts
from cltrain.rollout import look
from cltrain.rooms import desired, required_ready
from cltrain.store.schema import updates
from cltrain.tending import IDLE_S, tend
from tests.deployments import base_server, config_for, corrected, record, tickets, worker
from tests.fleet_parts import probes_of
from tests.gateway_parts import served
from tests.registry_parts import sealed
from tests.rollout_parts import AGENT, Trial, trial

URLS = ["http://a", "http://b", "http://c"]


def judged(made: Trial) -> str:
    """A candidate whose update the gate judges just now."""
    name = sealed(made.store, made.home, made.incumbent, "judged")
    with made.store.write() as connection:
        connection.execute(
            updates.insert().values(
                id="judged", agent=AGENT, number=9, state="judging", parent=made.incumbent, candidate=name, mode="auto",
                fence=made.fence, manifest={}, started_at=3.0,
            )
        )  # fmt: skip
    return name


def holders(made: Trial, name: str) -> list[str]:
    return [shelf.url for shelf in made.shelves if name in shelf.held]


def test_what_is_not_judged_yet_is_on_one_replica_and_the_tender_leaves_it_there(tmp_path: Path) -> None:
    with trial(tmp_path, URLS) as made:
        name = judged(made)
        values = {**made.rooms.config.resolved(), "rollout": {"kind": "rolling"}}
        made.rooms.config = from_dict({**values, "server": {"urls": URLS}})
        made.rooms.server.load_on_first(name, made.directory(name))
        made.rooms.server.prove(name, probes_of(made.directory(name)), 1)
        tend(made.rooms)
        assert holders(made, name) == URLS[:1]
        assert name in desired(made.rooms).directories, "it would be unloaded while it is judged"
        made.rooms.server.roll(name, made.directory(name), probes_of(made.directory(name)))
        assert holders(made, name) == URLS
        with made.store.read() as connection:
            readiness.require_ready(connection, URLS, name, 3)


def test_what_was_rolled_back_goes_from_every_replica_though_nothing_is_learned(tmp_path: Path) -> None:
    with trial(tmp_path, URLS) as made:
        made.shelves[0].held["a-stranger"] = "/theirs"
        made.recorded(replace(made.episode("incumbent"), end="open"))  # its next turn is answered by what serves then
        undone = made.incumbent
        aliases.rollback(made.store, AGENT, now=made.now, reason="no")  # and frozen: no update will come
        tend(made.rooms)
        assert holders(made, undone) == URLS
        made.now += made.rooms.config.rollout.grace_s + IDLE_S
        made.rooms.server.prove(undone, probes_of(made.directory(undone)))  # as a command that would serve it again
        tend(made.rooms)
        assert holders(made, undone) == URLS
        made.now += made.rooms.config.rollout.grace_s + IDLE_S
        tend(made.rooms)
        assert [set(shelf.held) for shelf in made.shelves] == [{"a-stranger"}, set(), set()]


def test_a_roll_stops_at_the_first_replica_that_answers_with_other_weights(tmp_path: Path) -> None:
    with trial(tmp_path, URLS) as made:
        name = judged(made)
        made.shelves[1].mounts_wrong = True
        with pytest.raises(NotProvedError):
            made.rooms.server.roll(name, made.directory(name), probes_of(made.directory(name)))
        assert holders(made, name) == URLS[:2]


def test_a_roll_leaves_out_a_replica_that_is_away(tmp_path: Path) -> None:
    with trial(tmp_path, URLS) as made:
        name = judged(made)
        made.shelves[0].is_down = True
        made.rooms.server.load_on_first(name, made.directory(name))
        assert holders(made, name) == URLS[1:2]
        made.rooms.server.roll(name, made.directory(name), probes_of(made.directory(name)))
        assert holders(made, name) == URLS[1:]


def test_blue_and_green_flip_when_the_whole_set_is_ready(tmp_path: Path) -> None:
    with trial(tmp_path, URLS) as made:
        made.rooms.server.min_ready = 1
        assert required_ready(made.rooms) == 1
        values = {**made.rooms.config.resolved(), "rollout": {"kind": "blue_green"}}
        made.rooms.config = from_dict({**values, "server": {"urls": URLS}})
        assert required_ready(made.rooms) == 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rolling", "blue_green"])
def test_an_update_rolls_over_two_replicas_and_serves(tmp_path: Path, kind: str) -> None:
    with ExitStack() as stack:
        urls = (stack.enter_context(base_server()), stack.enter_context(base_server()))
        config = config_for(tmp_path / "demo", "", server={"url": None, "urls": urls}, rollout={"kind": kind})
        deployment = Deployment(config)
        record(deployment.store, config, [corrected(ticket) for ticket in tickets("repair", 24)])
        seen: list[int] = []
        with worker(config, deployment.store) as learner:

            def count(line: str) -> None:
                if "judged on" in line:
                    name = releases.list_releases(deployment.store, "support")[-1].name
                    seen.append(sum(name in member.server.list() for member in learner.rooms.server.members))

            learner.rooms.evidence.on_progress = count
            summary = learner.update()
        assert summary["verdict"] == "promote", summary["reasons"]
        assert seen[0] == (1 if kind == "rolling" else 2)
        with deployment.store.read() as connection:
            readiness.require_ready(connection, urls, summary["serving"], 2)


@pytest.mark.slow
def test_an_update_becomes_a_canary_that_answers_and_is_promoted(tmp_path: Path) -> None:
    rollout = {"kind": "canary", "weights": [0.5], "step_episodes": 4, "settle_s": 0, "margin": 0.9, "alpha": 0.4}
    with base_server() as url:
        config = config_for(tmp_path / "demo", url, rollout={**rollout, "metrics": ["faults"]})
        deployment = Deployment(config)
        store = deployment.store
        record(store, config, [corrected(ticket) for ticket in tickets("repair", 24)])
        with worker(config, store) as learner:
            summary = learner.update()
            assert (summary["verdict"], summary["is_served"]) == ("promote", False), summary["reasons"]
            assert summary["reasons"][0].endswith("(tried as canary at 0.5 first)")
            candidate = summary["candidate"]
            assert aliases.read_alias(store, "support").release == summary["parent"]
            with pytest.raises(ConflictError, match=f"{candidate} is tried as canary"):
                learner.update()
            app = create_gateway(store, config, Upstream.of(config))
            answered = set()
            with served(app) as gateway, httpx.Client(base_url=gateway, timeout=60, trust_env=False) as http:
                for number in range(60):
                    body = {"model": "support", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 64}
                    answer = http.post("/v1/chat/completions", json=body, headers={"X-Session-Id": f"s{number}"})
                    answered.add(answer.headers["x-cltrain-adapter"])
                    if rollouts.read_open(store, "support") is None:  # the worker's other thread judges meanwhile
                        break
            if rollouts.read_open(store, "support") is not None:
                look(learner.rooms)
        assert answered == {candidate, summary["parent"]}
        assert aliases.read_alias(store, "support").release == candidate
        assert deployment.status()["updates"][0]["verdict"] == "promote"
        assert set(deployment.status()["screenings"]) <= {"replay", "learned", "quarantined"}
