"""What kernel tests and benchmarks share: the twice-eager tolerance, memory that starts as NaN and between guards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Make = Callable[..., Tensor]


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
    """Inside the block `torch.empty`, `torch.empty_like` and `Tensor.new_empty` return NaN (or the most negative
    integer), never zeros."""

    def poisoned(make: Make, _: bool) -> Make:
        return lambda *args, **kwargs: _poison(make(*args, **kwargs))

    with _replaced(poisoned, ("empty", "empty_like", "new_empty")):
        yield


@contextmanager
def guarded(*, in_front: int = 256) -> Iterator[None]:
    """Inside the block what those three and `torch.zeros` make lies between guards, which must be untouched at its end;
    what has no values yet is NaN. `in_front = 0` leaves out the guard before, for who wants a whole storage."""
    guards: list[Tensor] = []

    def between(make: Make, is_zero: bool) -> Make:
        def place(*args: Any, **kwargs: Any) -> Tensor:
            made = make(*args, **kwargs)
            size = made.numel()
            buffer = torch.full((in_front + size + 256,), 7, dtype=made.dtype, device=made.device)
            guards.extend((buffer[:in_front], buffer[in_front + size :]))
            found = buffer[in_front : in_front + size].view(made.shape)
            return found.zero_() if is_zero else _poison(found)

        return place

    with _replaced(between, ("empty", "empty_like", "new_empty", "zeros")):
        yield
    assert guards, "nothing was made inside the block"
    assert all(bool((guard == 7).all()) for guard in guards), "something wrote outside of what it was given"


@contextmanager
def _replaced(around: Callable[[Make, bool], Make], names: Sequence[str]) -> Iterator[None]:
    """Inside the block torch's makers of these names are what `around(maker, whether it makes zeros)` returns."""
    owners: list[Any] = [torch.Tensor if name.startswith("new_") else torch for name in names]
    before = [getattr(owner, name) for owner, name in zip(owners, names, strict=True)]
    try:
        for owner, name, make in zip(owners, names, before, strict=True):
            setattr(owner, name, around(make, name == "zeros"))
        yield
    finally:
        for owner, name, make in zip(owners, names, before, strict=True):
            setattr(owner, name, make)


def _poison(made: Tensor) -> Tensor:
    if made.dtype is torch.bool:
        return made.fill_(True)
    return made.fill_(torch.nan if made.is_floating_point() else torch.iinfo(made.dtype).min)
