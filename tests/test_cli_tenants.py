"""Commands about tenants: one alone, or all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from cltrain.config import load
from cltrain.deploy.readiness import mark_proved
from cltrain.gateway.keys import add_key
from cltrain.registry.aliases import frozen_reason, read_alias
from cltrain.registry.lease import acquire
from cltrain.store.database import open_store
from cltrain.turns import TenantWorker
from cltrain.worker import Worker
from tests.command import Command, cltrain
from tests.registry_parts import BASE, promoted
from tests.test_tenants_registry import ACME, ZORG, family, learned, own_base

__all__ = ["cltrain"]  # a fixture


@pytest.fixture
def home(tmp_path: Path) -> Path:
    store = family(tmp_path)
    promoted(store, tmp_path, "s1", acquire(store, "support", "worker", 1.0, 1.0))
    learned(store, tmp_path, ACME, "a1")
    learned(store, tmp_path, ACME, "a2")
    store.close()
    add_key(tmp_path / "state", "new", ["infer"], now=1.0)
    return tmp_path / "state"


def test_status_lists_tenants_and_one_is_rolled_back_alone(cltrain: Command, home: Path, tmp_path: Path) -> None:
    mode = "--set=tenants.mode=individual"
    before = cltrain("status", f"--home={home}", mode, "--json").json
    found = {t["agent"]: t["release"] for t in before["tenants"]}
    assert {name: bool(release) for name, release in found.items()} == {ACME: True, "support@new": False, ZORG: False}
    assert "serves support@acme-v000002" in cltrain("status", f"--home={home}", mode).out
    back = cltrain("rollback", f"--home={home}", f"--agent={ACME}", "--json").json
    assert back["release"].startswith(f"{ACME}-v000001-")
    assert cltrain("status", f"--home={home}", f"--agent={ACME}", "--json").json["frozen"]
    after = cltrain("status", f"--home={home}", mode, "--json").json
    assert (after["release"], after["frozen"]) == (before["release"], False)
    assert [t["frozen"] for t in after["tenants"]] == [True, False, False]


def test_all_of_them_at_once(cltrain: Command, home: Path, tmp_path: Path) -> None:
    frozen = cltrain("freeze", "--tenants", f"--home={home}", "--reason=audit", "--json").json
    assert [one["agent"] for one in frozen["done"]] == ["support", ACME, ZORG]
    assert cltrain("unfreeze", "--tenants", f"--home={home}").out.count("learning goes on") == 3
    back = cltrain("rollback", "--tenants", f"--home={home}", "--json").json
    assert [one["agent"] for one in back["done"]] == ["support"], "acme's grew from what was undone, and went along"
    assert set(back["left"]) == {ACME, ZORG}
    store = open_store(home)
    assert read_alias(store, "support").release == BASE
    assert read_alias(store, ACME).release == own_base(ACME)
    assert frozen_reason(store, ACME) is not None
    assert frozen_reason(store, ZORG) is None
    store.close()


def test_a_freeze_says_which_tenants_go_on_learning(cltrain: Command, home: Path) -> None:
    assert "\n2 tenants go on learning: --tenants freezes them too" in cltrain("freeze", f"--home={home}").out
    alone = cltrain("freeze", f"--home={home}", f"--agent={ACME}")
    assert "on learning" not in alone.out
    assert "\n1 tenant goes on learning: --tenants" in cltrain("freeze", f"--home={home}").out
    assert cltrain("freeze", f"--home={home}", "--json").json["tenants_learning"] == [ZORG]
    assert "on learning" not in cltrain("freeze", "--tenants", f"--home={home}").out
    assert "on learning" not in cltrain("freeze", f"--home={home}").out


def test_a_rollback_that_did_nothing_for_anybody_says_so_by_its_exit_code(cltrain: Command, home: Path) -> None:
    assert cltrain("rollback", "--tenants", f"--home={home}").code == 0
    again = cltrain("rollback", "--tenants", f"--home={home}", "--json")
    assert (again.code, again.json["done"], set(again.json["left"])) == (4, [], {"support", ACME, ZORG})


def test_what_a_server_of_earlier_days_proved_is_not_loaded_and_not_audited(cltrain: Command, home: Path) -> None:
    store = open_store(home)
    serving = read_alias(store, ACME).release
    config = load((), [f"home={home}", "agent.updates=on_request", "gate.audit_hours=1.0"])
    learner = TenantWorker(Worker(config, store), ACME)

    def seen() -> tuple[bool, bool]:
        rows = cltrain("status", f"--home={home}", "--json").json["tenants"]
        return next(t["is_loaded"] for t in rows if t["agent"] == ACME), learner.has_work()

    mark_proved(store, "http://gone:1", serving, "/x", 1.0)
    assert seen() == (False, False)
    mark_proved(store, config.server.replicas[0], serving, "/x", 1.0)
    assert seen() == (True, True)
    store.close()


def test_a_tenant_runs_no_processes_and_shares_nothing_by_itself(cltrain: Command, home: Path) -> None:
    for words in (("share",), ("run",), ("serve",)):
        done = cltrain(*words, f"--home={home}", f"--agent={ACME}")
        assert (done.code, "'support@acme' is a tenant's: this takes 'support'" in done.err) == (2, True), words
    for odd in ("support@../x", "support@", "support@A", "a@b@c"):
        assert cltrain("status", f"--home={home}", f"--agent={odd}").code == 2, odd
