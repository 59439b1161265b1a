"""Loss values and gradients against float64 models that compute every logit, and micro-batches that change nothing."""

import pytest
import torch

import cltrain.models.forward as forward
from cltrain.models.adapter import attach, new_factors, parameters_of, set_factors
from cltrain.models.base import load_base
from cltrain.models.forward import hidden_at, next_log_probs
from cltrain.models.shapes import FAMILIES
from cltrain.objectives.losses import token_weights, weighted_divergence, weighted_nll
from cltrain.records import TokenRow
from tests.tiny import make_tiny_base

TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj")
ROWS = (
    TokenRow("a", "s", "p", tuple(range(10, 27)), (0.0,) * 9 + (1.0,) * 8),
    TokenRow("b", "s", "p", tuple(range(40, 73)), (0.0,) * 5 + (0.5,) * 2 + (0.0,) * 20 + (0.5,) * 6),
    TokenRow("c", "s", "p", (5,) * 4, (0.0,) * 3 + (1.0,)),
)
ROW_WEIGHTS = (0.5, 0.25, 0.25)


def moved(base, seed=3):
    adapter = new_factors(base, 4, 8.0, TARGETS, seed=1)
    generator = torch.Generator().manual_seed(seed)
    return adapter.with_factors(
        {m: (a, 0.1 * torch.randn(b.shape, generator=generator)) for m, (a, b) in adapter.factors.items()}
    )


def dense_losses(base, adapter):
    """(nll, kl, gradients of each) in float64 with merged matrices, whole logits and one row at a time."""
    model = load_base(base.path).model.double()
    frozen = load_base(base.path).model.double()
    leaves = {m: tuple(t.double().requires_grad_() for t in pair) for m, pair in adapter.factors.items()}
    merged = {
        f"{m}.weight": model.get_submodule(m).weight + adapter.scale * b_NR @ a_RK for m, (a_RK, b_NR) in leaves.items()
    }
    nll, kl = torch.zeros((), dtype=torch.float64), []
    for row, row_weight in zip(ROWS, ROW_WEIGHTS, strict=True):
        ids, weights = torch.tensor([row.ids]), torch.tensor(row.weights[1:], dtype=torch.float64)
        logq = torch.log_softmax(torch.func.functional_call(model, merged, (ids,)).logits[0, :-1], -1)
        logp = torch.log_softmax(frozen(ids).logits[0, :-1], -1)
        picked = logq[torch.arange(len(weights)), ids[0, 1:]]
        nll = nll - row_weight * (weights * picked).sum() / (weights > 0).sum()
        kl.append((logp.exp() * (logp - logq)).sum(-1)[weights > 0])
    flat = [t for pair in leaves.values() for t in pair]
    mean_kl = torch.cat(kl).mean()
    return nll, mean_kl, torch.autograd.grad(nll, flat, retain_graph=True), torch.autograd.grad(mean_kl, flat)


def measured(base, adapter, groups):
    """The same from the trainer's own functions in float32, with rows split into `groups`."""
    model = attach(base, adapter)
    flat = [t for pair in parameters_of(model, adapter).values() for t in pair]
    num_tokens = sum(sum(w > 0 for w in row.weights) for row in ROWS)
    results = []
    for term in ("nll", "kl"):
        model.zero_grad()
        total = 0.0
        for group in groups:
            rows, weights = [ROWS[i] for i in group], [ROW_WEIGHTS[i] for i in group]
            hidden = hidden_at(model, rows)
            if term == "nll":
                loss = weighted_nll(base, hidden, rows, token_weights(rows, weights))
            else:
                with torch.no_grad():
                    teacher = hidden_at(base.model, rows)
                loss = weighted_divergence(base, hidden, teacher, torch.ones(len(hidden))) / num_tokens
            loss.backward()
            total += float(loss.detach())
        results.append((total, [t.grad.clone() for t in flat]))
    return results


def assert_agrees(values, gradients, exact_value, exact_gradients):
    assert values == pytest.approx(float(exact_value.detach()), rel=1e-5)
    for mine, exact in zip(gradients, exact_gradients, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-3, atol=1e-4 * float(exact.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_those_of_dense_float64(tmp_path, family):
    base = load_base(make_tiny_base(tmp_path / family, family))
    adapter = moved(base)
    nll, kl, grad_nll, grad_kl = dense_losses(base, adapter)
    for groups in ([(0, 1, 2)], [(0,), (1,), (2,)]):
        (my_nll, my_grad_nll), (my_kl, my_grad_kl) = measured(base, adapter, groups)
        assert_agrees(my_nll, my_grad_nll, nll, grad_nll)
        assert_agrees(my_kl, my_grad_kl, kl, grad_kl)


def test_logits_in_pieces_give_the_same(tmp_path, monkeypatch):
    base = load_base(make_tiny_base(tmp_path / "llama"))
    adapter = moved(base)
    whole = measured(base, adapter, [(0, 1, 2)])
    monkeypatch.setattr(forward, "MAX_LOGITS", 3 * base.model.config.vocab_size)
    for (value, gradients), (value_pieces, gradients_pieces) in zip(
        whole, measured(base, adapter, [(0, 1, 2)]), strict=True
    ):
        assert value_pieces == pytest.approx(value, rel=1e-5)
        for one, other in zip(gradients, gradients_pieces, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


def test_tokens_without_weight_do_not_count(tmp_path):
    """Targets in the masked part may change freely after the last learned position; the loss stays."""
    base = load_base(make_tiny_base(tmp_path / "llama"))
    model = attach(base, moved(base))
    row = TokenRow("a", "s", "p", tuple(range(10, 30)), (0.0,) * 5 + (1.0,) * 5 + (0.0,) * 10)
    other = TokenRow("a", "s", "p", (*range(10, 20), *range(200, 210)), row.weights)

    def loss(some):
        hidden = hidden_at(model, [some])
        return float(weighted_nll(base, hidden, [some], token_weights([some], [1.0])).detach())

    assert loss(row) == loss(other)


def test_every_row_counts_the_same_however_long():
    weights = token_weights(ROWS, (1.0, 1.0, 1.0))
    assert weights[:8].sum() == pytest.approx(1.0)
    assert weights[8:16].sum() == pytest.approx(0.5), "its token weights are 0.5"
    assert weights[16:].sum() == pytest.approx(1.0)


def test_setting_factors_moves_the_live_model(tmp_path):
    base = load_base(make_tiny_base(tmp_path / "llama"))
    one, other = moved(base, 1), moved(base, 2)
    model = attach(base, one)
    set_factors(parameters_of(model, one), other.factors)
    assert torch.equal(next_log_probs(base, model, ROWS), next_log_probs(base, attach(base, other), ROWS))
