"""Leases fence out who slept; the decision log shows every change made to it."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import delete, update

from cltrain.errors import ConflictError, DataError
from cltrain.registry.aliases import freeze
from cltrain.registry.decisions import append, read_decisions, verify_chain
from cltrain.registry.lease import acquire, lease_until, release_lease, renew
from cltrain.store.database import Store, open_store
from cltrain.store.schema import decisions


def _log(store: Store) -> None:
    for i in range(5):
        with store.write() as connection:
            append(connection, "support", "verdict", {"verdict": "hold", "gain": 0.1 + i, "n": {"a": i}}, 1e9 + 0.1 * i)


def test_a_lease_belongs_to_one_holder_and_its_number_grows(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    first = acquire(store, "support", "one", 10.0, 0.0)
    with pytest.raises(ConflictError, match="worked on by one for another 5 s"):
        acquire(store, "support", "two", 10.0, 5.0)
    renew(store, "support", "one", first, 10.0, 8.0)
    with pytest.raises(ConflictError):
        acquire(store, "support", "two", 10.0, 15.0)
    second = acquire(store, "support", "two", 10.0, 18.5)
    assert second > first
    with pytest.raises(ConflictError, match="not the newest"):
        renew(store, "support", "one", first, 10.0, 20.0)
    assert lease_until(store, "support") == 28.5
    release_lease(store, "support", second)
    with pytest.raises(ConflictError):
        renew(store, "support", "two", second, 10.0, 21.0)
    assert acquire(store, "support", "one", 10.0, 21.0) > second
    assert acquire(store, "billing", "one", 10.0, 21.0) == 1


def test_a_restarted_holder_gets_its_lease_back_under_a_new_number(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    first = acquire(store, "support", "worker", 60.0, 0.0)
    second = acquire(store, "support", "worker", 60.0, 1.0)
    assert second == first + 1
    release_lease(store, "support", first)  # late, from before the restart
    assert lease_until(store, "support") == 61.0


def test_the_chain_of_decisions_holds_and_survives_reopening(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert verify_chain(store).num_entries == 0
    _log(store)
    freeze(store, "billing", now=5.0, reason="grün ≠ blue")
    chain = verify_chain(store)
    assert chain.num_entries == 6
    store.close()
    store = open_store(tmp_path)
    assert verify_chain(store) == chain
    assert [e.payload["n"]["a"] for e in read_decisions(store, "support", kind="verdict")] == list(range(5))


@pytest.mark.parametrize(
    ("column", "value"),
    [("payload", {"verdict": "promote"}), ("agent", "billing"), ("kind", "promote"), ("at", 2.0), ("hash", "f" * 64)],
)
def test_a_changed_decision_is_found(tmp_path: Path, column: str, value: object) -> None:
    store = open_store(tmp_path)
    _log(store)
    with store.write() as connection:
        connection.execute(update(decisions).where(decisions.c.seq == 3).values({column: value}))
    with pytest.raises(DataError, match=r"decision [34]"):
        verify_chain(store)


def test_a_removed_decision_is_found(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    _log(store)
    with store.write() as connection:
        connection.execute(delete(decisions).where(decisions.c.seq == 2))
    with pytest.raises(DataError, match="decision 3 does not follow"):
        verify_chain(store)


def test_content_stays_out_of_the_log(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with pytest.raises(DataError, match="501 characters of text"), store.write() as connection:
        append(connection, "support", "verdict", {"messages": [{"content": "x" * 501}]}, 1.0)
    with pytest.raises(DataError, match="plain JSON"), store.write() as connection:
        append(connection, "support", "verdict", {"gain": float("nan")}, 1.0)
    assert verify_chain(store).num_entries == 0
