"""Hard constraints on an update: out of the base's top directions (OPLoRA), never against a gradient (A-GEM), never out
of the ball of the cumulative bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cltrain.errors import ConfigError
from cltrain.models.adapter import AdapterFile, Factors, snapshot
from cltrain.models.base import Base
from cltrain.objectives.geometry import inner

Subspaces = Mapping[str, tuple[Tensor, Tensor]]
"""Module -> (U_Nk, V_Kk), orthonormal columns."""


def top_subspaces(base: Base, modules: Sequence[str], k: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> the top-k left and right singular vectors (U_Nk, V_Kk) of W0, float32 on the base's device.

    One eigendecomposition of min(N, K)^2 per module in float64: seconds each for wide layers, so keep the result.
    Raises ConfigError unless 1 <= k < min(N, K): at the full rank nothing could be learned.
    """
    subspaces: dict[str, tuple[Tensor, Tensor]] = {}
    for module in modules:
        w_NK = base.model.get_submodule(module).weight.detach().double()
        if not 1 <= k < min(w_NK.shape):
            shape = " x ".join(map(str, w_NK.shape))
            raise ConfigError(
                f"{k} directions of {module} ({shape}) cannot be kept out: choose 1 to {min(w_NK.shape) - 1}"
            )
        is_wide = w_NK.shape[0] <= w_NK.shape[1]
        w_SL = w_NK if is_wide else w_NK.T  # the short side first
        short_Sk = torch.linalg.eigh(w_SL @ w_SL.T).eigenvectors[:, -k:].flip(1)
        # W^T U = V Sigma has orthogonal columns; QR normalises them without dividing by a sigma that may be zero.
        long_Lk = torch.linalg.qr(w_SL.T @ short_Sk).Q
        pair = (short_Sk, long_Lk) if is_wide else (long_Lk, short_Sk)
        subspaces[module] = (pair[0].float().contiguous(), pair[1].float().contiguous())
    return subspaces


def keep_out(live: Factors, subspaces: Subspaces) -> None:
    """In place B <- (I - U U^T) B and A <- A (I - V V^T): U^T dW = 0 and dW V = 0, whatever a step has added.

    OPLoRA, 2510.13003: W0 + dW keeps W0's top-k singular triples.
    """
    with torch.no_grad():
        for module, (u_Nk, v_Kk) in subspaces.items():
            a_RK, b_NR = live[module]
            b_NR -= u_Nk @ (u_Nk.T @ b_NR)
            a_RK -= (a_RK @ v_Kk) @ v_Kk.T


def keep_within(live: Factors, scale: float, radii: Mapping[str, float], least: float) -> None:
    """In place, the nearest deltas of at most these Frobenius norms: B <- min(1, radius / ||scale B A||_F) B.

    Where the bound is not reached nothing changes, to the bit; nor where B would be scaled below `least`: what exploded
    must be seen. What is scaled down while training goes on can be made good by the terms that remember.
    """
    with torch.no_grad():
        for module, (a_RK, b_NR) in live.items():
            a, b = a_RK.double(), b_NR.double()
            norm = scale * ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt()
            c = (radii[module] / norm).clamp(max=1.0)
            b_NR *= torch.where(c < least, 1.0, c).to(b_NR.dtype)


def within_ball(adapter: AdapterFile, radii: Mapping[str, float], least: float) -> AdapterFile:
    """The adapter after `keep_within`.

    The projection onto a ball brings no two points further apart: what was within a step of the incumbent, which lies
    inside, still is.
    """
    factors = snapshot(adapter.factors)
    keep_within(factors, adapter.scale, radii, least)
    return adapter.with_factors(factors)


def overlap(adapter: AdapterFile, subspaces: Subspaces) -> float:
    """The share of ||dW||_F^2, over all modules of `subspaces`, that `keep_out` would remove; 0 for a zero delta.

    Energy in U's columns on the left or in V's on the right counts; OPLoRA's rho_k counts only what is in both.
    """
    touching, total = 0.0, 0.0
    for module, (u, v) in subspaces.items():
        a_RK, b_NR = (t.detach().to("cpu", torch.float64) for t in adapter.factors[module])
        u_Nk, v_Kk = u.to("cpu", torch.float64), v.to("cpu", torch.float64)
        left_kR = u_Nk.T @ b_NR
        rest_NR = b_NR - u_Nk @ left_kR
        right_Rk = a_RK @ v_Kk
        touching += inner(a_RK, left_kR, a_RK, left_kR) + inner(right_Rk, rest_NR, right_Rk, rest_NR)
        total += inner(a_RK, b_NR, a_RK, b_NR)
    return touching / total if total > 0 else 0.0


def agem(step: Sequence[Tensor], gradient: Sequence[Tensor]) -> list[Tensor]:
    """The step without the part that would raise, to first order, the loss whose gradient is given.

    `step` is what the optimiser would add to the parameters, `gradient` has the same shapes. Returns
    step - <step, g> / <g, g> g when <step, g> > 0, else the step. A-GEM (1812.00420) projects gradients, which
    for SGD is the same; Adam rescales every entry afterwards and undoes it.
    """
    product = sum(float((s.double() * g.double()).sum()) for s, g in zip(step, gradient, strict=True))
    square = sum(float(g.double().square().sum()) for g in gradient)
    if product <= 0 or square == 0:
        return list(step)
    return [s - (product / square * g.double()).to(s.dtype) for s, g in zip(step, gradient, strict=True)]
