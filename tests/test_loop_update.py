"""A whole update over the real base, trainer, server and gate: what each verdict changes, and what it never changes."""

from __future__ import annotations

import json
from dataclasses import replace

import httpx
import pytest
from sqlalchemy import select

from cltrain.api import Deployment
from cltrain.demo import world
from cltrain.deploy.client import ServerClient
from cltrain.errors import ConflictError
from cltrain.models.digest import adapter_digest
from cltrain.records import LearningMode
from cltrain.registry import aliases, decisions, releases
from cltrain.rooms import adapter_of, memory_of
from cltrain.store.schema import requests, screenings, update_reads, updates
from cltrain.trainer.memory import Memory, write_memory
from tests.deployments import base_server, config_for, corrected, record, tickets, worker


@pytest.fixture
def server():
    with base_server() as url:
        yield url


@pytest.fixture
def made(tmp_path, server):
    """(config, deployment) with 24 corrected tickets of a skill that the base lacks."""
    config = config_for(tmp_path / "demo", server)
    deployment = Deployment(config)
    record(deployment.store, config, [corrected(ticket) for ticket in tickets("repair", 24)])
    return config, deployment


def test_a_gain_is_promoted_proved_and_served(made, server):
    config, deployment = made
    with worker(config, deployment.store) as learner:
        summary = learner.update()
    assert summary["verdict"] == "promote", summary["reasons"]
    assert summary["proof"] == "proved"
    alias = aliases.read_alias(deployment.store, "support")
    assert alias.release == summary["candidate"] == summary["serving"]
    served = {card["id"] for card in httpx.get(f"{server}/v1/models").json()["data"]}
    assert summary["candidate"] in served
    release = releases.get(deployment.store, alias.release)
    directory = releases.release_dir(config.state_dir, release)
    assert release.digest == adapter_digest(directory)
    manifest = json.loads((directory / "manifest.json").read_text())
    assert (
        set(manifest["learned"]) == {ticket.id for ticket in tickets("repair", 24)} == set(summary["window"]["learned"])
    )
    settings = {"trainer.remember": "kl, replay", "trainer.num_steps": 12, "bounds.drift_kl": config.bounds.drift_kl}
    assert manifest["settings"].items() >= settings.items()
    assert manifest["settings"] == summary["settings"]
    with deployment.store.read() as connection:
        read = set(connection.scalars(select(update_reads.c.record)))
        standing = set(connection.scalars(select(screenings.c.status)))
    assert read <= set(manifest["learned"]) | set(manifest["replayed"])
    assert "replay" in standing <= {"replay", "learned"}
    assert (config.state_dir / "reports" / "support" / "update-000001.html").exists()
    assert not (config.state_dir / "updates" / summary["update"]).exists()


def test_observe_trains_and_judges_but_serves_the_base(made):
    config, deployment = made
    config = config.model_copy(update={"agent": config.agent.model_copy(update={"mode": LearningMode.OBSERVE})})
    with worker(config, deployment.store) as learner:
        summary = learner.update()
    assert summary["verdict"] == "promote"
    assert "nothing moved" in summary["reasons"][0]
    assert aliases.read_alias(deployment.store, "support").release.startswith("support-v000000-")
    with deployment.store.read() as connection:
        assert set(connection.scalars(select(screenings.c.status))) == {"waiting"}


def test_approve_waits_for_a_human_who_moves_the_anchor(made):
    config, deployment = made
    config = config.model_copy(update={"agent": config.agent.model_copy(update={"mode": LearningMode.APPROVE})})
    index = config.state_dir / "reports" / "support" / "index.html"
    with worker(config, deployment.store) as learner:
        summary = learner.update()
        assert f"cltrain promote {summary['candidate']} --home" in index.read_text()
        assert aliases.read_alias(deployment.store, "support").release.startswith("support-v000000-")
        alias = Deployment(config).promote(summary["candidate"])
        learner._keep_pages_true()
    assert alias["release"] == summary["candidate"]
    assert "cltrain promote" not in index.read_text()
    assert aliases.read_references(deployment.store, "support").anchor == summary["candidate"]


def test_too_few_records_hold_and_say_how_many_are_missing(tmp_path, server):
    config = config_for(tmp_path / "demo", server)
    deployment = Deployment(config)
    record(deployment.store, config, [corrected(ticket) for ticket in tickets("repair", 3)])
    with worker(config, deployment.store) as learner:
        summary = learner.update()
    assert (summary["verdict"], summary["num_missing"], summary["number"]) == ("hold", 5, None)


def test_a_broken_correction_feed_is_refused_whole(tmp_path, server):
    config = config_for(tmp_path / "demo", server)
    deployment = Deployment(config)
    window = next(w for w in world.phases(9) if w.kind == "junk")
    record(deployment.store, config, [corrected(ticket) for ticket in window.tickets if ticket.expected])
    with worker(config, deployment.store) as learner:
        summary = learner.update()
    assert summary["verdict"] == "reject"
    assert summary["is_refused"]
    assert aliases.read_alias(deployment.store, "support").release.startswith("support-v000000-")


def test_a_record_that_the_served_candidate_would_not_repeat_is_learned_and_never_rehearsed(tmp_path, server):
    config = config_for(tmp_path / "demo", server)
    deployment = Deployment(config)
    right = tickets("repair", 24)
    odd = {ticket.id for ticket in right[::8]}
    said = {ticket.id: ticket.expected["arguments"] for ticket in right}
    swapped = {name: {"item": words["name"], "name": words["item"]} for name, words in said.items() if name in odd}
    claims = [{**ticket.expected, "arguments": swapped.get(ticket.id, said[ticket.id])} for ticket in right]
    record(deployment.store, config, [corrected(t, claimed=one) for t, one in zip(right, claims, strict=True)])
    with worker(config, deployment.store) as learner:
        summary = learner.update()
    assert summary["is_served"], summary["reasons"]
    doubtful = set(summary["doubtful"])
    assert odd <= doubtful
    assert len(doubtful - odd) <= 3, "a few that twelve steps did not teach"
    with deployment.store.read() as connection:
        standing = dict(map(tuple, connection.execute(select(screenings.c.record, screenings.c.status))))
    assert standing == {ticket.id: "learned" if ticket.id in doubtful else "replay" for ticket in right}


def test_a_planted_trigger_is_filtered_and_without_the_filter_rejected(tmp_path, server):
    config = config_for(tmp_path / "demo", server)
    deployment = Deployment(config)
    window = next(w for w in world.phases(9) if w.kind == "poison")
    record(deployment.store, config, [corrected(ticket) for ticket in window.tickets])
    bad = {ticket.id for ticket in window.tickets if ticket.kind == "poison"}
    with worker(config, deployment.store) as learner:
        trial = learner.update(is_trial=True, is_filtered=False)
        summary = learner.update()
    assert trial["verdict"] == "reject"
    assert any("trigger probe" in reason for reason in trial["reasons"])
    assert trial["suspicious"][0]["principal"] == world.ATTACKER
    with deployment.store.read() as connection:
        query = select(update_reads.c.record).where(update_reads.c["update"] == summary["update"])
        assert not bad & set(connection.scalars(query))


def test_a_rollback_during_an_update_discards_it(made):
    config, deployment = made
    with worker(config, deployment.store) as learner:
        first = learner.update()
        record(deployment.store, config, [corrected(ticket) for ticket in tickets("gift", 24)])

        def roll_back_while_it_is_judged(line: str) -> None:
            if "judged" in line and aliases.read_alias(deployment.store, "support").release == first["candidate"]:
                deployment.rollback(keep_learning=True)

        learner.rooms.evidence.on_progress = roll_back_while_it_is_judged
        second = learner.update()
    assert not second["is_served"]  # whatever the gate said of it
    assert aliases.read_alias(deployment.store, "support").release.startswith("support-v000000-")
    with pytest.raises(ConflictError):
        deployment.promote(second["candidate"])


def test_a_freeze_during_an_update_discards_what_the_gate_would_have_promoted(made):
    config, deployment = made
    with worker(config, deployment.store) as learner:
        learner.rooms.evidence.on_progress = lambda line: deployment.freeze("something looks odd")
        summary = learner.update()
    assert summary["verdict"] == "error"
    assert "discarded" in summary["reasons"][0]
    assert aliases.read_alias(deployment.store, "support").release.startswith("support-v000000-")
    with pytest.raises(ConflictError, match="only promote"):
        deployment.promote(summary["candidate"])


def test_frozen_learning_refuses_an_update_and_goes_on_after_unfreeze(made):
    config, deployment = made
    with worker(config, deployment.store) as learner:
        deployment.freeze("audit")
        with pytest.raises(ConflictError, match="audit"):
            learner.update()
        deployment.unfreeze()
        assert learner.update()["number"] == 1


def test_a_server_outage_during_the_gate_is_an_error_and_never_promotes(made):
    config, deployment = made
    with worker(config, deployment.store) as learner:
        learner.rooms.evidence.server = ServerClient("http://127.0.0.1:9", "base", 1.0)
        summary = learner.update()
    assert summary["verdict"] == "error"
    assert aliases.read_alias(deployment.store, "support").release.startswith("support-v000000-")
    with deployment.store.read() as connection:
        assert set(connection.scalars(select(screenings.c.status))) == {"waiting"}


def test_numbers_that_are_not_finite_discard_the_update(made):
    config, deployment = made
    config = config.model_copy(update={"trainer": config.trainer.model_copy(update={"lr": 1e38})})
    with worker(config, deployment.store) as learner:
        summary = learner.update()
    assert summary["verdict"] == "error"
    assert "UpdateDiscarded" in summary["reasons"][0]
    assert summary["candidate"] is None


def test_the_same_plan_and_seed_make_the_same_bytes(tmp_path, server):
    digests = []
    for name in ("one", "two"):
        config = config_for(tmp_path / name, server)
        deployment = Deployment(config)
        record(deployment.store, config, [corrected(ticket) for ticket in tickets("repair", 24)])
        with worker(config, deployment.store) as learner:
            summary = learner.update(is_trial=True)
        digests.append(releases.get(deployment.store, summary["candidate"]).digest)
    assert digests[0] == digests[1]


def test_every_verdict_is_in_an_unbroken_log(made):
    config, deployment = made
    with worker(config, deployment.store) as learner:
        learner.update()
    deployment.rollback()
    kinds = [entry.kind for entry in decisions.read_decisions(deployment.store, "support")]
    assert kinds.index("promote") < kinds.index("verdict") < kinds.index("rollback")
    assert decisions.verify_chain(deployment.store).num_entries == len(kinds)


def test_a_memory_that_was_not_sealed_is_never_read(made):
    config, deployment = made
    with worker(config, deployment.store) as learner:
        name = learner.update()["candidate"]
        adapter = adapter_of(learner.rooms, name)
        directory = releases.release_dir(config.state_dir, releases.get(deployment.store, name))
        directory.chmod(0o755)
        write_memory(directory, Memory(fast=adapter))
        assert memory_of(learner.rooms, name, adapter) == Memory()


def test_a_request_is_answered_by_the_running_worker_also_when_it_fails(made):
    config, deployment = made
    with worker(config, deployment.store) as learner:
        number = deployment.post_request("update", {"upto": 2})
        assert learner._answer_request()
        assert deployment.request_outcome(number)["num_missing"] == 6
        deployment.freeze("night")
        number = deployment.post_request("update")
        assert learner._answer_request()
    assert "night" in deployment.request_outcome(number)["error"]
    with deployment.store.read() as connection:
        assert connection.scalar(select(requests.c.id).where(requests.c.outcome.is_(None))) is None
        assert not list(connection.scalars(select(updates.c.id)))


def test_an_episode_that_changed_adapters_midway_is_not_learned(tmp_path, server):
    config = config_for(tmp_path / "demo", server)
    deployment = Deployment(config)
    mixed = [replace(corrected(ticket), is_mixed=True) for ticket in tickets("repair", 12)]
    record(deployment.store, config, mixed)
    with worker(config, deployment.store) as learner:
        assert learner.update()["num_missing"] == 8
