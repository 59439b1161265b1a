"""Which implementation the model in training runs by (`trainer.kernels`), and for how long."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cltrain_kernels import apply
from cltrain_kernels.dispatch import VARIABLE

from cltrain.config import Kernels


@contextmanager
def fused(peft_model: Any, kernels: Kernels) -> Iterator[None]:
    """Inside the block the model's decoder runs by the fused ops, where they can: `auto` takes Triton on a GPU,
    `reference` plain PyTorch everywhere, and `off` leaves the model to PEFT's modules."""
    if kernels == "off":
        yield
        return
    asked = os.environ.get(VARIABLE)
    if kernels == "reference":
        os.environ[VARIABLE] = kernels  # read at each op, also by the threads that run backward on a GPU
    applied = apply(peft_model)
    try:
        yield
    finally:
        applied.remove()
        if kernels == "reference":
            os.environ.pop(VARIABLE)
            if asked is not None:
                os.environ[VARIABLE] = asked
