"""Triton path of `adamw_step`: the gradient's norm in two ordered sums, then one pass that clips, steps and copies.

The pass reads value, gradient and two moments once and writes value and moments once. Which factor a block belongs to
comes from a table, so that the low-precision corners, each in a buffer of its own, are written from registers.
"""

# mypy: ignore-errors

import functools
import weakref

import torch
import triton
import triton.language as tl

from cltrain_kernels.adamw import bias_corrections
from cltrain_kernels.aot import Compilation

BLOCK = 1024
NUM_PARTIALS = 512


@triton.jit
def square_sums_kernel(x, partials, num, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(program * BLOCK, num, tl.num_programs(0).to(tl.int64) * BLOCK):
        offsets = start + lanes
        part = tl.load(x + offsets, mask=offsets < num, other=0.0)
        sums += part * part
    tl.store(partials + program, tl.sum(sums, axis=0))


@triton.jit
def step_kernel(
    values, gradients, means, squares, partials, norm, corrections, rates, blocks, factors, num_partials, boundary,
    beta1, beta2, eps, weight_decay, max_norm, corner_scale, HAS_CORNERS: tl.constexpr, CORNER: tl.constexpr,
    PARTIALS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, PARTIALS)
    total = tl.sqrt(tl.sum(tl.load(partials + lanes, mask=lanes < num_partials, other=0.0), axis=0))
    if program == 0:
        tl.store(norm, total)
    ratio = max_norm / (total + 1e-6)
    clip = tl.where(ratio > 1.0, 1.0, ratio)  # keeps a NaN
    factor = tl.load(blocks + 2 * program)
    inside = tl.load(blocks + 2 * program + 1) + tl.arange(0, BLOCK)
    factors += 6 * factor  # offset, number of elements, width, corner, its strides
    offset, num, width = tl.load(factors), tl.load(factors + 1), tl.load(factors + 2)
    mask = inside < num
    offsets = offset + inside
    is_b = offset >= boundary
    rate = tl.load(rates + tl.where(is_b, 1, 0))
    value = tl.load(values + offsets, mask=mask, other=0.0)
    gradient = tl.load(gradients + offsets, mask=mask, other=0.0) * clip
    mean = tl.load(means + offsets, mask=mask, other=0.0)
    square = tl.load(squares + offsets, mask=mask, other=0.0)
    mean += (1.0 - beta1) * (gradient - mean)
    square = beta2 * square + (1.0 - beta2) * gradient * gradient
    value -= rate * weight_decay * value
    value -= rate * (mean / tl.load(corrections)) / (tl.sqrt(square / tl.load(corrections + 1)) + eps)
    tl.store(values + offsets, value, mask=mask)
    tl.store(means + offsets, mean, mask=mask)
    tl.store(squares + offsets, square, mask=mask)
    if HAS_CORNERS:
        corner = tl.load(factors + 3).to(tl.pointer_type(CORNER))
        places = inside // width * tl.load(factors + 4) + inside % width * tl.load(factors + 5)
        copy = value * tl.where(is_b, corner_scale, 1.0)
        tl.store(corner + places, copy.to(CORNER), mask=mask)


def adamw_step_triton(state, rates_2, settings, corners):
    """`adamw_step` on Triton; the arguments are already checked."""
    layout, device = state.layout, state.values.device
    state.num_steps += 1
    num_partials = min(NUM_PARTIALS, triton.cdiv(layout.size, BLOCK))
    partials = torch.empty(num_partials, dtype=torch.float32, device=device)
    norm = torch.empty((), dtype=torch.float32, device=device)
    corrections = torch.stack(bias_corrections(state.num_steps, settings)).float()
    square_sums_kernel[(num_partials,)](state.gradients, partials, layout.size, BLOCK=BLOCK, num_warps=4)
    blocks = block_table(layout, device)
    table = factor_table(layout, device) if corners is None else corner_table(layout, corners)
    corner = tl.float32 if corners is None else _dtype(next(iter(corners.places.values()))[0].dtype)
    step_kernel[(len(blocks),)](
        state.values, state.gradients, state.means, state.squares, partials, norm, corrections, rates_2, blocks, table,
        num_partials, layout.boundary, *settings.betas, settings.eps, settings.weight_decay, settings.max_norm,
        corners.scale if corners else 1.0, HAS_CORNERS=corners is not None, CORNER=corner, PARTIALS=NUM_PARTIALS,
        BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return norm


@functools.cache
def block_table(layout, device):
    """(factor, first element inside it) of every block, int64."""
    rows = [(f, start) for f, (_, num, _) in enumerate(_factors(layout)) for start in range(0, num, BLOCK)]
    return torch.tensor(rows, dtype=torch.int64, device=device)


@functools.cache
def factor_table(layout, device):
    """(offset, number of elements, width, and no corner: 0, 0, 0) of every factor, int64."""
    return torch.tensor([(*factor, 0, 0, 0) for factor in _factors(layout)], dtype=torch.int64, device=device)


_CORNER_TABLES = weakref.WeakKeyDictionary()


def corner_table(layout, corners):
    """The factor table with each corner's address and strides; made once, since a captured step cannot."""
    if corners not in _CORNER_TABLES:
        places = [corners.places[m][i] for i in (0, 1) for m in layout.modules]
        rows = [
            (*factor, place.data_ptr(), *place.stride()) for factor, place in zip(_factors(layout), places, strict=True)
        ]
        _CORNER_TABLES[corners] = torch.tensor(rows, dtype=torch.int64, device=places[0].device)
    return _CORNER_TABLES[corners]


def _factors(layout):
    """(offset, number of elements, width) of every A, then of every B, in the order of the modules."""
    of_a, of_b = [], []
    for g in layout.groups:
        for i in range(len(g.modules)):
            of_a.append((g.a_start + i * g.a_stride, layout.rank * g.num_in, g.num_in))
            of_b.append((g.b_start + i * g.b_stride, g.num_out * layout.rank, layout.rank))
    return of_a + of_b


def _dtype(dtype):
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


def compilations():
    pointers = dict.fromkeys(
        ("x", "values", "gradients", "means", "squares", "partials", "norm", "corrections", "rates"), "*fp32"
    )
    pointers |= {"blocks": "*i64", "factors": "*i64"}
    floats = dict.fromkeys(("beta1", "beta2", "eps", "weight_decay", "max_norm", "corner_scale"), "fp32")
    constants = {"HAS_CORNERS", "CORNER", "PARTIALS", "BLOCK"}

    def one(kernel, **constexprs):
        signature = {n: {**pointers, **floats}.get(n, "i32") for n in kernel.arg_names if n not in constants}
        aligned = tuple(n for n in signature if n in pointers or n in ("num", "boundary"))
        return Compilation(kernel, signature, constexprs, aligned, num_warps=4)

    step = {"PARTIALS": NUM_PARTIALS, "BLOCK": BLOCK}
    return [
        one(square_sums_kernel, BLOCK=BLOCK),
        one(step_kernel, HAS_CORNERS=False, CORNER=tl.float32, **step),
        one(step_kernel, HAS_CORNERS=True, CORNER=tl.bfloat16, **step),
    ]
