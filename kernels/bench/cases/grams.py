"""grams: the table of inner products of all modules' deltas, by one launch against torch's batched products, and what
column sums of squares reach."""

from __future__ import annotations

import functools

import torch
from case import Case, Contender
from cltrain_kernels.flat import Layout
from cltrain_kernels.grams import column_square_sums_reference, delta_norms, factor_grams_reference, product_grams
from torch import Tensor

LINEARS = {
    "0.5B": (24, [(896, 896), (128, 896), (128, 896), (896, 896), (4864, 896), (4864, 896), (896, 4864)]),
    "8B": (32, [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]),
}


def cases(quick: bool) -> list[Case]:
    sizes = [("0.5B", 16)] if quick else [(m, r) for m in LINEARS for r in (16, 64)]
    return [
        Case("grams", {"model": m, "rank": r}, functools.partial(problem, m, r), functools.partial(contenders, m, r))
        for m, r in sizes
    ]


def draw(model: str, rank: int) -> tuple[Layout, Tensor, Tensor]:
    """A layout, the end and the start."""
    num_layers, shapes = LINEARS[model]
    layout = Layout.of({f"{i}.{j}": shape for i in range(num_layers) for j, shape in enumerate(shapes)}, rank)
    rng = torch.Generator("cuda").manual_seed(0)
    start = torch.randn(layout.size, generator=rng, device="cuda")
    return layout, start + 0.01 * torch.randn(layout.size, generator=rng, device="cuda"), start


def problem(model: str, rank: int) -> str | None:
    from cltrain_kernels.grams_triton import column_square_sums_triton, factor_grams_triton

    layout, end, start = draw(model, rank)
    ours, again = factor_grams_triton(layout, end, start), factor_grams_triton(layout, end, start)
    for one, repeated, true in zip(ours, again, factor_grams_reference(layout, end, start), strict=True):
        size = true.diagonal(dim1=1, dim2=2).sqrt()
        error = float(((one.double() - true).abs() / (size[:, :, None] * size[:, None])).max())
        if not error <= 1e-6:
            return f"Grams: relative error {error:.3g} exceeds 1e-6"
        if not torch.equal(one, repeated):
            return "two runs differ"
    x = torch.randn(4097, 4864, device="cuda").bfloat16()
    error = float((column_square_sums_triton(x).double() / x.double().square().sum(0) - 1).abs().max())
    return None if error <= 1e-5 else f"column sums: relative error {error:.3g} exceeds 1e-5"


def contenders(model: str, rank: int) -> tuple[list[Contender], dict[str, str]]:
    from cltrain_kernels.grams_triton import column_square_sums_triton

    layout, end, start = draw(model, rank)
    x = torch.randn(8192, 4096, device="cuda").bfloat16()
    runs = {
        "ours": lambda: product_grams(layout, end, start),
        "batched_float64": lambda: factor_grams_reference(layout, end, start),
        "norms_batched": lambda: delta_norms(layout, end, 1.0),
        "ours_column_sums": lambda: column_square_sums_triton(x),
        "column_sums_eager": lambda: column_square_sums_reference(x),
    }
    return [Contender(name, lambda run=run: nothing(run())) for name, run in runs.items()], {}


def nothing(_: object) -> None:
    """Norms have no gradient to compare."""
