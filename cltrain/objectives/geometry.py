"""Geometry of weight deltas in float64: norms, inner products, differences, ranks, and sums brought back to one rank.

No N x K matrix is ever formed: with stacked factors B = [B_1 B_2 ...], A = [A_1; A_2; ...] every inner product
<B_i A_j, B_k A_l> is sum((B_i^T B_k) * (A_j A_l^T)), O((N + K) R^2), and every singular value is one of the small core
R_B R_A^T of two thin QRs. A and B are never measured separately: (A, B) and (R A, B R^-1) are the same function.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from cltrain.errors import DataError
from cltrain.models.adapter import AdapterFile, Factors
from cltrain.models.base import Base
from cltrain.models.shapes import module_order

_BASE_NORMS: WeakKeyDictionary[Any, dict[str, float]] = WeakKeyDictionary()
ROUNDING = 1e-9  # singular values below this part of what was summed are rounding: the factors are float32


def inner(a1_RK: Tensor, b1_NR: Tensor, a2_SK: Tensor, b2_NS: Tensor) -> float:
    """<B1 A1, B2 A2> in float64; the ranks R and S may differ."""
    a1, b1, a2, b2 = (t.detach().to("cpu", torch.float64) for t in (a1_RK, b1_NR, a2_SK, b2_NS))
    return float(((b1.T @ b2) * (a1 @ a2.T)).sum())


def delta_norms(adapter: AdapterFile) -> dict[str, float]:
    """Module -> ||dW||_F with dW = alpha / rank * B A."""
    return {m: adapter.scale * max(inner(a, b, a, b), 0.0) ** 0.5 for m, (a, b) in adapter.factors.items()}


def difference_norms(one: AdapterFile, other: AdapterFile | None) -> dict[str, float]:
    """Module -> ||dW_one - dW_other||_F over both adapters' modules; None and missing modules count as zero."""
    # A difference of two near-equal deltas cancels in the Gram sum; triangular factors keep the small norm exact.
    parts = _minus(one, other)
    return {m: float(torch.linalg.vector_norm(_core(*_stack(parts, m)))) for m in _modules(parts)}


def spectral_norms(one: AdapterFile, other: AdapterFile | None) -> dict[str, float]:
    """Module -> ||dW_one - dW_other||_2 over both adapters' modules; None and missing modules count as zero."""
    parts = _minus(one, other)
    return {m: float(torch.linalg.matrix_norm(_core(*_stack(parts, m)), 2)) for m in _modules(parts)}


def effective_ranks(adapter: AdapterFile) -> dict[str, float]:
    """Module -> exp(entropy of dW's singular values over their sum), in [1, rank]; 0 for a zero delta.

    Roy and Vetterli, "The effective rank" (EUSIPCO 2007).
    """
    ranks: dict[str, float] = {}
    for module in adapter.factors:
        sigmas_R = torch.linalg.svdvals(_core(*_stack([(adapter, 1.0)], module)))
        total = sigmas_R.sum()
        ranks[module] = float(torch.special.entr(sigmas_R / total).sum().exp()) if total > 0 else 0.0
    return ranks


def cosine(one: AdapterFile, other: AdapterFile) -> float:
    """<dW_one, dW_other> / (||dW_one|| ||dW_other||) over all modules together; 0 when either is zero."""
    product = sum(inner(*one.factors[m], *other.factors[m]) for m in one.factors if m in other.factors)
    squares = [sum(norm**2 for norm in delta_norms(adapter).values()) for adapter in (one, other)]
    length = (squares[0] * squares[1]) ** 0.5
    return one.scale * other.scale * product / length if length > 0 else 0.0


def base_norms(base: Base, modules: list[str]) -> dict[str, float]:
    """Module -> ||W0||_F of the frozen matrix, in float64; each is computed once for a loaded base."""
    known = _BASE_NORMS.setdefault(base.model, {})
    for module in modules:
        if module not in known:
            known[module] = float(torch.linalg.vector_norm(base.model.get_submodule(module).weight.double()))
    return {module: known[module] for module in modules}


def combine(parts: Sequence[tuple[AdapterFile, float]], rank: int, alpha: float) -> tuple[AdapterFile, float]:
    """The adapter of this rank and alpha nearest to sum_i c_i dW_i, and the largest relative error of its modules.

    The error is ||sum - result||_F / ||sum||_F of the truncation, 0 when the sum's rank fits. Factors are float32 and
    balanced (A A^T = B^T B). Ranks that the sum leaves free get B = 0 and a fresh A as in a new adapter, drawn by the
    module's name: with both factors zero they could never learn. Parts may differ in rank, alpha and modules, a missing
    module counting as zero; raises DataError when they belong to different bases.
    """
    assert parts
    digests = {part.base_digest for part, _ in parts if part.base_digest is not None}
    if len(digests) > 1:
        raise DataError(f"adapters of different bases cannot be added: {', '.join(sorted(d[:12] for d in digests))}")
    factors: Factors = {}
    largest_error = 0.0
    for module in sorted(_modules(parts), key=module_order):
        factors[module], error = _truncate(*_stack(parts, module), rank, alpha / rank, module)
        largest_error = max(largest_error, error)
    targets = tuple(sorted({target for part, _ in parts for target in part.targets}))
    return AdapterFile(factors, rank, float(alpha), targets, next(iter(digests), None)), largest_error


def _truncate(a_SK: Tensor, b_NS: Tensor, rank: int, scale: float, module: str) -> tuple[tuple[Tensor, Tensor], float]:
    """(A_RK, B_NR) in float32 with scale * B A nearest to B_NS A_SK, and the relative error of the truncation."""
    q_b, r_b = torch.linalg.qr(b_NS)
    q_a, r_a = torch.linalg.qr(a_SK.T)
    u, sigmas, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    summed = (torch.linalg.vector_norm(b_NS, dim=0) * torch.linalg.vector_norm(a_SK, dim=1)).sum()
    sigmas = sigmas[sigmas > ROUNDING * summed]
    kept = min(rank, len(sigmas))
    roots = (sigmas[:kept] / scale).sqrt()
    a_RK = torch.cat([roots[:, None] * (vt[:kept] @ q_a.T), _fresh_rows(module, rank - kept, a_SK.shape[1])])
    b_NR = torch.cat([(q_b @ u[:, :kept]) * roots, b_NS.new_zeros(b_NS.shape[0], rank - kept)], dim=1)
    lost = float(torch.linalg.vector_norm(sigmas[kept:]))
    return (a_RK.float(), b_NR.float()), lost / float(torch.linalg.vector_norm(sigmas)) if lost else 0.0


def _fresh_rows(module: str, num_rows: int, num_in: int) -> Tensor:
    key = hashlib.sha256(f"combine\0{module}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
    return (2 * torch.rand((num_rows, num_in), generator=generator, dtype=torch.float64) - 1) / num_in**0.5


def _minus(one: AdapterFile, other: AdapterFile | None) -> list[tuple[AdapterFile, float]]:
    return [(one, 1.0)] if other is None else [(one, 1.0), (other, -1.0)]


def _modules(parts: Sequence[tuple[AdapterFile, float]]) -> list[str]:
    return list(dict.fromkeys(module for part, _ in parts for module in part.factors))


def _stack(parts: Sequence[tuple[AdapterFile, float]], module: str) -> tuple[Tensor, Tensor]:
    """(A_SK, B_NS) in float64 with B A = sum_i c_i dW_i, S the sum of the ranks of the parts that have the module."""
    a_parts, b_parts = [], []
    for part, coefficient in parts:
        if module in part.factors:
            a_RK, b_NR = (t.detach().to("cpu", torch.float64) for t in part.factors[module])
            a_parts.append(a_RK)
            b_parts.append(b_NR * (part.scale * coefficient))
    return torch.cat(a_parts), torch.cat(b_parts, dim=1)


def _core(a_SK: Tensor, b_NS: Tensor) -> Tensor:
    """A small matrix with the singular values of B A."""
    return torch.linalg.qr(b_NS, mode="r")[1] @ torch.linalg.qr(a_SK.T, mode="r")[1].T
