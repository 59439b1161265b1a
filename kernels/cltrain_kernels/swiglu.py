"""SwiGLU, the gated activation of Llama's MLP: `silu(gate) * up`, elementwise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from cltrain_kernels.dispatch import implementation_for


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, differentiable in both; two tensors are saved and neither is written to.

    Raises ValueError on shapes, dtypes or devices that do not fit.
    """
    _check(gate, up)
    return _Swiglu.apply(gate, up)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The specification of `swiglu`, in PyTorch."""
    _check(gate, up)
    return F.silu(gate) * up


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` without autograd, for ops that contain one."""
    if gate.dtype is not torch.float64 and implementation_for("swiglu", gate.device) == "triton":
        from cltrain_kernels import swiglu_triton

        return swiglu_triton.forward(gate, up)
    return F.silu(gate).mul_(up)


def swiglu_backward(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(d gate, d up, silu(gate) * up made again); with s = sigmoid(gate), silu' = s (1 + gate (1 - s))."""
    if gate.dtype is not torch.float64 and implementation_for("swiglu", gate.device) == "triton":
        from cltrain_kernels import swiglu_triton

        return swiglu_triton.backward(dh, gate, up)
    activated = F.silu(gate)
    h = activated * up
    d_up = activated.mul_(dh)
    return torch.ops.aten.silu_backward(dh * up, gate), d_up, h


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return swiglu_forward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor]:
        return swiglu_backward(dh, *ctx.saved_tensors)[:2]


def _check(gate: Tensor, up: Tensor) -> None:
    if gate.shape != up.shape or gate.dtype is not up.dtype or gate.device != up.device:
        raise ValueError(
            f"expected gate and up alike; got {tuple(gate.shape)} {gate.dtype} on {gate.device} and "
            f"{tuple(up.shape)} {up.dtype} on {up.device}"
        )
    if not gate.is_floating_point():
        raise ValueError(f"expected floats; got {gate.dtype}")
