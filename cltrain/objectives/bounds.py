"""How far an adapter may go: the norms of its factors' straight path as quartics, and the exact step to a limit."""

from __future__ import annotations

import torch
from torch import Tensor

from cltrain.models.adapter import AdapterFile
from cltrain.objectives.geometry import inner

BISECTIONS = 60  # halvings of an interval within [0, 1]: to float64's resolution


def max_ratio(norms: dict[str, float], references: dict[str, float]) -> float:
    """The largest norm relative to its reference; a module of zero weight that moved counts as infinite."""
    return max(_ratio(norm, references[module]) for module, norm in norms.items())


def step_quartic(start: AdapterFile, end: AdapterFile, module: str) -> list[float]:
    """Coefficients c^0 ... c^4 of ||dW(c) - dW(0)||_F^2 of a module whose factors move linearly.

    dW(c) = s (B + c dB)(A + c dA) = s B A + c Y + c^2 Z with Y = s (dB A + B dA), Z = s dB dA. Both ends share rank
    and alpha.
    """
    assert (start.rank, start.alpha) == (end.rank, end.alpha)
    a_RK, b_NR = (t.double() for t in start.factors[module])
    a_end, b_end = (t.double() for t in end.factors[module])
    da_RK, db_NR = a_end - a_RK, b_end - b_NR
    y = (torch.cat([a_RK, da_RK]), torch.cat([db_NR, b_NR], dim=1))
    z = (da_RK, db_NR)
    yy, yz, zz = (start.scale**2 * inner(*one, *other) for one, other in ((y, y), (y, z), (z, z)))
    return [0.0, 0.0, yy, 2 * yz, zz]


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


def norm_step(start: AdapterFile, end: AdapterFile, references: dict[str, float], limit: float) -> float:
    """Largest c in [0, 1] up to which every module's step stays within `limit` relative to `references`."""
    quartics = {module: step_quartic(start, end, module) for module in end.factors}
    return min(largest_step(quartic, (limit * references[module]) ** 2) for module, quartic in quartics.items())


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


def _ratio(norm: float, reference: float) -> float:
    if reference > 0:
        return norm / reference
    return float("inf") if norm > 0 else 0.0
