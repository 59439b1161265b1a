"""What goes into `linear_loss` beside tensors, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Divergence = Literal["forward", "reverse", "k3"]


@dataclass(frozen=True)
class Reference:
    """What to stay close to, row by row: exactly one of final hidden states under the same head, whole logits, or the
    log-probs of the tokens (enough for k3 only). `weights_M` weighs each row's divergence in the loss; without them the
    divergence is only measured.

    forward is KL(reference || student), reverse KL(student || reference), both over the whole vocabulary; k3 is the
    sampled estimate r - 1 - log r with r = p_reference / p_student of the token
    (http://joschu.net/blog/kl-approx.html).
    """

    divergence: Divergence
    weights_M: Tensor | None = None
    hidden_MD: Tensor | None = None
    logits_MV: Tensor | None = None
    logprob_M: Tensor | None = None


@dataclass(frozen=True)
class LinearLoss:
    """The loss, and what was seen on the way: one float32 per row, detached, 0 for rows that are not supervised."""

    loss: Tensor
    num_supervised: Tensor  # int64, on the device: 0 means that the loss is 0 for want of a supervised token
    logprob_M: Tensor
    entropy_M: Tensor
    divergence_M: Tensor | None
    reference_logprob_M: Tensor | None
