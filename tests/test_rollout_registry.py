"""What may be tried, by whom, and the one way back: in the store alone, whatever else is down."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cltrain.errors import ConflictError
from cltrain.records import Alias
from cltrain.registry import aliases, lease, releases, rollouts
from cltrain.registry.decisions import read_decisions, verify_chain
from tests.registry_parts import promoted, sealed
from tests.rollout_parts import AGENT, trial


def test_a_candidate_is_tried_while_the_alias_stays(tmp_path: Path) -> None:
    with trial(tmp_path) as made:
        found = made.start()
        assert (found.release, found.incumbent, found.weight) == (made.candidate, made.incumbent, 0.5)
        assert made.serving == made.incumbent
        assert releases.get(made.store, made.candidate).status == "candidate"
        assert made.log() == ["begun"]
        with pytest.raises(ConflictError, match="is being tried already"):
            made.start()
        with pytest.raises(ConflictError, match="is being tried for support and stays"):
            releases.delete_release(made.store, tmp_path / "state", made.candidate, now=200.0)


def test_nothing_is_tried_against_an_alias_or_a_lease_that_moved(tmp_path: Path) -> None:
    with trial(tmp_path) as made:
        old = made.alias
        with pytest.raises(ConflictError, match=r"serves .* \(version 2\) now"):
            made.start(expected=Alias(AGENT, old.release, old.version - 1, None, 0))
        lease.acquire(made.store, AGENT, "another", 60.0, 2e9)
        with pytest.raises(ConflictError, match="is not the newest"):
            made.start()
        assert rollouts.read_open(made.store, AGENT) is None


def test_nothing_is_tried_while_learning_is_frozen(tmp_path: Path) -> None:
    with trial(tmp_path) as made:
        aliases.freeze(made.store, AGENT, now=150.0, reason="holidays")
        with pytest.raises(ConflictError, match=r"is frozen \(holidays\)"):
            made.start()


def test_a_freeze_takes_it_back_and_its_records_wait(tmp_path: Path) -> None:
    with trial(tmp_path) as made:
        made.start()
        aliases.freeze(made.store, AGENT, now=150.0, reason="holidays")
        assert made.state == ("back", "frozen: holidays")
        assert made.serving == made.incumbent
        assert releases.get(made.store, made.candidate).status == "rejected"
        assert made.standing() == "waiting"
        assert made.log() == ["begun", "back"]


def test_a_rollback_takes_back_what_is_tried_and_leaves_what_serves(tmp_path: Path) -> None:
    with trial(tmp_path) as made:
        made.start()
        done = aliases.rollback(made.store, AGENT, now=150.0, reason="it is rude")
        assert (done.undone, done.alias.release, done.is_frozen) == (made.candidate, made.incumbent, True)
        assert made.state == ("back", "rollback: it is rude")
        assert releases.get(made.store, made.candidate).status == "rejected"
        assert releases.get(made.store, made.incumbent).status == "released"
        assert made.standing() == "quarantined"
        assert done.alias.version == made.alias.version + 1  # an update that is under way is discarded
        entry = read_decisions(made.store, AGENT, kind="rollback")[-1]
        assert (entry.payload["undone"], entry.payload["to"]) == ([made.candidate], made.incumbent)
        aliases.rollback(made.store, AGENT, now=160.0, reason="and that one too")
        assert made.serving != made.incumbent


@pytest.mark.parametrize("names", ["to", "expected"])
def test_a_rollback_of_what_serves_takes_back_both(tmp_path: Path, names: str) -> None:
    with trial(tmp_path) as made:
        base = releases.list_releases(made.store, AGENT)[0].name
        made.start()
        said = {"to": base} if names == "to" else {"expected": made.incumbent}
        done = aliases.rollback(made.store, AGENT, now=150.0, reason="audit", **said)
        assert (done.undone, made.serving) == (made.incumbent, base)
        assert made.state[0] == "back"
        assert releases.get(made.store, made.candidate).status == "rejected"


def test_a_persons_yes_to_it_ends_the_trial_with_its_promotion(tmp_path: Path) -> None:
    with trial(tmp_path) as made:
        made.start()
        aliases.move_alias(
            made.store, AGENT, expected=made.alias, to=made.candidate, fence=None, now=150.0, is_human=True
        )
        assert (made.serving, made.state[0]) == (made.candidate, "promoted")
        assert made.log() == ["begun", "promoted"]


def test_a_persons_yes_to_another_takes_it_back(tmp_path: Path) -> None:
    with trial(tmp_path) as made:
        other = sealed(made.store, tmp_path, made.incumbent, "other")
        made.start()
        aliases.move_alias(made.store, AGENT, expected=made.alias, to=other, fence=None, now=150.0, is_human=True)
        assert made.state == ("back", f"{other} serves from here on")
        assert releases.get(made.store, made.candidate).status == "rejected"


def test_what_was_taken_back_never_serves(tmp_path: Path) -> None:
    with trial(tmp_path) as made:
        made.start()
        aliases.rollback(made.store, AGENT, now=150.0, reason="no", freeze=False)
        alias = aliases.read_alias(made.store, AGENT)
        for fence in (made.fence, None):
            with pytest.raises(ConflictError, match="is rejected and cannot become released"):
                aliases.move_alias(
                    made.store, AGENT, expected=alias, to=made.candidate, fence=fence, now=160.0,
                    is_human=fence is None,
                )  # fmt: skip
        promoted(made.store, tmp_path, "next", made.fence)
        assert verify_chain(made.store).num_entries > 0


def test_an_outcome_counts_once_and_none_after_the_end(tmp_path: Path) -> None:
    with trial(tmp_path) as made:
        tried = made.start()
        pair = [("one", "incumbent", False, None), ("one", "candidate", True, 0.5)]
        for outcomes in (pair, [*pair, ("two", "candidate", False, None)]):
            with made.store.write() as connection:
                rollouts.add_outcomes_in(connection, tried.id, outcomes)
        aliases.freeze(made.store, AGENT, now=150.0, reason="holidays")
        with made.store.write() as connection:
            rollouts.add_outcomes_in(connection, tried.id, [("three", "candidate", True, None)])
            found = [tuple(row) for row in rollouts.outcomes_of(connection, tried.id)]
        assert found == [("incumbent", False, None), ("candidate", True, 0.5), ("candidate", False, None)]


def test_the_way_back_needs_no_torch() -> None:
    code = (
        "import sys, cltrain.registry.aliases, cltrain.registry.rollouts, cltrain.gate.sequential\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
