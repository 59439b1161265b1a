"""Which implementation an update runs by (`trainer.kernels`), and for how long."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cltrain_kernels import apply
from cltrain_kernels.dispatch import VARIABLE

from cltrain.config import Kernels


@contextmanager
def run_by(kernels: Kernels) -> Iterator[None]:
    """Inside the block every op, the loss head too, runs as `kernels` says: `auto` by its device (or by
    CLTRAIN_KERNELS), `reference` and `off` in plain PyTorch everywhere."""
    if kernels == "auto":
        yield
        return
    asked = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "reference"  # read at each op, also by the threads that run backward on a GPU
    try:
        yield
    finally:
        if asked is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = asked


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
