"""Which implementation an update runs by (`trainer.kernels`), and for how long."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from cltrain_kernels import apply
from cltrain_kernels.dispatch import in_plain_torch

from cltrain.config import Kernels


def run_by(kernels: Kernels) -> AbstractContextManager[None]:
    """Inside the block every op, the loss head too, runs as `kernels` says: `auto` by its device (or by
    CLTRAIN_KERNELS), `reference` and `off` in plain PyTorch everywhere."""
    return nullcontext() if kernels == "auto" else in_plain_torch()


@contextmanager
def fused(peft_model: Any, kernels: Kernels) -> Iterator[None]:
    """Inside the block the model's decoder runs by the fused ops, where they can; `off` leaves it to PEFT's modules."""
    with run_by(kernels):
        applied = None if kernels == "off" else apply(peft_model)
        try:
            yield
        finally:
            if applied is not None:
                applied.remove()
