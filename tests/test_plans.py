"""What becomes of an update's records: what it learned, what it set aside, what comes back."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
from sqlalchemy import insert, select, update

from cltrain import plans
from cltrain.config import ObjectivesConfig
from cltrain.experience import window
from cltrain.experience.waiting import rules_mark
from cltrain.records import Alias, Aside, Check, Code, Decision, Feedback, TokenRow, Verdict
from cltrain.registry import aliases
from cltrain.store.schema import screenings, updates
from tests.experience_parts import CONFIG, RULES, good, recorder, store

__all__ = ["recorder", "store"]  # fixtures
ALL = ObjectivesConfig()
GAINLESS = (Check("retention", Code.RETENTION, Verdict.PROMOTE, ""), Check("gain", Code.GAIN, Verdict.HOLD, ""))


def row_of(record, objective="sft", value=1.0, **changes):
    return TokenRow(record, "mend/good", "p", (1, 2), (0.0, 1.0), objective, value, **changes)


ROWS = (row_of("right"), row_of("wrong", "kto", -1.0), row_of("hinted", "hindsight"), row_of("fixed", "dpo"))


def plan_of(rows, aside=(), **changes):
    names = [*(row.record for row in rows), *(one.record for one in aside)]
    plan = plans.Plan(
        id="u", agent="support", number=1, parent="x", alias=Alias("support", "x", 1, None, 0), is_trial=False, seed=0,
        work_dir=None, window=tuple((name, "mend/good", "p") for name in names), fresh=tuple(rows), replay=(),
        set_aside=tuple(aside), notes=(), suspicious=(), refusal=None,
        manifest={"rules": rules_mark(**RULES, objectives=ALL)},
    )  # fmt: skip
    return replace(plan, **changes)


def filed(store, plan, decision, *, is_served=False, learned=None, doubtful=()):
    """Record -> (status, reason, update) once the plan, begun at 10, is concluded at 20."""
    with store.write() as connection:
        if connection.scalar(select(updates.c.id)) is None:
            values = {"id": "u", "agent": "support", "number": 1, "state": "done", "parent": "x", "candidate": "y"}
            connection.execute(insert(updates).values(**values, mode="auto", fence=1, manifest={}, started_at=10.0))
        rows = plan.fresh if learned is None else learned
        plans._file_records(connection, plan, rows, decision, doubtful, is_served=is_served, now=20.0)
        return {row.record: (row.status, row.reason, row.update) for row in connection.execute(select(screenings))}


@pytest.mark.parametrize(
    ("decision", "is_served", "expected"),
    [
        (Decision(Verdict.PROMOTE, ("",), ()), True, ["replay", "learned", "learned", "replay"]),
        (Decision(Verdict.PROMOTE, ("",), ()), False, ["waiting"] * 4),
        (Decision(Verdict.HOLD, ("",), GAINLESS), False, ["replay", "waiting", "waiting", "replay"]),
        (Decision(Verdict.HOLD, ("",), ()), False, ["waiting"] * 4),
        (Decision(Verdict.REJECT, ("",), ()), False, ["quarantined"] * 4),
    ],
)
def test_what_was_wrong_is_learned_once_something_serves_and_never_rehearsed(store, decision, is_served, expected):
    plan = plan_of(ROWS)
    assert plan.taught == {"mend/good"}
    found = filed(store, plan, decision, is_served=is_served)
    assert [found[row.record][0] for row in ROWS] == expected


@pytest.mark.parametrize(
    ("decision", "is_served", "expected"),
    [
        (Decision(Verdict.PROMOTE, ("",), ()), True, ["replay", "learned"]),
        (Decision(Verdict.PROMOTE, ("",), ()), False, ["waiting", "waiting"]),
        (Decision(Verdict.HOLD, ("",), GAINLESS), False, ["replay", "learned"]),
        (Decision(Verdict.REJECT, ("",), ()), False, ["quarantined", "quarantined"]),
    ],
)
def test_what_the_adapter_doubts_right_after_learning_it_leaves_the_window_and_is_never_rehearsed(
    store, decision, is_served, expected
):
    rows = (row_of("right"), row_of("odd"))
    found = filed(store, plan_of(rows), decision, is_served=is_served, doubtful={"odd"})
    assert [found[row.record][0] for row in rows] == expected
    assert [plans.DOUBTFUL in found[row.record][1] for row in rows] == [False, True]


@pytest.mark.parametrize("is_served", [True, False])
def test_what_was_rehearsed_and_is_doubted_leaves_the_buffer_only_once_the_doubter_serves(store, is_served):
    with store.write() as connection:
        for name in ("old", "odd"):
            window.mark(connection, "support", name, "replay", now=1.0, stratum="mend/good", update="before")
        window.mark(connection, "support", "undone", "quarantined", now=1.0, stratum="mend/good", update="before")
    verdict = Decision(Verdict.PROMOTE, ("",), ())
    found = filed(
        store, plan_of((row_of("right"),)), verdict, is_served=is_served, doubtful={"odd", "undone", "owners"}
    )
    assert found["odd"][::2] == ("learned" if is_served else "replay", "before"), "a rollback still finds it"
    assert {name: one[0] for name, one in found.items() if name in ("old", "undone", "owners")} == {
        "old": "replay", "undone": "quarantined"
    }  # fmt: skip


@pytest.mark.parametrize("verdict", [Verdict.PROMOTE, Verdict.ERROR, Verdict.REJECT])
def test_what_a_rollback_quarantined_since_it_was_read_stays_quarantined(store, verdict):
    with store.write() as connection:
        window.mark(connection, "support", "right", "quarantined", now=15.0, reason="rolled back", update="before")
    found = filed(store, plan_of((row_of("right"), row_of("other"))), Decision(verdict, ("",), ()))
    assert found["right"] == ("quarantined", "rolled back", "before")
    assert found["other"][2] == "u"


@pytest.mark.parametrize("verdict", [Verdict.PROMOTE, Verdict.REJECT])
def test_what_is_set_aside_goes_where_it_was_set_aside_to_whatever_the_verdict_and_its_reason_says(store, verdict):
    aside = [
        Aside("surplus", "waiting", "said quota elsewhere"), Aside("quota: no", "quarantined", "quota: not the reason"),
        Aside("long", "unusable", "unusable: too long"),
    ]  # fmt: skip
    found = filed(store, plan_of(ROWS, aside), Decision(verdict, ("",), ()), is_served=verdict is Verdict.PROMOTE)
    mark = rules_mark(**RULES, objectives=ALL)
    assert {one.record: found[one.record][:2] for one in aside} == {
        "surplus": ("waiting", "said quota elsewhere"), "quota: no": ("quarantined", "quota: not the reason"),
        "long": ("unusable", f"unusable: too long{mark}"),
    }  # fmt: skip
    assert {found[one.record][2] for one in aside} == {None}, "neither approved nor rolled back with what was learned"


def test_what_turned_out_unusable_comes_back_with_other_rules_or_with_what_was_said_since_it_was_read(recorder, store):
    for name in ("a", "b", "c", "d"):
        recorder.add_trajectory(good(name))
    aside = [Aside(name, "unusable", "no worse than usual: it is not") for name in "abcd"]
    recorder.add_feedback(Feedback("before", "a", score=1.0), now=9.0).result()
    recorder.add_feedback(Feedback("meanwhile", "b", score=1.0), now=15.0).result()
    recorder.add_feedback(Feedback("after", "c", score=1.0), now=25.0).result()
    filed(store, plan_of((), aside), Decision(Verdict.HOLD, ("",), ()))

    def names(**changes):
        options = {"now": 30.0, "objectives": ALL, **RULES, **changes}
        return [e.record for e in window.next_window(store, "support", CONFIG, **options).examples]

    assert names() == ["b", "c"]
    assert names(learn_from=("agent",)) == ["a", "b", "c", "d"]


def test_what_is_scrubbed_from_what_is_rehearsed_is_filed_with_the_window_and_keeps_who_learned_it(recorder, store):
    recorder.add_trajectory(good("old"))
    filed(store, plan_of(ROWS[:1]), Decision(Verdict.PROMOTE, ("",), ()), is_served=True)
    aside = [Aside("right", "quarantined", "no longer rehearsed: why"), Aside("unread", "quarantined", "not ours")]
    plan = plan_of(ROWS[3:], aside, window=(("fixed", "mend/good", "p"),))
    found = filed(store, plan, Decision(Verdict.REJECT, ("",), ()))
    assert found["right"] == ("quarantined", "no longer rehearsed: why", "u")
    assert found.keys() == {"right", "fixed"}


def test_what_is_promoted_later_is_rehearsed_but_for_its_failures_its_doubts_and_what_was_not_learned(store):
    aside = [Aside("surplus", "waiting", "quota: it has enough")]
    read = (*((name, "mend/good", "p") for name in ("right", "odd", "surplus")), ("wrong", "mend/bad", "p"))
    plan = plan_of((*ROWS[:2], row_of("odd")), aside, window=read)
    filed(store, plan, Decision(Verdict.PROMOTE, ("",), ()), doubtful={"odd"})
    with store.write() as connection:
        connection.execute(update(updates).values(summary={"doubtful": ["odd", "old", "older"]}))
        for record, made_by in (("old", "u"), ("older", "before"), ("sure", "before")):
            window.mark(connection, "support", record, "replay", now=1.0, update=made_by)
        aliases.file_learned_in(connection, "support", "y", "promoted by a human", 30.0)
    with store.read() as connection:
        found = dict(map(tuple, connection.execute(select(screenings.c.record, screenings.c.status))))
    expected = {"right": "replay", "wrong": "learned", "odd": "learned", "surplus": "waiting"}
    assert found == {**expected, "old": "learned", "older": "learned", "sure": "replay"}


def test_a_plan_with_partners_and_notes_comes_back_from_disk():
    row = row_of("r", "dpo", partner=row_of("r", "dpo"))
    assert plans._token_row(json.loads(json.dumps(asdict(row)))) == row
