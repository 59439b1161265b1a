"""sha256 of all that the trained bytes depend on: a checkpoint counts only for the inputs it was made from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence

import torch
from cltrain_kernels.dispatch import VARIABLE

from cltrain import __version__
from cltrain.config import TrainerConfig
from cltrain.models.adapter import AdapterFile, Factors, snapshot
from cltrain.models.base import Base
from cltrain.objectives.fisher import to_tensors
from cltrain.records import TokenRow
from cltrain.trainer.memory import Memory

CHECKPOINTS = 2  # counts the ways in which they were ever written


def fingerprint_of(
    base: Base,
    start: AdapterFile,
    incumbent: AdapterFile | None,
    fresh: Sequence[TokenRow],
    replay: Sequence[TokenRow],
    anchors: Sequence[TokenRow],
    trainer: TrainerConfig,
    radii: Mapping[str, float] | None,
    least: float,
    memory: Memory,
    num_steps: int,
    seed: int,
) -> str:
    """Hex digest over base, rows, settings, the ball of the cumulative bound, seed, where it starts, the incumbent, the
    Fisher, the versions of this code and of torch, its threads and the kernels that were asked for."""
    whole = hashlib.sha256()
    settings = trainer.model_dump(mode="json", exclude={"checkpoint_every", "anchors", "num_anchors", "anchor_tokens"})
    numbers = [start.rank, start.alpha, start.targets, settings, radii, least, num_steps, seed]
    machine = [CHECKPOINTS, __version__, torch.__version__, torch.get_num_threads(), os.environ.get(VARIABLE)]
    loaded = [base.digest, base.device, str(base.model.dtype), base.context]
    whole.update(json.dumps([loaded, numbers, machine], sort_keys=True).encode())
    for rows in (fresh, replay, anchors):
        for row in rows:
            whole.update(repr(row).encode())
        whole.update(b"\0")
    whole.update(_bytes_of(start.factors))
    whole.update(_bytes_of(incumbent.factors) if incumbent is not None else b"")
    if memory.fisher is not None:  # the fast weights, if they are used, are the start
        for name, value in to_tensors(memory.fisher).items():
            whole.update(name.encode() + value.numpy().tobytes())
    return whole.hexdigest()


def _bytes_of(factors: Factors) -> bytes:
    return b"".join(
        module.encode() + a_RK.numpy().tobytes() + b_NR.numpy().tobytes()
        for module, (a_RK, b_NR) in snapshot(factors).items()
    )
