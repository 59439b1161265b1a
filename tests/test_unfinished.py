"""Updates that a crash cut off: which of them carry on, with what they knew before, and which are discarded whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from sqlalchemy import select

from cltrain import plans, unfinished
from cltrain.api import Deployment
from cltrain.demo import world
from cltrain.experience import window
from cltrain.gate.pool import num_uses
from cltrain.gate.suites import item_key
from cltrain.monitoring.outbox import events_after
from cltrain.registry import decisions
from cltrain.store.schema import updates
from tests.chaos_checks import half_done
from tests.deployments import base_server, config_for, corrected, record, tickets, worker
from tests.windows import standing


class Killed(BaseException):
    """Ends an update as the death of its process would: nothing of ours catches it."""


def killed_at(*words: str) -> Callable[[str], None]:
    """Progress that ends the process at the last of these words, once the others were said in this order."""
    left = list(words)

    def on_progress(line: str) -> None:
        if left[0] in line and len(left) > 1:
            left.pop(0)
        elif left[0] in line:
            raise Killed

    return on_progress


@pytest.fixture(scope="module")
def server():
    with base_server() as url:
        yield url


@pytest.fixture
def made(tmp_path, server):
    """Updates of two steps on eight corrected tickets; four more were learned before."""
    config = config_for(tmp_path / "demo", server, trainer={"num_steps": 2, "num_anchors": 4, "checkpoint_every": 1})
    deployment = Deployment(config)
    record(deployment.store, config, [corrected(ticket) for ticket in tickets("repair", 8)])
    learned = tickets("gift", 4, seed=6)
    record(deployment.store, config, [corrected(ticket) for ticket in learned])
    with deployment.store.write() as connection:
        for ticket in learned:
            window.mark(connection, "support", ticket.id, "replay", now=3.0, stratum="gift")
    return config, deployment


def cut_off(config, deployment) -> None:
    with worker(config, deployment.store) as learner:
        learner.rooms.on_progress = killed_at("trained 1 steps")
        with pytest.raises(Killed):
            learner.update()


def restarted(config, deployment, on_progress: Callable[[str], None] = lambda line: None) -> None:
    with worker(config, deployment.store) as learner:
        learner.rooms.on_progress = on_progress
        learner.finish_interrupted()


def test_an_update_that_ends_its_process_twice_is_discarded_at_the_third_start(made):
    config, deployment = made
    cut_off(config, deployment)
    with pytest.raises(Killed):
        restarted(config, deployment, killed_at("trained 2 steps"))
    restarted(config, deployment)
    (update,) = deployment.status()["updates"]
    assert (update["state"], update["verdict"]) == ("discarded", "error")
    assert "started 2 times" in update["reason"]
    told = {status for record, (status, _) in standing(deployment.store).items() if "update" not in record}
    assert told == {"waiting", "replay"}  # looked at: only new records start the next update by themselves
    assert half_done(deployment.store, config.state_dir) == []


def test_an_update_that_was_cut_off_once_carries_on(made):
    config, deployment = made
    cut_off(config, deployment)
    restarted(config, deployment)
    (update,) = deployment.status()["updates"]
    assert update["state"] == "done"


@pytest.mark.parametrize("where", ["window", "replay"])
def test_an_update_that_reads_a_record_quarantined_since_is_discarded(made, where):
    config, deployment = made
    cut_off(config, deployment)
    bad = (tickets("repair", 8) if where == "window" else tickets("gift", 4, seed=6))[2].id
    with deployment.store.write() as connection:
        window.mark(connection, "support", bad, "quarantined", now=4.0, reason="an operator looked at it")
    restarted(config, deployment)
    (update,) = deployment.status()["updates"]
    assert update["state"] == "discarded"
    assert bad in update["reason"]
    assert standing(deployment.store)[bad] == ("quarantined", "an operator looked at it")
    assert len(standing(deployment.store)) == (5 if where == "window" else 4)  # the others wait as if never read


def test_an_update_cut_off_under_another_configuration_is_discarded_and_its_records_wait(made):
    config, deployment = made
    cut_off(config, deployment)
    other = config.model_copy(update={"trainer": config.trainer.model_copy(update={"lr": 1e-3})})
    restarted(other, deployment)
    (update,) = deployment.status()["updates"]
    assert (update["state"], update["reason"]) == ("discarded", "discarded: config changed since it began")
    assert len(standing(deployment.store)) == 4  # those learned before: nothing is said of the window's
    with worker(other, deployment.store) as learner:
        assert learner.update()["num_window"] == 8


def test_an_update_cut_off_on_another_base_or_anchors_may_not_carry_on(made):
    config, deployment = made
    cut_off(config, deployment)
    with deployment.store.read() as connection:
        manifest = connection.scalar(select(updates.c.manifest))
    seen = {"base_digest": manifest["base"], "anchors_digest": manifest["anchors"]}

    def obstacle(**changes: str) -> str | None:
        (left,) = unfinished.interrupted(deployment.store, config, **{**seen, **changes})
        return left.obstacle

    assert obstacle() is None
    assert obstacle(base_digest="another") == "base changed since it began"
    assert obstacle(anchors_digest="another") == "anchors changed since it began"


def test_a_discarded_update_has_a_time_a_reason_an_event_and_a_page_like_any_other(made):
    config, deployment = made
    cut_off(config, deployment)
    (config.state_dir / "updates" / "support-u000001" / plans.ROWS_FILE).write_bytes(b"lost")
    restarted(config, deployment)
    with deployment.store.read() as connection:
        row = connection.execute(select(updates)).one()
    assert row.finished_at > row.started_at
    assert row.summary["reason"] == row.summary["reasons"][0] == "discarded: its rows were lost in a crash"
    assert row.summary["num_window"] == 8
    (entry,) = decisions.read_decisions(deployment.store, "support", kind="discard")
    assert entry.at == row.finished_at
    assert [event.payload["verdict"] for event in events_after(deployment.store, 0)] == ["error"]
    written = config.state_dir / "reports" / "support" / "update-000001.html"
    for page in (written, deployment.report(1), deployment.report()):
        text = page.read_text()
        assert "Discarded" in text
        assert "its rows were lost in a crash" in text


def test_the_page_of_an_update_discarded_by_an_older_version_gives_its_reason(made):
    config, deployment = made
    cut_off(config, deployment)
    with deployment.store.write() as connection:
        old = {"state": "discarded", "verdict": "error", "summary": {"reasons": ["discarded: long ago"]}}
        connection.execute(updates.update().values(**old))
    assert "long ago" in deployment.report(1).read_text()
    assert "long ago" in deployment.report().read_text()


def test_a_second_attempt_is_judged_on_fresh_items_also_after_a_crash_in_it(tmp_path, server):
    config = config_for(
        tmp_path / "demo", server, experience={"filter": False}, gate={"items_per_gate": 2000, "max_uses": 100}
    )
    deployment = Deployment(config)
    poisoned = next(w for w in world.phases(9) if w.kind == "poison")
    record(deployment.store, config, [corrected(ticket) for ticket in poisoned.tickets])
    with worker(config, deployment.store) as learner:
        learner.rooms.on_progress = killed_at("once more on", "trained 1 steps")
        with pytest.raises(Killed):
            learner.update()
        uses = num_uses(deployment.store, "support")
        used_before = {item.id for item in learner.rooms.evidence.suite if item_key(item) in uses}
    restarted(config, deployment)
    with deployment.store.read() as connection:
        decision = connection.execute(select(updates.c.summary)).scalar_one()["decision"]
    assert used_before
    assert decision["items_used"]
    assert not used_before & set(decision["items_used"])
