"""The alias moves by compare-and-swap, walks back by rollback, and both are quick with everything else down."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from sqlalchemy import insert, select, update

from cltrain.errors import ConflictError, DataError
from cltrain.records import Alias
from cltrain.registry.aliases import (
    freeze,
    frozen_reason,
    move_alias,
    read_alias,
    read_references,
    rollback,
    unfreeze,
)
from cltrain.registry.lease import acquire
from cltrain.registry.releases import get, set_status
from cltrain.store.database import Store
from cltrain.store.schema import screenings, updates
from tests.registry_parts import BASE, new_store, promoted, sealed, statuses


def test_a_new_agent_serves_the_bare_base(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    assert read_alias(store, "support") == Alias("support", BASE, 1, None, 0)
    references = read_references(store, "support")
    assert (references.incumbent, references.high_water, references.anchor) == (BASE, BASE, BASE)
    with pytest.raises(DataError, match="has no alias yet"):
        read_alias(store, "nobody")


def test_a_move_names_what_it_replaces_and_only_the_first_of_two_wins(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    fence = acquire(store, "support", "worker", 60.0, 1.0)
    start = read_alias(store, "support")
    first = sealed(store, tmp_path, BASE, "one")
    second = sealed(store, tmp_path, BASE, "two")
    moved = move_alias(store, "support", expected=start, to=first, fence=fence, now=3.0)
    assert (moved.release, moved.previous, moved.version, moved.fence) == (first, BASE, 2, fence)
    assert get(store, first).status == "released"
    with pytest.raises(ConflictError, match="no longer"):
        move_alias(store, "support", expected=start, to=second, fence=fence, now=3.0)
    with pytest.raises(ConflictError, match="no longer"):
        move_alias(store, "support", expected=BASE, to=second, fence=fence, now=3.0)
    assert get(store, second).status == "candidate"


def test_of_eight_movers_at_once_exactly_one_wins(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    fence = acquire(store, "support", "worker", 60.0, 1.0)
    names = [sealed(store, tmp_path, BASE, f"w{i}") for i in range(8)]
    results: list[str] = []

    def move(name: str) -> None:
        try:
            results.append(move_alias(store, "support", expected=BASE, to=name, fence=fence, now=3.0).release)
        except ConflictError:
            results.append("conflict")

    threads = [threading.Thread(target=move, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results.count("conflict") == 7
    assert read_alias(store, "support").release in results


def test_a_worker_that_lost_its_lease_moves_nothing(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    old = acquire(store, "support", "worker 1", 10.0, 0.0)
    new = acquire(store, "support", "worker 2", 10.0, 20.0)
    assert new > old
    name = sealed(store, tmp_path, BASE, "one")
    with pytest.raises(ConflictError, match="not the newest"):
        move_alias(store, "support", expected=BASE, to=name, fence=old, now=21.0)
    with pytest.raises(ConflictError, match="without a lease"):
        move_alias(store, "support", expected=BASE, to=name, fence=None, now=21.0)
    assert read_alias(store, "support").release == BASE


@pytest.mark.parametrize("status", ["held", "rejected", "deleted"])
def test_what_the_gate_did_not_promote_never_serves(tmp_path: Path, status: str) -> None:
    store = new_store(tmp_path)
    name = sealed(store, tmp_path, BASE, "one")
    set_status(store, name, status, now=3.0)
    with pytest.raises(ConflictError, match=f"{status} and cannot become released"):
        move_alias(store, "support", expected=BASE, to=name, fence=None, now=3.0, is_human=True)
    assert read_alias(store, "support").release == BASE


@pytest.mark.parametrize("verdict", ["hold", "reject", "error"])
def test_a_written_verdict_binds_even_a_human(tmp_path: Path, verdict: str) -> None:
    store = new_store(tmp_path)
    name = sealed(store, tmp_path, BASE, "one")
    with store.write() as connection:
        connection.execute(
            insert(updates).values(
                id="u", agent="support", number=1, state="done", parent=BASE, candidate=name, verdict=verdict,
                mode="auto", fence=1, manifest={}, started_at=1.0,
            )
        )  # fmt: skip
    with pytest.raises(ConflictError, match=f"the gate said {verdict}"):
        move_alias(store, "support", expected=BASE, to=name, fence=None, now=3.0, is_human=True)


def test_frozen_learning_promotes_nothing_until_it_is_unfrozen(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    fence = acquire(store, "support", "worker", 60.0, 1.0)
    name = sealed(store, tmp_path, BASE, "one")
    freeze(store, "support", now=2.0, reason="holiday")
    assert frozen_reason(store, "support") == "holiday"
    with pytest.raises(ConflictError, match=r"frozen \(holiday\)"):
        move_alias(store, "support", expected=BASE, to=name, fence=fence, now=3.0)
    unfreeze(store, "support", now=3.0)
    assert frozen_reason(store, "support") is None
    assert move_alias(store, "support", expected=BASE, to=name, fence=fence, now=3.0).release == name


@pytest.mark.parametrize("ends_with", ["unfreeze", "rollback and unfreeze"])
def test_an_update_that_a_freeze_interrupted_never_promotes_even_once_it_is_lifted(
    tmp_path: Path, ends_with: str
) -> None:
    store = new_store(tmp_path)
    fence = acquire(store, "support", "worker", 60.0, 1.0)
    promoted(store, tmp_path, "one", fence)
    began_before = read_alias(store, "support")
    freeze(store, "support", now=2.0, reason="something is wrong")
    began_while_frozen = read_alias(store, "support")
    if "rollback" in ends_with:
        rollback(store, "support", now=2.0, reason="it was the last update")
    unfreeze(store, "support", now=3.0)
    candidate = sealed(store, tmp_path, began_before.release, "two")
    for started_from in (began_before, began_while_frozen):
        with pytest.raises(ConflictError, match=r"no longer|frozen since"):
            move_alias(store, "support", expected=started_from, to=candidate, fence=fence, now=4.0)
    assert get(store, candidate).status == "candidate"
    fresh = read_alias(store, "support")
    assert move_alias(store, "support", expected=fresh, to=candidate, fence=fence, now=5.0).release == candidate


def test_unfreezing_what_is_not_frozen_disturbs_no_update(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    fence = acquire(store, "support", "worker", 60.0, 1.0)
    started_from = read_alias(store, "support")
    unfreeze(store, "support", now=2.0)
    name = sealed(store, tmp_path, BASE, "one")
    assert move_alias(store, "support", expected=started_from, to=name, fence=fence, now=3.0).release == name


def test_rollback_undoes_the_release_quarantines_its_window_and_freezes(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    fence = acquire(store, "support", "worker", 60.0, 1.0)
    first = promoted(store, tmp_path, "one", fence)
    second = promoted(store, tmp_path, "two", fence)
    done = rollback(store, "support", now=5.0, reason="refunds everything")
    assert (done.undone, done.alias.release, done.rolled_back, done.num_quarantined) == (second, first, (second,), 2)
    assert get(store, second).status == "rolled_back"
    assert get(store, first).status == "released"
    assert statuses(store) == {
        "one-waiting": "waiting",
        "one-replay": "replay",
        "one-unusable": "unusable",
        "two-waiting": "quarantined",
        "two-replay": "quarantined",
        "two-unusable": "unusable",
    }
    assert "refunds everything" in (frozen_reason(store, "support") or "")


def _rehearsed(store: Store, record: str, update: str | None, changed_at: float) -> None:
    """A record that a held update found harmless, or one whose update is not known any more."""
    with store.write() as connection:
        connection.execute(
            insert(screenings).values(
                record=record, agent="support", status="replay", update=update, changed_at=changed_at
            )
        )


def test_rollback_quarantines_what_came_into_replay_after_its_target_was_made(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    fence = acquire(store, "support", "worker", 60.0, 1.0)
    _rehearsed(store, "before", "held-0", 1.5)
    first = promoted(store, tmp_path, "one", fence)  # sealed at 2.0
    _rehearsed(store, "between", "held-1", 3.5)
    _rehearsed(store, "between, of no update", None, 3.5)
    with store.write() as connection:  # approved by a human long after it was sealed: its records are filed then
        late = update(screenings).where(screenings.c.record == "one-replay").values(changed_at=3.6)
        connection.execute(late)
    promoted(store, tmp_path, "two", fence)
    _rehearsed(store, "after", "held-2", 4.5)
    done = rollback(store, "support", now=5.0, reason="refunds everything")
    assert (done.alias.release, done.num_quarantined) == (first, 5)
    replayed = {record for record, status in statuses(store).items() if status == "replay"}
    assert replayed == {"before", "one-replay"}


def test_rollback_to_the_bare_base_leaves_nothing_to_rehearse(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    fence = acquire(store, "support", "worker", 60.0, 1.0)
    _rehearsed(store, "found harmless beside the base", "held-0", 1.5)
    promoted(store, tmp_path, "one", fence)
    rollback(store, "support", now=5.0, reason="bad")
    assert "replay" not in statuses(store).values()


def test_rollback_of_one_agent_leaves_the_records_of_another(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    fence = acquire(store, "support", "worker", 60.0, 1.0)
    promoted(store, tmp_path, "one", fence)
    with store.write() as connection:
        values = {"record": "theirs", "agent": "other", "status": "replay", "update": None, "changed_at": 4.0}
        connection.execute(insert(screenings).values(values))
    rollback(store, "support", now=5.0, reason="bad")
    assert statuses(store)["theirs"] == "replay"


def test_rollbacks_in_a_row_walk_back_to_the_bare_base_and_stop_there(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    fence = acquire(store, "support", "worker", 60.0, 1.0)
    names = [promoted(store, tmp_path, f"w{i}", fence) for i in range(4)]
    seen = [rollback(store, "support", now=5.0, reason="bad", freeze=False).alias.release for _ in names]
    assert seen == [names[2], names[1], names[0], BASE]
    with pytest.raises(ConflictError, match="nothing to roll back to"):
        rollback(store, "support", now=5.0, reason="bad")
    assert get(store, BASE).status == "released"
    assert read_alias(store, "support").previous is None
    assert frozen_reason(store, "support") is None


def test_a_rolled_back_release_is_skipped_by_later_rollbacks(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    fence = acquire(store, "support", "worker", 60.0, 1.0)
    first = promoted(store, tmp_path, "one", fence)
    promoted(store, tmp_path, "two", fence)
    rollback(store, "support", now=5.0, reason="bad", freeze=False)
    third = promoted(store, tmp_path, "three", fence)
    assert get(store, third).parent == first
    assert rollback(store, "support", now=6.0, reason="bad").alias.release == first
    assert rollback(store, "support", now=6.0, reason="bad").alias.release == BASE


def test_rollback_to_a_named_release_undoes_everything_since(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    fence = acquire(store, "support", "worker", 60.0, 1.0)
    names = [promoted(store, tmp_path, f"w{i}", fence) for i in range(4)]
    done = rollback(store, "support", to=names[0], now=5.0, reason="bad")
    assert done.rolled_back == (names[3], names[2], names[1])
    assert done.num_quarantined == 6
    with pytest.raises(ConflictError, match="rolled_back of support"):
        rollback(store, "support", to=names[2], now=6.0, reason="bad")
    with pytest.raises(ConflictError, match="already serves"):
        rollback(store, "support", to=names[0], now=6.0, reason="bad")


@pytest.mark.parametrize("is_named_only", [True, False])
def test_a_rollback_during_an_update_discards_that_update(tmp_path: Path, is_named_only: bool) -> None:
    store = new_store(tmp_path)
    fence = acquire(store, "support", "worker", 60.0, 1.0)
    promoted(store, tmp_path, "one", fence)
    started_from = read_alias(store, "support")
    candidate = sealed(store, tmp_path, started_from.release, "two")
    rollback(store, "support", now=5.0, reason="bad", freeze=False)
    expected = started_from.release if is_named_only else started_from
    with pytest.raises(ConflictError):
        move_alias(store, "support", expected=expected, to=candidate, fence=fence, now=6.0)
    assert read_alias(store, "support").release == BASE


def test_an_alias_that_went_away_and_came_back_does_not_fool_the_swap(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    fence = acquire(store, "support", "worker", 60.0, 1.0)
    started_from = read_alias(store, "support")
    candidate = sealed(store, tmp_path, BASE, "slow")
    promoted(store, tmp_path, "one", fence)
    rollback(store, "support", now=5.0, reason="bad", freeze=False)
    assert read_alias(store, "support").release == started_from.release
    with pytest.raises(ConflictError, match="version 3"):
        move_alias(store, "support", expected=started_from, to=candidate, fence=fence, now=6.0)


def test_high_water_and_anchor_go_back_with_a_rollback(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    fence = acquire(store, "support", "worker", 60.0, 1.0)
    first = promoted(store, tmp_path, "one", fence, raises_high_water=True)
    second = promoted(store, tmp_path, "two", fence)
    third = promoted(store, tmp_path, "three", fence, raises_high_water=True)
    move_alias(store, "support", expected=third, to=third, fence=None, now=4.0, is_human=True)
    assert read_alias(store, "support").previous == second
    references = read_references(store, "support")
    assert (references.high_water, references.anchor) == (third, third)
    rollback(store, "support", now=5.0, reason="bad")
    references = read_references(store, "support")
    assert (references.incumbent, references.high_water, references.anchor) == (second, first, BASE)


def test_only_a_human_promotes_what_was_rolled_back(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    fence = acquire(store, "support", "worker", 60.0, 1.0)
    name = promoted(store, tmp_path, "one", fence)
    rollback(store, "support", now=5.0, reason="mistake")
    unfreeze(store, "support", now=5.0)
    with pytest.raises(ConflictError, match="only a human"):
        move_alias(store, "support", expected=BASE, to=name, fence=fence, now=6.0)
    moved = move_alias(store, "support", expected=BASE, to=name, fence=None, now=6.0, is_human=True)
    assert moved.release == name
    assert read_references(store, "support").anchor == name


SCRIPT = """
import sys, time, json
from pathlib import Path
from cltrain.registry.aliases import freeze, rollback, unfreeze
from cltrain.store.database import open_store
store = open_store(Path(sys.argv[1]))
rollback(store, "support", now=5.0, reason="bad")
unfreeze(store, "support", now=5.0)
freeze(store, "support", now=5.0, reason="again")
heavy = [m for m in ("torch", "transformers", "peft", "fastapi", "scipy") if m in sys.modules]
print(json.dumps({"seconds": time.process_time(), "heavy": heavy}))
"""


def test_rollback_and_freeze_take_under_a_second_in_a_new_process_without_torch(tmp_path: Path) -> None:
    """A second of the process's own time, interpreter included: how busy the machine is does not count."""
    store = new_store(tmp_path)
    fence = acquire(store, "support", "worker", 60.0, 1.0)
    promoted(store, tmp_path, "one", fence)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "state")]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1], timeout=60)
    report = json.loads(out.stdout)
    assert report["heavy"] == []
    assert report["seconds"] < 1.0
    assert read_alias(store, "support").release == BASE
    assert "again" in (frozen_reason(store, "support") or "")


def test_a_rollback_waits_for_no_reader(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    fence = acquire(store, "support", "worker", 60.0, 1.0)
    promoted(store, tmp_path, "one", fence)
    with store.read() as connection:
        connection.execute(select(updates)).all()
        start = time.monotonic()
        rollback(store, "support", now=5.0, reason="bad")
        assert time.monotonic() - start < 1.0
