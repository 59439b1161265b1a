"""The exact step back to a limit, against dense float64 matrices along the way."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cltrain.objectives.bounds import between, largest_step, norm_step, step_quartic
from cltrain.objectives.geometry import delta_norms, difference_norms
from cltrain.objectives.projections import within_ball
from tests.deltas import dense, make_adapter

SIZES = [(1, 1, 1), (17, 33, 4), (65, 17, 8), (33, 65, 1)]


def adapter(num_out, num_in, rank, seed, size=1.0):
    return make_adapter([(num_out, num_in)], rank, seed, size=size)


@pytest.mark.parametrize("size", SIZES)
def test_the_quartic_is_the_dense_norm_along_the_segment(size):
    start, end = adapter(*size, seed=1), adapter(*size, seed=2)
    step = np.polynomial.Polynomial(step_quartic(start, end, "m0"))
    for c in (0.0, 0.1, 0.37, 0.9, 1.0):
        (a0, b0), (a1, b1) = ((t.double() for t in x.factors["m0"]) for x in (start, end))
        delta = start.scale * (b0 + c * (b1 - b0)) @ (a0 + c * (a1 - a0))
        scale = float(dense(start).norm() ** 2 + dense(end).norm() ** 2)
        assert step(c) == pytest.approx(float((delta - dense(start)).norm() ** 2), rel=1e-9, abs=1e-12 * scale)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=4, max_size=4), st.floats(0.01, 5))
def test_the_largest_step_is_the_first_crossing(coefficients, limit):
    """Against a dense scan: everything before it obeys, and it stops only where the limit is reached."""
    quartic = np.polynomial.Polynomial([0.0, *coefficients])
    c = largest_step(list(quartic.coef), limit)
    assert (quartic(np.linspace(0, c, 2001)) <= limit + 1e-9).all()
    assert c == 1.0 or quartic(c) == pytest.approx(limit, abs=1e-9)


def test_a_later_return_below_the_limit_does_not_count():
    hump = np.polynomial.Polynomial([0, 4, -4])  # rises to 1 at c = 0.5, back to 0 at c = 1
    assert largest_step(list(hump.coef), 0.75) == pytest.approx(0.25, abs=1e-12)
    assert largest_step(list(hump.coef), 1.1) == 1.0


def test_a_start_beyond_the_limit_allows_no_step():
    assert largest_step([2.0, -1.0], 1.0) == 0.0


def test_the_norm_step_touches_its_limit():
    start, end = adapter(33, 17, 4, seed=1, size=0.1), adapter(33, 17, 4, seed=2)
    c = norm_step(start, end, {"m0": 10.0}, 0.3)
    assert 0 < c < 1
    assert difference_norms(between(start, end, c), start)["m0"] == pytest.approx(3, rel=1e-6)
    assert norm_step(start, end, {"m0": 10.0}, 1e3) == 1.0


def test_what_left_the_ball_comes_back_to_its_surface_in_its_own_direction_and_no_further_from_what_lies_inside():
    inside, outside = adapter(33, 17, 4, seed=1, size=0.1), adapter(33, 17, 4, seed=2)
    radii = {"m0": delta_norms(outside)["m0"] / 2}
    assert delta_norms(inside)["m0"] < radii["m0"]
    back = within_ball(outside, radii, 0.05)
    assert delta_norms(back)["m0"] == pytest.approx(radii["m0"], rel=1e-6)
    assert dense(back).allclose(dense(outside) / 2, rtol=1e-6)
    assert difference_norms(back, inside)["m0"] <= difference_norms(outside, inside)["m0"]
    for same, least in ((inside, 0.05), (outside, 0.6)):
        assert dense(within_ball(same, radii, least)).equal(dense(same))
