"""Triton path of the Grams: all factors of all modules in one launch, and ordered column sums.

A program takes one piece of one factor's long side, forms F F^T, F dF^T and dF dF^T of it with dF = F - F_start made in
registers, and leaves them as partial sums; a second launch adds the pieces of each factor in order. No atomics.
"""

# mypy: ignore-errors

import functools
import itertools

import torch
import triton
import triton.language as tl

from cltrain_kernels.aot import Compilation

TILE = 16  # of the rank, rows by columns of a Gram per program: 64 x 64 in one would spill
BLOCK = 32
PIECE = 1024  # of a factor's long side, per program
COLUMNS, ROWS = 128, 32
SPLIT = 1024  # rows per program of the column sums


@triton.jit
def pieces_kernel(
    values, starts, table, pieces, partials, rank, side, TILE: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr
):
    program = tl.program_id(0).to(tl.int64)
    factor = tl.load(pieces + 2 * program)
    first = tl.load(pieces + 2 * program + 1)
    table += 4 * factor  # offset, length of the long side, stride along it, stride along the rank
    offset, length = tl.load(table), tl.load(table + 1)
    along, across = tl.load(table + 2), tl.load(table + 3)
    rows = tl.program_id(1) * TILE + tl.arange(0, TILE)
    columns = tl.program_id(2) * TILE + tl.arange(0, TILE)
    lanes = tl.arange(0, BLOCK)
    whole = tl.zeros((TILE, TILE), dtype=tl.float32)
    mixed = tl.zeros((TILE, TILE), dtype=tl.float32)
    moved = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in range(0, PIECE, BLOCK):
        places = first + start + lanes
        inside = places < length
        of_rows = offset + rows[:, None] * across + places[None, :] * along
        of_columns = offset + columns[None, :] * across + places[:, None] * along
        row_mask = (rows[:, None] < rank) & inside[None, :]
        column_mask = (columns[None, :] < rank) & inside[:, None]
        row = tl.load(values + of_rows, mask=row_mask, other=0.0)
        row_move = row - tl.load(starts + of_rows, mask=row_mask, other=0.0)
        column = tl.load(values + of_columns, mask=column_mask, other=0.0)
        column_move = column - tl.load(starts + of_columns, mask=column_mask, other=0.0)
        whole += tl.dot(row, column, input_precision="ieee")
        mixed += tl.dot(row, column_move, input_precision="ieee")
        moved += tl.dot(row_move, column_move, input_precision="ieee")
    square = rows[:, None] * side + columns[None, :]
    partials += program * (3 * side * side)
    tl.store(partials + square, whole)
    tl.store(partials + side * side + square, mixed)
    tl.store(partials + 2 * side * side + square, moved)


@triton.jit
def sum_pieces_kernel(partials, spans, sums, SIZE: tl.constexpr):
    factor = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    num_parts = tl.num_programs(1)
    lanes = tl.arange(0, SIZE)
    total = tl.zeros((SIZE,), dtype=tl.float32)
    for piece in range(tl.load(spans + 2 * factor), tl.load(spans + 2 * factor + 1)):
        total += tl.load(partials + (piece * num_parts + part) * SIZE + lanes)
    tl.store(sums + (factor * num_parts + part) * SIZE + lanes, total)


@triton.jit
def column_squares_kernel(
    x, partials, num_rows, num_columns, row_stride, column_stride, SPLIT: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(1).to(tl.int64)
    lanes = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, SPLIT, ROWS):
        rows = split * SPLIT + start + lanes
        mask = (rows[:, None] < num_rows) & (columns[None, :] < num_columns)
        part = tl.load(x + rows[:, None] * row_stride + columns[None, :] * column_stride, mask=mask, other=0.0)
        part = part.to(tl.float32)
        total += part * part
    tl.store(partials + split * num_columns + columns, tl.sum(total, axis=0), mask=columns < num_columns)


def factor_grams_triton(layout, values_S, start_S):
    """`factor_grams_reference` on Triton, in float32; the arguments are already checked."""
    layout.stacks(values_S), layout.stacks(start_S)  # both are whole buffers of this layout
    device, num_modules = values_S.device, len(layout.modules)
    table, pieces, spans = _tables(layout, device)
    num_tiles = triton.cdiv(layout.rank, TILE)
    side = num_tiles * TILE
    partials = torch.empty((len(pieces), 3, side, side), dtype=torch.float32, device=device)
    sums = torch.empty((2 * num_modules, 3, side, side), dtype=torch.float32, device=device)
    pieces_kernel[(len(pieces), num_tiles, num_tiles)](
        values_S, start_S, table, pieces, partials, layout.rank, side, TILE=TILE, PIECE=PIECE, BLOCK=BLOCK, num_warps=4
    )
    num_parts = 3 * num_tiles * num_tiles
    sum_pieces_kernel[(2 * num_modules, num_parts)](partials, spans, sums, SIZE=TILE * TILE, num_warps=4)
    whole, mixed, moved = sums[:, :, : layout.rank, : layout.rank].unbind(1)
    grams = torch.cat([torch.cat([whole, mixed], 2), torch.cat([mixed.mT, moved], 2)], 1)
    return grams[:num_modules], grams[num_modules:]


def column_square_sums_triton(x_TK):
    """`column_square_sums` on Triton; the arguments are already checked."""
    num_rows, num_columns = x_TK.shape
    num_splits = max(1, triton.cdiv(num_rows, SPLIT))
    partials = torch.empty((num_splits, num_columns), dtype=torch.float32, device=x_TK.device)
    if num_columns:
        column_squares_kernel[(triton.cdiv(num_columns, COLUMNS), num_splits)](
            x_TK, partials, num_rows, num_columns, *x_TK.stride(), SPLIT=SPLIT, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4
        )
    return partials.sum(0)


@functools.cache
def _tables(layout, device):
    """Every factor's (offset, length, strides), every piece's (factor, first place), every factor's span of pieces."""
    of_a, of_b = [], []
    for g in layout.groups:
        for i in range(len(g.modules)):
            of_a.append((g.a_start + i * g.a_stride, g.num_in, 1, g.num_in))
            of_b.append((g.b_start + i * g.b_stride, g.num_out, layout.rank, 1))
    table = of_a + of_b
    pieces = [(f, first) for f, (_, length, _, _) in enumerate(table) for first in range(0, length, PIECE)]
    ends = list(itertools.accumulate(triton.cdiv(length, PIECE) for _, length, _, _ in table))
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    return tuple(torch.tensor(rows, dtype=torch.int64, device=device) for rows in (table, pieces, spans))


def compilations():
    pointers = dict.fromkeys(("values", "starts", "partials", "sums"), "*fp32")
    pointers |= {"table": "*i64", "pieces": "*i64", "spans": "*i64", "x": "*bf16"}

    def one(kernel, **constexprs):
        signature = {n: pointers.get(n, "i32") for n in kernel.arg_names if n not in constexprs}
        aligned = tuple(n for n in signature if n in pointers or n in ("rank", "side", "num_columns", "row_stride"))
        return Compilation(kernel, signature, constexprs, aligned, num_warps=4)

    return [
        one(pieces_kernel, TILE=TILE, PIECE=PIECE, BLOCK=BLOCK),
        one(sum_pieces_kernel, SIZE=TILE * TILE),
        one(column_squares_kernel, SPLIT=SPLIT, ROWS=ROWS, COLUMNS=COLUMNS),
    ]
