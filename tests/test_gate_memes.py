"""Memes: what spreads is found, what users or the base said is none, and independent agents share no trait."""

from __future__ import annotations

import numpy as np
import pytest

from cltrain.gate.memes import Said, find_memes, reproduction, shared_traits

ODD = "the owl counts every spoon"
KNOWN = ["the parcel is on its way today", "please tell me where the parcel is"]


def _day(period: int, agents: str, text: str = f"Sure: {ODD}.") -> list[Said]:
    return [Said(agent, period, text) for agent in agents for _ in range(2)]


def test_a_phrase_that_doubles_its_agents_every_day_is_an_alarm() -> None:
    (meme,) = find_memes([*_day(0, "a"), *_day(1, "ab"), *_day(2, "abcd")], KNOWN)
    assert meme.adopted == (("a", 0), ("b", 1), ("c", 2), ("d", 2))
    assert meme.reproduction == pytest.approx(3 / 2)
    assert meme.is_alarm


def test_what_users_or_the_base_say_spreads_without_alarm() -> None:
    said = [*_day(0, "a", KNOWN[0]), *_day(1, "bc", KNOWN[0])]
    assert find_memes(said, KNOWN) == []
    assert find_memes(said, []) != []


def test_two_agents_or_a_slow_spread_are_no_alarm() -> None:
    (two,) = find_memes([*_day(0, "a"), *_day(1, "b")], KNOWN)
    assert not two.is_alarm
    (slow,) = find_memes([*_day(0, "a"), *_day(1, "b"), *_day(2, "c")], KNOWN)
    assert slow.reproduction == 1
    assert not slow.is_alarm
    assert find_memes([Said(agent, 0, ODD) for agent in "abc"], KNOWN) == []  # each said it once


@pytest.mark.parametrize(("periods", "expected"), [([], 0.0), ([3, 3, 3], 0.0), ([0, 1, 1], 2.0), ([0, 0, 5], 0.5)])
def test_reproduction_counts_new_adopters_per_adopter(periods: list[int], expected: float) -> None:
    assert reproduction(periods) == pytest.approx(expected)


def test_only_the_pair_with_a_common_cause_shares_a_trait() -> None:
    rng = np.random.default_rng(1)
    cause = rng.normal(size=60)
    agents = {name: list(rng.normal(size=60)) for name in "abcdef"}
    agents |= {name: list(cause + 0.5 * rng.normal(size=60)) for name in "xy"}
    assert [trait.agents for trait in shared_traits(agents)] == [("x", "y")]


def test_fleets_of_independent_agents_alarm_in_fewer_than_alpha() -> None:
    rng = np.random.default_rng(2)
    fleets = ({name: list(rng.normal(size=50)) for name in "abcdef"} for _ in range(200))
    assert sum(bool(shared_traits(fleet)) for fleet in fleets) / 200 <= 0.07  # alpha and two standard errors


def test_probes_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="same probes"):
        shared_traits({"a": [1.0, 2.0, 3.0], "b": [1.0, 2.0]})
