"""Frozen linear layers with LoRA: projections that share one input, and the gated MLP, as single autograd nodes.

Plain matrix products of cuBLAS or MKL, forward and backward. What PEFT's autograd keeps and these nodes do not: the
normed input, silu(gate) and the MLP's activation (made again in the backward). What it writes to memory and these do
not: each LoRA branch's output and input gradient, which are added inside the product. Dropout is not offered.

M rows (tokens), K in, N out, R rank, I inner. With U = (X A^T) s:
    Y = X W^T + U B^T         S = (dY B) s         dX = dY W + S A         dA = S^T X         dB = dY^T U
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from cltrain_kernels.grams import column_square_sums
from cltrain_kernels.rms_norm import rms_norm_backward, rms_norm_forward, rms_norm_reference
from cltrain_kernels.swiglu import swiglu_backward, swiglu_forward, swiglu_reference


@dataclass(frozen=True)
class Projection:
    """A frozen linear layer and what is learned beside it.

    `scale` is alpha / rank, or a tensor that broadcasts to (M, R): with the factors of several adapters stacked along R
    and their scales at the rows of each, zero elsewhere, every row is computed by its own adapter and trains no other.
    To `fisher` (rows_N, columns_K) a backward adds sum_m dY[m]^2 and sum_m X[m]^2: a Fisher's rows and columns.
    """

    weight_NK: Tensor  # frozen; or bitsandbytes' Params4bit, dequantised where it is used
    bias_N: Tensor | None = None
    a_RK: Tensor | None = None  # None, with b_NR: no adapter here
    b_NR: Tensor | None = None
    scale: float | Tensor = 1.0
    fisher: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Norm:
    """A frozen RMSNorm in front of a projection: its output is made again in the backward, not kept."""

    weight_K: Tensor
    eps: float


def lora_linear(x: Tensor, projections: Sequence[Projection], norm: Norm | None = None) -> tuple[Tensor, ...]:
    """Each projection of `norm(x)`; x is (..., K). Differentiable in x and in the factors, which may be wider floats.

    Raises ValueError on shapes, dtypes or devices that do not fit, and on a base weight that requires a gradient.
    """
    _check(x, projections, norm)
    ys = _LoraLinear.apply(x.reshape(-1, x.shape[-1]), _frozen(projections), norm, *_factors(x, projections))
    return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in ys)


def lora_mlp(x: Tensor, gate: Projection, up: Projection, down: Projection, norm: Norm | None = None) -> Tensor:
    """`down(silu(gate(n)) * up(n))` of n = norm(x), as `lora_linear` otherwise."""
    _check(x, (gate, up), norm)
    _check(x.new_empty(0, _shape(gate.weight_NK)[0]), (down,), None)
    three = (gate, up, down)
    y = _LoraMlp.apply(x.reshape(-1, x.shape[-1]), _frozen(three), norm, *_factors(x, three))
    return y.view(*x.shape[:-1], y.shape[1])


def lora_linear_reference(x: Tensor, projections: Sequence[Projection], norm: Norm | None = None) -> tuple[Tensor, ...]:
    """The specification of `lora_linear`, in PyTorch: PEFT's two branches."""
    if norm is not None:
        x = rms_norm_reference(x, norm.weight_K, norm.eps)
    rows = x.reshape(-1, x.shape[-1])
    ys = []
    for p in projections:
        y = F.linear(rows, dense(p.weight_NK, x.dtype), p.bias_N)
        if p.a_RK is not None and p.b_NR is not None:
            y = y + F.linear(F.linear(rows, p.a_RK.to(x.dtype)) * p.scale, p.b_NR.to(x.dtype))
        ys.append(y.view(*x.shape[:-1], y.shape[1]))
    return tuple(ys)


def lora_mlp_reference(
    x: Tensor, gate: Projection, up: Projection, down: Projection, norm: Norm | None = None
) -> Tensor:
    """The specification of `lora_mlp`, in PyTorch."""
    return lora_linear_reference(swiglu_reference(*lora_linear_reference(x, (gate, up), norm)), (down,))[0]


def dense(weight_NK: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight as a matrix in `dtype`; a 4-bit one is dequantised anew each time, so that only 4 bits are kept."""
    if _is_4bit(weight_NK):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight_NK.data, weight_NK.quant_state).to(dtype)  # type: ignore[attr-defined]
    return weight_NK


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_MK: Tensor, projections: Sequence[Projection], norm: Norm | None, *factors: Tensor | None
    ) -> tuple[Tensor, ...]:
        n_MK, inverse = normed(x_MK, norm)
        made = [_forward(n_MK, p, *ab) for p, ab in zip(projections, _pairs(factors), strict=True)]
        ctx.projections, ctx.norm = projections, norm
        ctx.save_for_backward(x_MK, inverse, *(u for _, u in made), *factors)
        return tuple(y for y, _ in made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:
        count = len(ctx.projections)
        x_MK, inverse, *rest = ctx.saved_tensors
        n_MK = normed(x_MK, ctx.norm)[0]
        dn_MK, gradients = _backward(dys, n_MK, ctx.projections, rest[:count], rest[count:], ctx.needs_input_grad[0])
        _add_to_fisher(ctx.projections, dys, n_MK)
        return through_norm(dn_MK, x_MK, inverse, ctx.norm), None, None, *gradients


class _LoraMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_MK: Tensor, projections: Sequence[Projection], norm: Norm | None, *factors: Tensor | None
    ) -> Tensor:
        n_MK, inverse = normed(x_MK, norm)
        of_gate, of_up, of_down = _pairs(factors)
        gate_MI, u_gate = _forward(n_MK, projections[0], *of_gate)
        up_MI, u_up = _forward(n_MK, projections[1], *of_up)
        del n_MK
        y_MK, u_down = _forward(swiglu_forward(gate_MI, up_MI), projections[2], *of_down)
        ctx.projections, ctx.norm = projections, norm
        ctx.save_for_backward(x_MK, inverse, gate_MI, up_MI, u_gate, u_up, u_down, *factors)
        return y_MK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_MK: Tensor) -> tuple[Any, ...]:
        x_MK, inverse, gate_MI, up_MI, u_gate, u_up, u_down, *factors = ctx.saved_tensors
        gate, up, down = ctx.projections
        dh_MI, s_down = _input_gradient((dy_MK,), (down,), factors[4:])
        d_gate_MI, d_up_MI, h_MI = swiglu_backward(dh_MI, gate_MI, up_MI)
        del dh_MI
        of_down = _factor_gradients(dy_MK, h_MI, u_down, s_down[0])
        _add_to_fisher((down,), (dy_MK,), h_MI)
        del h_MI
        n_MK = normed(x_MK, ctx.norm)[0]
        dn_MK, gradients = _backward(
            (d_gate_MI, d_up_MI), n_MK, (gate, up), (u_gate, u_up), factors[:4], ctx.needs_input_grad[0]
        )
        _add_to_fisher((gate, up), (d_gate_MI, d_up_MI), n_MK)
        return through_norm(dn_MK, x_MK, inverse, ctx.norm), None, None, *gradients, *of_down


def _forward(x_MK: Tensor, p: Projection, a_RK: Tensor | None, b_NR: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(Y, U); U is None without an adapter."""
    weight_KN = dense(p.weight_NK, x_MK.dtype).t()
    y_MN = x_MK @ weight_KN if p.bias_N is None else torch.addmm(p.bias_N, x_MK, weight_KN)
    if a_RK is None or b_NR is None:
        return y_MN, None
    u_MR = (x_MK @ a_RK.t()).mul_(p.scale)
    return y_MN.addmm_(u_MR, b_NR.t()), u_MR


def _backward(
    dys: Sequence[Tensor],
    x_MK: Tensor,
    projections: Sequence[Projection],
    us: Sequence[Tensor | None],
    factors: Sequence[Tensor | None],
    needs_dx: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dX (None unless needed) and (dA, dB) of each projection, in one list."""
    dx_MK, ss = _input_gradient(dys, projections, factors, needs_dx)
    gradients: list[Tensor | None] = []
    for dy_MN, u_MR, s_MR in zip(dys, us, ss, strict=True):
        gradients += _factor_gradients(dy_MN, x_MK, u_MR, s_MR)
    return dx_MK, gradients


def _input_gradient(
    dys: Sequence[Tensor], projections: Sequence[Projection], factors: Sequence[Tensor | None], needs_dx: bool = True
) -> tuple[Any, list[Tensor | None]]:
    """dX summed over the projections, and the S of each."""
    dx_MK: Tensor | None = None
    ss: list[Tensor | None] = []
    for dy_MN, p, (a_RK, b_NR) in zip(dys, projections, _pairs(factors), strict=True):
        s_MR = None if b_NR is None else (dy_MN @ b_NR).mul_(p.scale)
        ss.append(s_MR)
        if not needs_dx:
            continue
        weight_NK = dense(p.weight_NK, dy_MN.dtype)
        dx_MK = dy_MN @ weight_NK if dx_MK is None else dx_MK.addmm_(dy_MN, weight_NK)
        if s_MR is not None and a_RK is not None:
            dx_MK.addmm_(s_MR, a_RK)
    return dx_MK, ss


def _factor_gradients(
    dy_MN: Tensor, x_MK: Tensor, u_MR: Tensor | None, s_MR: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if u_MR is None or s_MR is None else (s_MR.t() @ x_MK, dy_MN.t() @ u_MR)


def _add_to_fisher(projections: Sequence[Projection], dys: Sequence[Tensor], x_MK: Tensor) -> None:
    """Rows and columns of the Fishers that are asked for, in a fixed order; nothing is computed where none is."""
    asked = [(p.fisher, dy_MN) for p, dy_MN in zip(projections, dys, strict=True) if p.fisher is not None]
    if not asked:
        return
    columns_K = column_square_sums(x_MK)
    for (rows_N, into_K), dy_MN in asked:
        rows_N += column_square_sums(dy_MN)
        into_K += columns_K


def normed(x_MK: Tensor, norm: Norm | None) -> tuple[Tensor, Tensor | None]:
    """x after the norm in front, if there is one, and what that norm saves."""
    return (x_MK, None) if norm is None else rms_norm_forward(x_MK, norm.weight_K, norm.eps)


def through_norm(dn_MK: Tensor | None, x_MK: Tensor, inverse: Tensor | None, norm: Norm | None) -> Tensor | None:
    """The gradient before the norm in front, from the one after it."""
    if dn_MK is None or norm is None or inverse is None:
        return dn_MK
    return rms_norm_backward(dn_MK, x_MK, norm.weight_K, inverse)


def _pairs(factors: Sequence[Tensor | None]) -> list[tuple[Tensor | None, Tensor | None]]:
    return list(zip(factors[::2], factors[1::2], strict=True))


def _frozen(projections: Sequence[Projection]) -> tuple[Projection, ...]:
    return tuple(Projection(p.weight_NK, p.bias_N, scale=p.scale, fisher=p.fisher) for p in projections)


def _factors(x: Tensor, projections: Sequence[Projection]) -> list[Tensor | None]:
    """A and B of each in the dtype of x: autograd gives their gradients back in their own."""
    return [None if f is None else f.to(x.dtype) for p in projections for f in (p.a_RK, p.b_NR)]


def _is_4bit(weight: Tensor) -> bool:
    return getattr(weight, "quant_state", None) is not None


def _shape(weight_NK: Tensor) -> tuple[int, ...]:
    return tuple(weight_NK.quant_state.shape if _is_4bit(weight_NK) else weight_NK.shape)  # type: ignore[attr-defined]


def _check(x: Tensor, projections: Sequence[Projection], norm: Norm | None) -> None:
    if x.ndim < 2 or not x.is_floating_point() or not projections:
        raise ValueError(f"expected float x (..., K) and a projection; got {tuple(x.shape)} {x.dtype}")
    num_in = x.shape[-1]
    for p in projections:
        num_out = _shape(p.weight_NK)[0]
        if _shape(p.weight_NK) != (num_out, num_in) or (p.bias_N is not None and p.bias_N.shape != (num_out,)):
            raise ValueError(f"weight {_shape(p.weight_NK)} and its bias do not fit x {tuple(x.shape)}")
        if p.fisher is not None and [tuple(sums.shape) for sums in p.fisher] != [(num_out,), (num_in,)]:
            raise ValueError(f"a Fisher's rows and columns do not fit a {num_out} x {num_in} weight")
        if (p.a_RK is None) != (p.b_NR is None):
            raise ValueError("a projection has both factors or none")
        if p.a_RK is not None and p.b_NR is not None:
            rank = p.a_RK.shape[0]
            if p.a_RK.shape != (rank, num_in) or p.b_NR.shape != (num_out, rank):
                raise ValueError(
                    f"factors {tuple(p.a_RK.shape)} and {tuple(p.b_NR.shape)} do not fit a {num_out} x {num_in} weight"
                )
        for frozen in (p.weight_NK, p.bias_N):
            if frozen is None:
                continue
            if frozen.requires_grad:
                raise ValueError("a base weight or bias requires a gradient, which LoRA ops never compute: freeze it")
            if not _is_4bit(frozen) and frozen.dtype is not x.dtype:
                raise ValueError(f"x is {x.dtype}, but the base is {frozen.dtype}")
        tensors = (p.weight_NK, p.bias_N, p.a_RK, p.b_NR, p.scale)
        if any(isinstance(t, Tensor) and t.device != x.device for t in tensors):
            raise ValueError(f"x is on {x.device}, but a weight, factor or scale is not")
    if norm is not None:
        w = norm.weight_K
        if w.shape != (num_in,) or w.dtype is not x.dtype or w.device != x.device:
            raise ValueError(f"a norm of {tuple(w.shape)} {w.dtype} on {w.device} does not fit x {tuple(x.shape)}")
        if w.requires_grad:
            raise ValueError("the norm's weight requires a gradient: call rms_norm before, which computes it")
