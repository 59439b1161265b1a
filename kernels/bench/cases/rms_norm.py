"""rms_norm of hidden states (0.5B, 8B) and of heads (Qwen3), forward and backward with a frozen weight."""

from __future__ import annotations

import functools

import torch
from case import Case
from cltrain_kernels import rms_norm, rms_norm_reference
from elementwise import Op, case, draw_normal
from torch import Tensor

EPS = 1e-6
SHAPES = [(m, d) for d in (896, 4096) for m in (1024, 8192)] + [(8192 * 32, 128)]


def cases(quick: bool) -> list[Case]:
    return [
        case(
            "rms_norm", {"M": m, "D": d, "dtype": str(dtype)}, functools.partial(draw, m, d, dtype), ours, eager, liger
        )
        for m, d in (SHAPES[:1] if quick else SHAPES)
        for dtype in (torch.bfloat16, torch.float32)
    ]


def draw(num_rows: int, num_features: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    x_MD = draw_normal(num_rows, num_features, seed=seed, dtype=dtype)
    return x_MD, draw_normal(num_features, seed=seed + 1, dtype=dtype)


def ours(x_MD: Tensor, weight_D: Tensor) -> Tensor:
    return rms_norm(x_MD, weight_D, EPS)


def eager(x_MD: Tensor, weight_D: Tensor) -> Tensor:
    return rms_norm_reference(x_MD, weight_D, EPS)


def liger() -> Op:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda x, w: LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False)
