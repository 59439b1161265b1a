"""Triton path of `rope`: one program per token rotates a block of its heads; 1 read and 1 write per element."""

# mypy: ignore-errors

import torch
import triton
import triton.language as tl

from cltrain_kernels.aot import Compilation

HEADS = 16
MAX_OFFSET = 1 << 31  # within a head offsets are 32-bit; heads, tokens and rows are 64-bit


@triton.jit
def rotate_kernel(
    x, cos, sin, y, sign, num_tokens, num_heads, half, x_batch, x_token, x_head, x_column, table_batch, table_token,
    table_column, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    heads = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None]
    columns = tl.arange(0, HALF)
    batch, place = token // num_tokens, token % num_tokens
    table = batch * table_batch + place * table_token + columns * table_column
    c = tl.load(cos + table, mask=columns < half, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + table, mask=columns < half, other=0.0).to(tl.float32)[None, :] * sign
    mask = (heads < num_heads) & (columns < half)[None, :]
    source = x + batch * x_batch + place * x_token + heads * x_head + columns[None, :] * x_column
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + half * x_column, mask=mask, other=0.0).to(tl.float32)
    target = y + (token * num_heads + heads) * (2 * half) + columns[None, :]
    tl.store(target, (first * c - second * s).to(y.dtype.element_ty), mask=mask)
    tl.store(target + half, (second * c + first * s).to(y.dtype.element_ty), mask=mask)


def rotate(x_BTHD, cos_BTD, sin_BTD, sign):
    """`rope` by sign times the angles; the arguments are already checked."""
    num_rows, num_tokens, num_heads, size = x_BTHD.shape
    if size * x_BTHD.stride(3) >= MAX_OFFSET:
        x_BTHD = x_BTHD.contiguous()
    y = torch.empty(x_BTHD.shape, dtype=x_BTHD.dtype, device=x_BTHD.device)
    if sin_BTD.stride() != cos_BTD.stride() or size * cos_BTD.stride(2) >= MAX_OFFSET:
        cos_BTD, sin_BTD = cos_BTD.contiguous(), sin_BTD.contiguous()
    table_batch = 0 if cos_BTD.shape[0] == 1 else cos_BTD.stride(0)
    if y.numel():
        rotate_kernel[(num_rows * num_tokens, triton.cdiv(num_heads, HEADS))](
            x_BTHD, cos_BTD, sin_BTD, y, sign, num_tokens, num_heads, size // 2, *x_BTHD.stride(), table_batch,
            *cos_BTD.stride()[1:], HEADS=HEADS, HALF=max(16, triton.next_power_of_2(size // 2)), num_warps=4,
        )  # fmt: skip
    return y


def compilations():
    pointers = dict.fromkeys(("x", "cos", "sin", "y"), "*bf16")
    aligned = (*pointers, "half", "x_batch", "x_token", "x_head", "table_batch", "table_token")
    constants = {"HEADS": HEADS, "HALF": 64}
    names = [name for name in rotate_kernel.arg_names if name not in constants]
    kinds = {name: pointers.get(name, "fp32" if name == "sign" else "i32") for name in names}
    return [Compilation(rotate_kernel, kinds, constants, aligned)]
