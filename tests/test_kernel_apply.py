"""apply() on random tiny models of four families: PEFT's numbers, undone without a trace, and refused aloud."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cltrain_kernels import apply, hidden_at
from peft import LoraConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from tests.kernel_parts import (
    FAMILIES,
    TARGETS,
    VOCABULARY,
    applied,
    assert_same,
    batch,
    fill,
    gradients_of,
    make,
    make_base,
    step,
)


@pytest.fixture(autouse=True)
def _every_line_is_news() -> None:
    sys.modules["cltrain_kernels.apply"]._say_once.cache_clear()


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_pefts(family: str) -> None:
    model, ids = make(family), batch()
    theirs = step(model, ids)
    assert len(theirs[1]) == 2 * 2 * len(TARGETS)
    applied(model)
    assert_same(step(model, ids), theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_and_packed_batches_are_pefts(family: str) -> None:
    model, ids = make(family), batch()
    left_padded = torch.ones_like(ids)
    left_padded[0, :4] = 0
    restarting = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6]]).expand(2, -1)
    cases: list[dict[str, Any]] = [{"attention_mask": left_padded}, {"position_ids": restarting, "use_cache": False}]
    theirs = [step(model, ids, **case) for case in cases]
    assert len({round(loss, 4) for loss, _ in (*theirs, step(model, ids))}) == 3
    applied(model)
    for case, expected in zip(cases, theirs, strict=True):
        assert_same(step(model, ids, **case), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_steps_are_pefts(family: str) -> None:
    curves = []
    for is_applied in (True, False):
        model = make(family)
        if is_applied:
            applied(model)
        adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        curves.append([])
        for i in range(20):
            curves[-1].append(step(model, batch(i % 3))[0])
            adam.step()
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) < 1e-3
    assert curves[0][-1] < curves[0][0] - 0.3, "it learns"


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_at_chosen_tokens_are_all_of_the_models(family: str) -> None:
    model, ids = make(family), batch()
    places = torch.tensor([3, 4, 10, 11, 20])
    upstream = torch.randn(5, 32, generator=torch.Generator().manual_seed(3))  # tells the rows apart
    results = []
    for is_applied in (False, True):
        if is_applied:
            applied(model)
        model.zero_grad()
        hidden_MD = hidden_at(model, ids, places)
        assert hidden_MD.shape == (5, 32)
        (hidden_MD * upstream).sum().backward()
        results.append((hidden_MD.detach(), gradients_of(model)))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-5)  # their sum would cancel
    assert_same((0.0, results[1][1]), (0.0, results[0][1]))


def test_no_token_at_all_trains_nothing() -> None:
    model = make("llama")
    applied(model)
    hidden_at(model, batch(), torch.tensor([], dtype=torch.int64)).sum().backward()
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj"], ["o_proj", "gate_proj"]])
def test_some_projections_alone_are_pefts(targets: list[str]) -> None:
    model, ids = make("qwen2", targets), batch()
    theirs = step(model, ids)
    applied(model)
    assert_same(step(model, ids), theirs)


def test_pefts_switches_work_as_ever() -> None:
    model, ids = make("qwen3"), batch()
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=3, target_modules=["q_proj", "up_proj"]))
    fill(model, 5, "other")

    def all_states() -> list[float]:
        losses = []
        with model.disable_adapter():
            losses.append(float(model(input_ids=ids, labels=ids).loss))
        for name in ("other", "default"):
            model.set_adapter(name)
            losses.append(step(model, ids)[0])
        model.base_model.set_adapter(["default", "other"])
        losses.append(step(model, ids)[0])
        model.set_adapter("default")
        model.merge_adapter()
        losses.append(float(model(input_ids=ids, labels=ids).loss))
        model.unmerge_adapter()
        return losses

    theirs = all_states()
    assert len({round(loss, 4) for loss in theirs}) == 4  # merged is the same as one that is active
    applied(model)
    assert all_states() == pytest.approx(theirs, rel=1e-6)


def test_remove_gives_back_the_same_model_bit_for_bit() -> None:
    model, ids = make("qwen2"), batch()
    parameters = {name: (id(p), p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    attributes = {name: set(m.__dict__) for name, m in model.named_modules()}
    theirs = step(model, ids)
    done = applied(model)
    step(model, ids)
    done.remove()
    done.remove()
    again = step(model, ids)
    assert again[0] == theirs[0]
    assert all(torch.equal(again[1][name], gradient) for name, gradient in theirs[1].items())
    assert attributes == {name: set(m.__dict__) for name, m in model.named_modules()}
    for name, p in model.named_parameters():
        assert (id(p), p.data_ptr()) == parameters[name][:2]
        assert torch.equal(p, parameters[name][2])


def test_two_runs_are_bitwise_equal() -> None:
    model, ids = make("llama"), batch()
    applied(model)
    first, second = step(model, ids), step(model, ids)
    assert first[0] == second[0]
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_an_adapter_saved_by_peft_loads_in_peft_and_back(tmp_path: Path) -> None:
    model, ids = make("llama"), batch()
    names = [name for name, _ in model.named_parameters()]
    applied(model)
    step(model, ids)
    assert [name for name, _ in model.named_parameters()] == names
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base("llama"), tmp_path, is_trainable=True).train()
    theirs = step(loaded, ids)
    assert_same(step(model, ids), theirs)
    applied(loaded)
    assert_same(step(loaded, ids), theirs)


def test_generation_and_returned_states_go_the_models_own_way(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = make("qwen3").eval(), batch()
    with torch.no_grad():
        theirs = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    applied(model)
    with caplog.at_level(logging.INFO), torch.no_grad():
        assert torch.equal(model.generate(input_ids=ids, max_new_tokens=4, do_sample=False), theirs)
        again = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(again, states, strict=True))
    assert [r.getMessage().split(": ")[1] for r in caplog.records if "own forward" in r.getMessage()] == [
        "it uses a cache",
        "it asks for output_hidden_states",
    ]
    with torch.no_grad():  # transformers' hooks, which that call left behind, do not end the ops
        caplog.clear()
        model(input_ids=ids, use_cache=False)
    assert "hooks" not in caplog.text


def test_hooks_still_see_the_modules_they_watch() -> None:
    model, ids, seen = make("llama"), batch(), []
    applied(model)
    handle = model.get_base_model().model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    step(model, ids)
    handle.remove()
    step(model, ids)
    assert seen == [1]


def test_autocast_to_another_dtype_and_checkpointing_go_the_models_own_way(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = make("llama"), batch()
    applied(model)
    with caplog.at_level(logging.INFO), torch.autocast("cpu", torch.bfloat16):
        step(model, ids)
    assert "autocast asks for another dtype than the base's torch.float32" in caplog.text
    model.gradient_checkpointing_enable()
    with caplog.at_level(logging.INFO):
        step(model, ids)
    assert "gradient checkpointing is on" in caplog.text


def lm_head() -> Any:
    return make("llama", [*TARGETS, "lm_head"])


def other_family() -> Any:
    base = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4)
    )
    return make("gpt2", ["c_attn"], base)


def trained_norm() -> Any:
    model = make("llama")
    model.get_base_model().model.layers[1].input_layernorm.weight.requires_grad_()
    return model


def gelu() -> Any:
    return make("llama", base=make_base("llama", hidden_act="gelu"))


def twice() -> Any:
    model = make("llama")
    applied(model)
    return model


UNFIT = [
    (lambda: make("llama", lora_dropout=0.1), "adapter 'default' has dropout"),
    (lambda: make("llama", use_dora=True), "a variant of LoRA"),
    (lambda: make("llama", lora_bias=True), "has a bias"),
    (lambda: make("llama", bias="all"), "the base's own weight or bias is trained"),
    (lambda: make("llama", modules_to_save=["lm_head"]), "lm_head is adapted too"),
    (lm_head, "lm_head is adapted too"),
    (trained_norm, "layers.1.input_layernorm is trained"),
    (gelu, "hidden_act = 'gelu'"),
    (other_family, "is none of LlamaModel, MistralModel, Qwen2Model, Qwen3Model"),
    (twice, "replaced already"),
    (lambda: make_base("llama"), "adapters of kind none"),
]


@pytest.mark.parametrize(("make_model", "said"), UNFIT)
def test_what_does_not_fit_stays_pefts_and_one_line_says_why(
    make_model: Any, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model()
    caplog.clear()
    with caplog.at_level(logging.INFO):
        done = apply(model)
        assert apply(model).why_not == done.why_not
    assert said in str(done.why_not)
    (line,) = [r.getMessage() for r in caplog.records if r.name.startswith("cltrain_kernels")]
    assert said in line
    loss = model(input_ids=batch(), labels=batch()).loss
    assert bool(torch.isfinite(loss))


def test_ops_run_in_triton_too(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    model, ids = make("qwen3"), batch()
    theirs = step(model, ids)
    monkeypatch.setenv("CLTRAIN_KERNELS", "triton")
    applied(model)
    assert_same(step(model, ids), theirs)


def test_an_adapter_that_comes_later_and_does_not_fit_ends_the_ops_until_it_goes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, ids = make("llama"), batch()
    applied(model)
    ours = step(model, ids)
    model.add_adapter("late", LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with caplog.at_level(logging.INFO):
        assert step(model, ids)[0] == pytest.approx(ours[0], rel=1e-6)
    assert "'late' is a variant of LoRA" in caplog.text
    model.delete_adapter("late")
    again = step(model, ids)
    assert again[0] == ours[0]
    assert all(torch.equal(again[1][name], gradient) for name, gradient in ours[1].items())
