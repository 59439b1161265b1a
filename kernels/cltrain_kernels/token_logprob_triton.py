"""Triton path of `token_logprob`: one program per row streams the vocabulary once forward and once backward.

Forward keeps a running maximum and sum (online softmax, arXiv 1805.02867) and saves those two numbers per row: their
sum alone, the log-sum-exp, loses digits when logits are large. Backward writes a new tensor: the saved logits are
never overwritten, because somebody else may hold them.
"""

# mypy: ignore-errors

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from cltrain_kernels.aot import Compilation

MAX_BLOCK = 4096


@triton.jit
def forward_kernel(
    logits, ids, logprob, row_max, row_log_sum, num_vocabulary, logits_row, logits_column, ids_row, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_row
    columns = tl.arange(0, BLOCK)
    running_max = -float("inf")
    running_sum = 0.0
    for start in range(0, num_vocabulary, BLOCK):
        offsets = start + columns
        mask = offsets < num_vocabulary
        z = tl.load(logits + offsets.to(tl.int64) * logits_column, mask=mask, other=-float("inf")).to(tl.float32)
        new_max = tl.maximum(running_max, tl.max(z, axis=0))
        shift = tl.where(new_max == -float("inf"), 0.0, new_max)  # a block of -inf only adds nothing, not NaN
        running_sum = running_sum * tl.exp(running_max - shift) + tl.sum(tl.exp(z - shift), axis=0)
        running_max = new_max
    log_sum = tl.log(running_sum)
    token = tl.load(ids + row * ids_row).to(tl.int64)
    is_inside = (token >= 0) & (token < num_vocabulary)
    picked = tl.load(logits + token * logits_column, mask=is_inside, other=float("nan")).to(tl.float32)
    tl.store(logprob + row, tl.where(token < 0, 0.0, picked - running_max - log_sum))
    tl.store(row_max + row, running_max)
    tl.store(row_log_sum + row, log_sum)


@triton.jit
def backward_kernel(
    logits, ids, row_max, row_log_sum, d_logprob, d_logits, num_vocabulary, logits_row,
    logits_column, ids_row, d_logprob_row, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < num_vocabulary
    token = tl.load(ids + row * ids_row).to(tl.int64)
    upstream = tl.load(d_logprob + row * d_logprob_row).to(tl.float32)
    z = tl.load(logits + row * logits_row + offsets.to(tl.int64) * logits_column, mask=mask, other=-float("inf"))
    p = tl.exp(z.to(tl.float32) - tl.load(row_max + row) - tl.load(row_log_sum + row))
    gradient = upstream * (tl.where(offsets == token, 1.0, 0.0) - p)
    gradient = tl.where(token < 0, 0.0, gradient)
    tl.store(d_logits + row * num_vocabulary + offsets, gradient.to(d_logits.dtype.element_ty), mask=mask)


class TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_MV, ids_M):
        num_rows, num_vocabulary = logits_MV.shape
        logprob_M = torch.empty(num_rows, dtype=torch.float32, device=logits_MV.device)
        max_M, log_sum_M = torch.empty_like(logprob_M), torch.empty_like(logprob_M)
        if num_rows:
            forward_kernel[(num_rows,)](
                logits_MV, ids_M, logprob_M, max_M, log_sum_M, num_vocabulary, *logits_MV.stride(), ids_M.stride(0),
                BLOCK=_block(num_vocabulary), num_warps=8,
            )  # fmt: skip
        ctx.save_for_backward(logits_MV, ids_M, max_M, log_sum_M)
        return logprob_M

    @staticmethod
    @once_differentiable
    def backward(ctx, d_logprob_M):
        logits_MV, ids_M, max_M, log_sum_M = ctx.saved_tensors
        num_rows, num_vocabulary = logits_MV.shape
        d_logits_MV = torch.empty((num_rows, num_vocabulary), dtype=logits_MV.dtype, device=logits_MV.device)
        block = _block(num_vocabulary)
        if num_rows:
            backward_kernel[(num_rows, triton.cdiv(num_vocabulary, block))](
                logits_MV, ids_M, max_M, log_sum_M, d_logprob_M, d_logits_MV, num_vocabulary, *logits_MV.stride(),
                ids_M.stride(0), d_logprob_M.stride(0), BLOCK=block, num_warps=8,
            )  # fmt: skip
        return d_logits_MV, None


def token_logprob_triton(logits_MV, ids_M):
    """`token_logprob` on Triton; the arguments are already checked."""
    return TokenLogprob.apply(logits_MV, ids_M)


def _block(num_vocabulary):
    return min(MAX_BLOCK, max(16, triton.next_power_of_2(num_vocabulary)))


def compilations():
    pointers = dict.fromkeys(("logprob", "row_max", "row_log_sum", "d_logprob"), "*fp32")
    pointers |= {"logits": "*bf16", "d_logits": "*bf16", "ids": "*i64"}
    aligned = {*pointers, "num_vocabulary", "logits_row"}
    return [
        Compilation(
            kernel,
            {name: pointers.get(name, "i32") for name in kernel.arg_names if name != "BLOCK"},
            {"BLOCK": MAX_BLOCK},
            tuple(name for name in kernel.arg_names if name in aligned),
            num_warps=8,
        )
        for kernel in (forward_kernel, backward_kernel)
    ]
