"""Penalties on how far the live factors' delta is from a reference delta, differentiable in the live factors.

Both are weighted squares of D = dW - dW_ref over the whole N x K matrix, computed from small Grams. They are summed in
float64 because a Gram sum of a small difference cancels. Which coefficient they get is the caller's business.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from cltrain.errors import DataError
from cltrain.models.adapter import AdapterFile, Factors
from cltrain.objectives.fisher import Fisher


def l2sp(live: Factors, scale: float, reference: AdapterFile | None, base_norms: Mapping[str, float]) -> Tensor:
    """1/2 sum over modules of ||dW - dW_ref||_F^2 / ||W0||_F^2, a float64 scalar without unit.

    dW = scale * B A of the live factors. No reference, or a module that it lacks, means a zero delta; modules that only
    the reference has are constant and left out. Raises DataError for a W0 of zero. L2-SP: Li et al., 1802.01483.
    """
    zero = [module for module in live if not base_norms[module] > 0]
    if zero:
        raise DataError(f"{zero[0]} of the base is all zeros: no distance can be measured relative to it")
    halves = [_half_square(*_difference(live, scale, reference, module)) / base_norms[module] ** 2 for module in live]
    return torch.stack(halves).sum()


def ewc(live: Factors, scale: float, reference: AdapterFile | None, fisher: Fisher) -> Tensor:
    """1/2 sum over modules of sum_ij d_S[i] d_C[j] (dW - dW_ref)_ij^2, a float64 scalar.

    Elastic weight consolidation (Kirkpatrick et al., 1612.00796) on the delta, as EWC-LoRA (2602.17559) does, with a
    diagonal Kronecker Fisher. In nats with the Fisher as measured; with `relative_to_base` in the units of `l2sp`.
    """
    halves = []
    for module in live:
        a_SK, b_NS = _difference(live, scale, reference, module)
        s_N, c_K = (d.to(a_SK.device, torch.float64).sqrt() for d in fisher.diagonals[module])
        halves.append(_half_square(a_SK * c_K, b_NS * s_N[:, None]))
    return torch.stack(halves).sum()


def _difference(live: Factors, scale: float, reference: AdapterFile | None, module: str) -> tuple[Tensor, Tensor]:
    """(A_SK, B_NS) in float64 with B A = dW - dW_ref.

    Stacked as dB A + B_ref dA rather than B A - B_ref A_ref: small where the factors are near the reference's, and
    exactly zero, with its gradient, where they are equal. Of two ranks the smaller is padded with zeros.
    """
    a_RK, b_NR = (t.double() for t in live[module])
    b_NR = b_NR * scale
    if reference is None or module not in reference.factors:
        return a_RK, b_NR
    a_ref, b_ref = (t.detach().to(a_RK.device, torch.float64) for t in reference.factors[module])
    b_ref = b_ref * reference.scale
    missing = len(a_RK) - len(a_ref)
    a_RK, b_NR = F.pad(a_RK, (0, 0, 0, max(-missing, 0))), F.pad(b_NR, (0, max(-missing, 0)))
    a_ref, b_ref = F.pad(a_ref, (0, 0, 0, max(missing, 0))), F.pad(b_ref, (0, max(missing, 0)))
    return torch.cat([a_RK, a_RK - a_ref]), torch.cat([b_NR - b_ref, b_ref], dim=1)


def _half_square(a_SK: Tensor, b_NS: Tensor) -> Tensor:
    return ((b_NS.T @ b_NS) * (a_SK @ a_SK.T)).sum() / 2
