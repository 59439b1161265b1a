"""What serves is compared with what it must not have lost to: a shown loss alarms, luck does not."""

from __future__ import annotations

import random

import pytest

from cltrain.config import GateConfig
from cltrain.gate.standing import Standing, compare, means
from cltrain.records import Code, SuiteItem, Verdict

CONFIG = GateConfig()
STRATA = ("refund", "lookup", "cancel", "gift")


def items(count: int, suite: str = "desk") -> tuple[SuiteItem, ...]:
    return tuple(
        SuiteItem(f"{suite}-{i}", suite, STRATA[i % len(STRATA)], "retention", ({"role": "user", "content": "?"},))
        for i in range(count)
    )


def verdicts(standing: Standing) -> dict[str, Verdict]:
    return {check.name: check.verdict for check in compare(standing, CONFIG)}


def test_equals_are_fine_in_every_suite_and_stratum():
    found = verdicts(Standing(items(200), (1.0,) * 200, {"base": (1.0,) * 200, "anchor": (1.0,) * 200}))
    assert set(found.values()) == {Verdict.PROMOTE}
    names = {"overall", "suite desk", *(f"stratum {name}" for name in STRATA)}
    assert set(found) == {f"{name} against {role}" for name in names for role in ("base", "anchor")}


def test_one_lost_skill_alarms_whatever_was_gained_elsewhere():
    asked = items(200)
    serving = tuple(float(item.stratum != "gift") for item in asked)
    before = tuple(float(item.stratum == "gift") for item in asked)
    found = {check.name: check for check in compare(Standing(asked, serving, {"high-water mark": before}), CONFIG)}
    lost = found["stratum gift against high-water mark"]
    assert (lost.verdict, lost.code, lost.difference) == (Verdict.REJECT, Code.STRATUM, -1.0)
    assert found["overall against high-water mark"].verdict is Verdict.PROMOTE


def test_a_slow_loss_to_the_anchor_alarms_though_nothing_was_lost_to_the_mark():
    asked = items(240)
    serving = tuple(float(i % 5 > 0) for i in range(240))  # 0.8
    found = verdicts(Standing(asked, serving, {"high-water mark": serving, "anchor": (1.0,) * 240}))
    assert found["overall against anchor"] is Verdict.REJECT
    assert found["overall against high-water mark"] is Verdict.PROMOTE


def test_a_large_drop_on_few_items_is_a_warning_and_on_very_few_nothing():
    few = tuple(item for item in items(100) if item.stratum == "refund")  # 25
    found = verdicts(Standing(few, (0.0,) * 4 + (1.0,) * 21, {"base": (1.0,) * 25}))
    assert found["stratum refund against base"] is Verdict.HOLD
    very_few = tuple(item for item in items(20) if item.stratum == "refund")
    found = verdicts(Standing(very_few, (0.0, *(1.0,) * 4), {"base": (1.0,) * 5}))
    assert found["stratum refund against base"] is Verdict.PROMOTE


@pytest.mark.parametrize(
    "standing",
    [
        Standing((), (), {"base": ()}),
        Standing(items(3), (1.0,) * 3, {"base": (1.0,) * 2}),
        Standing(items(3), (1.0, float("nan"), 1.0), {"base": (1.0,) * 3}),
        Standing(items(3), (1.0, 1.5, 1.0), {"base": (1.0,) * 3}),
    ],
)
def test_what_cannot_be_measured_is_an_error_and_no_number(standing: Standing):
    (check,) = compare(standing, CONFIG)
    assert (check.verdict, check.code) == (Verdict.ERROR, Code.SUITE)


def test_the_bare_base_is_compared_with_nothing():
    assert compare(Standing((), (), {}), CONFIG) == []


def test_of_two_equals_no_more_audits_alarm_than_alpha_allows():
    """300 audits of 200 items, 12 % of which flip either way: harder than a release that is any good."""
    rng, alarms, asked = random.Random(9), 0, items(200)
    for _ in range(300):
        serving, anchor = [], []
        for _ in asked:
            right = float(rng.random() < 0.8)
            anchor.append(right)
            serving.append(right)
            if rng.random() < 0.12:
                serving[-1] = float(rng.random() < 0.5)
                anchor[-1] = 1 - serving[-1]
        found = verdicts(Standing(asked, tuple(serving), {"anchor": tuple(anchor)}))
        alarms += Verdict.REJECT in found.values()
    assert alarms <= 300 * CONFIG.alpha


def test_means_are_those_of_every_group():
    asked = items(8)
    found = means(Standing(asked, (1.0, 0.0) * 4, {"base": (0.0,) * 8}))
    assert found["overall"] == {"serving": 0.5, "base": 0.0, "num_items": 8.0}
    assert found["stratum refund"]["serving"] == 1.0
    assert found["stratum lookup"]["serving"] == 0.0
