"""trainer.kernels: an update learns the same by the fused ops as by PEFT's modules, and leaves nothing behind."""

from __future__ import annotations

import logging
import os

import pytest
from cltrain_kernels import dispatch
from cltrain_kernels.apply import decoder_of, is_applied

from cltrain.models.adapter import attach, new_factors
from cltrain.models.forward import hidden_at
from cltrain.trainer.fused import fused
from tests.trainer_parts import ADAPTER, Tiny, make_tiny, skill_rows

ROWS = skill_rows(0, 6)


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
    model = attach(tiny.base, new_factors(tiny.base, 4, 8.0, ADAPTER.targets, 1))
    monkeypatch.setenv("CLTRAIN_KERNELS", "auto")
    with fused(model, kernels):
        assert is_applied(decoder_of(model)) == (kernels != "off")
        assert os.environ["CLTRAIN_KERNELS"] == ("auto" if kernels == "auto" else "reference")
    assert not is_applied(decoder_of(model))
    assert os.environ["CLTRAIN_KERNELS"] == "auto"
    assert not is_applied(decoder_of(tiny.base.model)), "the base's own decoder is another one"


@pytest.mark.parametrize("kernels", ["reference", "off"])
def test_no_part_of_an_update_runs_by_triton_where_it_is_not_wanted(tiny, kernels, monkeypatch, caplog):
    """The loss head and EWC's Fisher too, although CLTRAIN_KERNELS asks for Triton, as a GPU's default does."""
    pytest.importorskip("triton")
    monkeypatch.setenv("CLTRAIN_KERNELS", "triton")
    dispatch._chosen.cache_clear()
    with caplog.at_level(logging.INFO, logger="cltrain_kernels"):
        tiny.update(f"plain-{kernels}", ROWS, trainer={"kernels": kernels, "num_steps": 1, "remember": ["ewc"]})
    said = [record.getMessage() for record in caplog.records if "runs by" in record.getMessage()]
    assert "linear_loss on cpu runs by reference: CLTRAIN_KERNELS=reference" in said
    assert not [line for line in said if "triton" in line]
    assert os.environ["CLTRAIN_KERNELS"] == "triton"


@pytest.mark.parametrize("asked", ["auto", None])
def test_an_error_on_the_way_in_leaves_the_setting_as_it_was(asked, monkeypatch):
    class Broken:
        @property
        def peft_config(self):
            raise RuntimeError("broken")

    monkeypatch.delenv("CLTRAIN_KERNELS", raising=False)
    if asked:
        monkeypatch.setenv("CLTRAIN_KERNELS", asked)
    with pytest.raises(RuntimeError, match="broken"), fused(Broken(), "reference"):
        pass
    assert os.environ.get("CLTRAIN_KERNELS") == asked


def test_hidden_states_of_rows_are_the_same_by_both(tiny):
    model = attach(tiny.base, new_factors(tiny.base, 4, 8.0, ADAPTER.targets, 1))
    theirs = hidden_at(tiny.base, model, ROWS)
    with fused(model, "auto"):
        ours = hidden_at(tiny.base, model, ROWS)
    assert ours.shape == theirs.shape == (24, 32)
    assert float((ours - theirs).detach().norm() / theirs.detach().norm()) < 1e-6
