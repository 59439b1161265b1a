"""Values and gradients of the penalties against dense float64 autograd, near the reference and exactly at it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cltrain.errors import DataError
from cltrain.models.adapter import AdapterFile
from cltrain.objectives.fisher import Fisher, relative_to_base
from cltrain.objectives.geometry import difference_norms
from cltrain.objectives.penalties import ewc, l2sp
from tests.deltas import dense, flat, make_adapter, regauged

SHAPES = [(17, 33), (65, 16), (1, 5)]
NORMS = {"m0": 3.0, "m1": 40.0, "m2": 0.5}
KINDS = ["l2sp", "ewc"]


def make_fisher(seed=5):
    generator = torch.Generator().manual_seed(seed)
    diagonals = {
        f"m{i}": tuple(torch.rand(size, generator=generator) ** 4 for size in shape) for i, shape in enumerate(SHAPES)
    }
    return Fisher(diagonals, 7.0)


def penalty(kind, adapter, reference):
    """Its value at an adapter and, module by module, its gradient."""
    layout, values = flat(adapter)
    distance = l2sp(layout, adapter.scale, reference, NORMS)
    if kind == "ewc":
        distance = ewc(layout, adapter.scale, reference, make_fisher())
    gradients = torch.zeros_like(values)
    return float(distance(values, gradients)), layout.factors(gradients)


def value_of(make, adapter, reference, how):
    layout, values = flat(adapter)
    return float(make(layout, adapter.scale, reference, how)(values))


def dense_penalty(kind, live, scale, reference):
    total = torch.zeros((), dtype=torch.float64)
    for module, (a_RK, b_NR) in live.items():
        difference_NK = scale * b_NR @ a_RK
        if reference is not None and module in reference.factors:
            difference_NK = difference_NK - dense(reference, module)
        weights_NK = 1 / NORMS[module] ** 2
        if kind == "ewc":
            s_N, c_K = (d.double() for d in make_fisher().diagonals[module])
            weights_NK = s_N[:, None] * c_K
        total = total + (weights_NK * difference_NK**2).sum() / 2
    return total


def check(kind, adapter, reference, rel=1e-6):
    """Value to `rel`, each factor's gradient to `rel` of its norm; float32 factors as in training."""
    exact = {m: tuple(t.double().requires_grad_() for t in pair) for m, pair in adapter.factors.items()}
    value, gradients = penalty(kind, adapter, reference)
    expected = dense_penalty(kind, exact, adapter.scale, reference)
    assert value == pytest.approx(expected.item(), rel=rel)
    expected.backward()
    for module, pair in gradients.items():
        for gradient, other in zip(pair, exact[module], strict=True):
            assert gradient.dtype == torch.float32
            assert float((gradient - other.grad).norm()) <= rel * float(other.grad.norm()), module


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rank", "other_rank"), [(1, 1), (8, 8), (8, 1), (1, 8), (3, 4)])
def test_penalties_are_those_of_the_dense_difference(kind, rank, other_rank):
    adapter = make_adapter(SHAPES, rank, seed=1)
    check(kind, adapter, make_adapter(SHAPES, other_rank, seed=2, alpha=2.5))
    check(kind, adapter, None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_that_the_reference_lacks_starts_at_zero(kind):
    check(kind, make_adapter(SHAPES, 4, seed=1), make_adapter(SHAPES[:2], 4, seed=2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6])
def test_near_the_reference_value_and_gradient_keep_their_digits(kind, distance):
    reference = make_adapter(SHAPES, 8, seed=1)
    noise = make_adapter(SHAPES, 8, seed=2, size=distance)
    near = reference.with_factors(
        {m: tuple(t + n for t, n in zip(pair, noise.factors[m], strict=True)) for m, pair in reference.factors.items()}
    )
    check(kind, near, reference)


@pytest.mark.parametrize("kind", KINDS)
def test_near_a_reference_with_other_factors_the_gradient_keeps_its_digits(kind):
    """The same delta under other factors, as after a re-compression: only float64 holds the difference."""
    reference = make_adapter(SHAPES, 8, seed=1)
    factors = {m: tuple(t.float() for t in pair) for m, pair in regauged(reference, 3).factors.items()}
    near = reference.with_factors({m: (a, b * (1 + 1e-4)) for m, (a, b) in factors.items()})
    check(kind, near, reference)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("extra_ranks", [0, 3])
def test_at_the_reference_value_and_gradient_are_zero(kind, extra_ranks):
    reference = make_adapter(SHAPES, 4, seed=1)
    factors = {
        m: (torch.nn.functional.pad(a, (0, 0, 0, extra_ranks)), torch.nn.functional.pad(b, (0, extra_ranks)))
        for m, (a, b) in reference.factors.items()
    }
    rank = 4 + extra_ranks
    same = AdapterFile(factors, rank, reference.scale * rank, reference.targets, None)
    value, gradients = penalty(kind, same, reference)
    assert value == 0.0
    assert all(float(gradient.abs().max()) == 0.0 for pair in gradients.values() for gradient in pair)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_has_no_penalty_and_finite_gradients(kind):
    one = make_adapter(SHAPES, 4, seed=1)
    fresh = one.with_factors({m: (a, torch.zeros_like(b)) for m, (a, b) in one.factors.items()})
    value, gradients = penalty(kind, fresh, None)
    assert value == 0.0
    assert all(float(gradient.abs().max()) == 0.0 for pair in gradients.values() for gradient in pair)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_multiplies_the_gradient_that_is_added_and_not_the_value(kind):
    one, reference = make_adapter(SHAPES, 4, seed=1), make_adapter(SHAPES, 2, seed=2)
    layout, values = flat(one)
    made = l2sp(layout, 1.0, reference, NORMS) if kind == "l2sp" else ewc(layout, 1.0, reference, make_fisher())
    plain, weighted = torch.zeros_like(values), torch.ones_like(values)
    assert float(made(values, plain)) == pytest.approx(float(made(values, weighted, 3.0)))
    torch.testing.assert_close(weighted - 1, 3 * plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1, 2, 8]), st.sampled_from(KINDS))
def test_no_penalty_depends_on_how_a_delta_splits_into_factors(seed, rank, kind):
    one, reference = make_adapter(SHAPES, rank, seed), make_adapter(SHAPES, 3, seed + 1, alpha=1.0)
    expected = penalty(kind, one, reference)[0]
    assert penalty(kind, regauged(one, seed + 2), reference)[0] == pytest.approx(expected)
    assert penalty(kind, one, regauged(reference, seed + 3))[0] == pytest.approx(expected)


def test_l2sp_is_half_the_squared_relative_distance():
    one, reference = make_adapter(SHAPES, 8, seed=1), make_adapter(SHAPES, 2, seed=2)
    expected = sum((norm / NORMS[m]) ** 2 for m, norm in difference_norms(one, reference).items()) / 2
    assert value_of(l2sp, one, reference, NORMS) == pytest.approx(expected)


def test_a_base_matrix_of_zeros_has_no_relative_distance():
    one = make_adapter(SHAPES, 2, seed=1)
    with pytest.raises(DataError, match="m1"):
        value_of(l2sp, one, None, NORMS | {"m1": 0.0})


def test_ewc_with_a_fisher_that_holds_all_modules_equally_is_l2sp():
    one, reference = make_adapter(SHAPES, 8, seed=1), make_adapter(SHAPES, 2, seed=2)
    even = {
        m: (torch.full((shape[0],), 1e-9 / NORMS[m] ** 2), torch.full((shape[1],), 20.0))
        for m, shape in zip(NORMS, SHAPES, strict=True)
    }
    relative = relative_to_base(Fisher(even, 3.0), NORMS)
    expected = value_of(l2sp, one, reference, NORMS)
    assert value_of(ewc, one, reference, relative) == pytest.approx(expected, rel=1e-6)


def test_a_relative_fisher_keeps_how_modules_compare_and_forgets_units():
    one, fisher = make_adapter(SHAPES, 4, seed=1), make_fisher()
    louder = Fisher({m: (9 * s_N, 0.25 * c_K) for m, (s_N, c_K) in fisher.diagonals.items()}, 1.0)
    values = [value_of(ewc, one, None, relative_to_base(f, NORMS)) for f in (fisher, louder)]
    assert values[1] == pytest.approx(values[0], rel=1e-6)
    raw = value_of(ewc, one, None, fisher)
    sizes = [float(s.mean() * c.mean()) * NORMS[m] ** 2 for m, (s, c) in fisher.diagonals.items()]
    assert values[0] == pytest.approx(raw / (sum(sizes) / 3), rel=1e-5)
