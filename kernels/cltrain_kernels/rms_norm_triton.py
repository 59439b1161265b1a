"""Triton path of `rms_norm`: one program per row, which lies in registers; backward reads x and dy once."""

# mypy: ignore-errors

import torch
import triton
import triton.language as tl

from cltrain_kernels.aot import Compilation

MAX_FEATURES = 16384


@triton.jit
def norm_kernel(x, weight, y, inverse, num_features, x_row, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < num_features
    values = tl.load(x + row * x_row + columns, mask=mask, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, axis=0) / num_features + eps)
    normed = (values * scale).to(y.dtype.element_ty).to(tl.float32)  # rounded before the weight, as in transformers
    w = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * num_features + columns, (normed * w).to(y.dtype.element_ty), mask=mask)
    tl.store(inverse + row, scale)


@triton.jit
def norm_backward_kernel(dy, x, weight, inverse, dx, num_features, dy_row, x_row, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < num_features
    scale = tl.load(inverse + row)
    normed = tl.load(x + row * x_row + columns, mask=mask, other=0.0).to(tl.float32) * scale
    upstream = tl.load(dy + row * dy_row + columns, mask=mask, other=0.0).to(tl.float32)
    upstream *= tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    share = tl.sum(upstream * normed, axis=0) / num_features
    tl.store(
        dx + row * num_features + columns, ((upstream - normed * share) * scale).to(dx.dtype.element_ty), mask=mask
    )


def forward(x, weight_D, eps):
    """`rms_norm_forward`; the arguments are already checked."""
    rows = rows_of(x)
    y = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    inverse = torch.empty((rows.shape[0], 1), dtype=torch.float32, device=x.device)
    block = _block(rows.shape[1])
    if len(rows):
        norm_kernel[(len(rows),)](
            rows, weight_D.contiguous(), y, inverse, rows.shape[1], rows.stride(0), eps, BLOCK=block,
            num_warps=_warps(block),
        )  # fmt: skip
    return y.view(x.shape), inverse.view(*x.shape[:-1], 1)


def backward(dy, x, weight_D, inverse):
    """`rms_norm_backward`; the arguments are already checked."""
    rows, dy_rows = rows_of(x), rows_of(dy)
    dx = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    block = _block(rows.shape[1])
    if len(rows):
        norm_backward_kernel[(len(rows),)](
            dy_rows, rows, weight_D.contiguous(), inverse.contiguous(), dx, rows.shape[1], dy_rows.stride(0),
            rows.stride(0), BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
    return dx.view(x.shape)


def rows_of(x):
    """x (..., D) as (M, D) whose rows are contiguous; a copy only where the strides allow no view."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _block(num_features):
    if num_features > MAX_FEATURES:
        raise ValueError(f"rms_norm takes rows of at most {MAX_FEATURES} features; got {num_features}")
    return max(16, triton.next_power_of_2(num_features))


def _warps(block):
    return min(16, max(1, block // 512))


def compilations():
    pointers = dict.fromkeys(("x", "weight", "y", "dy", "dx"), "*bf16") | {"inverse": "*fp32"}
    kinds = pointers | {"eps": "fp32"}
    aligned = {*pointers, "num_features", "x_row", "dy_row"}
    return [
        Compilation(
            kernel,
            {name: kinds.get(name, "i32") for name in kernel.arg_names if name != "BLOCK"},
            {"BLOCK": block},
            tuple(name for name in kernel.arg_names if name in aligned),
            num_warps=_warps(block),
        )
        for block in (128, 4096)  # a head, and the hidden states of 8B
        for kernel in (norm_kernel, norm_backward_kernel)
    ]
