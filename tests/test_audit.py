"""The audit sees what the gate cannot: a changed file, log, alias or server, and a loss over many versions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sqlalchemy import select, update

from cltrain.api import Deployment
from cltrain.deploy.client import ServerClient
from cltrain.gate.pool import num_uses
from cltrain.models.adapter import read_adapter, write_adapter
from cltrain.models.base import load_base
from cltrain.registry import aliases, releases
from cltrain.registry.decisions import read_decisions, verify_chain
from cltrain.store.schema import aliases as alias_rows
from cltrain.store.schema import audits, decisions
from tests.command import Command, cltrain
from tests.deployments import base_server, config_for, corrected, record, tickets, worker
from tests.serving import random_adapter
from tests.test_worker import keeps_signals, run_until

__all__ = ["cltrain", "keeps_signals"]  # fixtures


@pytest.fixture(scope="module")
def url():
    with base_server() as url:
        yield url


@pytest.fixture(scope="module")
def learned(tmp_path_factory, url):
    """A deployment in which one honest update serves; tests put back what they change."""
    config = config_for(tmp_path_factory.mktemp("audited") / "demo", url)
    deployment = Deployment(config)
    record(deployment.store, config, [corrected(ticket) for ticket in tickets("repair", 24)])
    with worker(config, deployment.store) as learner:
        summary = learner.update()
    assert summary["verdict"] == "promote", summary["reasons"]
    return config, deployment


@pytest.fixture
def made(learned):
    config, deployment = learned
    yield config, deployment
    if aliases.frozen_reason(deployment.store, "support") is not None:
        deployment.unfreeze()


def audited(config, deployment, **gate):
    config = config.model_copy(update={"gate": config.gate.model_copy(update=gate)})
    with worker(config, deployment.store) as auditor:
        return auditor.audit()


def alarms(found) -> dict[str, str]:
    """Name -> code of the checks that alarm."""
    return {check["name"]: check["code"] for check in found["checks"] if check["verdict"] == "reject"}


def bad_release(config, deployment, tmp_path: Path) -> str:
    """Random weights that a person let serve, against everything the gate would have said."""
    serving = aliases.read_alias(deployment.store, "support").release
    path = random_adapter(load_base(None), tmp_path / "bad", 3)
    mild = read_adapter(path)
    worse = tmp_path / "worse"
    write_adapter(worse, mild.with_factors({m: (a, 20 * b) for m, (a, b) in mild.factors.items()}))
    name = releases.seal(deployment.store, config.state_dir, "support", worse, serving, {}, now=1.0).name
    aliases.move_alias(deployment.store, "support", expected=serving, to=name, fence=None, now=2.0, is_human=True)
    return name


def test_a_healthy_deployment_is_ok_and_its_audit_is_written_logged_and_shown(made):
    config, deployment = made
    uses = sum(num_uses(deployment.store, "support").values())
    found = audited(config, deployment)
    assert (found["outcome"], found["reasons"], found["action"]) == ("ok", [], None), found["reasons"]
    names = {check["name"] for check in found["checks"]}
    assert {"decision log", "alias", "files", "server", "canaries", "base KL", "budget drift_kl"} <= names
    assert {"overall against base and anchor", "stratum repair against base and anchor"} & names, names
    assert sum(num_uses(deployment.store, "support").values()) > uses
    with deployment.store.read() as connection:
        row = connection.execute(select(audits).where(audits.c.id == found["audit"])).one()
    assert (row.release, row.trigger, row.outcome) == (found["release"], "asked", "ok")
    entry = read_decisions(deployment.store, "support", kind="audit")[-1]
    assert (entry.payload["audit"], entry.payload["outcome"]) == (found["audit"], "ok")
    verify_chain(deployment.store)
    assert deployment.status()["audit"]["outcome"] == "ok"
    page = (config.state_dir / "reports" / "support" / "index.html").read_text()
    assert "Audits of what serves" in page
    assert "Where this is going" in page
    assert "not enough versions" in page
    json.dumps(found)


def test_a_changed_file_alarms_and_freezes_learning_with_its_reason(made):
    config, deployment = made
    serving = releases.get(deployment.store, aliases.read_alias(deployment.store, "support").release)
    file = releases.release_dir(config.state_dir, serving) / "adapter_model.safetensors"
    whole = file.read_bytes()
    try:
        file.chmod(0o644)
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        found = audited(config, deployment)
    finally:
        file.write_bytes(whole)
        file.chmod(0o444)
    assert found["outcome"] == "alarm"
    assert alarms(found)["files"] == "integrity"
    assert found["action"] == "learning frozen"
    assert "changed after it was sealed" in aliases.frozen_reason(deployment.store, "support")
    assert aliases.read_alias(deployment.store, "support").release == serving.name


def test_a_server_that_answers_with_other_weights_alarms(made, url, tmp_path):
    config, deployment = made
    name = aliases.read_alias(deployment.store, "support").release
    directory = releases.release_dir(config.state_dir, releases.get(deployment.store, name))
    other = random_adapter(load_base(None), tmp_path / "other", 4)
    file = directory / "adapter_model.safetensors"
    whole = file.read_bytes()
    with ServerClient(url, "base") as client:
        client.unload(name)
        try:
            file.chmod(0o644)
            file.write_bytes((other / file.name).read_bytes())
            config_file = directory / "adapter_config.json"
            settings = config_file.read_bytes()
            config_file.chmod(0o644)
            config_file.write_bytes((other / config_file.name).read_bytes())
            client.load(name, directory)
        finally:
            file.write_bytes(whole)
            config_file.write_bytes(settings)
        try:
            found = audited(config, deployment, on_alarm="report")
            assert alarms(found)["server"] == "integrity"
            assert "is not proved" in " ".join(found["reasons"])
            assert (found["action"], aliases.frozen_reason(deployment.store, "support")) == ("reported", None)
            client.unload(name)
            client.load(name, other.absolute())
            found = audited(config, deployment, on_alarm="report")
            assert f"answers as {name} from {other}" in " ".join(found["reasons"])
        finally:
            client.unload(name)
            client.load(name, directory)
    assert audited(config, deployment)["outcome"] == "ok"


def test_a_changed_decision_and_a_moved_alias_alarm_and_no_rollback_answers_them(made):
    config, deployment = made
    with deployment.store.write() as connection:
        row = connection.execute(select(decisions).where(decisions.c.seq == 2)).one()
        connection.execute(update(decisions).where(decisions.c.seq == 2).values(at=row.at + 1))
        alias = connection.execute(select(alias_rows)).one()
        base = releases.list_releases(deployment.store, "support")[0].name
        connection.execute(update(alias_rows).values(release=base))
    try:
        found = audited(config, deployment, on_alarm="rollback")
    finally:
        with deployment.store.write() as connection:
            connection.execute(update(decisions).where(decisions.c.seq == 2).values(at=row.at))
            connection.execute(update(alias_rows).values(release=alias.release))
    assert alarms(found) == {"decision log": "integrity", "alias": "integrity"}
    assert found["action"] == "learning frozen"


def test_what_lost_its_skills_is_rolled_back_where_the_owner_says_so(made, tmp_path):
    config, deployment = made
    before = aliases.read_alias(deployment.store, "support").release
    name = bad_release(config, deployment, tmp_path)
    found = audited(config, deployment, on_alarm="rollback")
    assert found["release"] == name
    codes = alarms(found)
    assert {"overall against base", "stratum repair against high-water mark"} <= codes.keys(), found["reasons"]
    assert found["action"] == f"rolled back to {before}, learning frozen"
    assert aliases.read_alias(deployment.store, "support").release == before
    assert audited(config, deployment)["outcome"] == "ok"


def test_a_canary_that_fails_alarms(made, tmp_path):
    config, deployment = made
    canary = {"id": "never", "messages": [{"role": "user", "content": "hello"}], "expected": "xyzzy", "kind": "canary"}
    suite = tmp_path / "suite.jsonl"
    suite.write_text(config.gate.suite.read_text() + json.dumps(canary) + "\n")
    found = audited(config, deployment, suite=suite, on_alarm="report")
    assert alarms(found) == {"canaries": "canary"}
    assert "1 of 1 failed: never" in found["reasons"][0]


def test_an_unreachable_server_is_an_error_and_changes_nothing(made):
    config, deployment = made
    with (
        base_server() as url,
        worker(
            config.model_copy(update={"server": config.server.model_copy(update={"url": url})}), deployment.store
        ) as auditor,
    ):
        auditor.rooms.server.close()
        found = auditor.audit()
    assert found["outcome"] == "error"
    assert "not measured" in found["reasons"][0]
    assert set(found["codes"]) == {"outage"}
    assert (found["scores"], found["action"]) == ({}, None)
    assert aliases.frozen_reason(deployment.store, "support") is None


def test_the_command_ends_with_what_it_found_and_the_worker_answers_it(cltrain: Command, made, keeps_signals):
    config, deployment = made
    number = deployment.post_request("audit")
    with worker(config, deployment.store) as auditor:
        run_until(auditor, lambda: deployment.request_outcome(number) is not None)
    assert deployment.request_outcome(number)["outcome"] == "ok"
    words = [
        f"--home={config.state_dir}",
        f"--set=server.url={config.server.url}",
        f"--set=gate.suite={config.gate.suite}",
    ]
    words += [f"--set=trainer.num_anchors={config.trainer.num_anchors}", "--set=gate.items_per_gate=40"]
    done = cltrain("audit", *words, "--json")
    assert (done.code, done.json["outcome"]) == (0, "ok"), done
    assert all("says" in trend for trend in done.json["trends"])


def test_the_worker_audits_by_its_timer_and_a_frozen_agent_too(made, keeps_signals):
    config, deployment = made
    deployment.freeze("so that nothing is learned")
    before = deployment.status()["audit"]["number"]
    often = config.model_copy(update={"gate": config.gate.model_copy(update={"audit_hours": 1e-6})})
    with worker(often, deployment.store) as auditor:
        run_until(auditor, lambda: deployment.status()["audit"]["number"] > before)
    with deployment.store.read() as connection:
        triggers = [row.trigger for row in connection.execute(select(audits).where(audits.c.id > before))]
    assert triggers[0] == "timer"
