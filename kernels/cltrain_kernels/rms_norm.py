"""RMSNorm over the last dimension, with the arithmetic of Llama, Qwen and Mistral: `w * (x / rms(x))`.

A frozen weight costs no gradient; the gradient of one that is trained is summed in plain PyTorch on every device.
M rows (tokens, or heads of tokens), D features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cltrain_kernels.dispatch import implementation_for


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension of `x` (..., D), in the dtype of `x`.

    Sums are float32 (float64 for float64). Differentiable in both, the weight only where it requires a gradient; the
    saved input is never written to. Raises ValueError on shapes, dtypes or devices that do not fit.
    """
    _check(x, weight_D)
    return _RmsNorm.apply(x, weight_D, eps)


def rms_norm_reference(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The specification of `rms_norm`, in PyTorch."""
    _check(x, weight_D)
    wide = _wide(x)
    return weight_D * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rms_norm_forward(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y, 1 / rms of each row (..., 1) in float32): `rms_norm` without autograd, for ops that contain a norm."""
    if x.dtype is not torch.float64 and implementation_for("rms_norm", x.device) == "triton":
        from cltrain_kernels import rms_norm_triton

        return rms_norm_triton.forward(x, weight_D, eps)
    wide = _wide(x)
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * inverse).to(x.dtype).mul_(weight_D), inverse


def rms_norm_backward(dy: Tensor, x: Tensor, weight_D: Tensor, inverse: Tensor) -> Tensor:
    """dx of `rms_norm_forward`: with h = x / rms and g = dy * w, `(g - h mean(g h)) / rms`."""
    if x.dtype is not torch.float64 and implementation_for("rms_norm", x.device) == "triton":
        from cltrain_kernels import rms_norm_triton

        return rms_norm_triton.backward(dy, x, weight_D, inverse)
    normed = _wide(x) * inverse
    upstream = _wide(dy) * weight_D
    share = (upstream * normed).mean(-1, keepdim=True)
    return upstream.sub_(normed.mul_(share)).mul_(inverse).to(x.dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        y, inverse = rms_norm_forward(x, weight_D, eps)
        ctx.save_for_backward(x, weight_D, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight_D, inverse = ctx.saved_tensors
        dx = rms_norm_backward(dy, x, weight_D, inverse) if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1]:
            dw = (_wide(dy) * (_wide(x) * inverse)).flatten(0, -2).sum(0).to(weight_D.dtype)
        return dx, dw, None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


def _check(x: Tensor, weight_D: Tensor) -> None:
    if x.ndim < 1 or weight_D.shape != x.shape[-1:] or x.shape[-1] < 1:
        raise ValueError(f"expected x (..., D) and weight (D,); got {tuple(x.shape)} and {tuple(weight_D.shape)}")
    if not x.is_floating_point() or weight_D.dtype is not x.dtype or weight_D.device != x.device:
        raise ValueError(
            f"expected one float dtype and device; got {x.dtype} on {x.device} and {weight_D.dtype} on "
            f"{weight_D.device}"
        )
