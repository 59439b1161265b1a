"""Which implementation of an op runs: by the device of its input, or by CLTRAIN_KERNELS=auto|triton|reference, for all
ops or op by op ("auto,linear_loss=reference"). Each op's choice is logged once."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch

log = logging.getLogger(__name__)

Implementation = Literal["triton", "reference"]
Op = Literal["adamw", "grams", "linear_loss", "rms_norm", "rope", "swiglu", "token_logprob"]
VARIABLE = "CLTRAIN_KERNELS"


def implementation_for(op: Op, device: torch.device) -> Implementation:
    """The implementation of `op` that runs for tensors on `device`.

    `auto` (or unset) takes Triton on CUDA and HIP devices and the reference elsewhere. `triton` and `reference` are
    obeyed or refused: ValueError for any other word or op, RuntimeError when triton is asked for and cannot run there.
    """
    if _num_plain:
        return _plain(op, device.type)
    return _chosen(op, device.type, os.environ.get(VARIABLE, "auto"), os.environ.get("TRITON_INTERPRET") == "1")


@contextmanager
def in_plain_torch() -> Iterator[None]:
    """Inside the block every op of this process runs by its reference, whatever the variable says: in all threads, for
    those that run a backward are torch's own. Blocks may overlap."""
    global _num_plain
    with _lock:
        _num_plain += 1
    try:
        yield
    finally:
        with _lock:
            _num_plain -= 1


_num_plain, _lock = 0, threading.Lock()


@functools.cache
def _plain(op: Op, device: str) -> Implementation:
    log.info("%s on %s runs by reference: plain PyTorch was asked for", op, device)
    return "reference"


@functools.cache
def _chosen(op: Op, device: str, variable: str, is_interpreted: bool) -> Implementation:
    asked = _asked(variable, op)
    chosen: Implementation = "triton" if asked == "triton" or (asked == "auto" and device == "cuda") else "reference"
    why = f"{VARIABLE}={variable}" if asked != "auto" else f"the default for {device}"
    if chosen == "triton" and not _has_triton():
        if asked == "triton":
            raise RuntimeError(
                f"{VARIABLE}={variable}, but triton is not installed: pip install triton, or unset {VARIABLE}"
            )
        chosen, why = "reference", "triton is not installed"
    if chosen == "triton" and device != "cuda" and not is_interpreted:
        raise RuntimeError(
            f"{VARIABLE}={variable}, but the tensors are on {device}: unset {VARIABLE}, or set TRITON_INTERPRET=1 "
            "to run kernels slowly on the CPU"
        )
    log.info("%s on %s runs by %s: %s", op, device, chosen, why)
    return chosen


def _asked(variable: str, op: Op) -> str:
    """What the variable says of `op`: its own entry, or the one for all ops."""
    found = {"": "auto"}
    for entry in variable.split(","):
        name, _, choice = entry.strip().rpartition("=")
        if name and name not in get_args(Op):
            raise ValueError(f"{VARIABLE}={variable!r}: no op {name!r}; there are {', '.join(get_args(Op))}")
        if choice not in ("auto", *get_args(Implementation)):
            raise ValueError(f"{VARIABLE} takes auto, triton or reference, or op=one of them; got {variable!r}")
        found[name] = choice
    return found.get(op, found[""])


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
