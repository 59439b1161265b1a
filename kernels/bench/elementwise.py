"""What cases of ops that are bound by memory share: correctness, then time against eager, compiled and Liger."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from case import Case, Contender, installed
from cltrain_kernels.testing import assert_as_accurate_as_eager
from torch import Tensor

Op = Callable[..., Tensor]


def case(
    op: str, facts: Mapping[str, Any], draw: Callable[[int], tuple[Tensor, ...]], ours: Op, eager: Op,
    liger: Callable[[], Op],
) -> Case:  # fmt: skip
    """`draw(seed)` gives the inputs, of which the first is differentiated; `liger` imports that peer's op."""
    return Case(
        op,
        facts,
        functools.partial(problem, draw, ours, eager),
        functools.partial(contenders, draw, ours, eager, liger),
        functools.partial(truth, draw, eager),
    )


def draw_normal(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda", dtype=torch.float32).to(dtype)


def problem(draw: Callable[[int], tuple[Tensor, ...]], ours: Op, eager: Op) -> str | None:
    first, *others = draw(1)
    try:
        assert_as_accurate_as_eager(
            lambda x: ours(x, *others), lambda x: eager(x, *(other.to(x.dtype) for other in others)), first
        )
    except AssertionError as error:
        return str(error)
    return None


def gradient(op: Op, inputs: tuple[Tensor, ...]) -> Tensor:
    leaf = inputs[0].detach().requires_grad_()
    y = op(leaf, *inputs[1:])
    return torch.autograd.grad(y, leaf, y.detach())[0]


def truth(draw: Callable[[int], tuple[Tensor, ...]], eager: Op) -> Tensor:
    return gradient(eager, tuple(t.double() for t in draw(0)))


def contenders(
    draw: Callable[[int], tuple[Tensor, ...]], ours: Op, eager: Op, liger: Callable[[], Op]
) -> tuple[list[Contender], dict[str, str]]:
    inputs = draw(0)
    ops = {"ours": ours, "eager": eager, "compiled": torch.compile(eager)}
    reason = installed("liger_kernel")
    if not reason:
        ops["liger"] = liger()
    found = [Contender(name, functools.partial(gradient, op, inputs)) for name, op in ops.items()]
    return found, {"liger": reason} if reason else {}
