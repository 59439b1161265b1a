"""Hard constraints on an update: out of the base's top directions (OPLoRA), never against a gradient (A-GEM), never out
of the ball of the cumulative bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from cltrain_kernels.flat import Layout
from cltrain_kernels.grams import keep_within
from torch import Tensor

from cltrain.errors import ConfigError
from cltrain.models.adapter import AdapterFile, Factors
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


def within_ball(adapter: AdapterFile, radii: Mapping[str, float], least: float) -> AdapterFile:
    """The nearest deltas of at most these Frobenius norms: B <- min(1, radius / ||dW||_F) B, module by module.

    Where the bound is not reached nothing changes, to the bit; nor where B would be scaled below `least`: what exploded
    must be seen. The projection onto a ball brings no two points further apart: what was within a step of the
    incumbent, which lies inside, still is.
    """
    layout = Layout.of({m: (len(b_NR), a_RK.shape[1]) for m, (a_RK, b_NR) in adapter.factors.items()}, adapter.rank)
    values_S = next(iter(adapter.factors.values()))[0].new_zeros(layout.size)
    layout.fill(values_S, adapter.factors)
    keep_within(layout, values_S, layout.table(radii), adapter.scale, least)
    factors = layout.factors(values_S)
    return adapter.with_factors({module: factors[module] for module in adapter.factors})


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


def agem(step_S: Tensor, gradient_S: Tensor) -> Tensor:
    """The step without the part that would raise, to first order, the loss whose gradient is given.

    `step_S` is what the optimiser would add to the parameters. Returns step - <step, g> / <g, g> g when <step, g> > 0,
    else the step. A-GEM (1812.00420) projects gradients, which for SGD is the same; Adam rescales every entry
    afterwards and undoes it.
    """
    g_S = gradient_S.double()
    product, square = float(step_S.double() @ g_S), float(g_S @ g_S)
    if product <= 0 or square == 0:
        return step_S
    return step_S - (product / square * g_S).to(step_S.dtype)
