"""Gate and up projections with LoRA behind a norm: two branches, the concatenated buffer, and PEFT's arithmetic.

The first rows answer whether cuBLAS takes K + 2R as cheaply as K, which decides the form that `apply` should use.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from case import Case, Contender
from cltrain_kernels import Norm, Projection, lora_linear, lora_linear_reference
from cltrain_kernels.lora_concat import concatenate, lora_concat
from torch import Tensor

SIZES = {"0.5B": (896, 4864), "3B": (3072, 8192), "8B": (4096, 14336)}
DTYPE, RANK, SCALE = torch.bfloat16, 16, 2.0


@dataclass(frozen=True)
class Layer:
    x_MK: Tensor
    projections: list[Projection]
    norm: Norm
    upstream: list[Tensor]


def cases(quick: bool) -> list[Case]:
    sizes = [("0.5B", 1024)] if quick else [(model, m) for model in SIZES for m in (512, 2048, 8192)]
    return [
        Case(
            "lora_linear",
            {"model": model, "M": m, "K": SIZES[model][0], "N": 2 * SIZES[model][1], "R": RANK, "dtype": str(DTYPE)},
            functools.partial(problem, model),
            functools.partial(contenders, model, m),
            functools.partial(truth, model, m),
        )
        for model, m in sizes
    ]


def draw(model: str, num_rows: int) -> Layer:
    num_in, num_out = SIZES[model]
    rng = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
        return torch.randn(*shape, generator=rng, device="cuda", dtype=dtype)

    projections = [
        Projection(
            normal(num_out, num_in) / num_in**0.5,
            None,
            normal(RANK, num_in) / num_in**0.5,
            normal(num_out, RANK) / RANK**0.5,
            SCALE,
        )
        for _ in range(2)
    ]
    norm = Norm(1 + 0.1 * normal(num_in), 1e-6)
    return Layer(normal(num_rows, num_in), projections, norm, [normal(num_rows, num_out) for _ in range(2)])


def in_float64(layer: Layer) -> Layer:
    def double(p: Projection) -> Projection:
        assert p.a_RK is not None
        assert p.b_NR is not None
        return Projection(p.weight_NK.double(), None, p.a_RK.double(), p.b_NR.double(), p.scale)

    norm = Norm(layer.norm.weight_K.double(), layer.norm.eps)
    return Layer(
        layer.x_MK.double(), [double(p) for p in layer.projections], norm, [t.double() for t in layer.upstream]
    )


def gradient(op: Callable[..., tuple[Tensor, ...]], layer: Layer) -> Tensor:
    """Of x and of all factors, in one row."""
    leaves = [layer.x_MK, *(f for p in layer.projections for f in (p.a_RK, p.b_NR) if f is not None)]
    x, *factors = (leaf.detach().requires_grad_() for leaf in leaves)
    given = [
        Projection(p.weight_NK, None, a, b, p.scale)
        for p, a, b in zip(layer.projections, factors[::2], factors[1::2], strict=True)
    ]
    ys = op(x, given, layer.norm)
    return torch.cat([g.flatten() for g in torch.autograd.grad(ys, [x, *factors], layer.upstream)])


def concatenated(layer: Layer) -> Callable[..., tuple[Tensor, ...]]:
    """The op over a buffer that is made once; a step's refresh is timed with it."""
    group = concatenate(layer.projections)

    def op(x: Tensor, projections: list[Projection], norm: Norm) -> tuple[Tensor, ...]:
        factors = [f for p in projections for f in (p.a_RK, p.b_NR) if f is not None]
        group.refresh(factors)
        return lora_concat(x, group, factors, norm)

    return op


def problem(model: str) -> str | None:
    layer = draw(model, 65)
    true = gradient(lora_linear_reference, in_float64(layer))
    limit = 2 * float((gradient(lora_linear_reference, layer).double() - true).norm())
    for name, op in {"two branches": lora_linear, "concatenated": concatenated(layer)}.items():
        error = float((gradient(op, layer).double() - true).norm())
        if not error <= limit:
            return f"{name}: gradient error {error:.3g} exceeds {limit:.3g}, twice eager's"
    return None


def truth(model: str, num_rows: int) -> Tensor:
    return gradient(lora_linear_reference, in_float64(draw(model, num_rows)))


def contenders(model: str, num_rows: int) -> tuple[list[Contender], dict[str, str]]:
    layer = draw(model, num_rows)
    ops = {
        "ours": lora_linear,
        "ours_concatenated": concatenated(layer),
        "eager": lora_linear_reference,
        "compiled": torch.compile(lora_linear_reference),
    }
    return [Contender(name, functools.partial(gradient, op, layer)) for name, op in ops.items()], {}
