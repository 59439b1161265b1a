"""Learning from judged answers: DPO where a pair is judged, KTO where each answer has only its own mark.

Both take log-probs summed over an answer's tokens, in nats, under the policy and under a frozen reference. Averages
over rows are the caller's, who knows the denominators. B pairs or rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def dpo(
    chosen_B: Tensor, rejected_B: Tensor, reference_chosen_B: Tensor, reference_rejected_B: Tensor, beta: float
) -> Tensor:
    """Sigmoid DPO loss_B per pair, -log sigmoid(beta * (chosen - rejected log-ratio)). arXiv:2305.18290, eq. 7."""
    margin_B = (chosen_B - reference_chosen_B) - (rejected_B - reference_rejected_B)
    return -F.logsigmoid(beta * margin_B)


def kto(
    logp_B: Tensor,
    reference_B: Tensor,
    labels_B: Tensor,
    divergence: Tensor,
    *,
    beta: float,
    desirable: float,
    undesirable: float,
) -> Tensor:
    """KTO loss_B per row, weight * (1 - sigmoid(label * beta * (log-ratio - divergence))). arXiv:2402.01306.

    labels_B is +1 (weighted by `desirable`) or -1 (by `undesirable`). `divergence` is the reference point z0 >= 0, a
    number without gradient from `mismatched_divergence` or `no_divergence`.
    """
    assert not divergence.requires_grad
    loss_B = torch.sigmoid(-beta * labels_B * (logp_B - reference_B - divergence))
    return torch.where(labels_B > 0, desirable * loss_B, undesirable * loss_B)


def mismatched_divergence(logp_B: Tensor, reference_B: Tensor) -> Tensor:
    """z0, a scalar in nats: the mean log-ratio of answers to other rows' prompts, at least 0 and without gradient.

    Row i is prompt i followed by the answer of row i - 1 (row 0 takes the last one), as in TRL's KTOTrainer. An answer
    to its own prompt would measure the very reward that z0 is the reference point of.
    """
    assert logp_B.shape[0] > 1, "one row has no other row's answer: use no_divergence"
    return (logp_B - reference_B).detach().mean().clamp(min=0)


def no_divergence(logp_B: Tensor) -> Tensor:
    """z0 = 0 for a batch of one row, which has no other row's answer; TRL refuses such a batch."""
    return logp_B.new_zeros(())
