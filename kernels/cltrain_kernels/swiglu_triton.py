"""Triton path of `swiglu`: forward 2 reads and 1 write; backward 3 reads and 3 writes, the activation made again."""

# mypy: ignore-errors

import torch
import triton
import triton.language as tl

from cltrain_kernels.aot import Compilation
from cltrain_kernels.rms_norm_triton import rows_of

BLOCK = 1024


@triton.jit
def swiglu_kernel(gate, up, h, num_columns, gate_row, up_row, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < num_columns
    g = tl.load(gate + row * gate_row + columns, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(h + row * num_columns + columns, (g / (1.0 + tl.exp(-g)) * u).to(h.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_backward_kernel(dh, gate, up, d_gate, d_up, h, num_columns, dh_row, gate_row, up_row, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < num_columns
    g = tl.load(gate + row * gate_row + columns, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + columns, mask=mask, other=0.0).to(tl.float32)
    upstream = tl.load(dh + row * dh_row + columns, mask=mask, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-g))
    target = row * num_columns + columns
    kind = h.dtype.element_ty
    tl.store(d_gate + target, (upstream * u * s * (1.0 + g * (1.0 - s))).to(kind), mask=mask)
    tl.store(d_up + target, (upstream * g * s).to(kind), mask=mask)
    tl.store(h + target, (g * s * u).to(kind), mask=mask)


def forward(gate, up):
    """`swiglu_forward`; the arguments are already checked."""
    gates, ups = _rows(gate), _rows(up)
    h = torch.empty(gates.shape, dtype=gate.dtype, device=gate.device)
    if h.numel():
        swiglu_kernel[(len(gates), triton.cdiv(gates.shape[1], BLOCK))](
            gates, ups, h, gates.shape[1], gates.stride(0), ups.stride(0), BLOCK=BLOCK, num_warps=4
        )
    return h.view(gate.shape)


def backward(dh, gate, up):
    """`swiglu_backward`; the arguments are already checked."""
    upstream, gates, ups = _rows(dh), _rows(gate), _rows(up)
    outputs = [torch.empty(gates.shape, dtype=gate.dtype, device=gate.device) for _ in range(3)]
    if gate.numel():
        swiglu_backward_kernel[(len(gates), triton.cdiv(gates.shape[1], BLOCK))](
            upstream, gates, ups, *outputs, gates.shape[1], upstream.stride(0), gates.stride(0), ups.stride(0),
            BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return tuple(output.view(gate.shape) for output in outputs)


def _rows(x):
    return rows_of(x if x.ndim else x[None])


def compilations():
    pointers = ("gate", "up", "dh", "h", "d_gate", "d_up")
    aligned = {*pointers, "num_columns", "gate_row", "up_row", "dh_row"}
    return [
        Compilation(
            kernel,
            {name: "*bf16" if name in pointers else "i32" for name in kernel.arg_names if name != "BLOCK"},
            {"BLOCK": BLOCK},
            tuple(name for name in kernel.arg_names if name in aligned),
        )
        for kernel in (swiglu_kernel, swiglu_backward_kernel)
    ]
