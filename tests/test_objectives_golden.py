"""Our losses and gradients equal those recorded from TRL's own trainers: see golden/record_trl.py for how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cltrain.models.base import Base
from cltrain.objectives.distill import divergence
from cltrain.objectives.losses import token_weights, weighted_nll
from cltrain.objectives.policy import clipped, clipping
from cltrain.objectives.preference import dpo, kto, mismatched_divergence
from cltrain.records import TokenRow

GOLDEN = json.loads((Path(__file__).parent / "golden/trl.json").read_text())


def leaf(values: Any) -> Tensor:
    return torch.tensor(values, requires_grad=True)


def assert_same(mine: Tensor, recorded: Any) -> None:
    torch.testing.assert_close(mine, torch.tensor(recorded), rtol=1e-5, atol=1e-5)


def assert_gradient(mine: Tensor | None, recorded: Any) -> None:
    """Also relative to the largest entry: small gradients would pass an absolute tolerance."""
    assert mine is not None
    exact = torch.tensor(recorded)
    torch.testing.assert_close(mine, exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


def base_around(head_VD: Tensor) -> Base:
    """A base whose output embedding is `head_VD`; nothing else of it is used."""
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary, hidden = head_VD.shape
    sizes = {"hidden_size": hidden, "intermediate_size": hidden, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=False, **sizes))
    model.get_output_embeddings().weight = torch.nn.Parameter(head_VD, requires_grad=False)
    return Base(Path(), model, tokenizer=None, digest="", context=64, device="cpu")


def test_weighted_nll_is_trl_sft_when_every_token_counts_alike() -> None:
    """TRL divides by the batch's answer tokens; we divide by a row's, so a row's weight is its share of them."""
    case = GOLDEN["sft"]
    rows = [
        TokenRow(str(i), "s", "p", tuple(ids), tuple(map(float, counts)))
        for i, (ids, counts) in enumerate(zip(case["ids"], case["counts"], strict=True))
    ]
    num_tokens = [sum(counts[1:]) for counts in case["counts"]]
    weights_M = token_weights(rows, [n / sum(num_tokens) for n in num_tokens])
    hidden_MD = leaf(case["hidden_MD"])
    loss = weighted_nll(base_around(torch.tensor(case["head_VD"])), hidden_MD, rows, weights_M)
    loss.backward()
    assert_same(loss, case["loss"])
    assert_gradient(hidden_MD.grad, case["hidden_grad_MD"])


def test_dpo_is_trl_dpo() -> None:
    case = GOLDEN["dpo"]
    chosen_B, rejected_B = leaf(case["chosen_B"]), leaf(case["rejected_B"])
    references = (torch.tensor(case[f"reference_{name}_B"]) for name in ("chosen", "rejected"))
    loss = dpo(chosen_B, rejected_B, *references, beta=case["beta"]).mean()
    loss.backward()
    assert_same(loss, case["loss"])
    assert_gradient(chosen_B.grad, case["chosen_grad_B"])
    assert_gradient(rejected_B.grad, case["rejected_grad_B"])


@pytest.mark.parametrize("case", GOLDEN["kto"], ids=["mixed", "negative divergence", "desirable only"])
def test_kto_is_trl_kto(case: dict[str, Any]) -> None:
    z0 = mismatched_divergence(leaf(case["mismatched_B"]), torch.tensor(case["reference_mismatched_B"]))
    assert_same(z0, case["divergence"])
    logp_B = leaf(case["logp_B"])
    settings = {name: case[name] for name in ("beta", "desirable", "undesirable")}
    loss = kto(logp_B, torch.tensor(case["reference_B"]), torch.tensor(case["labels_B"]), z0, **settings).mean()
    loss.backward()
    assert_same(loss, case["loss"])
    assert_gradient(logp_B.grad, case["logp_grad_B"])


@pytest.mark.parametrize("case", GOLDEN["policy"], ids=lambda case: case["kind"])
def test_clipped_is_trl_grpo_with_truncated_importance(case: dict[str, Any]) -> None:
    if case["kind"] == "ppo":
        bounds = {"low": case["epsilon"], "high": case["epsilon_high"]}
    else:
        bounds = {"low": 1.0, "high": case["epsilon_high"] - 1}
    logp_M = leaf(case["logp_M"])
    proximal_M, behaviour_M, advantages_M = (
        torch.tensor(case[name]) for name in ("proximal_M", "behaviour_M", "advantages_M")
    )
    loss = clipped(
        logp_M, proximal_M, behaviour_M, advantages_M, kind=case["kind"], truncate=case["truncate"], **bounds
    ).mean()
    loss.backward()
    assert_same(loss, case["loss"])
    assert_gradient(logp_M.grad, case["logp_grad_M"])
    assert ((proximal_M - behaviour_M).exp() > case["truncate"]).any(), "the batch must reach the truncation"
    if case["kind"] == "ppo":
        share = clipping(logp_M, proximal_M, advantages_M, kind="ppo", **bounds).share
        assert share == pytest.approx(case["clip_share"], abs=1e-6)


@pytest.mark.parametrize("case", GOLDEN["distill"], ids=lambda case: case["kind"])
def test_divergence_is_trl_generalised_jsd(case: dict[str, Any]) -> None:
    student_MV = leaf(case["student_MV"])
    divergence_M = divergence(
        torch.tensor(case["teacher_MV"]).log_softmax(-1), student_MV.log_softmax(-1), case["kind"]
    )
    divergence_M.sum().backward()
    assert_same(divergence_M, case["divergence_M"])
    assert_gradient(student_MV.grad, case["student_grad_MV"])
