"""What preference, policy and distillation losses must do whatever the numbers: signs, limits, and rows alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cltrain.objectives import distill, policy
from cltrain.objectives.distill import divergence
from cltrain.objectives.policy import clipped, clipping
from cltrain.objectives.preference import dpo, kto, mismatched_divergence, no_divergence

WEIGHTS = {"desirable": 1.0, "undesirable": 1.5}


def draw(*shape: int, seed: int = 0, size: float = 1.0) -> Tensor:
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_probs(num_rows: int, seed: int, size: float = 3.0) -> Tensor:
    return draw(num_rows, 33, seed=seed, size=size).log_softmax(-1)


def test_dpo_at_equal_log_ratios_is_log_2() -> None:
    chosen_B, rejected_B, shift_B = draw(5, seed=1), draw(5, seed=2), draw(5, seed=3)
    loss_B = dpo(chosen_B, rejected_B, chosen_B - shift_B, rejected_B - shift_B, 0.3)
    torch.testing.assert_close(loss_B, torch.full_like(loss_B, math.log(2)))


def test_dpo_raises_the_chosen_and_lowers_the_rejected_by_as_much() -> None:
    chosen_B, rejected_B = draw(5, seed=1).requires_grad_(), draw(5, seed=2).requires_grad_()
    dpo(chosen_B, rejected_B, draw(5, seed=3), draw(5, seed=4), 0.3).sum().backward()
    assert (chosen_B.grad < 0).all()
    torch.testing.assert_close(rejected_B.grad, -chosen_B.grad)


def test_doubling_beta_is_doubling_every_log_ratio() -> None:
    four = [draw(7, seed=i) for i in range(4)]
    torch.testing.assert_close(dpo(*four, 0.6), dpo(*(2 * part for part in four), 0.3))
    logp_B, reference_B, labels_B = draw(7, seed=1), draw(7, seed=2), draw(7, seed=3).sign()
    z0 = torch.tensor(0.2, dtype=torch.float64)
    torch.testing.assert_close(
        kto(logp_B, reference_B, labels_B, z0, beta=0.6, **WEIGHTS),
        kto(2 * logp_B, 2 * reference_B, labels_B, 2 * z0, beta=0.3, **WEIGHTS),
    )


def test_preference_losses_survive_extreme_log_ratios() -> None:
    far_B = torch.tensor([-1e4, 1e4], requires_grad=True)
    zero_B = torch.zeros(2)
    loss_B = dpo(far_B, zero_B, zero_B, zero_B, 1.0) + kto(
        far_B, zero_B, torch.tensor([1, -1]), no_divergence(far_B), beta=1.0, **WEIGHTS
    )
    loss_B.sum().backward()
    assert loss_B.isfinite().all()
    assert far_B.grad.isfinite().all()


def test_kto_raises_desirable_and_lowers_undesirable_answers() -> None:
    logp_B, labels_B = draw(6, seed=1).requires_grad_(), torch.tensor([1, -1, 1, -1, 1, -1])
    z0 = torch.tensor(0.5, dtype=torch.float64)
    loss_B = kto(logp_B, draw(6, seed=2), labels_B, z0, beta=0.3, **WEIGHTS)
    loss_B.sum().backward()
    assert (logp_B.grad.sign() == -labels_B).all()
    assert (loss_B > 0).all()
    assert (loss_B[labels_B > 0] < 1.0).all()
    assert (loss_B[labels_B < 0] < 1.5).all()


def test_kto_at_its_reference_point_is_half_the_weight() -> None:
    logp_B, labels_B = draw(2), torch.tensor([1, -1])
    loss_B = kto(logp_B, logp_B - 0.4, labels_B, torch.tensor(0.4), beta=0.3, **WEIGHTS)
    torch.testing.assert_close(loss_B, torch.tensor([0.5, 0.75], dtype=torch.float64))


def test_mismatched_divergence_is_a_clamped_mean_without_gradient() -> None:
    logp_B = torch.tensor([1.0, 2.0, 0.0], requires_grad=True)
    z0 = mismatched_divergence(logp_B, torch.zeros(3))
    assert float(z0) == 1.0
    assert not z0.requires_grad
    assert float(mismatched_divergence(-logp_B, torch.zeros(3))) == 0.0
    with pytest.raises(AssertionError):
        mismatched_divergence(logp_B[:1], torch.zeros(1))


@pytest.mark.parametrize("label", [1, -1])
def test_one_row_learns_without_an_estimated_divergence(label: int) -> None:
    logp_B = torch.tensor([-3.0], requires_grad=True)
    loss_B = kto(logp_B, torch.tensor([-3.0]), torch.tensor([label]), no_divergence(logp_B), beta=0.1, **WEIGHTS)
    loss_B.sum().backward()
    assert loss_B.isfinite().all()
    assert logp_B.grad.sign() == -label


@pytest.mark.parametrize("kind", policy.KINDS)
def test_one_token_has_a_finite_loss_and_a_gradient(kind: policy.Kind) -> None:
    logp_M = torch.tensor([-2.0], requires_grad=True)
    proximal_M, behaviour_M = torch.tensor([-2.0]), torch.tensor([-200.0])
    loss_M = clipped(logp_M, proximal_M, behaviour_M, torch.tensor([1.0]), kind=kind, low=0.2, high=0.28, truncate=2.0)
    loss_M.sum().backward()
    assert loss_M.isfinite().all()
    assert float(logp_M.grad) == pytest.approx(-2.0), "the token's importance, e^198, is truncated to 2"


def test_ppo_has_no_gradient_exactly_where_the_clip_holds() -> None:
    ratio_M = torch.tensor([0.5, 0.5, 1.0, 1.0, 2.0, 2.0])
    advantages_M = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    logp_M, zero_M = ratio_M.log().requires_grad_(), torch.zeros(6)
    settings = {"kind": "ppo", "low": 0.2, "high": 0.28}
    loss_M = clipped(logp_M, zero_M, zero_M, advantages_M, truncate=2.0, **settings)
    loss_M.sum().backward()
    torch.testing.assert_close(loss_M, torch.tensor([-0.5, 0.8, -1.0, 1.0, -1.28, 2.0]))
    torch.testing.assert_close(logp_M.grad, torch.tensor([-0.5, 0.0, -1.0, 1.0, 0.0, 2.0]))
    report = clipping(logp_M, zero_M, advantages_M, **settings)
    assert report.share == pytest.approx(2 / 6)
    assert report.mean_ratio == pytest.approx(7 / 6)


def test_cispo_keeps_every_gradient_and_bounds_it() -> None:
    ratio_M = torch.tensor([0.5, 0.5, 1.0, 1.0, 9.0, 9.0])
    advantages_M = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    logp_M, zero_M = ratio_M.log().requires_grad_(), torch.zeros(6)
    settings = {"kind": "cispo", "low": 0.2, "high": 4.0}
    clipped(logp_M, zero_M, zero_M, advantages_M, truncate=2.0, **settings).sum().backward()
    torch.testing.assert_close(logp_M.grad, torch.tensor([-0.8, 0.8, -1.0, 1.0, -5.0, 5.0]))
    assert clipping(logp_M, zero_M, advantages_M, **settings).share == pytest.approx(4 / 6)


def test_cispo_with_low_1_has_no_lower_bound() -> None:
    logp_M, zero_M = torch.tensor([-3.0], requires_grad=True), torch.zeros(1)
    clipped(logp_M, zero_M, zero_M, torch.ones(1), kind="cispo", low=1.0, high=4.0, truncate=2.0).sum().backward()
    assert float(logp_M.grad) == pytest.approx(-math.exp(-3))


@pytest.mark.parametrize("kind", policy.KINDS)
def test_only_the_policy_in_training_gets_a_gradient(kind: policy.Kind) -> None:
    three = [(0.1 * draw(9, seed=i)).requires_grad_() for i in range(3)]
    clipped(*three, draw(9, seed=4), kind=kind, low=0.2, high=0.28, truncate=2.0).sum().backward()
    assert three[0].grad is not None
    assert three[1].grad is None
    assert three[2].grad is None


@pytest.mark.parametrize("kind", distill.KINDS)
def test_divergence_is_positive_and_zero_only_at_equality(kind: distill.Kind) -> None:
    logp_MV, logq_MV = log_probs(17, 1), log_probs(17, 2)
    assert (divergence(logp_MV, logq_MV, kind) > 0).all()
    torch.testing.assert_close(divergence(logp_MV, logp_MV, kind), torch.zeros(17, dtype=torch.float64))


def test_forward_and_reverse_are_each_other_turned_round() -> None:
    logp_MV, logq_MV = log_probs(17, 1), log_probs(17, 2)
    torch.testing.assert_close(divergence(logp_MV, logq_MV, "forward"), divergence(logq_MV, logp_MV, "reverse"))
    by_hand = sum(math.exp(p) * (p - q) for p, q in zip(logp_MV[0].tolist(), logq_MV[0].tolist(), strict=True))
    assert float(divergence(logp_MV, logq_MV, "forward")[0]) == pytest.approx(by_hand)


def test_jsd_is_symmetric_and_at_most_log_2() -> None:
    logp_MV, logq_MV = log_probs(65, 1, size=30.0), log_probs(65, 2, size=30.0)
    jsd_M = divergence(logp_MV, logq_MV, "jsd")
    torch.testing.assert_close(jsd_M, divergence(logq_MV, logp_MV, "jsd"))
    assert (jsd_M <= math.log(2) + 1e-12).all()
    assert jsd_M.max() > 0.69, "distributions this sharp nearly reach the bound"


@pytest.mark.parametrize("kind", distill.KINDS)
def test_a_student_position_alone_learns_and_the_teacher_never_does(kind: distill.Kind) -> None:
    teacher_MV, student_MV = draw(1, 33, seed=1).requires_grad_(), draw(1, 33, seed=2).requires_grad_()
    divergence(teacher_MV.log_softmax(-1), student_MV.log_softmax(-1), kind).sum().backward()
    assert teacher_MV.grad is None
    assert student_MV.grad.isfinite().all()
    assert student_MV.grad.abs().max() > 0
