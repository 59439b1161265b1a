"""A tenant's alias beside the shared one: what it falls back to, and what a rollback of either takes along."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import insert

from cltrain.errors import ConflictError
from cltrain.registry import aliases
from cltrain.registry.aliases import ancestry, frozen_reason, move_alias, read_alias, rollback
from cltrain.registry.displacement import moved_since
from cltrain.registry.lease import acquire
from cltrain.registry.releases import ensure_base_release, get, seal
from cltrain.registry.tenants import incumbent, tenants_in
from cltrain.store.database import Store
from cltrain.store.schema import updates
from tests.registry_parts import BASE, BASE_DIGEST, new_store, promoted

ACME, ZORG = "support@acme", "support@zorg"


def own_base(agent: str) -> str:
    return f"{agent}-v000000-{BASE_DIGEST[:12]}"


def family(tmp_path: Path) -> Store:
    store = new_store(tmp_path)
    for agent in (ACME, ZORG):
        ensure_base_release(store, agent, BASE_DIGEST, now=1.0)
    return store


def learned(store: Store, tmp_path: Path, agent: str, weights: str, *, step: float = 0.1) -> str:
    """A candidate of the tenant, judged and promoted as its worker would."""
    directory = tmp_path / f"candidate-{agent}-{weights}"
    directory.mkdir()
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.safetensors").write_text(agent + weights)
    alias = read_alias(store, agent)
    parent = incumbent(store, agent, alias.release)
    name = seal(store, tmp_path / "state", agent, directory, parent, {"bounds": {"step_frobenius": step}}, now=2.0).name
    fence = acquire(store, agent, "worker", 60.0, 2.0)
    with store.write() as connection:
        row = {"state": "done", "verdict": "promote", "mode": "auto", "fence": fence, "manifest": {}}
        connection.execute(
            insert(updates).values(
                id=f"{name}-u",
                agent=agent,
                number=get(store, name).number,
                parent=parent,
                candidate=name,
                started_at=2.0,
                **row,
            )
        )
    move_alias(store, agent, expected=alias, to=name, fence=fence, now=3.0)
    return name


def test_a_tenant_without_a_release_follows_the_shared_agent_and_then_stays_at_its_own(tmp_path: Path) -> None:
    store = family(tmp_path)
    fence = acquire(store, "support", "worker", 60.0, 1.0)
    assert incumbent(store, ACME, own_base(ACME)) == own_base(ACME), "of two bare bases its own"
    shared = promoted(store, tmp_path, "s1", fence)
    assert incumbent(store, ACME, read_alias(store, ACME).release) == shared
    own = learned(store, tmp_path, ACME, "a1")
    assert get(store, own).parent == shared
    promoted(store, tmp_path, "s2", fence)
    assert incumbent(store, ACME, read_alias(store, ACME).release) == own
    assert ancestry(store, own) == [own, shared, BASE]
    with store.read() as connection:
        assert tenants_in(connection, "support") == [ACME, ZORG]
        assert aliases.serving_in(connection, ZORG) == read_alias(store, "support").release


def test_a_rollback_of_one_tenant_leads_to_the_shared_release_and_leaves_the_others(tmp_path: Path) -> None:
    store = family(tmp_path)
    shared = promoted(store, tmp_path, "s1", acquire(store, "support", "worker", 60.0, 1.0))
    first, second = (learned(store, tmp_path, ACME, weights) for weights in ("a1", "a2"))
    other = learned(store, tmp_path, ZORG, "z1")
    assert rollback(store, ACME, now=4.0, reason="curt", freeze=False).rolled_back == (second,)
    assert read_alias(store, ACME).release == first
    done = rollback(store, ACME, now=5.0, reason="curt")
    assert (done.rolled_back, done.alias.release) == ((first,), own_base(ACME))
    assert incumbent(store, ACME, done.alias.release) == shared
    with pytest.raises(ConflictError, match="nothing to roll back"):
        rollback(store, ACME, now=6.0, reason="again")
    assert get(store, shared).status == "released", "what all are served is not the tenant's to undo"
    assert read_alias(store, ZORG).release == other
    assert (read_alias(store, "support").release, frozen_reason(store, "support")) == (shared, None)
    assert frozen_reason(store, ZORG) is None
    assert "curt" in str(frozen_reason(store, ACME))


def test_what_grew_from_an_undone_shared_release_goes_with_it(tmp_path: Path) -> None:
    store = family(tmp_path)
    fence = acquire(store, "support", "worker", 60.0, 1.0)
    clean = learned(store, tmp_path, ZORG, "z1")  # from the bare base
    shared = promoted(store, tmp_path, "s1", fence)
    learned(store, tmp_path, ACME, "a1")
    latest = learned(store, tmp_path, ACME, "a2")
    rollback(store, "support", now=4.0, reason="poisoned")
    assert get(store, shared).status == get(store, latest).status == "rolled_back"
    assert read_alias(store, ACME).release == own_base(ACME)
    assert shared in str(frozen_reason(store, ACME))
    assert read_alias(store, ZORG).release == clean
    assert frozen_reason(store, ZORG) is None


@pytest.mark.parametrize("is_rollback", [True, False])
def test_an_update_that_compared_with_what_the_tenant_was_served_loses_when_that_moves(
    tmp_path: Path, is_rollback: bool
) -> None:
    store = family(tmp_path)
    fence = acquire(store, "support", "worker", 60.0, 1.0)
    shared = promoted(store, tmp_path, "s1", fence)
    before = read_alias(store, ACME)
    directory = tmp_path / "slow"
    directory.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (directory / file).write_text("{}")
    slow = seal(store, tmp_path / "state", ACME, directory, shared, {}, now=2.0).name
    if is_rollback:
        rollback(store, "support", now=4.0, reason="bad")
    else:
        promoted(store, tmp_path, "s2", fence)
    tenants_fence = acquire(store, ACME, "worker", 60.0, 4.0)
    with pytest.raises(ConflictError, match="rolled back, moved or frozen since"):
        move_alias(store, ACME, expected=before, to=slow, fence=tenants_fence, now=5.0)


def test_another_agents_release_never_serves_a_tenant(tmp_path: Path) -> None:
    store = family(tmp_path)
    other = learned(store, tmp_path, ZORG, "z1")
    with pytest.raises(ConflictError, match=f"belongs to {ZORG}, not to {ACME}"):
        move_alias(store, ACME, expected=own_base(ACME), to=other, fence=None, now=5.0, is_human=True)
    learned(store, tmp_path, ACME, "a1")
    with pytest.raises(ConflictError, match="cannot serve"):
        rollback(store, ACME, to=other, now=6.0, reason="x")


def test_each_tenant_spends_its_own_day(tmp_path: Path) -> None:
    store = family(tmp_path)
    learned(store, tmp_path, ACME, "a1", step=0.2)
    learned(store, tmp_path, ACME, "a2", step=0.3)
    learned(store, tmp_path, ZORG, "z1", step=0.1)
    spent = {agent: moved_since(store, agent, 0.0) for agent in (ACME, ZORG, "support")}
    assert spent == pytest.approx({ACME: 0.5, ZORG: 0.1, "support": 0.0})
