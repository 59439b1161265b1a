"""The audit sees what the gate cannot: a changed file, log, alias or server, and a loss over many versions."""

from __future__ import annotations

import json
import time
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import select, update

from cltrain import audit, tending
from cltrain.api import Deployment
from cltrain.config import SigningConfig, load
from cltrain.deploy import probes
from cltrain.deploy.client import ServerClient
from cltrain.deploy.replicas import Replicas
from cltrain.evidence import Evidence
from cltrain.gate.pool import num_uses
from cltrain.models.adapter import read_adapter, write_adapter
from cltrain.models.base import load_base
from cltrain.models.digest import ADAPTER_FILES, MANIFEST, SIGNATURE
from cltrain.models.signature import sign
from cltrain.registry import aliases, releases
from cltrain.registry.decisions import read_decisions, verify_chain
from cltrain.store.database import open_store
from cltrain.store.schema import aliases as alias_rows
from cltrain.store.schema import audits, decisions, replicas
from tests.command import Command, cltrain
from tests.deployments import base_server, config_for, corrected, record, tickets, worker
from tests.serving import random_adapter
from tests.test_requests import Answering, taken
from tests.test_signature import make_key
from tests.test_worker import keeps_signals, run_until

__all__ = ["cltrain", "keeps_signals"]  # fixtures


@pytest.fixture(scope="module")
def url():
    with base_server() as url:
        yield url


@pytest.fixture(scope="module")
def learner(tmp_path_factory, url):
    """A worker, not running, whose one honest update serves; tests put back what they change."""
    config = config_for(tmp_path_factory.mktemp("audited") / "demo", url)
    store = Deployment(config).store
    record(store, config, [corrected(ticket) for ticket in tickets("repair", 24)])
    with worker(config, store) as learner:
        summary = learner.update()
        assert summary["verdict"] == "promote", summary["reasons"]
        yield learner


@pytest.fixture
def made(learner):
    deployment = Deployment(learner.config)
    yield learner, deployment
    if aliases.frozen_reason(deployment.store, "support") is not None:
        deployment.unfreeze()


def audited(learner, **gate):
    """An audit under other settings of the gate."""
    rooms = learner.rooms
    config = rooms.config.model_copy(update={"gate": rooms.config.gate.model_copy(update=gate)})
    evidence = Evidence(config, rooms.store, rooms.base, rooms.server, rooms.on_progress)
    return audit.run_audit(replace(rooms, config=config, evidence=evidence), trigger="asked")


def alarms(found) -> dict[str, str]:
    """Name -> code of the checks that alarm."""
    return {check["name"]: check["code"] for check in found["checks"] if check["verdict"] == "reject"}


def bad_release(learner, deployment, tmp_path: Path) -> str:
    """Random weights that a person let serve, against everything the gate would have said."""
    serving = aliases.read_alias(deployment.store, "support").release
    path = random_adapter(load_base(None), tmp_path / "bad", 3)
    mild = read_adapter(path)
    worse = tmp_path / "worse"
    write_adapter(worse, mild.with_factors({m: (a, 20 * b) for m, (a, b) in mild.factors.items()}))
    name = releases.seal(deployment.store, learner.config.state_dir, "support", worse, serving, {}, now=1.0).name
    aliases.move_alias(deployment.store, "support", expected=serving, to=name, fence=None, now=2.0, is_human=True)
    return name


def test_a_healthy_deployment_is_ok_and_its_audit_is_written_logged_and_shown(made):
    learner, deployment = made
    uses = num_uses(deployment.store, "support")
    found = learner.audit()
    assert (found["outcome"], found["reasons"], found["action"]) == ("ok", [], None), found["reasons"]
    names = {check["name"] for check in found["checks"]}
    assert {"decision log", "alias", "files", "server", "canaries", "base KL", "budget drift_kl"} <= names
    assert {"overall against base and anchor", "stratum repair against base and anchor"} & names, names
    assert num_uses(deployment.store, "support") == uses, "an audit decides nothing about candidates"
    with deployment.store.read() as connection:
        row = connection.execute(select(audits).where(audits.c.id == found["audit"])).one()
    assert (row.release, row.trigger, row.outcome) == (found["release"], "asked", "ok")
    entry = read_decisions(deployment.store, "support", kind="audit")[-1]
    assert (entry.payload["audit"], entry.payload["outcome"]) == (found["audit"], "ok")
    verify_chain(deployment.store)
    assert deployment.status()["audit"]["outcome"] == "ok"
    page = (learner.config.state_dir / "reports" / "support" / "index.html").read_text()
    assert "Audits of what serves" in page
    assert "Where this is going" in page
    assert "not enough versions" in page
    json.dumps(found)


def test_a_changed_file_alarms_and_freezes_learning_with_its_reason(made):
    learner, deployment = made
    serving = releases.get(deployment.store, aliases.read_alias(deployment.store, "support").release)
    file = releases.release_dir(learner.config.state_dir, serving) / "adapter_model.safetensors"
    whole = file.read_bytes()
    try:
        file.chmod(0o644)
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        found = audited(learner)
    finally:
        file.write_bytes(whole)
        file.chmod(0o444)
    assert found["outcome"] == "alarm"
    assert alarms(found)["files"] == "integrity"
    assert found["action"] == "learning frozen"
    assert "changed after it was sealed" in aliases.frozen_reason(deployment.store, "support")
    assert aliases.read_alias(deployment.store, "support").release == serving.name


def test_a_server_that_answers_with_other_weights_alarms(made, tmp_path):
    learner, deployment = made
    (client,), lock = learner.rooms.server.members, learner.rooms.server_lock  # that the tender does not put it right
    name = aliases.read_alias(deployment.store, "support").release
    directory = releases.release_dir(learner.config.state_dir, releases.get(deployment.store, name))
    other = random_adapter(load_base(None), tmp_path / "other", 4)
    sealed = {file: file.read_bytes() for file in (directory / file for file in ADAPTER_FILES)}
    try:
        with lock:
            for file in sealed:
                file.chmod(0o644)
                file.write_bytes((other / file.name).read_bytes())
            client.unload(name)
            client.load(name, directory)
            for file, content in sealed.items():
                file.write_bytes(content)
        found = audited(learner, on_alarm="report")
        assert alarms(found) == {"server": "integrity"}
        assert "is not proved" in found["reasons"][0]
        assert (found["action"], aliases.frozen_reason(deployment.store, "support")) == ("reported", None)
        with lock:
            client.unload(name)
            client.load(name, other.absolute())
        found = audited(learner, on_alarm="report")
        assert f"answers as {name} from {other}" in found["reasons"][0]
    finally:
        for file, content in sealed.items():
            file.write_bytes(content)
            file.chmod(0o444)
        client.unload(name)
        client.load(name, directory)
    assert audited(learner)["outcome"] == "ok"


@contextmanager
def tampered(learner, deployment, tmp_path: Path):
    """The files of what serves are others, also on the server, where nobody of ours loads them; put back afterwards."""
    name = aliases.read_alias(deployment.store, "support").release
    directory = releases.release_dir(learner.config.state_dir, releases.get(deployment.store, name))
    other = random_adapter(load_base(None), tmp_path / "tampered", 6)
    sealed = {file: file.read_bytes() for file in (directory / file for file in ADAPTER_FILES)}

    def replace_by(content) -> None:
        for file in sealed:
            file.chmod(0o644)
            file.write_bytes(content(file))
            file.chmod(0o444)
        with learner.rooms.server_lock:
            for member in learner.rooms.server.members:
                member.unload(name)
            learner.rooms.server.load(name, directory)
        tending.tend(learner.rooms)

    try:
        replace_by(lambda file: (other / file.name).read_bytes())
        yield name
    finally:
        replace_by(sealed.__getitem__)


def states(store, release: str) -> set[str]:
    with store.read() as connection:
        return set(connection.scalars(select(replicas.c.state).where(replicas.c.release == release)))


def test_an_audit_proves_no_tampered_file_and_keeps_no_probes(made, tmp_path):
    learner, deployment = made
    store = deployment.store
    with tampered(learner, deployment, tmp_path) as name:
        kept = probes.kept_of(store, name)
        assert states(store, name) == {"failed"}
        found = audited(learner, on_alarm="report")
        assert {"files", "server"} <= alarms(found).keys()
        assert probes.kept_of(store, name) == kept
        tending.tend(learner.rooms)
        assert states(store, name) == {"failed"}
        probes.forget(store, name)
        found = audited(learner, on_alarm="report")
        assert {c["verdict"] for c in found["checks"] if c["name"] == "server"} == {"error"}, "nothing can prove it"
        assert not tending.make_missing_probes(learner.rooms)
        assert probes.kept_of(store, name) is None
        assert states(store, name) == {"failed"}
    assert tending.make_missing_probes(learner.rooms)
    tending.tend(learner.rooms)
    assert states(store, name) == {"proved"}
    assert audited(learner)["outcome"] == "ok"


def test_what_was_sealed_before_a_key_was_set_is_a_warning_and_a_wrong_signature_an_alarm(made, tmp_path):
    learner, deployment = made
    name = aliases.read_alias(deployment.store, "support").release
    directory = releases.release_dir(learner.config.state_dir, releases.get(deployment.store, name))
    (own, _), (other, _) = make_key(tmp_path, "own"), make_key(tmp_path, "other")
    config = learner.config.model_copy(update={"signing": SigningConfig(key=own)})
    rooms = learner.rooms
    evidence = Evidence(config, rooms.store, rooms.base, rooms.server, rooms.on_progress)

    def found():
        return audit.run_audit(replace(rooms, config=config, evidence=evidence), trigger="timer")

    unsigned = found()
    assert (unsigned["outcome"], unsigned["action"]) == ("warning", None), unsigned["reasons"]
    assert "openssl pkeyutl -sign" in unsigned["reasons"][0]
    directory.chmod(0o755)
    try:
        (directory / SIGNATURE).write_bytes(sign((directory / MANIFEST).read_bytes(), own))
        assert found()["outcome"] == "ok"
        (directory / SIGNATURE).write_bytes(sign((directory / MANIFEST).read_bytes(), other))
        assert alarms(found()) == {"files": "integrity"}
    finally:
        (directory / SIGNATURE).unlink()


def test_a_changed_decision_and_a_moved_alias_alarm_and_no_rollback_answers_them(made):
    learner, deployment = made
    with deployment.store.write() as connection:
        row = connection.execute(select(decisions).where(decisions.c.seq == 2)).one()
        connection.execute(update(decisions).where(decisions.c.seq == 2).values(at=row.at + 1))
        alias = connection.execute(select(alias_rows)).one()
        base = releases.list_releases(deployment.store, "support")[0].name
        connection.execute(update(alias_rows).values(release=base))
    try:
        found = audited(learner, on_alarm="rollback")
    finally:
        with deployment.store.write() as connection:
            connection.execute(update(decisions).where(decisions.c.seq == 2).values(at=row.at))
            connection.execute(update(alias_rows).values(release=alias.release))
    assert alarms(found) == {"decision log": "integrity", "alias": "integrity"}
    assert found["action"] == "learning frozen"


def test_what_lost_its_skills_is_rolled_back_where_the_owner_says_so(made, tmp_path):
    learner, deployment = made
    before = aliases.read_alias(deployment.store, "support").release
    name = bad_release(learner, deployment, tmp_path)
    found = audited(learner, on_alarm="rollback")
    assert found["release"] == name
    codes = alarms(found)
    assert {"overall against base", "stratum repair against high-water mark"} <= codes.keys(), found["reasons"]
    assert found["action"] == f"rolled back to {before}, learning frozen"
    assert aliases.read_alias(deployment.store, "support").release == before
    assert audited(learner)["outcome"] == "ok"


def test_a_canary_that_fails_alarms(made, tmp_path):
    learner, _ = made
    canary = {"id": "never", "messages": [{"role": "user", "content": "hello"}], "expected": "xyzzy", "kind": "canary"}
    suite = tmp_path / "suite.jsonl"
    suite.write_text(learner.config.gate.suite.read_text() + json.dumps(canary) + "\n")
    found = audited(learner, suite=suite, on_alarm="report")
    assert alarms(found) == {"canaries": "canary"}
    assert "1 of 1 failed: never" in found["reasons"][0]


def test_an_unreachable_server_is_an_error_and_changes_nothing(made):
    learner, deployment = made
    gate = learner.config.gate.model_copy(update={"max_answer_tokens": 39})  # no score of the tests before is of use
    config = learner.config.model_copy(update={"gate": gate})
    with closing(Replicas(deployment.store, [ServerClient("http://127.0.0.1:9", "base")])) as nobody:
        rooms = replace(learner.rooms, config=config, server=nobody)
        evidence = Evidence(config, rooms.store, rooms.base, nobody, rooms.on_progress)
        found = audit.run_audit(replace(rooms, evidence=evidence), trigger="asked")
    assert found["outcome"] == "error"
    assert {check["name"] for check in found["checks"] if check["verdict"] == "error"} == {"server", "items"}
    assert set(found["codes"]) == {"outage"}
    assert (found["scores"], found["action"]) == ({}, None)
    assert aliases.frozen_reason(deployment.store, "support") is None


def test_the_worker_answers_who_asks_and_audits_by_its_timer_a_frozen_agent_too(made, keeps_signals):
    learner, deployment = made
    deployment.freeze("so that nothing is learned")
    number = deployment.post_request("audit")
    assert learner._answer_request()
    asked = deployment.request_outcome(number)
    assert (asked["outcome"], asked["trigger"]) == ("ok", "asked")
    often = learner.config.model_copy(update={"gate": learner.config.gate.model_copy(update={"audit_hours": 1e-6})})
    before, learner.config = learner.config, often
    try:
        run_until(learner, lambda: deployment.status()["audit"]["number"] > asked["audit"])
    finally:
        learner.config = before
    with deployment.store.read() as connection:
        newer = select(audits.c.trigger).where(audits.c.id > asked["audit"])
        assert set(connection.scalars(newer)) == {"timer"}


# ---------------------------------------------------------------- the command


def test_the_command_audits_in_place_and_ends_with_code_11_on_an_alarm(cltrain: Command, tmp_path: Path, url: str):
    words = ["audit", f"--home={tmp_path}", "--agent=desk", f"--set=server.url={url}", "--set=trainer.num_anchors=2"]
    done = cltrain(*words)
    assert (done.code, "there is no deployment" in done.err) == (3, True), done
    store = open_store(tmp_path)
    releases.ensure_base_release(store, "desk", load_base(None).digest, now=time.time())
    done = cltrain(*words, "--json")
    assert (done.code, done.json["outcome"], done.json["scores"], done.json["trends"]) == (0, "ok", {}, []), done
    with store.write() as connection:
        connection.execute(update(decisions).where(decisions.c.seq == 1).values(at=7.0))
    done = cltrain(*words)
    assert done.code == 11
    assert "alarm: desk-v000000" in done.out
    assert "integrity  decision log: decision 1" in done.out


@pytest.mark.parametrize(("outcome", "code"), [("ok", 0), ("warning", 0), ("alarm", 11), ("error", 12)])
def test_the_exit_code_is_what_the_running_worker_found(cltrain: Command, tmp_path: Path, outcome: str, code: int):
    store = open_store(tmp_path)
    releases.ensure_base_release(store, "support", "ab" * 32, now=time.time())
    taken(store, load((), [f"home={tmp_path}"]))
    found = {"outcome": outcome, "release": "r", "action": None, "codes": [], "reasons": [], "trends": []}
    with Answering(store, found):
        assert cltrain("audit", f"--home={tmp_path}").code == code
