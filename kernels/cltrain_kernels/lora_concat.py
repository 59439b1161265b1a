"""LoRA inside the base's own matrix product: projections with one input over a single buffer [[W, s B], [A, .]].

    Y = [X | U] [W | s B]^T   with U = X A^T          dX = [dY | S] [[W], [A]]   with S = dY (s B)

The corners A and s B are what an optimiser step leaves (`adamw.Corners` of `places()`). Two products forward and two
for dX; the two branches of `lora_linear` have one more for each projection, which reads and writes Y or dX again. On
one CPU thread (float32, r = 16, 1024 tokens, all linears of a layer) the sum of forward and backward took 236 ms
against 250 of the two branches at width 384, and 677 against 658 for gate and up at width 896: no reason for a second
form, so `apply` uses `lora_linear` everywhere. A GPU may differ: kernels/bench/gpu.py measures.

M rows (tokens), K in, N out of all projections, R rank of all adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cltrain_kernels.lora_linear import Norm, Projection, normed, through_norm


@dataclass(frozen=True)
class Concatenated:
    """The buffer and where each projection lies in it. It holds the only copy of the base that is needed: give the
    layers `weights()` as their weights, or the base lies in memory twice."""

    buffer: Tensor  # (N + R, K + R); the corner below the Bs is never read
    outs: tuple[int, ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    bias_N: Tensor | None

    @property
    def num_out(self) -> int:
        return sum(self.outs)

    @property
    def num_in(self) -> int:
        return self.buffer.shape[1] - sum(self.ranks)

    def weights(self) -> tuple[Tensor, ...]:
        """Each projection's weight, a view."""
        return self.buffer[: self.num_out, : self.num_in].split(self.outs)

    def places(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Where each projection's (A_RK, scale * B_NR) lie, views: what `adamw.Corners` takes."""
        a_rows = self.buffer[self.num_out :, : self.num_in].split(self.ranks)
        b_columns = self.buffer[: self.num_out, self.num_in :].split(self.ranks, dim=1)
        b_blocks = [columns.split(self.outs)[i] for i, columns in enumerate(b_columns)]
        return tuple(zip(a_rows, b_blocks, strict=True))

    def refresh(self, factors: Sequence[Tensor]) -> None:
        """Copy A, B, A, B, ... into the buffer: after each change that no `adamw.Corners` brings there, and never
        between forward and backward."""
        pairs = zip(factors[::2], factors[1::2], strict=True)
        with torch.no_grad():
            for (a_place, b_place), (a_RK, b_NR), scale in zip(self.places(), pairs, self.scales, strict=True):
                a_place.copy_(a_RK)
                b_place.copy_(b_NR * scale)


def concatenate(projections: Sequence[Projection]) -> Concatenated:
    """A buffer with copies of these projections' weights and factors. Raises ValueError for 4-bit weights, a projection
    without an adapter, and a scale that is not one number."""
    factors: list[Tensor] = []
    for p in projections:
        if p.a_RK is None or p.b_NR is None or isinstance(p.scale, Tensor) or hasattr(p.weight_NK, "quant_state"):
            raise ValueError("only dense weights, each with one adapter and one scale, can be concatenated")
        factors += [p.a_RK, p.b_NR]
    first = projections[0].weight_NK
    outs, ranks = tuple(len(p.weight_NK) for p in projections), tuple(len(a_RK) for a_RK in factors[::2])
    buffer = first.new_zeros(sum(outs) + sum(ranks), first.shape[1] + sum(ranks))
    biases = [p.weight_NK.new_zeros(len(p.weight_NK)) if p.bias_N is None else p.bias_N for p in projections]
    has_bias = any(p.bias_N is not None for p in projections)
    scales = tuple(float(p.scale) for p in projections)
    made = Concatenated(buffer, outs, ranks, scales, torch.cat(biases) if has_bias else None)
    with torch.no_grad():
        for view, p in zip(made.weights(), projections, strict=True):
            view.copy_(p.weight_NK)
    made.refresh(factors)
    return made


def lora_concat(
    x: Tensor, group: Concatenated, factors: Sequence[Tensor], norm: Norm | None = None
) -> tuple[Tensor, ...]:
    """`lora_linear` of the group's projections. `factors` (A, B, A, B, ...) get the gradients; what is computed with is
    the group's copy of them. Raises ValueError on an x that does not fit, RuntimeError in the backward when the buffer
    was refreshed after the forward."""
    if x.ndim < 2 or x.shape[-1] != group.num_in or x.dtype is not group.buffer.dtype:
        raise ValueError(f"x {tuple(x.shape)} {x.dtype} does not fit {group.num_in} inputs of {group.buffer.dtype}")
    if len(factors) != 2 * len(group.outs):
        raise ValueError(f"{len(factors)} factors for {len(group.outs)} projections: expected A and B of each")
    ys = _LoraConcat.apply(x.reshape(-1, x.shape[-1]), group.buffer, group, norm, *factors)
    return tuple(y.unflatten(0, x.shape[:-1]) for y in ys)


class _LoraConcat(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_MK: Tensor, buffer: Tensor, group: Concatenated, norm: Norm | None, *factors: Tensor
    ) -> tuple[Tensor, ...]:
        n_MK, inverse = normed(x_MK, norm)
        num_out, num_in = group.num_out, group.num_in
        wide = torch.empty((len(x_MK), buffer.shape[1]), dtype=x_MK.dtype, device=x_MK.device)
        wide[:, :num_in] = n_MK
        wide[:, num_in:] = n_MK @ buffer[num_out:, :num_in].t()
        both = buffer[:num_out].t()
        y_MN = wide @ both if group.bias_N is None else torch.addmm(group.bias_N, wide, both)
        ctx.group, ctx.norm, ctx.dtypes = group, norm, [factor.dtype for factor in factors]
        ctx.save_for_backward(x_MK, inverse, buffer, wide[:, num_in:].clone())
        return y_MN.split(group.outs, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:
        group, (x_MK, inverse, buffer, u_MR) = ctx.group, ctx.saved_tensors
        num_out, num_in = group.num_out, group.num_in
        n_MK = normed(x_MK, ctx.norm)[0]
        wide = torch.empty((len(x_MK), buffer.shape[0]), dtype=x_MK.dtype, device=x_MK.device)
        torch.cat(dys, dim=1, out=wide[:, :num_out])
        wide[:, num_out:] = wide[:, :num_out] @ buffer[:num_out, num_in:]
        dx_MK = None
        if ctx.needs_input_grad[0]:
            dx_MK = through_norm(wide @ buffer[:, :num_in], x_MK, inverse, ctx.norm)
        da_RK = wide[:, num_out:].t() @ n_MK
        gradients: list[Tensor] = []
        parts = zip(dys, da_RK.split(group.ranks), u_MR.split(group.ranks, dim=1), group.scales, strict=True)
        for dy_MN, da, u, scale in parts:
            gradients += [da, dy_MN.t() @ (u * scale)]
        return dx_MK, None, None, None, *(g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True))
