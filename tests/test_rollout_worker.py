"""The worker's looks at a candidate on live traffic: when it grows, serves or goes back, and what a crash leaves."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from sqlalchemy import func, select

from cltrain import plans
from cltrain.config import from_dict
from cltrain.deploy import readiness
from cltrain.errors import ConflictError
from cltrain.loop import Attempt, conclude
from cltrain.records import Check, Code, Decision, Verdict
from cltrain.registry import aliases, lease, releases, rollouts
from cltrain.registry.decisions import read_decisions, verify_chain
from cltrain.rollout import look
from cltrain.store.schema import rollout_outcomes, screenings, updates
from cltrain.worker import Worker
from tests.registry_parts import sealed
from tests.rollout_parts import AGENT, Trial, trial

CHECK = Check("gain in suite", Code.GAIN, Verdict.PROMOTE, "+0.2", 0.9, 0.7, 0.2, 0.1, 0.3, 40)
BROKEN = '{"item": '


def concluded(made: Trial, verdict: Verdict, manifest: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the loop makes of the gate's verdict on one more candidate."""
    name = sealed(made.store, made.home, made.incumbent, "judged", manifest)
    work_dir = made.home / "work"
    work_dir.mkdir()
    plan = plans.Plan(
        id="judged", agent=AGENT, number=8, parent=made.incumbent, alias=made.alias, is_trial=False, seed=0,
        work_dir=work_dir, window=(("fresh", "find/good", "ann"),), fresh=(), replay=(), set_aside=(), notes=(),
        suspicious=(), refusal=None, manifest={"config": "c", "base": "b", "anchors": "a", "settings": {}},
    )  # fmt: skip
    with made.store.write() as connection:
        row = {"id": "judged", "agent": AGENT, "number": 8, "state": "judging", "parent": made.incumbent}
        row |= {"candidate": name, "mode": "auto", "fence": made.fence, "manifest": {}, "started_at": 3.0}
        connection.execute(updates.insert().values(**row))
    decision = Decision(verdict, ("gain in suite: +0.2",), (CHECK,))
    return conclude(made.rooms, plan, Attempt((), decision, release=releases.get(made.store, name)))


@pytest.mark.parametrize("kind", ["canary", "shadow"])
def test_the_gates_yes_starts_it_and_nothing_that_serves_moves(tmp_path: Path, kind: str) -> None:
    with trial(tmp_path, kind=kind) as made:
        summary = concluded(made, Verdict.PROMOTE)
        assert (summary["verdict"], summary["is_served"], summary["serving"]) == ("promote", False, made.incumbent)
        assert summary["reasons"] == [f"gain in suite: +0.2 (tried as {kind} at 0.5 first)"]
        found = rollouts.read_open(made.store, AGENT)
        assert found is not None
        assert (found.release, found.update, found.kind, found.raises_high_water) == (
            summary["candidate"], "judged", kind, False,
        )  # fmt: skip
        assert made.serving == made.incumbent
        with made.store.read() as connection:
            status = connection.scalar(select(screenings.c.status).where(screenings.c.record == "fresh"))
        assert status == "waiting"
        with pytest.raises(ConflictError, match=f"{found.release} is tried as {kind} at 0.5 of the traffic"):
            rollouts.require_none(made.store, AGENT)


def test_a_verdict_that_comes_too_late_starts_nothing(tmp_path: Path) -> None:
    with trial(tmp_path) as made:
        aliases.freeze(made.store, AGENT, now=made.now, reason="holidays")
        summary = concluded(made, Verdict.PROMOTE)
        assert summary["verdict"] == "error"
        assert summary["reasons"][0].startswith("discarded: support is frozen (holidays)")
        assert rollouts.read_open(made.store, AGENT) is None
        assert releases.get(made.store, summary["candidate"]).status == "rejected"


def test_the_gates_no_starts_nothing(tmp_path: Path) -> None:
    with trial(tmp_path) as made:
        assert concluded(made, Verdict.HOLD)["verdict"] == "hold"
        assert rollouts.read_open(made.store, AGENT) is None


def test_one_that_breaks_tool_calls_goes_back_after_a_few_episodes(tmp_path: Path) -> None:
    with trial(tmp_path) as made:
        made.start()
        num_pairs = 0
        while made.state[0] == "open":
            assert num_pairs < 20, "harm was not seen"
            made.pairs(1, calls=BROKEN, score=None)
            num_pairs += 1
            look(made.rooms)
        state, reason = made.state
        assert (state, num_pairs) == ("back", 8)  # as the bets allow, at 2 metrics / alpha = 40
        assert reason is not None
        assert reason.startswith("it does harm: faults worse by 1.00 on average over 8 comparisons")
        assert (made.serving, releases.get(made.store, made.candidate).status) == (made.incumbent, "rejected")
        assert made.standing() == "quarantined"
        assert made.log() == ["begun", "back"]


def test_one_that_people_rate_lower_goes_back_though_its_calls_are_whole(tmp_path: Path) -> None:
    with trial(tmp_path) as made:
        made.start()
        made.pairs(15, score=-1.0)
        assert "harm: it does harm: score worse by 1.00" in str(look(made.rooms))
        assert made.state[0] == "back"


def test_an_equal_grows_step_by_step_and_is_promoted(tmp_path: Path) -> None:
    with trial(tmp_path, weights=[0.1, 0.5], step_episodes=15) as made:
        made.start()
        made.pairs(14)
        assert look(made.rooms) is None
        made.pairs(1)
        assert "step up: no harm at 0.1" in str(look(made.rooms))
        found = rollouts.read_open(made.store, AGENT)
        assert found is not None
        assert (found.step, found.weight) == (1, 0.5)
        made.pairs(14)
        assert look(made.rooms) is None
        while made.state[0] == "open":
            assert made.now < 2000.0, "never promoted"
            made.pairs(5)
            look(made.rooms)
        references = aliases.read_references(made.store, AGENT)
        assert (made.state[0], references.incumbent, references.previous) == (
            "promoted",
            made.candidate,
            made.incumbent,
        )
        assert (references.high_water, made.standing()) == (made.candidate, "replay")
        assert made.log() == ["begun", "weight", "promoted"]
        grown = read_decisions(made.store, AGENT, kind="rollout")[1].payload
        assert (grown["weight"], grown["evidence"]["episodes"]) == (0.5, {"incumbent": 15, "candidate": 15})


def test_an_episode_is_not_judged_before_it_settled_and_later_ones_wait_for_it(tmp_path: Path) -> None:
    with trial(tmp_path) as made:
        made.start()
        made.recorded(made.episode("incumbent"))
        made.now += 5.0
        made.recorded(made.episode("candidate"))
        made.now += 6.0
        look(made.rooms)
        assert evidence(made)["episodes"] == {"incumbent": 1}
        made.now += 5.0
        look(made.rooms)
        assert evidence(made)["episodes"] == {"incumbent": 1, "candidate": 1}


def test_an_episode_waits_for_one_that_began_before_it_by_another_clock(tmp_path: Path) -> None:
    with trial(tmp_path) as made:
        made.start()
        made.now += 9.0
        made.recorded(made.episode("incumbent"), replace(made.episode("candidate"), created_at=made.now - 8.0))
        made.now += 3.0  # the second has settled, the first has not
        look(made.rooms)
        assert evidence(made)["episodes"] == {}
        made.now += 8.0
        look(made.rooms)
        assert evidence(made)["episodes"] == {"incumbent": 1, "candidate": 1}


def evidence(made: Trial) -> dict:
    found = rollouts.read_open(made.store, AGENT)
    assert found is not None
    return found.evidence


@pytest.mark.parametrize("end", ["left", "away"])
def test_clients_that_hang_up_and_replicas_that_went_away_take_no_canary_back(tmp_path: Path, end: str) -> None:
    with trial(tmp_path) as made:
        made.start()
        for _ in range(40):  # whoever sees x-cltrain-adapter leaves only the candidate's streams
            made.now += 1.0
            made.recorded(made.episode("incumbent", score=1.0), made.episode("candidate", end=end))
        made.now += 20.0
        look(made.rooms)
        assert (made.state[0], evidence(made)["episodes"]) == ("open", {"incumbent": 40})


def test_what_was_imported_or_moved_midway_is_no_evidence(tmp_path: Path) -> None:
    with trial(tmp_path) as made:
        made.start()
        made.recorded(made.episode("candidate"))
        with made.store.write() as connection:
            connection.exec_driver_sql("UPDATE records SET prefix = NULL")
        made.recorded(made.episode("candidate"))
        with made.store.write() as connection:
            connection.exec_driver_sql("UPDATE records SET is_mixed = 1 WHERE prefix IS NOT NULL")
        made.now += 20.0
        look(made.rooms)
        assert evidence(made)["episodes"] == {}


def begun_anew(made: Trial, **sections: dict[str, Any]) -> None:
    """The worker as it is after a restart with these settings."""
    made.rooms.config = from_dict({**made.rooms.config.model_dump(mode="json", exclude_unset=True), **sections})


@pytest.mark.parametrize("mode", ["off", "observe", "approve"])
def test_a_worker_begun_anew_in_a_mode_that_promotes_nothing_takes_it_back_without_blame(
    tmp_path: Path, mode: str
) -> None:
    with trial(tmp_path) as made:
        made.start()
        made.pairs(60)  # enough to promote
        begun_anew(made, agent={"name": AGENT, "mode": mode})
        look(made.rooms)
        why = f"agent.mode is {mode}: only in auto is a candidate tried and promoted without a person"
        assert (made.state, made.serving, made.standing()) == (("back", why), made.incumbent, "waiting")


def test_what_no_key_signed_that_is_trusted_now_is_taken_back(tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate().public_key()
    (tmp_path / "key.pub").write_bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    with trial(tmp_path) as made:
        made.start()
        made.pairs(60)
        begun_anew(made, signing={"trusted": [str(tmp_path / "key.pub")]})
        look(made.rooms)
        assert (made.state[0], made.serving, made.standing()) == ("back", made.incumbent, "waiting")
        assert "is signed by none of the keys that are trusted now" in str(made.state[1])


@pytest.mark.parametrize(("on_timeout", "num_pairs", "state"), [
    ("back", 25, "back"), ("promote", 25, "promoted"), ("promote", 10, "back"),
])  # fmt: skip
def test_when_the_time_is_over_the_owner_decides_but_no_data_never_passes(
    tmp_path: Path, on_timeout: str, num_pairs: int, state: str
) -> None:
    with trial(tmp_path, on_timeout=on_timeout, max_hours=1, metrics=["faults"]) as made:
        made.start()
        made.pairs(num_pairs)
        assert look(made.rooms) is None
        made.now += 3600.0
        assert "1 hours" in str(look(made.rooms))
        assert made.state[0] == state
        assert made.standing() == ("replay" if state == "promoted" else "waiting")


def test_a_replica_that_answers_with_other_weights_ends_it(tmp_path: Path) -> None:
    with trial(tmp_path, ["http://one", "http://two"]) as made:
        made.start()
        directory = str(made.directory(made.candidate))
        readiness.mark_failed(made.store, "http://two", made.candidate, directory, made.now)
        look(made.rooms)
        assert made.state[0] == "back"
        assert "http://two answered as" in str(made.state[1])
        assert made.standing() == "waiting"


def test_a_replica_that_is_cut_off_ends_it_when_too_few_are_left(tmp_path: Path) -> None:
    with trial(tmp_path, ["http://one", "http://two"]) as made:
        made.start()
        made.pairs(2)
        look(made.rooms)
        made.shelves[1].is_down = True
        readiness.note_out(made.store, "http://two", made.now)
        look(made.rooms)
        assert made.state == ("back", f"1 of 2 replicas hold and proved {made.candidate} now (server.min_ready = 2)")
        assert made.serving == made.incumbent


def test_one_of_two_replicas_is_enough_where_one_is_asked_for(tmp_path: Path) -> None:
    with trial(tmp_path, ["http://one", "http://two"]) as made:
        made.rooms.server.min_ready = 1
        made.start()
        readiness.note_out(made.store, "http://two", made.now)
        look(made.rooms)
        assert made.state[0] == "open"


def test_no_update_begins_beside_one_that_was_cut_off_and_is_tried_once_it_is_finished(tmp_path: Path) -> None:
    with trial(tmp_path) as made:

        class Restarted(Worker):
            def _check_anchors(self) -> None:
                pass

            def finish_interrupted(self) -> None:
                made.start()

        learner = Restarted(made.rooms.config, made.store)
        learner.rooms = made.rooms
        with pytest.raises(ConflictError, match=f"{made.candidate} is tried as canary"):
            learner.update()


def test_a_worker_without_the_lease_decides_nothing(tmp_path: Path) -> None:
    with trial(tmp_path) as made:
        made.start()
        made.pairs(12, calls=BROKEN, score=None)
        stale, made.rooms.fence = made.rooms.fence, lease.acquire(made.store, AGENT, "second", 60.0, 2e9)
        second, made.rooms.fence = made.rooms.fence, stale
        with pytest.raises(ConflictError, match="is not the newest"):
            look(made.rooms)
        with made.store.read() as connection:
            assert connection.scalar(select(func.count()).select_from(rollout_outcomes)) == 0
        assert made.state[0] == "open"
        made.rooms.fence = second
        look(made.rooms)
        assert made.state[0] == "back"


KILLED = """
import os, signal, sys
from pathlib import Path
from sqlalchemy import event
from cltrain.rollout import look
from cltrain.store.database import open_store
from tests.fleet_parts import Shelf
from tests.rollout_parts import rooms_of
home, now, fence = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
store = open_store(home / "state")
rooms = rooms_of(home, store, [Shelf("http://one")], fence, lambda: now, {})
@event.listens_for(store.engine, "before_cursor_execute")
def kill(connection, cursor, statement, *rest):
    if statement.startswith("INSERT INTO decisions"):
        os.kill(os.getpid(), signal.SIGKILL)
while True:
    look(rooms)
"""


def test_a_worker_that_is_killed_in_the_middle_of_a_promotion_left_nothing_half_done(tmp_path: Path) -> None:
    with trial(tmp_path, step_episodes=60) as made:
        made.start()
        made.pairs(30)
        look(made.rooms)
        made.pairs(60)
        before = (made.log(), made.serving, evidence(made))
        command = [sys.executable, "-c", KILLED, str(tmp_path), str(made.now), str(made.fence)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert (made.log(), made.serving, evidence(made)) == before
        look(made.rooms)
        assert (made.state[0], made.serving) == ("promoted", made.candidate)
        with made.store.read() as connection:
            assert connection.scalar(select(func.count()).select_from(rollout_outcomes)) == 2 * 90
        assert verify_chain(made.store).num_entries > 0
