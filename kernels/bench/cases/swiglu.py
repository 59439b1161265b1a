"""swiglu at the inner sizes of 0.5B and 8B, forward and backward to the gate."""

from __future__ import annotations

import functools

import torch
from case import Case
from cltrain_kernels import swiglu, swiglu_reference
from elementwise import Op, case, draw_normal
from torch import Tensor

SHAPES = [(m, i) for i in (4864, 14336) for m in (1024, 8192)]


def cases(quick: bool) -> list[Case]:
    return [
        case(
            "swiglu", {"M": m, "I": i, "dtype": str(dtype)}, functools.partial(draw, m, i, dtype), swiglu,
            swiglu_reference, liger,
        )
        for m, i in (SHAPES[:1] if quick else SHAPES)
        for dtype in (torch.bfloat16, torch.float32)
    ]  # fmt: skip


def draw(num_rows: int, num_inner: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    gate, up = (draw_normal(num_rows, num_inner, seed=seed + i, dtype=dtype) for i in range(2))
    return gate, up


def liger() -> Op:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply
