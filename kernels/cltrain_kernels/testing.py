"""What kernel tests and benchmarks share: the twice-eager tolerance and memory that starts as NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def assert_as_accurate_as_eager(
    op: Callable[..., Tensor], eager: Callable[..., Tensor], *inputs: Tensor, slack: float = 2.0, seed: int = 0
) -> None:
    """Output and every gradient of `op` are at most `slack` times as far from float64 as `eager` in the same dtype.

    One unit in the last place of the largest true element is allowed on top, for cases where eager happens to be exact.
    Raises AssertionError naming the output or gradient, the error and the limit.
    """
    truth = _run(eager, [x.double() if x.is_floating_point() else x for x in inputs], seed)
    ours = _run(op, list(inputs), seed)
    theirs = _run(eager, list(inputs), seed)
    for name, true in truth.items():
        ulp = torch.finfo(theirs[name].dtype).eps * _largest(true)
        limit = slack * _largest(theirs[name].double() - true) + ulp
        error = _largest(ours[name].double() - true)
        assert error <= limit, f"{name}: error {error:.3g} exceeds {limit:.3g} ({slack}x eager + 1 ulp)"


def _run(function: Callable[..., Tensor], inputs: list[Tensor], seed: int) -> dict[str, Tensor]:
    leaves = [_leaf(x) if x.is_floating_point() else x for x in inputs]
    output = function(*leaves)
    results = {"output": output.detach()}
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    output.backward(upstream.to(output))
    for i, leaf in enumerate(leaves):
        if leaf.requires_grad:
            assert leaf.grad is not None, f"input {i} got no gradient"
            results[f"gradient of input {i}"] = leaf.grad
    return results


def _leaf(x: Tensor) -> Tensor:
    """A leaf that keeps the strides of `x`, so that views are tested as views."""
    leaf = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    leaf.copy_(x)
    return leaf.requires_grad_()


def _largest(x: Tensor) -> float:
    if x.numel() == 0:
        return 0.0
    assert not x.isnan().any(), "a NaN: part of the result was never written"
    return float(x.abs().max())


@contextmanager
def nan_filled() -> Iterator[None]:
    """Inside the block `torch.empty` and `torch.empty_like` return NaN (or the most negative integer), never zeros."""
    originals = torch.empty, torch.empty_like

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def fill(*args: Any, **kwargs: Any) -> Tensor:
            made = make(*args, **kwargs)
            return made.fill_(torch.nan if made.is_floating_point() else torch.iinfo(made.dtype).min)

        return fill

    torch.empty, torch.empty_like = poisoned(originals[0]), poisoned(originals[1])
    try:
        yield
    finally:
        torch.empty, torch.empty_like = originals
