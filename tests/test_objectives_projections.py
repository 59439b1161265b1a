"""What is kept out of the base's top directions stays out, and a projected step raises no loss to first order."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cltrain.errors import ConfigError
from cltrain.models.adapter import snapshot
from cltrain.objectives.projections import agem, keep_out, overlap, top_subspaces, within_ball
from tests.deltas import dense, make_adapter, regauged

SHAPES = [(17, 33), (65, 16), (5, 5)]


def make_base(shapes=SHAPES, rank=None, seed=7):
    """What `top_subspaces` needs of a base: linear layers m0, m1, ... with random weights, of low rank if given."""
    generator = torch.Generator().manual_seed(seed)
    layers = torch.nn.Module()
    for i, (num_out, num_in) in enumerate(shapes):
        layer = torch.nn.Linear(num_in, num_out, bias=False)
        inside = rank or min(num_out, num_in)
        weight = torch.randn(num_out, inside, generator=generator) @ torch.randn(inside, num_in, generator=generator)
        layer.weight.data = weight
        layers.add_module(f"m{i}", layer)
    return SimpleNamespace(model=layers)


def dense_split(adapter, base, k):
    """(energy of the deltas within top-k directions of either side, all of it), from dense SVDs."""
    touching, total = 0.0, 0.0
    for module in adapter.factors:
        u, _, vt = torch.linalg.svd(base.model.get_submodule(module).weight.double())
        outside_u, outside_v = u[:, k:].detach(), vt[k:].detach()
        delta = dense(adapter, module)
        total += float(delta.norm() ** 2)
        touching += float(delta.norm() ** 2 - (outside_u.T @ delta @ outside_v.T).norm() ** 2)
    return touching, total


@pytest.mark.parametrize("k", [1, 4])
def test_top_subspaces_are_those_of_the_dense_svd(k):
    base = make_base()
    for module, (u_Nk, v_Kk) in top_subspaces(base, ["m0", "m1", "m2"], k).items():
        u, _, vt = torch.linalg.svd(base.model.get_submodule(module).weight.detach().double())
        assert torch.allclose(u_Nk.double() @ u_Nk.double().T, u[:, :k] @ u[:, :k].T, atol=1e-6)
        assert torch.allclose(v_Kk.double() @ v_Kk.double().T, vt[:k].T @ vt[:k], atol=1e-6)
        assert torch.allclose(((u_Nk * u[:, :k]).sum(0)).abs(), torch.ones(k, dtype=torch.float64), atol=1e-5)


def test_a_base_matrix_of_low_rank_still_gives_orthonormal_directions():
    for u_Nk, v_Kk in top_subspaces(make_base(rank=2), ["m0", "m1"], 5).values():
        for columns in (u_Nk, v_Kk):
            assert torch.allclose(columns.T @ columns, torch.eye(5), atol=1e-5)


@pytest.mark.parametrize("k", [0, 5, 17])
def test_a_number_of_directions_that_leaves_nothing_is_refused(k):
    with pytest.raises(ConfigError, match="m2"):
        top_subspaces(make_base(), ["m2"], k)


@pytest.mark.parametrize(("rank", "k"), [(1, 1), (8, 3), (8, 1)])
def test_the_overlap_is_the_dense_share_and_keeping_out_leaves_none(rank, k):
    base, adapter = make_base(), make_adapter(SHAPES, rank, seed=1)
    subspaces = top_subspaces(base, list(adapter.factors), k)
    touching, total = dense_split(adapter, base, k)
    assert overlap(adapter, subspaces) == pytest.approx(touching / total, rel=1e-6)
    assert overlap(regauged(adapter, 3), subspaces) == pytest.approx(touching / total, rel=1e-6)
    live = snapshot(adapter.factors)
    keep_out(live, subspaces)
    kept = adapter.with_factors(live)
    assert overlap(kept, subspaces) < 1e-10
    for module in live:
        u, _, vt = torch.linalg.svd(base.model.get_submodule(module).weight.detach().double())
        outside_u, outside_v = u[:, k:] @ u[:, k:].T, vt[k:].T @ vt[k:]
        expected = outside_u @ dense(adapter, module) @ outside_v
        assert float((dense(kept, module) - expected).norm()) <= 1e-6 * float(dense(adapter, module).norm())


def test_what_is_kept_out_leaves_the_top_singular_values_in_place():
    base, adapter = make_base(), make_adapter(SHAPES, 4, seed=1, size=0.01)
    live = snapshot(adapter.factors)
    keep_out(live, top_subspaces(base, list(live), 3))
    for module in live:
        weight = base.model.get_submodule(module).weight.detach().double()
        after = weight + dense(adapter.with_factors(live), module)
        assert torch.allclose(torch.linalg.svdvals(after)[:3], torch.linalg.svdvals(weight)[:3], rtol=1e-6)


def test_keeping_within_scales_what_is_too_long_and_leaves_the_rest_as_it_was_to_the_bit():
    adapter = make_adapter(SHAPES, 4, seed=1)
    norms = {module: float(dense(adapter, module).norm()) for module in adapter.factors}
    long, *short = norms
    radii = {long: norms[long] / 3, **{module: norms[module] * 1.01 for module in short}}
    kept = within_ball(adapter, radii, 0.05)
    assert list(kept.factors) == list(adapter.factors)
    assert torch.allclose(dense(kept, long), dense(adapter, long) / 3, rtol=1e-5, atol=1e-7)
    for module in short:
        assert all(torch.equal(a, b) for a, b in zip(kept.factors[module], adapter.factors[module], strict=True))
    nothing = adapter.with_factors({m: (a, torch.zeros_like(b)) for m, (a, b) in adapter.factors.items()})
    assert not any(b.any() for _, b in within_ball(nothing, radii, 0.05).factors.values())
    exploded = within_ball(adapter, {**norms, long: norms[long] / 30}, 0.05).factors[long]
    assert torch.equal(exploded[1], adapter.factors[long][1]), "what exploded was made to look well"


def test_keeping_out_works_on_parameters_in_place():
    base, adapter = make_base(), make_adapter(SHAPES, 4, seed=1)
    live = {m: tuple(torch.nn.Parameter(t.clone()) for t in pair) for m, pair in adapter.factors.items()}
    before = {m: tuple(id(t) for t in pair) for m, pair in live.items()}
    keep_out(live, top_subspaces(base, list(live), 2))
    assert {m: tuple(id(t) for t in pair) for m, pair in live.items()} == before
    assert all(t.requires_grad and t.grad_fn is None for pair in live.values() for t in pair)


def test_a_zero_delta_overlaps_nothing():
    subspaces = top_subspaces(make_base(), ["m0", "m1", "m2"], 2)
    assert overlap(make_adapter(SHAPES, 4, seed=1, size=0.0), subspaces) == 0.0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1e-8, 1.0, 1e4]))
def test_agem_removes_exactly_the_part_along_the_gradient(seed, size):
    generator = torch.Generator().manual_seed(seed)
    step, gradient = (torch.randn(21, generator=generator) * size for _ in range(2))
    s, g = step.double(), gradient.double()
    projected = agem(step, gradient).double()
    expected = s if s @ g <= 0 else s - (s @ g) / (g @ g) * g
    assert float((projected - expected).norm()) <= 1e-6 * float(s.norm())
    assert float(projected @ g) <= 1e-6 * float(s.norm() * g.norm())


def test_agem_leaves_a_step_that_helps_or_a_zero_gradient_alone():
    step = torch.tensor([1.0, 2.0, 3.0])
    for gradient in (-step, torch.zeros(3)):
        assert agem(step, gradient) is step


def test_agem_after_adam_protects_a_loss_that_projected_gradients_do_not():
    """Adam's step on a gradient orthogonal to the protected one still climbs it: its signs are not orthogonal."""
    gradient, protected = torch.tensor([3.0, -2.0]), torch.tensor([1.0, 4.0])
    before = gradient - (gradient @ protected) / (protected @ protected) * protected
    assert float(before @ protected) == pytest.approx(0.0, abs=1e-6)
    adam_step = -before / before.abs()  # Adam's first step
    assert float(adam_step @ protected) > 0.1
    after = agem(adam_step, protected)
    assert float(after @ protected) == pytest.approx(0.0, abs=1e-6)
