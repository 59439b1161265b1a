"""What can be said of all modules' weight deltas from small Grams: norms, inner products, the exact step to a bound,
penalties and their gradients. No N x K matrix is ever formed and no module is visited alone.

A delta is dW = scale * B A. Between a start (A0, B0) and an end (A, B), with dA = A - A0 and dB = B - B0, every delta
on the way is a combination of the four products B A, B dA, dB A, dB dA, whose inner products are the table of
`product_grams`. Differences are taken of the factors, never of the Grams: those cancel. Shapes: R rank, K in, N out, L
modules of one shape, M all modules in the order of `Layout.modules`, S elements of a flat buffer.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from cltrain_kernels.dispatch import implementation_for
from cltrain_kernels.flat import Layout, Stacks

# Over (B A, B dA, dB A, dB dA):
END = (1.0, 0.0, 0.0, 0.0)
START = (1.0, -1.0, -1.0, 1.0)  # (B - dB)(A - dA)
STEP = (0.0, 1.0, 1.0, -1.0)  # end - start
LINEAR = (0.0, 1.0, 1.0, -2.0)  # dB A0 + B0 dA: the step is c LINEAR + c^2 QUADRATIC a fraction c of the way
QUADRATIC = (0.0, 0.0, 0.0, 1.0)
BISECTIONS = 60


def delta_norms(layout: Layout, values_S: Tensor, scale: float) -> Tensor:
    """||dW||_F of every module, norms_M, summed in the buffer's dtype."""
    squares = [((b.mT @ b) * (a @ a.mT)).sum((-2, -1)) for a, b in layout.stacks(values_S)]
    return scale * torch.cat(squares).clamp(min=0).sqrt()


def product_grams(layout: Layout, values_S: Tensor, start_S: Tensor) -> Tensor:
    """<P_i, P_j> in float64 for the products P = (B A, B dA, dB A, dB dA) of every module, grams_M44."""
    if values_S.dtype is torch.float32 and implementation_for("grams", values_S.device) == "triton":
        from cltrain_kernels.grams_triton import factor_grams_triton

        a_M2R2R, b_M2R2R = factor_grams_triton(layout, values_S, start_S)
    else:
        a_M2R2R, b_M2R2R = factor_grams_reference(layout, values_S, start_S)
    shape = (-1, 2, layout.rank, 2, layout.rank)
    a_MjRlR, b_MiRkR = a_M2R2R.double().reshape(shape), b_M2R2R.double().reshape(shape)
    return torch.einsum("mirks,mjrls->mijkl", b_MiRkR, a_MjRlR).reshape(-1, 4, 4)


def factor_grams_reference(layout: Layout, values_S: Tensor, start_S: Tensor) -> tuple[Tensor, Tensor]:
    """[A; dA] [A; dA]^T and [B dB]^T [B dB] of every module in float64: two M x 2R x 2R."""
    of_a, of_b = [], []
    for (a, b), (a0, b0) in zip(layout.stacks(values_S), layout.stacks(start_S), strict=True):
        a, b, a0, b0 = a.double(), b.double(), a0.double(), b0.double()
        a_L2RK, b_LN2R = torch.cat([a, a - a0], 1), torch.cat([b, b - b0], 2)
        of_a.append(a_L2RK @ a_L2RK.mT)
        of_b.append(b_LN2R.mT @ b_LN2R)
    return torch.cat(of_a), torch.cat(of_b)


def inner(grams_M44: Tensor, one: tuple[float, ...], other: tuple[float, ...], scale: float) -> Tensor:
    """<one, other> of every module, inner_M in float64, for two of END, START, STEP, LINEAR, QUADRATIC."""
    left, right = (_weights(weights, grams_M44.device) for weights in (one, other))
    return scale**2 * (grams_M44 @ right @ left)


@functools.cache
def _weights(weights: tuple[float, ...], device: torch.device) -> Tensor:
    """Made once: to copy them from the host in each step would be to wait for the device."""
    return torch.tensor(weights, dtype=torch.float64, device=device)


def step_norms(layout: Layout, values_S: Tensor, start_S: Tensor, scale: float) -> Tensor:
    """||dW_end - dW_start||_F of every module, norms_M in float64.

    Exact for small moves of the factors. Where large ones cancel (another factoring of the same delta) what is below
    sqrt(eps) of them is lost: 1e-8, on Triton 3e-4.
    """
    return inner(product_grams(layout, values_S, start_S), STEP, STEP, scale).clamp(min=0).sqrt()


def spectral_norms(layout: Layout, values_S: Tensor, scale: float, start_S: Tensor | None = None) -> Tensor:
    """||dW||_2 of every module, or of its step from `start_S`, norms_M in float64, exact by small eigenproblems.

    The non-zero singular values of B A are those of S^T (B^T B) S with S S^T = A A^T. Not for a captured step:
    eigenvalues wait for the device.
    """
    norms = []
    starts = [None] * len(layout.groups) if start_S is None else layout.stacks(start_S)
    for (a, b), before in zip(layout.stacks(values_S), starts, strict=True):
        a, b = a.double(), b.double()
        if before is not None:
            a0, b0 = before[0].double(), before[1].double()
            a, b = torch.cat([a, a - a0], 1), torch.cat([b - b0, b0], 2)
        squares_LR, vectors_LRR = torch.linalg.eigh(a @ a.mT)
        root_LRR = vectors_LRR * squares_LR.clamp(min=0).sqrt()[:, None]
        norms.append(torch.linalg.eigvalsh(root_LRR.mT @ (b.mT @ b) @ root_LRR)[:, -1].clamp(min=0).sqrt())
    return scale * torch.cat(norms)


def largest_step(yy_M: Tensor, yz_M: Tensor, zz_M: Tensor, limits_M: Tensor) -> Tensor:
    """The largest c_M in [0, 1] such that ||c' Y + c' c' Z|| <= limit for every c' in [0, c], in float64.

    yy, yz, zz are the inner products of Y and Z, which the quartic c^2 (yy + 2 yz c + zz c^2) is made of. It turns at
    the roots of yy + 3 yz c + 2 zz c^2 only: the first piece between turns that ends above the limit holds the
    crossing, which bisection finds on the side that obeys.
    """
    squares_M = limits_M.double().square()

    def quartic(c_M: Tensor) -> Tensor:
        return c_M**2 * (yy_M + c_M * (2 * yz_M + c_M * zz_M))

    discriminant_M = (9 * yz_M**2 - 8 * yy_M * zz_M).clamp(min=0).sqrt()
    q_M = -(3 * yz_M + torch.where(yz_M < 0, -discriminant_M, discriminant_M)) / 2  # both roots without cancellation
    turns_2M = torch.stack([q_M / (2 * zz_M), yy_M / q_M]).nan_to_num(1.0).clamp(0.0, 1.0).sort(0).values
    low_M, high_M, found_M = torch.zeros_like(yy_M), torch.ones_like(yy_M), torch.zeros_like(yy_M, dtype=torch.bool)
    for end_M in (*turns_2M, torch.ones_like(yy_M)):
        is_first_M = ~found_M & (quartic(end_M) > squares_M)
        high_M = torch.where(is_first_M, end_M, high_M)
        found_M = found_M | is_first_M
        low_M = torch.where(found_M, low_M, end_M)
    for _ in range(BISECTIONS):
        middle_M = (low_M + high_M) / 2
        obeys_M = quartic(middle_M) <= squares_M
        low_M, high_M = torch.where(obeys_M, middle_M, low_M), torch.where(obeys_M, high_M, middle_M)
    return torch.where(found_M, low_M, 1.0)


def trust_region(
    layout: Layout, values_S: Tensor, start_S: Tensor, radii_M: Tensor, scale: float, *, together: bool
) -> Tensor:
    """Take `values_S` in place back along the straight line of the factors from `start_S`, as far as the radii ask.

    radii_M are float64 limits of ||dW - dW_start||_F. `together`: all modules go the same fraction, the smallest;
    otherwise each its own. Returns the fractions c_M in float64. Where c is 1, as with an infinite radius, nothing
    changes, to the bit. The result is rounded to the buffer's dtype: leave a margin where a bound must hold exactly.
    """
    grams_M44 = product_grams(layout, values_S, start_S)
    yy_M, zz_M = (inner(grams_M44, one, one, scale) for one in (LINEAR, QUADRATIC))
    c_M = largest_step(yy_M, inner(grams_M44, LINEAR, QUADRATIC, scale), zz_M, radii_M)
    if together:
        c_M = c_M.min().expand_as(c_M)
    begin = 0
    for ends, starts in zip(layout.stacks(values_S), layout.stacks(start_S), strict=True):
        c_L = c_M[begin : begin + len(ends[0]), None, None]
        begin += len(ends[0])
        for end, start in zip(ends, starts, strict=True):
            moved = start.double() + c_L * (end.double() - start.double())
            end.copy_(torch.where(c_L < 1, moved.to(end.dtype), end))
    return c_M


def keep_within(layout: Layout, values_S: Tensor, radii_M: Tensor, scale: float, least: float) -> Tensor:
    """B <- min(1, radius / ||dW||_F) B in place, but not where that is below `least` or no number; returns these c_M,
    float64."""
    begin, kept = 0, []
    for a, b in layout.stacks(values_S):
        a64, b64 = a.double(), b.double()
        norms_L = scale * ((b64.mT @ b64) * (a64 @ a64.mT)).sum((-2, -1)).clamp(min=0).sqrt()
        c_L = (radii_M[begin : begin + len(a)] / norms_L).clamp(max=1.0)
        kept.append(torch.where(c_L >= least, c_L, 1.0))
        b *= kept[-1][:, None, None].to(b.dtype)
        begin += len(a)
    return torch.cat(kept)


def delta_penalty(
    layout: Layout,
    values_S: Tensor,
    starts: Stacks | None,
    scale: float,
    coefficients_M: Tensor,
    fisher: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    gradients_S: Tensor | None = None,
) -> Tensor:
    """1/2 sum_M c_M sum_ij g_i x_j (dW - dW_start)_ij^2, a float64 scalar; its gradient is added to `gradients_S`.

    `starts` are the factors of dW_start under the same scale, as `Layout.stacks` has them, of any rank; None means a
    zero delta. L2-SP (1802.01483) without `fisher`; EWC on the delta with a row x column Fisher, module -> (g_N, x_K),
    all >= 0. With D = dB A + B0 dA, as = [A; dA], bs = [dB B0], the smaller rank padded by zeros, and the weighted
    Grams GA = (as.x) as^T, GB = (g.bs)^T bs, the value is c scale^2 / 2 <GA, GB> and the gradients are
    gB = c scale^2 (g.bs) GA[:, :R] and gA = c scale^2 (GB[:R] + GB[R:]) (as.x), both exactly zero at the start.
    """
    total = values_S.new_zeros((), dtype=torch.float64)
    gradients = layout.stacks(gradients_S) if gradients_S is not None else [None] * len(layout.groups)
    begin = 0
    for i, (group, (a, b), into) in enumerate(zip(layout.groups, layout.stacks(values_S), gradients, strict=True)):
        a0, b0 = (torch.zeros_like(a), torch.zeros_like(b)) if starts is None else starts[i]
        rank = max(layout.rank, a0.shape[1])
        a, a0 = (F.pad(x.double(), (0, 0, 0, rank - x.shape[1])) for x in (a, a0))
        b, b0 = (F.pad(x.double(), (0, rank - x.shape[2])) for x in (b, b0))
        as_L2RK, bs_LN2R = torch.cat([a, a - a0], 1), torch.cat([b - b0, b0], 2)
        asx_L2RK, gbs_LN2R = as_L2RK, bs_LN2R
        if fisher is not None:
            g_LN, x_LK = (torch.stack([fisher[m][i] for m in group.modules]).to(a) for i in (0, 1))
            asx_L2RK, gbs_LN2R = as_L2RK * x_LK[:, None], bs_LN2R * g_LN[:, :, None]
        c_L11 = scale**2 * coefficients_M[begin : begin + len(a), None, None].to(a)
        begin += len(a)
        of_a, of_b = asx_L2RK @ as_L2RK.mT, gbs_LN2R.mT @ bs_LN2R
        total += (c_L11 * of_a * of_b).sum() / 2
        if into is not None:
            gradient_LRK = c_L11 * ((of_b[:, :rank] + of_b[:, rank:]) @ asx_L2RK)
            gradient_LNR = c_L11 * (gbs_LN2R @ of_a[:, :, :rank])
            into[0].add_(gradient_LRK[:, : layout.rank].to(into[0].dtype))
            into[1].add_(gradient_LNR[:, :, : layout.rank].to(into[1].dtype))
    return total


def column_square_sums(x_TK: Tensor) -> Tensor:
    """sum_t x[t, k]^2 in float32 (float64 for float64), sums_K. Bitwise repeatable: a fixed order, no atomics.

    Of a layer's inputs they are the columns of its Fisher, of the gradients at its outputs the rows.
    """
    if x_TK.ndim != 2 or not x_TK.is_floating_point():
        raise ValueError(f"expected floats (T, K); got {x_TK.dtype} {tuple(x_TK.shape)}")
    if x_TK.dtype is not torch.float64 and implementation_for("grams", x_TK.device) == "triton":
        from cltrain_kernels.grams_triton import column_square_sums_triton

        return column_square_sums_triton(x_TK)
    return column_square_sums_reference(x_TK)


def column_square_sums_reference(x_TK: Tensor) -> Tensor:
    """The specification of `column_square_sums`, in PyTorch."""
    return (x_TK if x_TK.dtype is torch.float64 else x_TK.float()).square().sum(0)
