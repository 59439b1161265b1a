"""Distance of a student's next-token distribution from a frozen teacher's, for distilling a hint or a demonstration.

Whole vocabularies, no top-K. What the teacher sees, and which positions count, is the caller's. M positions, V ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from cltrain.models.forward import token_kl

Kind = Literal["forward", "reverse", "jsd"]


def divergence(logp_MV: Tensor, logq_MV: Tensor, kind: Kind) -> Tensor:
    """divergence_M in nats from log-probs of the teacher p and the student q; only q gets a gradient.

    forward is KL(p || q), reverse KL(q || p), jsd (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2, at most log 2.
    In GKD (arXiv:2306.13649) and TRL these are beta = 0, 1 and 1/2.
    """
    return KINDS[kind](logp_MV.detach(), logq_MV)


def _reverse(logp_MV: Tensor, logq_MV: Tensor) -> Tensor:
    return token_kl(logq_MV, logp_MV)


def _jsd(logp_MV: Tensor, logq_MV: Tensor) -> Tensor:
    logm_MV = torch.logaddexp(logp_MV, logq_MV) - math.log(2)
    return (token_kl(logp_MV, logm_MV) + token_kl(logq_MV, logm_MV)) / 2


KINDS: dict[Kind, Callable[[Tensor, Tensor], Tensor]] = {"forward": token_kl, "reverse": _reverse, "jsd": _jsd}
