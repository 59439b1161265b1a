"""trainer.kernels: an update learns the same by the fused ops as by PEFT's modules, and leaves nothing behind."""

from __future__ import annotations

import logging
import os

import pytest
import torch
from cltrain_kernels import dispatch
from cltrain_kernels.apply import decoder_of, is_applied

from cltrain.models.adapter import attach, new_factors, parameters_of, set_factors
from cltrain.models.forward import hidden_at
from cltrain.records import TokenRow
from cltrain.trainer.fused import fused, run_by
from cltrain.trainer.shrink import Ruler
from cltrain.trainer.update import verify_bounds
from tests.trainer_parts import ADAPTER, LOOSE, Tiny, make_tiny, skill_rows

ROWS = skill_rows(0, 6)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("kernels"))


def test_every_setting_learns_the_same_and_the_ops_the_same_bytes(tiny):
    made = {
        name: tiny.update(name, ROWS, trainer={"kernels": name.split("-")[0], "num_steps": 4})
        for name in ("off", "auto", "reference", "auto-again")
    }
    assert made["auto"].content == made["auto-again"].content == made["reference"].content
    assert made["auto"].content != made["off"].content, "they round differently: the ops ran"
    for name, value in made["off"].candidate.metrics.items():
        assert made["auto"].candidate.metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("kernels", ["auto", "reference", "off"])
def test_the_ops_run_inside_the_block_alone(tiny, kernels, monkeypatch):
    pytest.importorskip("triton")
    model = attach(tiny.base, new_factors(tiny.base, 4, 8.0, ADAPTER.targets, 1))
    monkeypatch.setenv("CLTRAIN_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with fused(model, kernels):
        assert is_applied(decoder_of(model)) == (kernels != "off")
        assert dispatch.implementation_for("swiglu", CPU) == ("triton" if kernels == "auto" else "reference")
    assert not is_applied(decoder_of(model))
    assert dispatch.implementation_for("swiglu", CPU) == "triton"
    assert not is_applied(decoder_of(tiny.base.model)), "the base's own decoder is another one"


@pytest.mark.parametrize("kernels", ["reference", "off"])
def test_no_part_of_an_update_runs_by_triton_where_it_is_not_wanted(tiny, kernels, monkeypatch, caplog):
    """The loss head and EWC's Fisher too, although CLTRAIN_KERNELS asks for Triton, as a GPU's default does."""
    pytest.importorskip("triton")
    monkeypatch.setenv("CLTRAIN_KERNELS", "triton")
    for choice in (dispatch._chosen, dispatch._plain):
        choice.cache_clear()
    with caplog.at_level(logging.INFO, logger="cltrain_kernels"):
        tiny.update(f"plain-{kernels}", ROWS, trainer={"kernels": kernels, "num_steps": 1, "remember": ["ewc"]})
    said = [record.getMessage() for record in caplog.records if "runs by" in record.getMessage()]
    assert "linear_loss on cpu runs by reference: plain PyTorch was asked for" in said
    assert not [line for line in said if "triton" in line]
    assert os.environ["CLTRAIN_KERNELS"] == "triton"


def test_plain_torch_ends_with_the_last_of_overlapping_updates_and_with_one_that_fails(monkeypatch):
    class Broken:
        @property
        def peft_config(self):
            raise RuntimeError("broken")

    pytest.importorskip("triton")
    monkeypatch.setenv("CLTRAIN_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="broken"), fused(Broken(), "reference"):
        pass
    one, other = run_by("reference"), run_by("off")
    seen = [dispatch.implementation_for("swiglu", CPU)]
    for change in (one.__enter__, other.__enter__, lambda: one.__exit__(None, None, None)):
        change()
        seen.append(dispatch.implementation_for("swiglu", CPU))
    other.__exit__(None, None, None)
    seen.append(dispatch.implementation_for("swiglu", CPU))
    assert seen == ["triton", "reference", "reference", "reference", "triton"]
    assert os.environ["CLTRAIN_KERNELS"] == "triton"


def test_hidden_states_of_rows_are_the_same_by_both(tiny):
    model = attach(tiny.base, new_factors(tiny.base, 4, 8.0, ADAPTER.targets, 1))
    theirs = hidden_at(model, ROWS)
    with fused(model, "auto"):
        ours = hidden_at(model, ROWS)
    assert ours.shape == theirs.shape == (24, 32)
    assert float((ours - theirs).detach().norm() / theirs.detach().norm()) < 1e-6


def gradients_of(model, rows, upstream=None):
    parameters = [p for p in model.parameters() if p.requires_grad]
    hidden_MD = hidden_at(model, rows)
    if upstream is None:
        upstream = torch.randn(hidden_MD.shape, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad(hidden_MD, parameters, upstream)
    return hidden_MD.detach(), torch.cat([part.flatten() for part in found])


def test_what_rows_begin_with_alike_runs_once_and_gives_the_same_gradients(tiny):
    """A common system prompt, answers inside it too, one row that is all of another's beginning, one of two tokens."""
    stem = tuple(range(20, 45))
    rows = [
        TokenRow("a", "s", "p", (*stem, 50, 51, 52), (0.0,) * 10 + (1.0,) * 18),
        TokenRow("b", "s", "p", (*stem, 60, 61), (0.0,) * 20 + (1.0,) * 7),
        TokenRow("c", "s", "p", stem, (0.0,) * 24 + (1.0,)),
        TokenRow("d", "s", "p", (7, 8), (0.0, 1.0)),
        TokenRow("e", "s", "p", (*stem[:5], 70, 71), (0.0,) * 5 + (1.0,) * 2),
    ]
    start = new_factors(tiny.base, 4, 8.0, ADAPTER.targets, 1)
    moved = {m: (a, 0.1 * torch.ones_like(b)) for m, (a, b) in start.factors.items()}
    model = attach(tiny.base, start.with_factors(moved))
    hidden, gradients = gradients_of(model, rows)
    with fused(model, "auto"):
        seen = []
        hook = decoder_of(model).embed_tokens.register_forward_hook(lambda _, ids, __: seen.append(ids[0].numel()))
        ours, our_gradients = gradients_of(model, rows)
        hook.remove()
    assert seen == [25 + 3 + 2 + 2 + 7], "five tokens in common are no reason to part an attention"
    assert float((ours - hidden).norm() / hidden.norm()) < 1e-6
    assert float((our_gradients - gradients).norm() / gradients.norm()) < 1e-5


@pytest.mark.parametrize("window", [11, 12])
def test_rows_longer_than_a_sliding_window_are_padded(tmp_path, window):
    """Rows of 12 tokens: as long as the window they are packed, longer ones are not; the model says the same."""
    tiny = make_tiny(tmp_path, num_layers=2, family="mistral")
    model = attach(tiny.base, new_factors(tiny.base, 4, 8.0, ADAPTER.targets, 1))
    decoder = decoder_of(model)
    decoder.config.sliding_window = window
    hidden, gradients = gradients_of(model, ROWS)
    with fused(model, "auto"):
        seen = []
        hook = decoder.embed_tokens.register_forward_hook(lambda _, ids, __: seen.append(tuple(ids[0].shape)))
        ours, our_gradients = gradients_of(model, ROWS)
        hook.remove()
    assert seen == [(1, 72) if window == 12 else (6, 12)]
    assert float((ours - hidden).norm() / hidden.norm()) < 1e-6
    assert float((our_gradients - gradients).norm() / gradients.norm()) < 1e-5


def test_training_gives_the_model_that_measures_back(tiny, monkeypatch):
    """With memory of its own, no gradients, and nothing measured before that would be taken for now."""
    lent = []
    lend = Ruler.lend

    def watched(ruler, adapter):
        lent.append((ruler, lend(ruler, adapter)))
        return lent[-1][1]

    monkeypatch.setattr(Ruler, "lend", watched)
    made = tiny.update("lent", ROWS, trainer={"num_steps": 2})
    ((ruler, model),) = lent
    for factor in (p for pair in parameters_of(model, made.adapter).values() for p in pair):
        assert factor.grad is None
        assert factor.untyped_storage().nbytes() == 4 * factor.numel()
    again = verify_bounds(tiny.base, made.adapter, None, tiny.anchors, LOOSE)
    for name in ("step_kl", "drift_kl", "step_frobenius", "drift_spectral"):
        assert getattr(again, name) == getattr(made.candidate.bounds, name), name
    before = ruler.on_anchors(made.adapter)
    set_factors(parameters_of(lend(ruler, made.adapter), made.adapter), new_factors_of(tiny))
    after = ruler.on_anchors(made.adapter.with_factors(new_factors_of(tiny)))
    assert after.drift_kl < 0.1 * before.drift_kl, "what was measured before the training was said of what came of it"


def new_factors_of(tiny):
    return new_factors(tiny.base, ADAPTER.rank, ADAPTER.alpha, ADAPTER.targets, 1).factors
