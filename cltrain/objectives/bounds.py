"""How far an adapter is from another: norms of weight deltas from Grams in float64, and the step back to a limit.

No N x K matrix is ever formed with stacked factors B = [B_1 B_2 ...], A = [A_1; A_2; ...] every inner product
<B_i A_j, B_k A_l> is sum((B_i^T B_k) * (A_j A_l^T)), O((N + K) R^2). A and B are never bounded
separately: (A, B) and (R A, B R^-1) are the same function.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cltrain.models.adapter import AdapterFile
from cltrain.models.base import Base

BISECTIONS = 60  # halvings of an interval within [0, 1]: to float64's resolution


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


def max_ratio(norms: dict[str, float], references: dict[str, float]) -> float:
    """The largest norm relative to its reference; a module of zero weight that moved counts as infinite."""
    return max(_ratio(norm, references[module]) for module, norm in norms.items())


def segment_quartics(start: AdapterFile, end: AdapterFile, module: str) -> tuple[list[float], list[float]]:
    """Coefficients c^0 ... c^4 of ||dW(c) - dW(0)||_F^2 and ||dW(c)||_F^2 of a module whose factors move linearly.

    dW(c) = s (B + c dB)(A + c dA) = X + c Y + c^2 Z with X = s B A, Y = s (dB A + B dA), Z = s dB dA. Both ends share
    rank and alpha.
    """
    assert (start.rank, start.alpha) == (end.rank, end.alpha)
    a_RK, b_NR = (t.double() for t in start.factors[module])
    a_end, b_end = (t.double() for t in end.factors[module])
    da_RK, db_NR = a_end - a_RK, b_end - b_NR
    terms = {
        "X": (a_RK, b_NR),
        "Y": (torch.cat([a_RK, da_RK]), torch.cat([db_NR, b_NR], dim=1)),
        "Z": (da_RK, db_NR),
    }
    square = start.scale**2

    def product(one: str, other: str) -> float:
        return square * inner(*terms[one], *terms[other])

    xx, xy, xz, yy, yz, zz = (product(*pair) for pair in ("XX", "XY", "XZ", "YY", "YZ", "ZZ"))
    return [0.0, 0.0, yy, 2 * yz, zz], [xx, 2 * xy, yy + 2 * xz, 2 * yz, zz]


def largest_step(quartic: list[float], limit: float) -> float:
    """Largest c in [0, 1] such that quartic(c') <= limit for every c' in [0, c]; 0 when it fails at 0 already.

    Between the derivative's roots the quartic is monotone, so the first piece that ends above the limit holds the only
    crossing; bisection finds it to float64's resolution, on the side that obeys.
    """
    import numpy as np

    polynomial = np.polynomial.Polynomial(quartic)
    if polynomial(0.0) > limit:
        return 0.0
    slope = polynomial.deriv()
    negligible = 1e-15 * float(np.abs(slope.coef).max())  # a vanishing leading coefficient has no usable roots
    turns = [complex(root) for root in slope.trim(negligible).roots()]
    inside = sorted(root.real for root in turns if abs(root.imag) < 1e-6 and 0 < root.real < 1)
    low = 0.0
    for high in [*inside, 1.0]:
        if polynomial(high) > limit:
            break
        low = high
    else:
        return 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if polynomial(middle) <= limit else (low, middle)
    return low


def norm_step(
    start: AdapterFile, end: AdapterFile, references: dict[str, float], step_limit: float, drift_limit: float
) -> float:
    """Largest c in [0, 1] up to which every module's step and drift stay within limits relative to `references`."""
    c = 1.0
    for module in end.factors:
        step, drift = segment_quartics(start, end, module)
        c = min(c, largest_step(step, (step_limit * references[module]) ** 2))
        c = min(c, largest_step(drift, (drift_limit * references[module]) ** 2))
    return c


def between(start: AdapterFile, end: AdapterFile, c: float) -> AdapterFile:
    """The adapter a fraction `c` of the way from start to end, both factors moved linearly; float32."""
    if c == 1.0:
        return end
    factors = {}
    for module, (a_end, b_end) in end.factors.items():
        a_RK, b_NR = start.factors[module]
        factors[module] = (_move(a_RK, a_end, c), _move(b_NR, b_end, c))
    return end.with_factors(factors)


def _move(start: Tensor, end: Tensor, c: float) -> Tensor:
    return (start.double() + c * (end.double() - start.double())).float()


def _stacked_norm(a_SK: Tensor, b_NS: Tensor) -> float:
    # A difference of two near-equal deltas cancels in the Gram sum; triangular factors keep the small norm exact.
    core = torch.linalg.qr(b_NS, mode="r")[1] @ torch.linalg.qr(a_SK.T, mode="r")[1].T
    return float(torch.linalg.vector_norm(core))


def _ratio(norm: float, reference: float) -> float:
    if reference > 0:
        return norm / reference
    return float("inf") if norm > 0 else 0.0
