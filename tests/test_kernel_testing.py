"""What kernel tests rely on: memory without values is never zero, and writing beyond it is seen."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cltrain_kernels.testing import guarded, nan_filled
from torch import Tensor

MAKERS: list[Callable[[], Tensor]] = [
    lambda: torch.empty(3, 4),
    lambda: torch.empty((3, 4), dtype=torch.float16),
    lambda: torch.empty_like(torch.ones(3, 4)),
    lambda: torch.ones(2).new_empty((3, 4)),
    lambda: torch.ones(2).new_empty(3, 4, dtype=torch.float64),
]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("block", [nan_filled, guarded])
def test_memory_without_values_is_nan_inside_the_block_alone(make: Callable[[], Tensor], block: Callable) -> None:
    before = torch.empty, torch.empty_like, torch.Tensor.new_empty, torch.zeros
    with block():
        made = make()
        assert made.shape == (3, 4)
        assert made.isnan().all()
        assert bool((torch.ones(2).new_empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).min).all())
        assert not torch.zeros(2, 3).any()
    assert (torch.empty, torch.empty_like, torch.Tensor.new_empty, torch.zeros) == before


def write(make: Callable[[], Tensor], offset: int, in_front: int = 256) -> Tensor:
    """Make a tensor between guards and write one element at `offset` from its beginning."""
    with guarded(in_front=in_front):
        made = make()
        made.as_strided((1,), (1,), made.storage_offset() + offset).fill_(1.0)
    return made


@pytest.mark.parametrize("make", [*MAKERS, lambda: torch.zeros(3, 4)])
def test_writing_beyond_what_was_made_is_seen(make: Callable[[], Tensor]) -> None:
    assert write(make, 11).flatten()[11] == 1
    for offset in (-1, 12):
        with pytest.raises(AssertionError, match="outside of what it was given"):
            write(make, offset)


def test_without_a_guard_in_front_a_tensor_begins_its_storage() -> None:
    assert write(lambda: torch.zeros(5), 4, in_front=0).storage_offset() == 0
    with pytest.raises(AssertionError, match="outside of what it was given"):
        write(lambda: torch.zeros(5), 5, in_front=0)
