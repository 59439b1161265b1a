"""Norms, ranks, angles and sums of deltas against dense float64 matrices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cltrain.errors import DataError
from cltrain.models.adapter import AdapterFile
from cltrain.objectives.geometry import (
    combine,
    cosine,
    delta_norms,
    difference_norms,
    effective_ranks,
    inner,
    spectral_norms,
)
from tests.deltas import dense, make_adapter, regauged

SIZES = [(1, 1, 1), (17, 33, 4), (65, 17, 8), (33, 65, 1)]
SHAPES = [(17, 33), (65, 16), (1, 5)]


def relative_gap(got, expected):
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("size", SIZES)
def test_norms_are_those_of_the_dense_delta(size):
    num_out, num_in, rank = size
    one = make_adapter([(num_out, num_in)], rank, seed=1)
    other = make_adapter([(num_out, num_in)], rank + 1, seed=2, alpha=3.0)
    assert delta_norms(one)["m0"] == pytest.approx(float(dense(one).norm()), rel=1e-12)
    for second in (None, other):
        difference = dense(one) - (dense(second) if second else 0.0)
        assert difference_norms(one, second)["m0"] == pytest.approx(float(difference.norm()), rel=1e-12)
        spectral = float(torch.linalg.matrix_norm(difference, 2))
        assert spectral_norms(one, second)["m0"] == pytest.approx(spectral, rel=1e-10)
    product = inner(*one.factors["m0"], *other.factors["m0"]) * one.scale * other.scale
    assert product == pytest.approx(float((dense(one) * dense(other)).sum()), rel=1e-10)


def test_the_difference_of_nearly_equal_adapters_keeps_its_digits():
    one = make_adapter([(65, 33)], 8, seed=1)
    a_RK, b_NR = one.factors["m0"]
    other = one.with_factors({"m0": (a_RK, b_NR * (1 + 2**-20))})
    exact = float((dense(one) - dense(other)).norm())
    assert difference_norms(one, other)["m0"] == pytest.approx(exact, rel=1e-6)


def test_a_module_that_one_adapter_lacks_counts_as_zero():
    both, first = make_adapter(SHAPES[:2], 4, seed=1), make_adapter(SHAPES[:1], 4, seed=2)
    for one, other in ((both, first), (first, both)):
        assert difference_norms(one, other)["m1"] == pytest.approx(float(dense(both, "m1").norm()))
        spectral = float(torch.linalg.matrix_norm(dense(both, "m1"), 2))
        assert spectral_norms(one, other)["m1"] == pytest.approx(spectral)


@pytest.mark.parametrize("rank", [1, 8])
def test_effective_ranks_are_those_of_the_dense_singular_values(rank):
    one = make_adapter(SHAPES[:2], rank, seed=1)
    for module, got in effective_ranks(one).items():
        shares = torch.linalg.svdvals(dense(one, module))[:rank]
        shares = shares / shares.sum()
        assert got == pytest.approx(float(torch.exp(-(shares * shares.log()).sum())), rel=1e-9)


def test_the_effective_rank_counts_equal_directions_and_a_zero_delta_has_none():
    eye = torch.eye(7)
    one = AdapterFile({"m0": (eye[:3], eye[:, :3]), "m1": (eye[:3], 0 * eye[:, :3])}, 3, 5.0, ("m0", "m1"), None)
    assert effective_ranks(one) == {"m0": pytest.approx(3.0), "m1": 0.0}


def test_the_cosine_is_that_of_all_dense_deltas_together():
    one, other = make_adapter(SHAPES, 8, seed=1), make_adapter(SHAPES, 1, seed=2, alpha=3.0)
    flat = [torch.cat([dense(a, m).flatten() for m in one.factors]) for a in (one, other)]
    expected = float(torch.nn.functional.cosine_similarity(*flat, dim=0))
    assert cosine(one, other) == pytest.approx(expected, rel=1e-9)
    assert cosine(one, one) == pytest.approx(1.0)
    assert cosine(one, make_adapter(SHAPES, 1, seed=2, size=0.0)) == 0.0


def test_a_sum_whose_rank_fits_is_exact():
    parts = [(make_adapter(SHAPES, 3, 1), 0.7), (make_adapter(SHAPES, 1, 2, alpha=0.5), -1.3)]
    result, error = combine(parts, rank=8, alpha=20.0)
    assert error == 0.0
    for module in result.factors:
        expected = sum(c * dense(part, module) for part, c in parts)
        assert relative_gap(dense(result, module), expected) < 1e-6
        assert all(factor.dtype == torch.float32 for factor in result.factors[module])


@pytest.mark.parametrize("rank", [1, 5])
def test_a_sum_that_does_not_fit_becomes_the_truncated_dense_svd(rank):
    parts = [(make_adapter(SHAPES, 8, 1), 0.3), (make_adapter(SHAPES, 4, 2, alpha=2.0), 2.0)]
    result, error = combine(parts, rank, alpha=3.0)
    errors = []
    for module in result.factors:
        expected = sum(c * dense(part, module) for part, c in parts)
        u, sigmas, vt = torch.linalg.svd(expected, full_matrices=False)
        best = u[:, :rank] * sigmas[:rank] @ vt[:rank]
        assert relative_gap(dense(result, module), best) < 1e-6
        errors.append(float(sigmas[rank:].norm() / sigmas.norm()))
        a_RK, b_NR = (t.double() for t in result.factors[module])
        if a_RK.shape[1] > rank:
            assert torch.allclose(a_RK @ a_RK.T, b_NR.T @ b_NR, rtol=1e-5, atol=1e-5 * float(sigmas[0]))
    assert error == pytest.approx(max(errors), rel=1e-9)


def test_compressing_to_the_same_rank_changes_nothing_and_is_repeatable():
    one = make_adapter(SHAPES, 4, seed=1)
    result, error = combine([(one, 1.0)], 4, one.alpha)
    assert error == 0.0
    again, _ = combine([(one, 1.0)], 4, one.alpha)
    for module, (a_RK, b_NR) in result.factors.items():
        assert relative_gap(dense(result, module), dense(one, module)) < 1e-6
        assert torch.equal(a_RK, again.factors[module][0])
        assert torch.equal(b_NR, again.factors[module][1])


def test_what_cancels_is_zero_and_ranks_left_free_can_still_learn():
    one = make_adapter(SHAPES, 2, seed=1)
    zero, error = combine([(one, 1.0), (one, -1.0)], 4, 8.0)
    wider, _ = combine([(one, 1.0)], 4, 8.0)
    assert error == 0.0
    for module in one.factors:
        assert float(dense(zero, module).norm()) == 0.0
        assert bool((zero.factors[module][0].norm(dim=1) > 0.01).all())
        assert bool((wider.factors[module][0].norm(dim=1) > 0.01).all())


def test_adapters_of_different_bases_are_not_added():
    one = make_adapter(SHAPES, 2, seed=1)
    bases = [AdapterFile(one.factors, 2, 6.0, one.targets, digest) for digest in ("a" * 64, "b" * 64)]
    with pytest.raises(DataError, match="different bases"):
        combine([(bases[0], 1.0), (bases[1], 1.0)], 2, 6.0)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1, 2, 8]))
def test_no_measure_depends_on_how_a_delta_splits_into_factors(seed, rank):
    one, other = make_adapter(SHAPES, rank, seed, alpha=3.0), make_adapter(SHAPES, 3, seed + 1)
    same = regauged(one, seed + 2)
    for measure in (delta_norms, effective_ranks, lambda a: spectral_norms(a, other)):
        assert measure(same) == pytest.approx(measure(one), rel=1e-8)
    assert difference_norms(same, other) == pytest.approx(difference_norms(one, other), rel=1e-8)
    assert cosine(same, other) == pytest.approx(cosine(one, other), abs=1e-10)
    sums = [combine([(a, 1.0), (other, 0.5)], rank + 3, 5.0)[0] for a in (one, same)]
    assert all(relative_gap(dense(sums[1], m), dense(sums[0], m)) < 1e-6 for m in one.factors)
