"""Which implementation of an op runs: by the device of its input, or by CLTRAIN_KERNELS=auto|triton|reference."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from typing import Literal, cast, get_args

import torch

log = logging.getLogger(__name__)

Implementation = Literal["triton", "reference"]
VARIABLE = "CLTRAIN_KERNELS"


def implementation_for(device: torch.device) -> Implementation:
    """The implementation that runs for tensors on `device`.

    `auto` (or unset) takes Triton on CUDA and HIP devices and the reference elsewhere. `triton` and `reference` are
    obeyed or refused: ValueError for any other word, RuntimeError when triton is asked for and cannot run there.
    """
    asked = os.environ.get(VARIABLE, "auto")
    if asked == "auto":
        if device.type != "cuda":
            return "reference"
        if not _has_triton():
            _say_once(f"triton is not installed: ops on {device.type} run as plain PyTorch")
            return "reference"
        return "triton"
    if asked not in get_args(Implementation):
        raise ValueError(f"{VARIABLE} takes auto, triton or reference; got {asked!r}")
    if asked == "triton":
        if not _has_triton():
            raise RuntimeError(
                f"{VARIABLE}=triton, but triton is not installed: pip install triton, or unset {VARIABLE}"
            )
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError(
                f"{VARIABLE}=triton, but the tensors are on {device.type}: unset {VARIABLE}, or set TRITON_INTERPRET=1 "
                "to run kernels slowly on the CPU"
            )
    return cast(Implementation, asked)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _say_once(text: str) -> None:
    log.warning(text)
