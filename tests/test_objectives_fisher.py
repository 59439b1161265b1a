"""Fisher factors against float64 models with merged matrices, one row at a time; clipping, decay, storage."""

import pytest
import torch

from cltrain.errors import DataError
from cltrain.models.adapter import attach, new_factors, parameters_of
from cltrain.models.base import load_base
from cltrain.objectives.fisher import Fisher, decayed, from_tensors, measure_fisher, relative_to_base, to_tensors
from cltrain.objectives.penalties import ewc
from cltrain.records import TokenRow
from tests.deltas import flat, regauged
from tests.tiny import make_tiny_base

TARGETS = ("q_proj", "v_proj", "down_proj")
ROWS = (
    TokenRow("a", "s", "p", tuple(range(10, 27)), (0.0,) * 9 + (1.0,) * 8),
    TokenRow("b", "s", "p", tuple(range(40, 73)), (0.0,) * 5 + (0.5,) * 2 + (0.0,) * 20 + (0.5,) * 4 + (0.0,) * 2),
    TokenRow("c", "s", "p", (5,) * 4, (0.0,) * 3 + (1.0,)),
)
EMPTY = TokenRow("d", "s", "p", (5, 6), (0.0, 0.0))
NO_LIMIT = 1e9


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_base(make_tiny_base(tmp_path_factory.mktemp("tiny") / "base"))


def moved(base, size=0.1):
    adapter = new_factors(base, 4, 8.0, TARGETS, seed=1)
    generator = torch.Generator().manual_seed(3)
    return adapter.with_factors(
        {m: (a, size * torch.randn(b.shape, generator=generator)) for m, (a, b) in adapter.factors.items()}
    )


def measured(base, adapter, rows=ROWS, max_norm=NO_LIMIT):
    return measure_fisher(base, attach(base, adapter), list(adapter.factors), rows, max_norm)


def brute_force(base, adapter, rows, max_norm=NO_LIMIT):
    """({module: (d_S, d_C)}, norms of the rows' gradients) from dense weight gradients of a merged float64 model."""
    model = load_base(base.path).model.double()
    for module, (a_RK, b_NR) in adapter.factors.items():
        weight = model.get_submodule(module).weight
        weight.data += adapter.scale * b_NR.double() @ a_RK.double()
        weight.requires_grad_()
    layers = {m: model.get_submodule(m) for m in adapter.factors}
    sums = dict.fromkeys(layers, (0.0, 0.0))
    norms = []
    for row in rows:
        inputs, nudges = {}, {}

        def nudge(module, taken, output, inputs=inputs, nudges=nudges):
            inputs[module] = taken[0][0].detach()
            nudges[module] = torch.zeros_like(output, requires_grad=True)
            return output + nudges[module]

        hooks = [layer.register_forward_hook(nudge) for layer in layers.values()]
        logp = torch.log_softmax(model(torch.tensor([row.ids])).logits[0], -1)
        for hook in hooks:
            hook.remove()
        targets = [t for t in range(1, len(row.ids)) if row.weights[t] > 0]
        loss = -sum(row.weights[t] * logp[t - 1, row.ids[t]] for t in targets) / len(targets)
        weights = torch.autograd.grad(loss, [layer.weight for layer in layers.values()], retain_graph=True)
        norms.append(float(torch.cat([w.flatten() for w in weights]).norm()))
        share = min(1.0, max_norm / norms[-1])
        for module, layer in layers.items():
            (delta,) = torch.autograd.grad(loss, nudges[layer], retain_graph=True)
            x_TK = inputs[layer][: targets[-1]]
            new = ((share * delta[0]) ** 2).sum(0), (x_TK**2).mean(0)
            sums[module] = tuple(old + one / len(rows) for old, one in zip(sums[module], new, strict=True))
    return sums, norms


def check(got, expected, rel=1e-5):
    assert got.diagonals.keys() == expected.keys()
    for module, pair in expected.items():
        for one, other in zip(got.diagonals[module], pair, strict=True):
            assert one.dtype == torch.float32
            assert float((one - other).norm()) <= rel * float(other.norm()), module


def test_the_factors_are_those_of_every_row_alone_in_float64(base):
    adapter = moved(base)
    got = measured(base, adapter)
    check(got, brute_force(base, adapter, ROWS)[0])
    assert got.num_rows == 3


def test_a_row_with_a_large_gradient_counts_as_one_at_the_limit(base):
    adapter = moved(base)
    norms = sorted(brute_force(base, adapter, ROWS)[1])
    limit = (norms[0] + norms[1]) / 2
    expected = brute_force(base, adapter, ROWS, limit)[0]
    check(measured(base, adapter, max_norm=limit), expected)
    unclipped = brute_force(base, adapter, ROWS)[0]
    assert all(expected[m][0].sum() < 0.9 * unclipped[m][0].sum() for m in expected)


def test_for_one_token_and_one_position_the_product_is_the_exact_square(base):
    """One position has one outer product: E[G_ij^2] = d_S[i] d_C[j] without any independence."""
    row = TokenRow("e", "s", "p", (7, 11), (0.0, 1.0))
    adapter = moved(base)
    model = load_base(base.path).model.double()
    for module, (a_RK, b_NR) in adapter.factors.items():
        model.get_submodule(module).weight.data += adapter.scale * b_NR.double() @ a_RK.double()
        model.get_submodule(module).weight.requires_grad_()
    (-torch.log_softmax(model(torch.tensor([[7]])).logits[0, 0], -1)[11]).backward()
    for module, (s_N, c_K) in measured(base, adapter, [row]).diagonals.items():
        square_NK = model.get_submodule(module).weight.grad ** 2
        # With one position attention has no choice, so q_proj's gradient is rounding.
        assert float((s_N[:, None] * c_K - square_NK).norm()) <= 1e-5 * float(square_NK.norm()) + 1e-12


def test_a_fresh_adapter_has_a_fisher_though_its_a_has_no_gradient(base):
    adapter = moved(base, size=0.0)
    got = measured(base, adapter)
    check(got, brute_force(base, adapter, ROWS)[0])
    assert all(float(s_N.sum()) > 0 for s_N, _ in got.diagonals.values())


def test_the_fisher_is_repeatable_blind_to_the_split_and_leaves_no_gradient(base):
    adapter = moved(base)
    first, again = measured(base, adapter), measured(base, adapter)
    assert all(
        torch.equal(a, b) for m in adapter.factors for a, b in zip(first.diagonals[m], again.diagonals[m], strict=True)
    )
    other = regauged(adapter, seed=4, spread=0.3)
    check(measured(base, other), first.diagonals, rel=1e-4)
    model = attach(base, adapter)
    measure_fisher(base, model, list(adapter.factors), ROWS, NO_LIMIT)
    assert all(factor.grad is None for pair in parameters_of(model, adapter).values() for factor in pair)
    assert not any(module._forward_hooks for module in model.modules())


def test_rows_without_targets_do_not_count_and_alone_are_an_error(base):
    adapter = moved(base)
    with_empty, without = measured(base, adapter, (*ROWS, EMPTY)), measured(base, adapter)
    assert with_empty.num_rows == without.num_rows
    check(with_empty, without.diagonals, rel=1e-12)
    with pytest.raises(DataError, match="no row"):
        measured(base, adapter, (EMPTY,))


def test_no_gradient_gives_a_zero_fisher_that_forbids_nothing(base):
    """Zero is what the likelihood of a perfectly fitted row leaves; here every output of the base is made equal."""
    adapter = moved(base)
    model = attach(base, adapter)
    with torch.no_grad():
        for weight in model.get_base_model().model.norm.parameters():
            norm = weight.clone()
            weight.zero_()
    try:
        fisher = measure_fisher(base, model, list(adapter.factors), ROWS, 1.0)
    finally:
        with torch.no_grad():
            weight.copy_(norm)
    assert all(float(s_N.abs().max()) == 0.0 for s_N, _ in fisher.diagonals.values())
    relative = relative_to_base(fisher, dict.fromkeys(adapter.factors, 1.0))
    layout, values = flat(adapter)
    gradients = torch.zeros_like(values)
    assert float(ewc(layout, adapter.scale, None, relative)(values, gradients)) == 0.0
    assert not gradients.any()


def test_a_gradient_that_is_not_finite_names_its_record(base):
    adapter = moved(base)
    model = attach(base, adapter)
    live = parameters_of(model, adapter)
    next(iter(live.values()))[0].data.fill_(float("nan"))
    with pytest.raises(DataError, match="record a"):
        measure_fisher(base, model, list(adapter.factors), ROWS, 1.0)


def test_decay_is_a_mean_in_which_older_rows_count_less(base):
    adapter = moved(base)
    apart = [measured(base, adapter, rows) for rows in (ROWS[:2], ROWS[2:])]
    check(decayed(*apart, gamma=1.0), measured(base, adapter).diagonals, rel=1e-6)
    check(decayed(*apart, gamma=0.0), apart[1].diagonals, rel=1e-7)
    fading = decayed(*apart, gamma=0.9)
    assert fading.num_rows == pytest.approx(0.9 * 2 + 1)
    expected = {
        m: tuple(
            (1.8 * old.double() + new.double()) / 2.8 for old, new in zip(pair, apart[1].diagonals[m], strict=True)
        )
        for m, pair in apart[0].diagonals.items()
    }
    check(fading, expected, rel=1e-6)


def test_decay_settles_instead_of_growing():
    one = Fisher({"m": (torch.ones(3), torch.ones(2))}, 10.0)
    fisher = one
    for _ in range(200):
        fisher = decayed(fisher, one, gamma=0.9)
    assert fisher.num_rows == pytest.approx(10 / (1 - 0.9))
    assert torch.allclose(fisher.diagonals["m"][0], torch.ones(3))


def test_a_fisher_survives_safetensors(base, tmp_path):
    from safetensors.torch import load_file, save_file

    fisher = decayed(measured(base, moved(base), ROWS[:1]), measured(base, moved(base)), gamma=0.95)
    save_file(to_tensors(fisher), tmp_path / "fisher.safetensors")
    again = from_tensors(load_file(tmp_path / "fisher.safetensors"))
    assert again.num_rows == fisher.num_rows
    assert again.diagonals.keys() == fisher.diagonals.keys()
    check(again, fisher.diagonals, rel=0.0)


@pytest.mark.parametrize("wrong", ["missing", "extra", "negative", "nan"])
def test_tensors_that_are_no_fisher_are_refused(wrong):
    tensors = to_tensors(Fisher({"m": (torch.ones(3), torch.ones(2))}, 1.0))
    if wrong == "missing":
        del tensors["m.inputs"]
    elif wrong == "extra":
        tensors["m.weight"] = torch.ones(1)
    else:
        tensors["m.inputs"][0] = -1.0 if wrong == "negative" else float("nan")
    with pytest.raises(DataError):
        from_tensors(tensors)
