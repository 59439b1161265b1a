"""Geometry of weight deltas: norms, inner products and differences in float64, from Grams and thin QRs.

No N x K matrix is ever formed: with stacked factors B = [B_1 B_2 ...], A = [A_1; A_2; ...] every inner product
<B_i A_j, B_k A_l> is sum((B_i^T B_k) * (A_j A_l^T)), O((N + K) R^2). A and B are never measured
separately: (A, B) and (R A, B R^-1) are the same function.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cltrain.models.adapter import AdapterFile
from cltrain.models.base import Base


def inner(a1_RK: Tensor, b1_NR: Tensor, a2_SK: Tensor, b2_NS: Tensor) -> float:
    """<B1 A1, B2 A2> in float64; the ranks R and S may differ."""
    a1, b1, a2, b2 = (t.detach().to("cpu", torch.float64) for t in (a1_RK, b1_NR, a2_SK, b2_NS))
    return float(((b1.T @ b2) * (a1 @ a2.T)).sum())


def delta_norms(adapter: AdapterFile) -> dict[str, float]:
    """Module -> ||dW||_F with dW = alpha / rank * B A."""
    return {m: adapter.scale * max(inner(a, b, a, b), 0.0) ** 0.5 for m, (a, b) in adapter.factors.items()}


def difference_norms(one: AdapterFile, other: AdapterFile | None) -> dict[str, float]:
    """Module -> ||dW_one - dW_other||_F over both adapters' modules; None and missing modules count as zero."""
    others = other.factors if other is not None else {}
    scale_other = other.scale if other is not None else 0.0
    norms: dict[str, float] = {}
    for module in [*one.factors, *(m for m in others if m not in one.factors)]:
        parts = []
        if module in one.factors:
            parts.append((one.factors[module][0].double(), one.factors[module][1].double() * one.scale))
        if module in others:
            parts.append((others[module][0].double(), others[module][1].double() * -scale_other))
        a_SK = torch.cat([a for a, _ in parts])
        b_NS = torch.cat([b for _, b in parts], dim=1)
        norms[module] = _stacked_norm(a_SK, b_NS)
    return norms


def spectral_norms(one: AdapterFile, other: AdapterFile | None) -> dict[str, float]:
    """Module -> ||dW_one - dW_other||_2, from thin QRs of the stacked factors and the SVD of the small core."""
    norms: dict[str, float] = {}
    for module, (a_RK, b_NR) in one.factors.items():
        a_SK, b_NS = a_RK.double(), b_NR.double() * one.scale
        if other is not None and module in other.factors:
            a_other, b_other = other.factors[module]
            a_SK = torch.cat([a_SK, a_other.double()])
            b_NS = torch.cat([b_NS, b_other.double() * -other.scale], dim=1)
        core = torch.linalg.qr(b_NS, mode="r")[1] @ torch.linalg.qr(a_SK.T, mode="r")[1].T
        norms[module] = float(torch.linalg.matrix_norm(core, 2))
    return norms


def base_norms(base: Base, modules: list[str]) -> dict[str, float]:
    """Module -> ||W0||_F of the frozen matrix, in float64."""
    return {m: float(torch.linalg.vector_norm(base.model.get_submodule(m).weight.double())) for m in modules}


def _stacked_norm(a_SK: Tensor, b_NS: Tensor) -> float:
    # A difference of two near-equal deltas cancels in the Gram sum; triangular factors keep the small norm exact.
    core = torch.linalg.qr(b_NS, mode="r")[1] @ torch.linalg.qr(a_SK.T, mode="r")[1].T
    return float(torch.linalg.vector_norm(core))
