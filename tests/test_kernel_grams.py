"""Norms, exact steps and penalties from Grams against dense float64 matrices, autograd and cltrain's own formulas."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cltrain_kernels import grams
from cltrain_kernels.flat import Layout
from cltrain_kernels.testing import guarded, nan_filled
from torch import Tensor

from cltrain.models.adapter import AdapterFile
from cltrain.objectives import bounds
from cltrain.objectives.fisher import Fisher

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {"q": (17, 33), "k": (1, 65), "v": (1, 65), "up": (65, 33), "o": (17, 33)}  # N, K
RANK, SCALE = 5, 1.7
LAYOUT = Layout.of(SHAPES, RANK)


def draw(seed: int, dtype: torch.dtype = torch.float64, spread: float = 1.0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    buffer = torch.zeros(LAYOUT.size, dtype=torch.float64)
    for pair in LAYOUT.factors(buffer).values():
        for place in pair:
            place.copy_(spread * torch.randn(place.shape, generator=rng, dtype=torch.float64))
    return buffer.to(DEVICE, dtype)


def deltas(values_S: Tensor) -> list[Tensor]:
    """The dense dW of every module in float64."""
    by_module = LAYOUT.factors(values_S.double())
    return [SCALE * by_module[m][1] @ by_module[m][0] for m in LAYOUT.modules]


def adapter(values_S: Tensor) -> AdapterFile:
    factors = {m: (a.cpu(), b.cpu()) for m, (a, b) in LAYOUT.factors(values_S).items()}
    return AdapterFile(factors, RANK, SCALE * RANK, ("q",), None)


def rotated(values_S: Tensor) -> Tensor:
    """The same deltas from other factors: (R A, B R^-1)."""
    r_RR = torch.randn(RANK, RANK, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(DEVICE)
    result = values_S.clone()
    for (a, b), (a_new, b_new) in zip(LAYOUT.stacks(values_S), LAYOUT.stacks(result), strict=True):
        a_new.copy_(r_RR @ a)
        b_new.copy_(b @ torch.linalg.inv(r_RR))
    return result


@pytest.fixture(params=["reference", "triton"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[torch.dtype, float]]:
    """(dtype, relative tolerance): the reference takes float64; Triton takes and sums float32, in the interpreter."""
    monkeypatch.setenv("CLTRAIN_KERNELS", request.param)
    if request.param == "triton":
        pytest.importorskip("triton")
        with nan_filled():
            yield torch.float32, 1e-6
    else:
        yield torch.float64, 1e-12


def norms(matrices: list[Tensor]) -> Tensor:
    return torch.stack([torch.linalg.matrix_norm(m) for m in matrices])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_equal_dense_ones(dtype: torch.dtype) -> None:
    values = draw(0, dtype)
    found = grams.delta_norms(LAYOUT, values, SCALE)
    assert found.dtype is dtype
    torch.testing.assert_close(found.double(), norms(deltas(values)), rtol=1e-6, atol=0)


def test_steps_products_and_quartics_equal_dense_ones(path: tuple[torch.dtype, float]) -> None:
    dtype, rtol = path
    start = draw(0, dtype)
    end = (start.double() + draw(1, spread=0.01)).to(dtype)
    table = grams.product_grams(LAYOUT, end, start)
    dense_end, dense_start = deltas(end), deltas(start)
    steps = [one - other for one, other in zip(dense_end, dense_start, strict=True)]
    torch.testing.assert_close(grams.step_norms(LAYOUT, end, start, SCALE), norms(steps), rtol=rtol, atol=0)
    products = torch.stack([(one * other).sum() for one, other in zip(dense_end, dense_start, strict=True)])
    torch.testing.assert_close(grams.inner(table, grams.END, grams.START, SCALE), products, rtol=10 * rtol, atol=0)
    yy, yz, zz = (
        grams.inner(table, *pair, SCALE)
        for pair in (
            (grams.LINEAR, grams.LINEAR), (grams.LINEAR, grams.QUADRATIC), (grams.QUADRATIC, grams.QUADRATIC)
        )
    )  # fmt: skip
    for c in (0.3, 0.8):
        between = deltas(start.double() + c * (end.double() - start.double()))
        square = norms([one - other for one, other in zip(between, dense_start, strict=True)]) ** 2
        torch.testing.assert_close(
            yy * c**2 + 2 * yz * c**3 + zz * c**4, square, rtol=1e-4 if rtol > 1e-9 else 1e-10, atol=0
        )


def test_a_step_that_changes_the_factors_only_is_as_short_as_a_gram_can_see(path: tuple[torch.dtype, float]) -> None:
    dtype, _ = path
    start = draw(0)
    end, start = rotated(start).to(dtype), start.to(dtype)
    relative = grams.step_norms(LAYOUT, end, start, SCALE) / norms(deltas(start))
    assert relative.max() < 10 * torch.finfo(dtype).eps ** 0.5  # a square is lost below eps of what cancels
    assert grams.step_norms(LAYOUT, end, end, SCALE).tolist() == [0.0] * len(SHAPES)


def test_spectral_norms_equal_dense_ones() -> None:
    start, end = draw(0), draw(1)
    dense = [torch.linalg.matrix_norm(m, 2) for m in deltas(end)]
    torch.testing.assert_close(grams.spectral_norms(LAYOUT, end, SCALE), torch.stack(dense), rtol=1e-10, atol=0)
    steps = [torch.linalg.matrix_norm(a - b, 2) for a, b in zip(deltas(end), deltas(start), strict=True)]
    found = grams.spectral_norms(LAYOUT, end, SCALE, start)
    torch.testing.assert_close(found, torch.stack(steps), rtol=1e-10, atol=0)
    assert not grams.spectral_norms(LAYOUT, torch.zeros_like(end), SCALE).any()


def test_largest_step_equals_the_trainers_own_on_every_kind_of_quartic() -> None:
    rng = torch.Generator().manual_seed(0)
    y, z = torch.randn(2, 400, 2, generator=rng, dtype=torch.float64)
    y[::4] = (
        -z[::4] * torch.rand(100, 1, generator=rng, dtype=torch.float64) * 2 + 0.02 * y[::4]
    )  # comes back and turns
    z[1::8] = 0.0
    z[3::8] *= 1e-9
    y[5::40] = 0.0
    yy, yz, zz = (y * y).sum(1), (y * z).sum(1), (z * z).sum(1)
    limits = torch.rand(400, generator=rng, dtype=torch.float64) * 1.5
    limits[::50], limits[1::50] = 0.0, torch.inf
    found = grams.largest_step(yy, yz, zz, limits)
    for i, c in enumerate(found.tolist()):
        quartic = [0.0, 0.0, float(yy[i]), 2 * float(yz[i]), float(zz[i])]
        expected = bounds.largest_step(quartic, float(limits[i]) ** 2)
        assert c == pytest.approx(expected, abs=1e-9), (i, quartic, limits[i])
    assert 0.1 < (found < 1).double().mean() < 0.95


@pytest.mark.parametrize("together", [False, True])
def test_trust_region_is_reached_exactly_and_by_the_straight_line(
    path: tuple[torch.dtype, float], together: bool
) -> None:
    dtype, rtol = path
    start = draw(0, dtype)
    trained = (start.double() + draw(1, spread=0.1)).to(dtype)
    free = norms([a - b for a, b in zip(deltas(trained), deltas(start), strict=True)])
    radii = free * torch.tensor([0.1, 2.0, 0.5, 0.9, 1.1], dtype=torch.float64, device=DEVICE)
    values = trained.clone()
    c = grams.trust_region(LAYOUT, values, start, radii, SCALE, together=together)
    reached = norms([a - b for a, b in zip(deltas(values), deltas(start), strict=True)])
    assert (reached <= radii * (1 + 30 * rtol)).all()
    if together:
        assert c.unique().numel() == 1
        torch.testing.assert_close((reached / radii).max(), torch.ones_like(c[0]), rtol=30 * rtol, atol=0)
    else:
        torch.testing.assert_close(reached[[0, 2, 3]], radii[[0, 2, 3]], rtol=30 * rtol, atol=0)
        assert c[[1, 4]].tolist() == [1.0, 1.0]
        one, other = LAYOUT.factors(values), LAYOUT.factors(trained)
        assert all(torch.equal(one[m][i], other[m][i]) for m in ("o", "up") for i in (0, 1))
    between = bounds.between(adapter(start.float()), adapter(trained.float()), float(c[0]))
    torch.testing.assert_close(
        LAYOUT.factors(values)["q"][0].float().cpu(), between.factors["q"][0], rtol=1e-5, atol=1e-6
    )


def test_an_infinite_radius_changes_no_bit(path: tuple[torch.dtype, float]) -> None:
    dtype, _ = path
    start, trained = draw(0, dtype), draw(1, dtype)
    values = trained.clone()
    radii = torch.full((len(SHAPES),), torch.inf, dtype=torch.float64, device=DEVICE)
    assert grams.trust_region(LAYOUT, values, start, radii, SCALE, together=True).tolist() == [1.0] * len(SHAPES)
    assert torch.equal(values, trained)


def test_keep_within_scales_what_is_too_long_and_nothing_else() -> None:
    before, values = draw(0, torch.float32), draw(0, torch.float32)
    free = norms(deltas(values)).cpu()
    radii = free * torch.tensor([0.5, 2.0, 0.01, 1.0001, 0.9])
    c = grams.keep_within(LAYOUT, values, radii.to(DEVICE), SCALE, 0.05)
    wanted = torch.tensor([0.5, 1.0, 1.0, 1.0, 0.9], dtype=torch.float64)
    torch.testing.assert_close(c.cpu(), wanted)
    torch.testing.assert_close(norms(deltas(values)).cpu(), free * wanted, rtol=1e-6, atol=0)
    for i, module in enumerate(LAYOUT.modules):
        (a_RK, b_NR), (a_before, b_before) = (LAYOUT.factors(one)[module] for one in (values, before))
        assert torch.equal(a_RK, a_before)
        assert torch.equal(b_NR, b_before) == (wanted[i] == 1)


def fisher() -> Fisher:
    rng = torch.Generator().manual_seed(5)
    return Fisher(
        {m: (torch.rand(n, generator=rng), torch.rand(k, generator=rng)) for m, (n, k) in SHAPES.items()}, 1.0
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("anchored", [False, True])
def test_penalty_and_gradient_equal_the_dense_sum(weighted: bool, anchored: bool) -> None:
    values, start = draw(0), draw(1) if anchored else None
    coefficients = (
        torch.rand(len(SHAPES), generator=torch.Generator().manual_seed(6), dtype=torch.float64).to(DEVICE) + 0.5
    )
    weights = fisher().diagonals if weighted else None
    leaf = values.clone().requires_grad_()
    dense = torch.zeros((), dtype=torch.float64, device=DEVICE)
    starts = deltas(start) if start is not None else [torch.zeros(())] * len(SHAPES)
    for i, (module, delta, before) in enumerate(zip(LAYOUT.modules, deltas(leaf), starts, strict=True)):
        square = (delta - before.to(DEVICE)) ** 2
        if weights:
            g_N, x_K = (w.double().to(DEVICE) for w in weights[module])
            square = square * g_N[:, None] * x_K
        dense = dense + coefficients[i] * square.sum() / 2
    dense.backward()
    gradients = torch.ones_like(values)
    start_stacks = LAYOUT.stacks(start) if start is not None else None
    value = grams.delta_penalty(LAYOUT, values, start_stacks, SCALE, coefficients, weights, gradients)
    torch.testing.assert_close(value, dense.detach(), rtol=1e-12, atol=0)
    assert leaf.grad is not None
    torch.testing.assert_close(gradients - 1, leaf.grad, rtol=1e-9, atol=1e-9)


def test_penalties_see_the_delta_and_not_how_it_is_factored() -> None:
    values, start = draw(0), draw(1)
    ones = torch.ones(len(SHAPES), dtype=torch.float64, device=DEVICE)
    for weights in (None, fisher().diagonals):
        value = grams.delta_penalty(LAYOUT, values, LAYOUT.stacks(start), SCALE, ones, weights)
        again = grams.delta_penalty(LAYOUT, rotated(values), LAYOUT.stacks(start), SCALE, ones, weights)
        torch.testing.assert_close(again, value, rtol=1e-9, atol=0)


def test_at_the_start_penalty_and_gradient_are_exactly_zero_even_in_float32() -> None:
    start = draw(1, torch.float32)
    gradients = torch.zeros_like(start)
    ones = torch.ones(len(SHAPES), dtype=torch.float64, device=DEVICE)
    assert (
        grams.delta_penalty(LAYOUT, start.clone(), LAYOUT.stacks(start), SCALE, ones, fisher().diagonals, gradients)
        == 0
    )
    assert not gradients.any()


@pytest.fixture(scope="module")
def column_kernel() -> Iterator[Any]:
    pytest.importorskip("triton")
    from cltrain_kernels.grams_triton import column_square_sums_triton

    with nan_filled():
        yield column_square_sums_triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 17), (63, 129), (1030, 3), (0, 5), (5, 0)])
def test_column_sums_are_as_accurate_as_eager_and_repeat(
    column_kernel: Any, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x = torch.randn(shape[0], 2 * shape[1], generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    for view in (x[:, ::2], x[:, shape[1] :], x.t().contiguous().t()[:, : shape[1]]):
        true = view.double().square().sum(0)
        limit = 2 * (view.float().square().sum(0).double() - true).abs() + 1e-6 * true
        for op in (column_kernel, grams.column_square_sums_reference):
            found = op(view)
            assert found.dtype is torch.float32
            assert ((found.double() - true).abs() <= limit).all()
            assert torch.equal(op(view), found)


def test_column_sums_refuse_what_is_no_matrix_of_floats() -> None:
    with pytest.raises(ValueError, match="int64"):
        grams.column_square_sums(torch.zeros(2, 2, dtype=torch.int64))


def test_nothing_is_written_outside_of_grams_and_sums() -> None:
    pytest.importorskip("triton")
    from cltrain_kernels.grams_triton import column_square_sums_triton, factor_grams_triton

    end, start = draw(0, torch.float32), draw(1, torch.float32)
    x = torch.randn(1030, 129, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with guarded():
        found, sums = factor_grams_triton(LAYOUT, end, start), column_square_sums_triton(x)
    for ours, true in zip(found, grams.factor_grams_reference(LAYOUT, end, start), strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums, x.square().sum(0))


@pytest.mark.parametrize(("rank", "num_modules"), [(1, 2), (17, 1)])
def test_triton_grams_repeat_to_the_bit_and_take_long_factors(rank: int, num_modules: int) -> None:
    pytest.importorskip("triton")
    from cltrain_kernels.grams_triton import factor_grams_triton

    shapes = {"wide": (3, 1030), "tall": (1025, 2)}
    layout = Layout.of(dict(list(shapes.items())[:num_modules]), rank)
    rng = torch.Generator().manual_seed(0)
    end, start = (torch.zeros(layout.size) for _ in range(2))
    for buffer in (end, start):
        for pair in layout.factors(buffer).values():
            for place in pair:
                place.copy_(torch.randn(place.shape, generator=rng))
    end, start = end.to(DEVICE), start.to(DEVICE)
    with nan_filled():
        found, again = factor_grams_triton(layout, end, start), factor_grams_triton(layout, end, start)
    for ours, repeated, true in zip(found, again, grams.factor_grams_reference(layout, end, start), strict=True):
        assert torch.equal(ours, repeated)
        scale = true.diagonal(dim1=1, dim2=2).sqrt()
        assert ((ours.double() - true).abs() <= 1e-6 * scale[:, :, None] * scale[:, None]).all()
