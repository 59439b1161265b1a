"""When an audit is due: by the timer, and after each move once half of the drift budget is spent."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import insert, update

from cltrain.audit import due, outcome_of
from cltrain.config import Config, from_dict, load
from cltrain.errors import ConfigError
from cltrain.records import Check, Code, Verdict
from cltrain.registry.aliases import rollback
from cltrain.registry.lease import acquire
from cltrain.registry.releases import get
from cltrain.store.database import Store
from cltrain.store.schema import audits, releases
from tests.registry_parts import BASE, new_store, promoted

HOUR_S = 3600.0  # the base of `new_store` is of second 1, what `promoted` promotes of second 3
DAILY = from_dict({})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path)


def wrote(store: Store, release: str, at: float, outcome: str = "ok") -> None:
    row = {"agent": "support", "release": release, "trigger": "timer", "outcome": outcome, "summary": {}}
    with store.write() as connection:
        connection.execute(insert(audits).values(started_at=at, finished_at=at, **row))


def spent(store: Store, release: str, drift_kl: float) -> None:
    bounds = {"drift_kl": drift_kl, "drift_kl_limit": 0.01, "step_kl": 0.01, "step_kl_limit": 0.01}
    manifest = {**get(store, release).manifest, "bounds": bounds}
    with store.write() as connection:
        connection.execute(update(releases).where(releases.c.name == release).values(manifest=manifest))


def hourly(hours: object) -> Config:
    return from_dict({"gate": {"audit_hours": hours}})


def test_the_first_audit_comes_a_day_after_the_agent_and_the_next_a_day_after_that(store: Store):
    assert due(store, DAILY, 24 * HOUR_S) is None
    assert due(store, DAILY, 24 * HOUR_S + 1) == "timer"
    wrote(store, BASE, 24 * HOUR_S + 1)
    assert due(store, DAILY, 48 * HOUR_S) is None
    assert due(store, DAILY, 48 * HOUR_S + 1) == "timer"


def test_an_audit_that_could_not_measure_is_tried_again_after_an_hour(store: Store):
    wrote(store, BASE, 24 * HOUR_S + 1, "error")
    assert due(store, DAILY, 25 * HOUR_S) is None
    assert due(store, DAILY, 25 * HOUR_S + 1) == "timer"


@pytest.mark.parametrize("never", ["never", None])
def test_never_is_no_timer_and_zero_is_refused(store: Store, never: object, tmp_path: Path):
    assert due(store, hourly(never), 1e9) is None
    assert load((), ["gate.audit_hours=never"]).gate.audit_hours is None
    (tmp_path / "c.toml").write_text('[gate]\naudit_hours = "never"\n')
    assert load([tmp_path / "c.toml"]).gate.audit_hours is None
    for wrong in (0, -1, "weekly", True):
        with pytest.raises(ConfigError, match=r"gate\.audit_hours"):
            hourly(wrong)


def test_from_half_of_the_drift_budget_on_each_release_is_audited_once_it_serves(store: Store, tmp_path: Path):
    fence = acquire(store, "support", "test", 1e9, 0.0)
    name = promoted(store, tmp_path, "one", fence)
    quiet = hourly("never")
    spent(store, name, 0.0049)
    assert due(store, quiet, 10.0) is None  # a step at its limit is no drift
    spent(store, name, 0.005)
    assert due(store, quiet, 10.0) == "move"
    wrote(store, name, 2.0)  # as a candidate's, before it began to serve
    assert due(store, quiet, 10.0) == "move"
    wrote(store, name, 10.0, "error")
    assert due(store, quiet, 20.0) is None
    assert due(store, quiet, 10.0 + HOUR_S) == "move"
    wrote(store, name, 10.0 + HOUR_S, "warning")
    assert due(store, quiet, 1e9) is None
    rollback(store, "support", now=2e9, reason="test")
    assert due(store, quiet, 3e9) is None  # the base has no drift


def test_an_agent_without_a_release_has_nothing_to_audit(tmp_path: Path):
    from cltrain.store.database import open_store

    assert due(open_store(tmp_path), DAILY, 1e9) is None


@pytest.mark.parametrize(
    ("verdicts", "outcome"),
    [
        ("", "ok"), ("promote", "ok"), ("promote hold", "warning"), ("hold error", "error"),
        ("error reject promote", "alarm"),
    ],
)  # fmt: skip
def test_the_worst_check_decides_and_what_was_not_measured_never_passes(verdicts: str, outcome: str):
    assert outcome_of([Check("x", Code.GAIN, Verdict(word), "") for word in verdicts.split()]) == outcome
