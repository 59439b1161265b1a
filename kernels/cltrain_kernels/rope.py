"""Rotary position embedding of one tensor of heads, from the cosines and sines of its positions.

Packed sequences need nothing special: their positions restart, and so do the tables. The two halves of a head are
rotated against each other (Llama's layout, not GPT-J's interleaved one). B rows, T tokens, H heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cltrain_kernels.dispatch import implementation_for


def rope(x_BTHD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
    """`x` rotated by the angles of its positions: a new tensor, differentiable in `x` only, which is not saved.

    cos and sin are (1 or B, T, D) as transformers makes them: their second half repeats the first, which alone is read;
    a scaling factor inside them is fine. Raises ValueError on shapes, dtypes or devices that do not fit.
    """
    _check(x_BTHD, cos_BTD, sin_BTD)
    return _Rope.apply(x_BTHD, cos_BTD, sin_BTD)


def rope_reference(x_BTHD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
    """The specification of `rope`, in PyTorch."""
    _check(x_BTHD, cos_BTD, sin_BTD)
    first, second = x_BTHD.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x_BTHD * cos_BTD[:, :, None] + turned * sin_BTD[:, :, None]


def _rotate(x_BTHD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor, sign: float) -> Tensor:
    """Rotation by sign times the angles; sign -1 is the transpose, which is the gradient."""
    if x_BTHD.dtype is not torch.float64 and implementation_for("rope", x_BTHD.device) == "triton":
        from cltrain_kernels import rope_triton

        return rope_triton.rotate(x_BTHD, cos_BTD, sin_BTD, sign)
    half = x_BTHD.shape[-1] // 2
    wide = x_BTHD if x_BTHD.dtype in (torch.float32, torch.float64) else x_BTHD.float()
    cos, sin = (table[:, :, None, :half].to(wide.dtype) for table in (cos_BTD, sin_BTD))
    first, second = wide.chunk(2, dim=-1)
    y = torch.empty(x_BTHD.shape, dtype=wide.dtype, device=x_BTHD.device)
    torch.mul(first, cos, out=y[..., :half]).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=y[..., half:]).addcmul_(first, sin, value=sign)
    return y.to(x_BTHD.dtype)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTHD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
        ctx.save_for_backward(cos_BTD, sin_BTD)
        return _rotate(x_BTHD, cos_BTD, sin_BTD, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTHD: Tensor) -> tuple[Tensor, None, None]:
        cos_BTD, sin_BTD = ctx.saved_tensors
        return _rotate(dy_BTHD, cos_BTD, sin_BTD, -1.0), None, None


def _check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    if x.ndim != 4 or x.shape[3] % 2 or x.shape[3] < 2:
        raise ValueError(f"expected x (B, T, H, D) with an even D; got {tuple(x.shape)}")
    expected = {(rows, x.shape[1], x.shape[3]) for rows in (1, x.shape[0])}
    if tuple(cos.shape) not in expected or cos.shape != sin.shape:
        raise ValueError(
            f"expected cos and sin (1 or B, T, D) for x {tuple(x.shape)}; got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if not x.is_floating_point() or not cos.is_floating_point() or cos.dtype is not sin.dtype:
        raise ValueError(f"expected floats, cos and sin of one dtype; got {x.dtype}, {cos.dtype} and {sin.dtype}")
    if not x.device == cos.device == sin.device:
        raise ValueError(f"expected one device; got {x.device}, {cos.device} and {sin.device}")
