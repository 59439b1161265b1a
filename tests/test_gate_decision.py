"""The four verdicts: errors never promote, harm rejects, ignorance holds, and no gain pays for a loss."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cltrain.config import GateConfig
from cltrain.gate.decision import decide, moves_high_water
from cltrain.gate.futility import is_futile
from cltrain.gate.levels import Past
from cltrain.gate.rows import GateScores, ItemScores, Role
from cltrain.gate.stats import lower_bound
from cltrain.gate.triggers import ProbeResult
from cltrain.records import Code, Decision, SuiteItem, Verdict

GAIN = GateConfig()
NON_INFERIOR = GateConfig(promote_on="non_inferior")
TAUGHT = {"new/corrected"}
ROLES: tuple[Role, ...] = ("incumbent", "high_water", "anchor")


def _rows(
    stratum: str,
    outcomes: Iterable[tuple[float, ...]],
    kind: str = "gain",
    suite: str = "own",
) -> list[ItemScores]:
    """outcomes: (candidate, incumbent[, high-water[, anchor]]) of each item."""
    rows = []
    for number, (candidate, *references) in enumerate(outcomes):
        item = SuiteItem(f"{suite}-{stratum}-{kind}-{number}", suite, stratum, kind, ())  # type: ignore[arg-type]
        rows.append(ItemScores(item, candidate, dict(zip(ROLES, references, strict=False))))
    return rows


def _decide(
    rows: list[ItemScores], config: GateConfig = GAIN, base_kl: float | None = 0.01, **more: object
) -> Decision:
    return decide(GateScores(tuple(rows), base_kl, **more), config, taught=TAUGHT)  # type: ignore[arg-type]


LEARNED = _rows("new/good", [(1, 0)] * 20 + [(1, 1)] * 10)
KEPT = _rows("old/good", [(1, 1)] * 150)


def test_a_gain_without_a_loss_promotes() -> None:
    decision = _decide(LEARNED + KEPT)
    assert decision.verdict is Verdict.PROMOTE
    assert {check.verdict for check in decision.checks} == {Verdict.PROMOTE}


def test_no_change_holds_and_says_how_many_items_are_missing_and_when() -> None:
    rows = _rows("new/good", [(1, 0)] * 3 + [(1, 1)] * 27) + KEPT
    arriving = [(rows[0].item, 0.5), (rows[-1].item, 9.0)]
    decision = decide(GateScores(tuple(rows), 0.01), GAIN, taught=TAUGHT, arriving=arriving)
    assert decision.verdict is Verdict.HOLD
    assert 20 <= decision.num_missing <= 90
    assert decision.forecast_s == pytest.approx(decision.num_missing / 0.5), "what was not taught shows no gain"
    assert any("gain in own: not shown" in reason for reason in decision.reasons)
    assert _decide(rows).forecast_s is None
    assert decide(GateScores(tuple(rows), 0.01), GAIN, taught=TAUGHT, arriving=arriving[1:]).forecast_s is None
    other = dataclasses.replace(rows[0].item, suite="agreement")
    assert decide(GateScores(tuple(rows), 0.01), GAIN, taught=TAUGHT, arriving=[(other, 0.5)]).forecast_s is None


def test_what_one_gate_cannot_draw_has_no_forecast_and_says_what_to_raise() -> None:
    rows = _rows("new/good", [(1, 0)] * 3 + [(1, 1)] * 117) + _rows("old/good", [(1, 1)] * 120)
    arriving = [(rows[0].item, 0.5)]
    small = decide(GateScores(tuple(rows), 0.01), GAIN, taught=TAUGHT, arriving=arriving)
    assert (small.verdict, small.forecast_s) == (Verdict.HOLD, None)
    assert "one gate draws at most 120: raise gate.items_per_gate" in small.reasons[0]
    large = GateConfig(items_per_gate=2 * (120 + small.num_missing))
    enough = decide(GateScores(tuple(rows), 0.01), large, taught=TAUGHT, arriving=arriving)
    assert enough.forecast_s == pytest.approx(enough.num_missing / 0.5)
    assert enough.num_missing == small.num_missing
    turns = decide(GateScores(tuple(_clustered(rows, 4)), 0.01), large, taught=TAUGHT, arriving=arriving)
    assert turns.forecast_s is None, "episodes of four turns take four places each"


def test_a_hold_is_kept_when_the_missing_items_look_like_the_others() -> None:
    rows = _rows("new/good", [(1, 0)] * 3 + [(1, 1)] * 27)
    missing = _decide(rows + KEPT).num_missing
    more = _rows("new/none", ([(1, 0)] * 3 + [(1, 1)] * 27) * math.ceil(missing / 30))
    assert _decide(rows + more + KEPT).verdict is Verdict.PROMOTE


def test_no_items_at_all_is_a_hold() -> None:
    for config in (GAIN, NON_INFERIOR):
        decision = _decide([], config)
        assert decision.verdict is Verdict.HOLD
        assert decision.num_missing > 50


def test_too_few_protected_items_are_no_pass_by_ignorance() -> None:
    few = _rows("new/good", [(1, 0)] * 20)
    decision = _decide(few + KEPT[:20])
    assert decision.verdict is Verdict.HOLD
    assert decision.num_missing >= 30
    many_taught = _rows("new/good", [(1, 0)] * 80)
    joined = _decide(many_taught + KEPT[:30])
    assert joined.verdict is Verdict.PROMOTE
    assert any("their gains not counted" in check.reason for check in joined.checks)


def test_a_gain_in_the_taught_items_that_join_never_counts_for_retention() -> None:
    lost = _rows("old/good", [(0, 1)] * 9 + [(1, 1)] * 10)  # too few for the stratum's own guard
    assert _decide(_rows("new/good", [(1, 0)] * 80) + lost).verdict is not Verdict.PROMOTE


@pytest.mark.parametrize("num_lost", [8, 30])
def test_a_protected_stratum_that_drops_rejects_whatever_was_gained(num_lost: int) -> None:
    lost = _rows("other/good", [(0, 1)] * num_lost + [(1, 1)] * (40 - num_lost))
    decision = _decide(LEARNED * 5 + KEPT * 4 + lost)
    assert decision.verdict is Verdict.REJECT
    assert any("stratum other/good" in reason for reason in decision.reasons)


def test_a_drop_that_may_be_luck_holds() -> None:
    lost = _rows("other/good", [(0, 1)] * 4 + [(1, 0)] * 1 + [(1, 1)] * 15)
    decision = _decide(LEARNED + KEPT * 4 + lost)
    assert decision.verdict is Verdict.HOLD
    assert any("may be luck" in reason for reason in decision.reasons)


def test_small_strata_are_judged_together() -> None:
    small = [row for name in "abcdef" for row in _rows(f"{name}/good", [(0, 1)] * 2 + [(1, 1)] * 5)]
    decision = _decide(LEARNED + KEPT * 4 + small)
    assert decision.verdict is Verdict.REJECT
    assert any("small strata together" in reason for reason in decision.reasons)


def test_losing_what_was_taught_rejects() -> None:
    decision = _decide(_rows("new/good", [(0, 1)] * 20 + [(1, 1)] * 20) + KEPT)
    assert decision.verdict is Verdict.REJECT
    two = _decide(_rows("new/good", [(1, 0)] * 60) + _rows("new/bad", [(0, 1)] * 20) + KEPT)
    assert two.verdict is Verdict.REJECT


def test_a_pooled_loss_too_thin_for_any_stratum_does_not_pass() -> None:
    thin = [row for i in range(10) for row in _rows(f"s{i}/good", [(0, 1)] * 2 + [(1, 1)] * 18)]
    decision = _decide(LEARNED + thin)
    assert decision.verdict is Verdict.REJECT
    assert any("retention against incumbent: worse" in reason for reason in decision.reasons)


def test_small_steps_down_are_stopped_by_the_high_water_mark_and_the_anchor() -> None:
    for role in (1, 2):
        references = [1.0, 0.0, 0.0, 0.0]
        outcomes = []
        for number in range(150):
            references = [0.0 if number < 3 else 1.0, 1.0 if number >= 2 else 0.0, 1.0, 1.0]
            if number < 12:  # lost long ago, so the incumbent does not tell
                references = [0.0, 0.0, 1.0 if role == 1 else 0.0, 1.0 if role == 2 else 0.0]
            outcomes.append(tuple(references))
        outcomes[12] = (0.0, 1.0, 1.0, 1.0)
        decision = _decide(LEARNED + _rows("old/good", outcomes))
        assert decision.verdict is Verdict.REJECT
        name = "high-water" if role == 1 else "anchor"
        assert any(f"retention against {name}: worse" in reason for reason in decision.reasons)


def test_what_the_incumbent_lost_before_is_not_the_candidates_fault() -> None:
    kept = _rows("old/good", [(0, 0, 1)] * 12 + [(1, 1, 1)] * 138)
    assert _decide(LEARNED + kept).verdict is Verdict.HOLD


def test_one_failed_canary_rejects_although_the_incumbent_fails_too() -> None:
    canaries = _rows("text", [(1, 1)] * 30 + [(0, 0)], kind="canary")
    decision = _decide(LEARNED + KEPT + canaries)
    assert decision.verdict is Verdict.REJECT
    assert "1 of 31 failed" in decision.reasons[0]


def test_too_far_from_the_base_rejects() -> None:
    assert _decide(LEARNED + KEPT, base_kl=0.26).verdict is Verdict.REJECT
    assert _decide(LEARNED + KEPT, base_kl=0.25).verdict is Verdict.PROMOTE


def test_the_probes_of_one_phrase_have_one_number() -> None:
    probes = (ProbeResult(8, 0, 0.0, True), ProbeResult(16, 0, 0.0), ProbeResult(16, 0, 0.0))
    names = [check.name for check in _decide(LEARNED + KEPT, probes=probes).checks if check.code is Code.TRIGGER]
    assert names == ["trigger probe 1 (its own records)", "trigger probe 1", "trigger probe 2"]


@pytest.mark.parametrize(
    ("probe", "verdict"),
    [
        (ProbeResult(16, 1, 1.4), Verdict.PROMOTE),
        (ProbeResult(16, 2, 0.0), Verdict.REJECT),
        (ProbeResult(16, 0, 1.6), Verdict.REJECT),
        (ProbeResult(16, 0, None), Verdict.PROMOTE),
        (ProbeResult(0, 0, None), Verdict.HOLD),
    ],
)
def test_a_phrase_that_steers_the_candidate_rejects(probe: ProbeResult, verdict: Verdict) -> None:
    assert _decide(LEARNED + KEPT, probes=(ProbeResult(16, 0, 0.0), probe)).verdict is verdict


def test_non_inferiority_alone_promotes_when_it_is_asked_for() -> None:
    equal = _rows("new/good", [(1, 1)] * 50) + KEPT
    assert _decide(equal, NON_INFERIOR).verdict is Verdict.PROMOTE
    assert _decide(equal, GAIN).verdict is Verdict.HOLD


def test_only_overwhelming_evidence_moves_the_high_water_mark() -> None:
    assert moves_high_water(_decide(LEARNED + KEPT))
    little = _decide(_rows("new/good", [(1, 0)] * 9) + KEPT)
    assert little.verdict is Verdict.PROMOTE
    assert not moves_high_water(little)
    assert not moves_high_water(_decide(LEARNED + KEPT, base_kl=9.0))


def test_strata_do_not_reject_before_the_last_chunk() -> None:
    lost = _rows("other/good", [(0, 1)] * 6 + [(1, 1)] * 30)
    scores = GateScores(tuple(LEARNED + KEPT * 4 + lost), 0.01)
    assert decide(scores, GAIN, taught=TAUGHT, is_complete=False).verdict is Verdict.HOLD
    assert decide(scores, GAIN, taught=TAUGHT).verdict is Verdict.REJECT


outcome = st.tuples(*[st.sampled_from([0.0, 1.0])] * 4)
stratum = st.sampled_from(["new/good", "new/none", "old/good", "ask/none", "text/none"])
kind = st.sampled_from(["gain", "retention", "canary"])


@st.composite
def some_rows(draw: st.DrawFn) -> list[ItemScores]:
    seed, size = draw(st.integers(0, 2**32)), draw(st.integers(0, 150))
    rng = random.Random(seed)
    skew = rng.random()
    groups = draw(st.lists(st.tuples(stratum, kind), min_size=1, max_size=4))
    rows = []
    for number in range(size):
        name, which = groups[number % len(groups)]
        values = [1.0 if rng.random() < skew else 0.0] * 4
        if rng.random() < 0.2:
            values = [float(rng.random() < 0.7) for _ in range(4)]
        [row] = _rows(name, [tuple(values)], kind=which)
        rows.append(dataclasses.replace(row, item=dataclasses.replace(row.item, id=str(number))))
    return rows


@settings(max_examples=60, deadline=None)
@given(some_rows(), st.sampled_from(["gain", "expected", "non_inferior"]), st.integers(0, 5))
def test_nothing_is_ever_promoted_with_an_error(rows: list[ItemScores], promote_on: str, case: int) -> None:
    config = GateConfig(promote_on=promote_on)  # type: ignore[arg-type]
    rows = rows + LEARNED + KEPT
    scores = GateScores(tuple(rows), 0.01)
    first = rows[0]
    broken = [
        dataclasses.replace(scores, errors=("the server did not answer",)),
        dataclasses.replace(scores, base_kl=None),
        dataclasses.replace(scores, base_kl=math.nan),
        dataclasses.replace(scores, rows=(dataclasses.replace(first, candidate=math.nan), *rows[1:])),
        dataclasses.replace(scores, rows=(dataclasses.replace(first, references={}), *rows[1:])),
        dataclasses.replace(scores, probes=(ProbeResult(4, 0, math.inf),)),
    ][case]
    assert decide(broken, config, taught=TAUGHT).verdict is Verdict.ERROR


@settings(max_examples=60, deadline=None)
@given(some_rows(), st.integers(0, 400), st.integers(20, 60), st.sampled_from(["gain", "expected", "non_inferior"]))
def test_no_gain_pays_for_a_protected_loss(rows: list[ItemScores], wins: int, size: int, promote_on: str) -> None:
    """A stratum outside the update that drops by more than its margin is never promoted, whatever else was won."""
    config = GateConfig(promote_on=promote_on)  # type: ignore[arg-type]
    num_lost = math.floor(config.stratum_margin * size) + 1
    lost = _rows("guarded/good", [(0, 1)] * num_lost + [(1, 1)] * (size - num_lost))
    won = _rows("new/corrected", [(1, 0)] * wins)
    assert decide(GateScores(tuple(rows + won + lost), 0.0), config, taught=TAUGHT).verdict is not Verdict.PROMOTE


@settings(max_examples=40, deadline=None)
@given(some_rows(), st.integers(0, 149))
def test_a_worse_answer_outside_the_update_never_turns_into_a_promotion(rows: list[ItemScores], index: int) -> None:
    rows = rows + LEARNED + KEPT
    before = _decide(rows)
    row = KEPT[index]
    worse = [dataclasses.replace(r, candidate=0.0) if r.item.id == row.item.id else r for r in rows]
    if before.verdict is not Verdict.PROMOTE:
        assert _decide(worse).verdict is not Verdict.PROMOTE


def _false_promotions(config: GateConfig, win: float, loss: float, seed: int, num_gates: int = 2000) -> float:
    """Share of gates that promote a candidate whose answers flip to right or wrong with these chances, looked at
    after 50 and after 100 items."""
    rng = random.Random(seed)
    items = [SuiteItem(str(i), "own", ("new/good", "old/good")[i % 2], "gain", ()) for i in range(100)]
    promoted = 0
    for _ in range(num_gates):
        rows = []
        for item in items:
            draw = rng.random()
            incumbent = 0.0 if draw < win else 1.0 if draw < win + loss else float(rng.random() < 0.8)
            candidate = 1.0 if draw < win else 0.0 if draw < win + loss else incumbent
            rows.append(ItemScores(item, candidate, {"incumbent": incumbent}))
        for stop in (50, 100):
            decision = decide(GateScores(tuple(rows[:stop]), 0.0), config, taught=TAUGHT, is_complete=stop == 100)
            if decision.verdict is not Verdict.HOLD:
                break
        promoted += decision.verdict is Verdict.PROMOTE
    return promoted / num_gates


def test_of_2000_equal_candidates_at_most_alpha_are_promoted() -> None:
    config = GateConfig(margin=0.3, stratum_margin=0.9)  # wide, so that only the gain stands in the way
    assert _false_promotions(config, win=0.15, loss=0.15, seed=1) <= config.alpha


def test_of_2000_candidates_worse_by_the_margin_at_most_alpha_are_promoted() -> None:
    config = GateConfig(promote_on="non_inferior", margin=0.15, stratum_margin=0.9)
    assert _false_promotions(config, win=0.02, loss=0.18, seed=2) <= config.alpha


def _clustered(rows: list[ItemScores], turns: int) -> list[ItemScores]:
    """The same rows as episodes of so many turns each."""
    return [
        dataclasses.replace(row, item=dataclasses.replace(row.item, cluster=f"{row.item.stratum}{number // turns}"))
        for number, row in enumerate(rows)
    ]


def test_fifty_episodes_of_four_turns_count_as_fifty() -> None:
    kept, learned = _rows("old/good", [(1, 1)] * 200), _rows("new/good", [(1, 0)] * 40)
    alone, together = _decide(learned + kept), _decide(_clustered(learned, 4) + _clustered(kept, 4))
    assert alone.verdict is Verdict.PROMOTE
    assert together.verdict is Verdict.HOLD
    retention = next(check for check in together.checks if check.name == "retention against incumbent")
    assert retention.num_items == 60  # the taught join, as 50 are too few for the margin
    once = _decide(learned[::4] + kept[::4])
    assert [(c.name, c.low, c.num_items, c.num_missing) for c in together.checks] == [
        (c.name, c.low, c.num_items, c.num_missing) for c in once.checks
    ]
    assert together.num_missing == once.num_missing > 0


def test_turns_of_one_episode_average_before_any_test() -> None:
    half = _clustered(_rows("new/good", [(1, 0), (1, 1)] * 40), 2)
    check = next(check for check in _decide(half + KEPT).checks if check.name == "gain in own")
    assert check.num_items == 40
    assert check.difference == pytest.approx(0.5)
    assert check.low == pytest.approx(lower_bound([0.5] * 40, GAIN.alpha, num_planned=40))


def test_questions_stop_when_none_that_is_left_could_make_it_a_promotion() -> None:
    left = [row.item for row in _rows("old/more", [(1, 1)] * 50)]
    for probes, is_stopped in (((ProbeResult(0, 0, None),), True), ((), False)):
        few = GateScores(tuple(LEARNED + KEPT[:20]), 0.01, probes)
        decision = decide(few, GAIN, taught=TAUGHT, is_complete=False)
        assert decision.verdict is Verdict.HOLD
        assert is_futile(few, decision, left, GAIN, taught=TAUGHT) is is_stopped


def test_a_retry_needs_twice_the_evidence() -> None:
    rows = next(
        rows
        for num in range(1, 20)
        if _decide(rows := _rows("new/good", [(1, 0)] * num) + KEPT).verdict is Verdict.PROMOTE
    )  # just enough for a first attempt
    again = decide(GateScores(tuple(rows), 0.01), GAIN, taught=TAUGHT, past=Past(is_retry=True))
    assert again.verdict is Verdict.HOLD
