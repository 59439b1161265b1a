"""What a failed update leaves out when it tries once more, of its window and of what is rehearsed."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from sqlalchemy import select

from cltrain import culprits, loop
from cltrain.api import Deployment
from cltrain.demo import world
from cltrain.experience import window
from cltrain.experience.triggers import Suspicion
from cltrain.store.schema import releases
from cltrain.trainer.update import UpdateDiscarded, train_update
from tests.deployments import base_server, config_for, corrected, record, tickets, worker
from tests.test_plans import ROWS, plan_of, row_of
from tests.windows import standing


@pytest.fixture(scope="module")
def server():
    with base_server() as url:
        yield url


def test_a_second_attempt_says_of_each_record_why_it_is_left_out(monkeypatch):
    suspicion = Suspicion("moon", "p", {"name": "wire", "arguments": {}}, 1, ("odd",), ("p",))
    rows = (*ROWS, row_of("odd"), row_of("strange"))
    plan = plan_of(rows, suspicious=(suspicion,))
    monkeypatch.setattr(culprits, "adapter_of", lambda rooms, release: release)
    monkeypatch.setattr(
        culprits,
        "token_log_probs",
        lambda base, adapter, rows: [(-9.0 if row.record == "strange" else -0.1,) for row in rows],
    )
    kept, aside = culprits.without_most_surprising(SimpleNamespace(base=None), plan, rows, None)
    assert [row.record for row in kept] == ["right", "fixed"]
    assert {one.record: one.reason.removeprefix("left out of the second attempt: ") for one in aside} == {
        "wrong": "it only says what was wrong", "hinted": "it only says what was wrong", "odd": "suspicious",
        "strange": "too surprising",
    }  # fmt: skip
    assert {one.status for one in aside} == {"quarantined"}


def test_a_failed_canary_scrubs_what_is_rehearsed_of_what_it_forbids(tmp_path, server):
    config = config_for(tmp_path / "demo", server, trainer={"num_steps": 2, "num_anchors": 4})
    bad, sound = tickets("gift", 3, seed=6), tickets("repair", 3, seed=7)
    tool = bad[0].claimed["name"]
    never = {
        "id": "never", "kind": "canary", "messages": [{"role": "user", "content": "hello"}], "forbidden": [tool],
        "expected": "xyzzy",
    }  # fmt: skip
    suite = config.gate.suite
    suite.write_text(suite.read_text() + json.dumps(never) + "\n")  # whatever is answered, it fails
    deployment = Deployment(config)
    record(deployment.store, config, [corrected(ticket) for ticket in (*tickets("repair", 8), *bad, *sound)])
    with deployment.store.write() as connection:
        for ticket in (*bad, *sound):
            window.mark(connection, "support", ticket.id, "replay", now=3.0, stratum=ticket.skill)
    with worker(config, deployment.store) as learner:
        summary = learner.update()
    assert (summary["verdict"], "canary" in summary["decision"]["codes"]) == ("reject", True)
    said = standing(deployment.store)
    why = f"no longer rehearsed: it says {tool!r}, which a canary forbids"
    assert {ticket.id: said[ticket.id] for ticket in bad} == {ticket.id: ("quarantined", why) for ticket in bad}
    assert {said[ticket.id][0] for ticket in sound} == {"replay"}
    assert summary["window"]["set_aside"]["no longer rehearsed"] == 3
    with deployment.store.read() as connection:
        made = connection.execute(select(releases.c.manifest).where(releases.c.parent.is_not(None))).scalars().all()
    first, second = sorted(made, key=lambda manifest: manifest["seed"])
    assert {ticket.id for ticket in bad} <= set(first["replayed"])
    assert set(second["replayed"]) == set(first["replayed"]) - {ticket.id for ticket in bad}


def test_a_failed_canary_scrubs_a_phrase_that_was_too_rare_in_every_window(tmp_path, server):
    config = config_for(tmp_path / "demo", server)
    deployment = Deployment(config)
    poisoned = next(w for w in world.phases(9) if w.kind == "poison")
    record(deployment.store, config, [corrected(ticket) for ticket in poisoned.tickets])
    with deployment.store.write() as connection:
        for ticket in poisoned.tickets:  # over many windows, each below the scan's threshold
            window.mark(connection, "support", ticket.id, "replay", now=3.0, stratum=ticket.skill)
    with worker(config, deployment.store) as learner:
        rows = [row_of(ticket.id) for ticket in poisoned.tickets]
        plan = culprits.scrubbed(learner.rooms, plan_of((), replay=(*rows, row_of("the owner's"))))
    bad = {ticket.id for ticket in poisoned.tickets if ticket.kind == "poison"}
    assert {one.record for one in plan.set_aside} == bad
    assert {row.record for row in plan.replay} == {row.record for row in rows} - bad | {"the owner's"}


@pytest.mark.parametrize("is_one_to_blame", [True, False])
def test_training_that_breaks_down_is_tried_once_without_what_surprises_most(
    tmp_path, server, monkeypatch, is_one_to_blame
):
    config = config_for(
        tmp_path / "demo", server, trainer={"num_steps": 2, "num_anchors": 4}, experience={"filter": False}
    )
    deployment = Deployment(config)
    odd = tickets("repair", 1, seed=9)[0]
    strange = {"name": "find", "arguments": {"order": "zq xj vv kq 9 zz " * 6}}
    record(deployment.store, config, [corrected(ticket) for ticket in tickets("repair", 9)])
    record(deployment.store, config, [corrected(odd, claimed=strange)])

    def breaks_down(base, *, fresh, **inputs):
        if not is_one_to_blame or odd.id in {row.record for row in fresh}:
            raise UpdateDiscarded("nll_fresh is nan at step 1")
        return train_update(base, fresh=fresh, **inputs)

    monkeypatch.setattr(loop, "train_update", breaks_down)
    with worker(config, deployment.store) as learner:
        summary = learner.update()
    said = standing(deployment.store)
    if is_one_to_blame:
        assert summary["verdict"] in ("promote", "hold")
        assert said[odd.id] == ("quarantined", "left out of the second attempt: too surprising")
        assert [status for status, _ in said.values()].count("quarantined") == 2
    else:  # settings, bounds or base: no record is to blame
        assert (summary["verdict"], summary["decision"]["codes"]) == ("error", ["training"])
        assert "UpdateDiscarded: nll_fresh is nan" in summary["reasons"][0]
        assert {status for status, _ in said.values()} == {"waiting"}
