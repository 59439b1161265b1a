"""Policy-gradient losses per token for stored trajectories: PPO's clip and CISPO, corrected for who sampled them.

Three policies meet: behaviour wrote the tokens, proximal is where the update starts, and the one in training moves away
from proximal. Advantages and denominators are the caller's. M tokens of all trajectories.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["cispo", "ppo"]


@dataclass(frozen=True)
class Clipping:
    """What the clip did to a batch: share of tokens in [0, 1] that it held back, and the mean of the raw ratio."""

    share: float
    mean_ratio: float


def clipped(
    logp_M: Tensor,
    proximal_M: Tensor,
    behaviour_M: Tensor,
    advantages_M: Tensor,
    *,
    kind: Kind,
    low: float,
    high: float,
    truncate: float,
) -> Tensor:
    """loss_M per token from log-probs in nats; only logp_M gets a gradient.

    With r = exp(logp - proximal), A the advantage and w = min(exp(proximal - behaviour), truncate) without gradient:
    ppo is -w min(r A, clip(r, 1 - low, 1 + high) A) (arXiv:1707.06347); cispo is -w clip(r, 1 - low, 1 + high) A logp,
    the clip without gradient, so that every token keeps one (arXiv:2506.13585). TRL's cispo has no lower bound
    (here low = 1) and its epsilon_high is the bound itself (here 1 + high); w is its `token_truncate`.
    """
    ratio_M = torch.exp(logp_M - proximal_M.detach())
    importance_M = torch.exp(proximal_M - behaviour_M).clamp(max=truncate).detach()
    return importance_M * KINDS[kind](logp_M, ratio_M, advantages_M, 1 - low, 1 + high)


def clipping(
    logp_M: Tensor, proximal_M: Tensor, advantages_M: Tensor, *, kind: Kind, low: float, high: float
) -> Clipping:
    """How much `clipped` with these settings holds back.

    For ppo, tokens that lose their gradient (TRL's clip_ratio/region_mean); for cispo, tokens whose weight is another
    than the ratio, whatever the sign of A (TRL counts only A > 0).
    """
    assert logp_M.shape[0] > 0
    ratio_M = torch.exp(logp_M - proximal_M).detach()
    below_M, above_M = ratio_M < 1 - low, ratio_M > 1 + high
    if kind == "ppo":
        below_M, above_M = below_M & (advantages_M < 0), above_M & (advantages_M > 0)
    return Clipping(float((below_M | above_M).float().mean()), float(ratio_M.mean()))


def _ppo(logp_M: Tensor, ratio_M: Tensor, advantages_M: Tensor, floor: float, ceiling: float) -> Tensor:
    return -torch.minimum(ratio_M * advantages_M, ratio_M.clamp(floor, ceiling) * advantages_M)


def _cispo(logp_M: Tensor, ratio_M: Tensor, advantages_M: Tensor, floor: float, ceiling: float) -> Tensor:
    return -ratio_M.detach().clamp(floor, ceiling) * advantages_M * logp_M


KINDS: dict[Kind, Callable[[Tensor, Tensor, Tensor, float, float], Tensor]] = {"cispo": _cispo, "ppo": _ppo}
