"""Commands about tenants: one alone, or all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from cltrain.gateway.keys import add_key
from cltrain.registry.aliases import frozen_reason, read_alias
from cltrain.registry.lease import acquire
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
    from cltrain.store.database import open_store

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


def test_a_tenant_runs_no_processes_and_shares_nothing_by_itself(cltrain: Command, home: Path) -> None:
    for words in (("share",), ("run",), ("serve",)):
        done = cltrain(*words, f"--home={home}", f"--agent={ACME}")
        assert (done.code, "'support@acme' is a tenant's: this takes 'support'" in done.err) == (2, True), words
    for odd in ("support@../x", "support@", "support@A", "a@b@c"):
        assert cltrain("status", f"--home={home}", f"--agent={odd}").code == 2, odd
