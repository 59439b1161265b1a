"""rope of query and key heads (0.5B, 8B) in the layout that projections leave them in, forward and backward."""

from __future__ import annotations

import functools

import torch
from case import Case
from cltrain_kernels import rope, rope_reference
from elementwise import Op, case, draw_normal
from torch import Tensor

SHAPES = [(8192, 14, 64), (8192, 32, 128), (1024, 32, 128)]


def cases(quick: bool) -> list[Case]:
    return [
        case(
            "rope", {"T": t, "H": h, "D": d, "dtype": str(dtype)}, functools.partial(draw, t, h, d, dtype), rope,
            rope_reference, liger,
        )
        for t, h, d in (SHAPES[-1:] if quick else SHAPES)
        for dtype in (torch.bfloat16, torch.float32)
    ]  # fmt: skip


def draw(num_tokens: int, num_heads: int, size: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    angles = torch.arange(num_tokens, device="cuda")[:, None] * 1e4 ** -torch.linspace(0, 1, size // 2, device="cuda")
    both = torch.cat([angles, angles], -1)[None]
    x_BTHD = draw_normal(1, num_tokens, num_heads, size, seed=seed, dtype=dtype)
    return x_BTHD, both.cos().to(dtype), both.sin().to(dtype)


def liger() -> Op:
    from liger_kernel.ops.rope import LigerRopeFunction

    def rotate(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # it takes q and k together: the second is empty
        none = x_BTHD.new_empty(*x_BTHD.shape[:2], 0, x_BTHD.shape[3]).transpose(1, 2)
        return LigerRopeFunction.apply(x_BTHD.transpose(1, 2), none, cos, sin)[0].transpose(1, 2)

    return rotate
