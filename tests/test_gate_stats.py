"""The evidence is honest: checked against theory and against plain products of bets."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from cltrain.gate.stats import (
    BETS,
    STAKES,
    e_value,
    items_for_margin,
    items_needed,
    lower_bound,
    means,
    sign_p,
    upper_bound,
)


def _product_of_bets(differences: list[float], above: float) -> float:
    """The definition, term by term, without counting equal differences."""
    total = 0.0
    for fraction, wealth in zip(BETS, STAKES, strict=True):
        for difference in differences:
            wealth *= 1 + fraction / (1 + above) * (difference - above)
        total += wealth
    return total


@pytest.mark.parametrize("above", [-0.05, 0.0, 0.3])
def test_the_e_value_is_the_wealth_of_its_bets(above: float) -> None:
    rng = np.random.default_rng(1)
    differences = [float(d) for d in rng.choice([-1, -0.5, 0, 0.25, 1], size=60)]
    assert e_value(differences, above) == pytest.approx(_product_of_bets(differences, above), rel=1e-9)
    assert e_value([], above) == pytest.approx(1.0)  # all that is staked, and no more


def test_two_equals_look_refuted_at_some_chunk_in_at_most_alpha_of_all_streams() -> None:
    """Ville: over 4,000 streams of 400 items at the edge of the null, looked at every 50."""
    rng = np.random.default_rng(2)
    margin, alpha, num_streams = 0.05, 0.05, 4000
    alarms = 0
    for _ in range(num_streams):
        draws = rng.random(400)
        stream = np.where(draws < 0.10, -1.0, np.where(draws < 0.15, 1.0, 0.0))  # mean -0.05
        alarms += any(e_value(stream[:stop], -margin) >= 1 / alpha for stop in range(50, 401, 50))
    assert alarms / num_streams <= alpha


@pytest.mark.parametrize("draw", [lambda rng: rng.uniform(-1, 1, 200), lambda rng: rng.choice([-1, 0, 0, 0, 1], 200)])
def test_the_bounds_cover_the_true_mean(draw: Callable[[np.random.Generator], np.ndarray]) -> None:
    rng = np.random.default_rng(3)
    missed = 0
    for _ in range(400):
        differences = draw(rng)
        missed += not lower_bound(differences, 0.05) <= 0.0 <= upper_bound(differences, 0.05)
    assert missed / 400 <= 0.1


def test_bounds_and_e_value_say_the_same() -> None:
    rng = np.random.default_rng(4)
    for _ in range(50):
        differences = rng.choice([-1, 0, 0, 0, 0, 0, 1, 1], int(rng.integers(1, 200)))
        low = lower_bound(differences, 0.05)
        assert e_value(differences, low) >= 19.99 or low == -1.0
        assert e_value(differences, min(0.99, low + 1e-3)) < 20
    assert lower_bound([], 0.05) == -1.0
    assert upper_bound([], 0.05) == 1.0


def test_the_forecast_of_items_is_kept_by_the_items() -> None:
    identical = items_needed([0.0] * 10, -0.05, 0.05, 0.05)
    assert e_value([0.0] * identical, -0.05) >= 20
    assert e_value([0.0] * (identical // 2), -0.05) < 20
    flipping = [0.0] * 46 + [1.0, 1.0, 1.0, -1.0]
    needed = items_needed(flipping, 0.0, 0.05, 0.05)
    assert e_value(flipping * math.ceil(needed / 50), 0.0) >= 20


def test_where_the_items_point_nowhere_the_forecast_is_for_the_effect_of_interest() -> None:
    assert items_needed([], 0.0, 0.05, 0.05) < 200
    losing = [0.0] * 80 + [1.0] * 5 + [-1.0] * 15
    assert 200 < items_needed(losing, 0.0, 0.05, 0.05) < 5000
    assert items_needed(losing, 0.0, 0.05, 0.2) < items_needed(losing, 0.0, 0.05, 0.05)


def test_the_sign_test_is_the_binomial_tail() -> None:
    assert sign_p([-1.0] * 5 + [0.0] * 30) == pytest.approx(1 / 32)
    assert sign_p([-1.0, 1.0]) == pytest.approx(0.75)
    assert sign_p([]) == 1.0


def test_the_fewest_items_for_a_margin_are_just_enough_for_two_equals() -> None:
    for margin in (0.02, 0.05, 0.1):
        least = items_for_margin(margin, 0.05)
        assert e_value([0.0] * least, -margin) >= 20
        assert e_value([0.0] * (least // 2), -margin) < 20
    assert items_for_margin(0.02, 0.05, 0.06) > 2 * items_for_margin(0.02, 0.05, 0.02) > 0


def test_items_of_one_cluster_become_one_difference() -> None:
    assert means([1.0, 0.0, -1.0, 0.5], ["a", None, "a", None]) == [0.0, 0.0, 0.5]
    assert means([1.0, 0.0], [None, None]) == [1.0, 0.0]
