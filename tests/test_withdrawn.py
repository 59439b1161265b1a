"""What was quarantined or removed after a candidate read it: that candidate never serves for the first time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from sqlalchemy import delete, insert

from cltrain.api import Deployment
from cltrain.config import from_dict
from cltrain.errors import ConflictError
from cltrain.experience import window
from cltrain.experience.rows import write_trajectory
from cltrain.models.base import load_base
from cltrain.records import Trajectory, Verdict
from cltrain.registry import aliases, releases
from cltrain.registry.lease import acquire
from cltrain.rollout import look
from cltrain.store.database import Store
from cltrain.store.schema import records, updates
from tests.registry_parts import BASE, BASE_DIGEST, new_store
from tests.rollout_parts import Trial, trial
from tests.serving import random_adapter
from tests.test_rollout_worker import concluded

ACME, BETA = "support@acme", "support@beta"
ASKED = {"role": "user", "content": "hello"}


def learned_by(store: Store, home: Path, agent: str) -> str:
    """A tenant's update that learned one record of its own and serves; the record."""
    record = agent.partition("@")[2]
    bare = releases.ensure_base_release(store, agent, BASE_DIGEST, now=1.0).name
    directory = home / record
    directory.mkdir()
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.safetensors").write_text(record)
    name = releases.seal(store, home / "state", agent, directory, bare, {}, now=2.0).name
    fence = acquire(store, agent, "worker", 60.0, 2.0)
    with store.write() as connection:
        assert write_trajectory(connection, Trajectory(record, agent, record, record, (ASKED,), ("user",)))
        window.mark(connection, agent, record, "replay", now=2.0, update=f"{record}-u")
        judged(connection, f"{record}-u", agent, name, bare, "auto")
    aliases.move_alias(store, agent, expected=bare, to=name, fence=fence, now=3.0)
    return record


def judged(connection, update: str, agent: str, name: str, parent: str, mode: str) -> None:
    row = {"number": 1, "state": "done", "verdict": "promote", "fence": 1, "manifest": {}, "started_at": 2.0}
    values = {"id": update, "agent": agent, "candidate": name, "parent": parent, "mode": mode}
    connection.execute(insert(updates).values(**row, **values))


def family(home: Path) -> Store:
    store = new_store(home)
    for tenant in (ACME, BETA):
        learned_by(store, home, tenant)
    return store


def shared(store: Store, home: Path, learned: Sequence[str], replayed: Sequence[str] = ()) -> str:
    """What `cltrain share` made of these records, and the gate said promote to: it waits for a yes."""
    made, read = random_adapter(load_base(None), home / "made", 1), {"learned": [*learned], "replayed": [*replayed]}
    name = releases.seal(store, home / "state", "support", made, BASE, read, now=2.0).name
    with store.write() as connection:
        judged(connection, "shared", "support", name, BASE, "approve")
    return name


def deployment(home: Path) -> Deployment:
    tenants = {"mode": "individual", "min_contributors": 2}
    return Deployment(from_dict({"home": str(home / "state"), "agent": {"name": "support"}, "tenants": tenants}))


def moved(store: Store, name: str) -> str:
    """By a person, in the transaction that `promote` ends with."""
    with store.write() as connection:
        aliases.move_alias_in(
            connection, "support", expected=aliases.read_alias(store, "support"), to=name, fence=None, now=5.0,
            file_as="promoted by a human", is_human=True,
        )  # fmt: skip
    return aliases.read_alias(store, "support").release


@pytest.mark.parametrize(("learned", "replayed"), [(("acme", "beta"), ()), (("beta",), ("acme",))])
def test_what_a_tenants_rollback_quarantined_is_not_served_to_all_by_a_yes(
    tmp_path: Path, learned: Sequence[str], replayed: Sequence[str]
) -> None:
    store = family(tmp_path)
    name = shared(store, tmp_path, learned, replayed)
    assert aliases.rollback(store, ACME, now=4.0, reason="poisoned").num_quarantined == 1
    said = rf"{name} learned or rehearsed what was quarantined or removed since \(1 records: acme\)"
    for ask in (deployment(tmp_path).approve, lambda: deployment(tmp_path).promote(name), lambda: moved(store, name)):
        with pytest.raises(ConflictError, match=said):
            ask()
    assert aliases.read_alias(store, "support").release == BASE
    assert releases.get(store, name).status == "candidate"


def test_a_removed_record_is_as_good_as_a_quarantined_one_and_the_owners_rehearsal_is_no_record(tmp_path: Path) -> None:
    store = family(tmp_path)
    name = shared(store, tmp_path, ("acme", "beta"), ("owners-own",))
    with store.write() as connection:
        connection.execute(delete(records).where(records.c.id == "beta"))
    with pytest.raises(ConflictError, match=r"\(1 records: beta\)"):
        moved(store, name)


def test_a_candidate_whose_records_all_stand_serves_and_once_it_did_it_may_again(tmp_path: Path) -> None:
    store = family(tmp_path)
    name = shared(store, tmp_path, ("acme", "beta"), ("owners-own",))
    assert moved(store, name) == name
    aliases.rollback(store, "support", now=6.0, reason="to see", freeze=False)
    aliases.rollback(store, ACME, now=7.0, reason="poisoned")
    assert moved(store, name) == name, "a person serves again what was rolled back"


def quarantined(made: Trial) -> None:
    """What the candidate learned, as by the rollback of a tenant whose record it is."""
    with made.store.write() as connection:
        window.mark(connection, "support@acme", "theirs", "quarantined", now=made.now)


@pytest.mark.parametrize("kind", ["all", "canary", "shadow"])
def test_an_update_whose_records_were_quarantined_meanwhile_is_discarded(tmp_path: Path, kind: str) -> None:
    with trial(tmp_path, kind=kind) as made:
        quarantined(made)
        summary = concluded(made, Verdict.PROMOTE, {"replayed": ["theirs"]})
        assert (summary["verdict"], summary["is_served"], made.serving) == ("error", False, made.incumbent)
        assert "discarded: " in summary["reason"]
        assert "quarantined or removed since (1 records: theirs)" in summary["reason"]
        assert releases.get(made.store, summary["candidate"]).status == "rejected"
        assert made.log() == []


@pytest.mark.parametrize("kind", ["canary", "shadow"])
def test_what_is_being_tried_goes_back_when_a_record_that_it_read_is_quarantined(tmp_path: Path, kind: str) -> None:
    with trial(tmp_path, kind=kind, max_hours=1.0, on_timeout="promote", step_episodes=1) as made:
        made.start()
        made.pairs(3)
        made.now += 7200.0
        quarantined(made)
        assert "back: " in str(look(made.rooms))
        state, reason = made.state
        assert (state, made.serving, made.standing()) == ("back", made.incumbent, "waiting")
        assert "quarantined or removed since (1 records: theirs)" in str(reason)
