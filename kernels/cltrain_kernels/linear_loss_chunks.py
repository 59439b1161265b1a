"""The pass of `linear_loss`: pick the supervised rows, then chunk by chunk logits, figures, gradient. 3 GEMMs with a
reference's hidden states, 2 without; on a GPU nothing is read back.

R rows to compute, N of them in a chunk, D hidden size, V vocabulary. Student z, p = softmax z, reference q, token y:

    dz = w (p - e_y) + k (p - q)                                  forward KL(q || p)
    dz = w (p - e_y) + k p (log p - log q - KL)                   reverse KL(p || q)
    dz = (w + k (q_y / p_y - 1)) (p - e_y)                        k3

In the chunk a row's w and k are divided by the larger of them, and multiplied back in float32 in the backward: float16
would lose the small weights of a long batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cltrain_kernels.linear_loss_types import Divergence, LinearLoss, Reference


@dataclass(frozen=True)
class Rows:
    """The rows to compute, on the head's device; `index_R` are their places in the batch (None: all of it, in order).
    Masked rows have id -1 and weight 0. `poison` is NaN where the batch did not fit, else 0."""

    ids_R: Tensor
    weights_R: Tensor
    divergence_weights_R: Tensor
    index_R: Tensor | None
    has_masked: bool
    num_supervised: Tensor
    poison: Tensor | None

    def of(self, values_M: Tensor) -> Tensor:
        return values_M if self.index_R is None else values_M[self.index_R]


@dataclass(frozen=True)
class Chunk:
    """What a step gets: logits of our own, which it overwrites, by their gradient if `has_gradient`; the rest it only
    reads. `reference_NV` are logits, `reference_logprob_N` stands in for them."""

    logits_NV: Tensor
    ids_N: Tensor
    weights_N: Tensor
    divergence_weights_N: Tensor
    divergence: Divergence | None
    reference_NV: Tensor | None
    reference_logprob_N: Tensor | None
    has_masked: bool
    has_gradient: bool


CACHED = 1 << 20  # logits of the rows that a CPU takes at a time (4 MiB of float32)
BLOCK, SLAB = 512, 2048  # rows, and tokens of the vocabulary, that it multiplies at a time
LOWEST = -1e30  # log-prob of a token that a reference forbids: 0 times it is 0 and not NaN
Figures = list[Tensor]  # logprob_N, entropy_N; with a reference divergence_N and reference_logprob_N too
Step = Callable[[Chunk], Figures]


def rows_on_host(
    hidden_MD: Tensor, num_vocabulary: int, ids_M: Tensor, weights_M: Tensor, other_M: Tensor, max_rows: int | None
) -> Rows:
    """The supervised rows and no others; with `max_rows`, masked ones behind them. What does not fit raises
    ValueError."""
    is_supervised_M = (ids_M >= 0) & ((weights_M != 0) | (other_M != 0))
    index = is_supervised_M.nonzero()[:, 0]
    num_supervised = len(index)
    if not num_supervised:
        raise ValueError("no supervised token: every weight is 0 or every id negative; leave such a batch out")
    if int(ids_M.max()) >= num_vocabulary:
        raise ValueError(f"id {int(ids_M.max())} is beyond the head's vocabulary of {num_vocabulary}")
    if max_rows is not None:
        if num_supervised > max_rows:
            raise ValueError(
                f"{num_supervised} supervised rows, but max_rows = {max_rows}: raise it or split the batch"
            )
        index = torch.cat([index, (~is_supervised_M).nonzero()[:, 0]])[:max_rows]
    return _rows(hidden_MD, is_supervised_M, ids_M, weights_M, other_M, index, len(index) > num_supervised, None)


def rows_on_device(
    hidden_MD: Tensor, num_vocabulary: int, ids_M: Tensor, weights_M: Tensor, other_M: Tensor, max_rows: int | None
) -> Rows:
    """`max_rows` rows, supervised ones first, or all of them; shapes depend on no value. What does not fit poisons."""
    ids_M, weights_M, other_M = (values.to(hidden_MD.device) for values in (ids_M, weights_M, other_M))
    is_beyond_M = ids_M >= num_vocabulary
    is_supervised_M = (ids_M >= 0) & ~is_beyond_M & ((weights_M != 0) | (other_M != 0))
    is_wrong, index = is_beyond_M.any(), None
    if max_rows is not None:
        is_wrong |= is_supervised_M.sum() > max_rows
        index = torch.argsort(is_supervised_M, descending=True, stable=True)[:max_rows]
    poison = torch.where(is_wrong, torch.nan, 0.0)
    return _rows(hidden_MD, is_supervised_M, ids_M, weights_M, other_M, index, True, poison)


def _rows(
    hidden_MD: Tensor, is_supervised_M: Tensor, ids_M: Tensor, weights_M: Tensor, other_M: Tensor,
    index: Tensor | None, has_masked: bool, poison: Tensor | None,
) -> Rows:  # fmt: skip
    def picked(values_M: Tensor, masked: float, dtype: torch.dtype) -> Tensor:
        values_M = torch.where(is_supervised_M, values_M, masked)
        return (values_M if index is None else values_M[index]).to(device, dtype, non_blocking=True)

    device, sums = hidden_MD.device, _sums_dtype(hidden_MD)
    return Rows(
        picked(ids_M, -1, torch.int64),
        picked(weights_M, 0, sums),
        picked(other_M, 0, sums),
        None if index is None else index.to(device, non_blocking=True),
        has_masked,
        is_supervised_M.sum().to(device, non_blocking=True),
        poison,
    )


def chunked(
    hidden_MD: Tensor, head_VD: Tensor, rows: Rows, reference: Reference | None, max_chunk_bytes: int, has_triton: bool
) -> LinearLoss:
    """`linear_loss` over chosen rows."""
    if has_triton:
        from cltrain_kernels.linear_loss_triton import triton_step

        step, bytes_per_logit = triton_step, hidden_MD.element_size() * (1 if reference is None else 2)
    else:
        step, bytes_per_logit = torch_step, _sums_dtype(hidden_MD).itemsize * (2 if reference is None else 5)
    num_chunks = -(-len(rows.ids_R) * head_VD.shape[0] * bytes_per_logit // max_chunk_bytes)
    size = -(-len(rows.ids_R) // max(1, num_chunks))  # chunks of the same size: no small one at the end
    if is_online := not has_triton and reference is None and _may_go_online(hidden_MD):
        size = min(BLOCK, max(1, max_chunk_bytes // (2 * min(SLAB, len(head_VD)) * hidden_MD.element_size())))
    has_gradient = torch.is_grad_enabled() and hidden_MD.requires_grad
    loss, *figures = _LinearLoss.apply(
        hidden_MD, head_VD, rows, reference, None if is_online else step, size, has_gradient
    )
    return LinearLoss(loss, rows.num_supervised, *figures, *([None] * (4 - len(figures))))


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_MD: Tensor, head_VD: Tensor, rows: Rows, reference: Reference | None, step: Step | None,
        size: int, has_gradient: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        hidden_RD = rows.of(hidden_MD)
        reference_RD = None if reference is None or reference.hidden_MD is None else rows.of(reference.hidden_MD)
        scale_R = torch.maximum(rows.weights_R.abs(), rows.divergence_weights_R.abs())
        safe_R = torch.where(scale_R == 0, 1.0, scale_R)
        weights_R, divergence_weights_R = rows.weights_R / safe_R, rows.divergence_weights_R / safe_R
        gradient_RD = torch.empty_like(hidden_RD, memory_format=torch.contiguous_format) if has_gradient else None
        buffer = head_VD.new_empty((0 if step is None else size, head_VD.shape[0]))
        reference_buffer = None if reference_RD is None else torch.empty_like(buffer)
        parts = []
        for start in range(0, len(hidden_RD), size):
            part = slice(start, start + size)
            if step is None:
                out_ND = None if gradient_RD is None else gradient_RD[part]
                parts.append(_online(hidden_RD[part], head_VD, rows.ids_R[part], weights_R[part], out_ND))
                continue
            logits_NV = _multiply(hidden_RD[part], head_VD, buffer)
            reference_NV, reference_N = _given(reference, rows, part)
            if reference_RD is not None and reference_buffer is not None:
                reference_NV = _multiply(reference_RD[part], head_VD, reference_buffer)
            chunk = Chunk(
                logits_NV, rows.ids_R[part], weights_R[part],
                divergence_weights_R[part], None if reference is None else reference.divergence,
                reference_NV, reference_N, rows.has_masked, has_gradient,
            )  # fmt: skip
            parts.append(step(chunk))
            if gradient_RD is not None:
                torch.mm(logits_NV, head_VD, out=gradient_RD[part])
        figures = [torch.where(rows.ids_R < 0, 0.0, torch.cat(some)) for some in zip(*parts, strict=True)]
        loss = -(rows.weights_R * figures[0]).sum()
        if reference is not None:
            loss = loss + (rows.divergence_weights_R * figures[2]).sum()
        if rows.poison is not None:
            loss = loss + rows.poison
        ctx.save_for_backward(gradient_RD, rows.index_R, scale_R, rows.poison)
        ctx.shape = hidden_MD.shape
        figures = [_spread(figure_R, rows.index_R, len(hidden_MD)) for figure_R in figures]
        ctx.mark_non_differentiable(*figures)
        return loss, *figures

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        gradient_RD, index_R, scale_R, poison = ctx.saved_tensors
        factor_R = scale_R * (d_loss if poison is None else d_loss + poison)
        d_hidden_RD = (gradient_RD * factor_R[:, None]).to(gradient_RD.dtype)
        return _spread(d_hidden_RD, index_R, ctx.shape[0]), None, None, None, None, None, None


def torch_step(chunk: Chunk) -> Figures:
    """On a CPU a few rows at a time, so that all passes find them in its cache; no bit depends on how many."""
    if chunk.logits_NV.device.type != "cpu":
        return _rows_step(chunk)
    size = max(1, CACHED // chunk.logits_NV.shape[1])
    parts = [_rows_step(_part(chunk, slice(i, i + size))) for i in range(0, len(chunk.logits_NV), size)]
    return [torch.cat(some) for some in zip(*parts, strict=True)]


def _part(chunk: Chunk, rows: slice) -> Chunk:
    tensors: Any = {name: x[rows] for name, x in vars(chunk).items() if isinstance(x, Tensor)}
    return replace(chunk, **tensors)


def _rows_step(chunk: Chunk) -> Figures:
    ids_N1 = chunk.ids_N.clamp(min=0)[:, None]
    sums = _sums_dtype(chunk.logits_NV)
    logp_NV = chunk.logits_NV.to(sums)  # so far z - max z; may be the logits themselves
    logp_NV -= logp_NV.amax(-1, keepdim=True)
    p_NV = logp_NV.exp()
    total_N1 = p_NV.sum(-1, keepdim=True)
    log_total_N1 = total_N1.log()
    entropy_N1 = log_total_N1 - _row_dots(p_NV, logp_NV)[:, None] / total_N1
    figures = [(logp_NV.gather(1, ids_N1) - log_total_N1)[:, 0], entropy_N1[:, 0]]
    p_NV /= total_N1
    weights_N1, slope_NV = chunk.weights_N[:, None], None
    if chunk.divergence is not None:
        logp_NV -= log_total_N1
        logq_NV = None if chunk.reference_NV is None else chunk.reference_NV.to(sums).log_softmax(-1)
        if logq_NV is not None:
            logq_NV.clamp_(min=LOWEST)
        logq_N = chunk.reference_logprob_N if logq_NV is None else logq_NV.gather(1, ids_N1)[:, 0]
        assert logq_N is not None
        if chunk.divergence == "k3":
            ratio_N = logq_N.to(sums) - figures[0]
            divergence_N = torch.expm1(ratio_N) - ratio_N
            weights_N1 = weights_N1 + (chunk.divergence_weights_N * torch.expm1(ratio_N))[:, None]
        elif chunk.divergence == "forward":
            assert logq_NV is not None
            q_NV = logq_NV.exp()
            divergence_N = _row_dots(q_NV, logq_NV.sub_(logp_NV))
            slope_NV = q_NV.neg_().add_(p_NV)
        else:
            slope_NV = logp_NV.sub_(logq_NV)  # type: ignore[arg-type]
            divergence_N = _row_dots(p_NV, slope_NV)
            slope_NV.sub_(divergence_N[:, None]).mul_(p_NV)
        figures += [divergence_N, logq_N]
    if chunk.has_gradient:
        gradient_NV = p_NV.mul_(weights_N1)
        gradient_NV.scatter_(1, ids_N1, gradient_NV.gather(1, ids_N1) - weights_N1)
        if slope_NV is not None:
            gradient_NV.addcmul_(slope_NV, chunk.divergence_weights_N[:, None])
        if chunk.has_masked:
            gradient_NV.masked_fill_(chunk.ids_N[:, None] < 0, 0.0)  # 0 times what a padded row holds may be NaN
        chunk.logits_NV.copy_(gradient_NV)
    return figures


def _may_go_online(hidden_MD: Tensor) -> bool:
    return hidden_MD.device.type == "cpu" and hidden_MD.dtype is _sums_dtype(hidden_MD)


def _online(hidden_ND: Tensor, head_VD: Tensor, ids_N: Tensor, weights_N: Tensor, out_ND: Tensor | None) -> Figures:
    """The figures without a reference, and the hidden states' gradient in `out_ND`, slab by slab of the vocabulary.

    For CPUs: no logits are kept, and a slab of the head is in the cache for both of its products. As in flash attention
    maxima, sums, dots and sum_v exp(z_v - max) W_v go on from slab to slab; dz = w (p - e_y) is linear in p.
    """
    num_rows = len(hidden_ND)
    best_N1, total_N1, dot_N1, logit_N1 = hidden_ND.new_zeros(4, num_rows, 1)
    best_N1.fill_(LOWEST)
    z_NS, e_NS = hidden_ND.new_empty(2, num_rows, min(SLAB, len(head_VD)))
    sum_ND = torch.zeros_like(hidden_ND, memory_format=torch.contiguous_format)
    for start in range(0, len(head_VD), SLAB):
        slab_SD = head_VD[start : start + SLAB]
        z, e = z_NS[:, : len(slab_SD)], e_NS[:, : len(slab_SD)]
        torch.mm(hidden_ND, slab_SD.t(), out=z)
        place_N1 = (ids_N - start)[:, None]
        is_here_N1 = (place_N1 >= 0) & (place_N1 < len(slab_SD))
        logit_N1 = torch.where(is_here_N1, z.gather(1, place_N1.clamp(0, len(slab_SD) - 1)), logit_N1)
        before_N1, best_N1 = best_N1, torch.maximum(best_N1, z.amax(1, keepdim=True))
        fades_N1 = torch.exp(before_N1 - best_N1)
        torch.exp(z.sub_(best_N1), out=e)
        dot_N1 = fades_N1 * (dot_N1 + total_N1 * (before_N1 - best_N1)) + z.mul_(e).sum(1, keepdim=True)
        total_N1 = fades_N1 * total_N1 + e.sum(1, keepdim=True)
        if out_ND is not None:
            sum_ND.mul_(fades_N1).addmm_(e, slab_SD)
    log_total_N1 = total_N1.log()
    if out_ND is not None:
        gradient_ND = (sum_ND.div_(total_N1) - head_VD[ids_N.clamp(min=0)]).mul_(weights_N[:, None])
        out_ND.copy_(gradient_ND.masked_fill_(ids_N[:, None] < 0, 0.0))
    return [(logit_N1 - best_N1 - log_total_N1)[:, 0], (log_total_N1 - dot_N1 / total_N1)[:, 0]]


def _given(reference: Reference | None, rows: Rows, part: slice) -> tuple[Tensor | None, Tensor | None]:
    """The caller's logits or log-probs of a reference for the rows of one chunk."""
    values = None if reference is None else reference.logprob_M if reference.logits_MV is None else reference.logits_MV
    if reference is None or values is None:
        return None, None
    values = values[part] if rows.index_R is None else values[rows.index_R[part]]
    return (None, values) if reference.logits_MV is None else (values, None)


def _multiply(hidden_ND: Tensor, head_VD: Tensor, buffer: Tensor) -> Tensor:
    return torch.mm(hidden_ND, head_VD.t(), out=buffer[: len(hidden_ND)])


def _row_dots(one_NV: Tensor, other_NV: Tensor) -> Tensor:
    """Row by row and slab by slab: no third tensor of that size, and sums as exact as torch's own."""
    slabs = zip(one_NV.split(8192, 1), other_NV.split(8192, 1), strict=True)
    return torch.stack([(one * other).sum(1) for one, other in slabs]).sum(0)


def _spread(values_R: Tensor, index_R: Tensor | None, num_rows: int) -> Tensor:
    """Rows back at their places in the batch, zeros elsewhere."""
    if index_R is None:
        return values_R
    return values_R.new_zeros((num_rows, *values_R.shape[1:])).index_copy_(0, index_R, values_R)


def _sums_dtype(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype is torch.float64 else torch.float32
