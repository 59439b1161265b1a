"""One file that holds an interrupted update: factors, Adam's moments, the step, what was measured so far.

Written whole or not at all; it counts only for exactly the inputs that it was made from.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cltrain.errors import DataError
from cltrain.models.adapter import sync_directory

NAME = "checkpoint.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """State after `step` steps: the flat buffers by name, and one entry per step in `history`."""

    step: int
    tensors: dict[str, Tensor]
    history: list[dict[str, float]]


def save(work_dir: Path, fingerprint: str, checkpoint: Checkpoint) -> None:
    """Replace the checkpoint of `work_dir`, durably. Raises DataError when it cannot be written."""
    from safetensors.torch import save as to_bytes

    state = {"fingerprint": fingerprint, "step": checkpoint.step, "history": checkpoint.history}
    content = to_bytes(checkpoint.tensors, metadata={"state": json.dumps(state)})
    temporary = work_dir / (NAME + ".writing")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, work_dir / NAME)
        sync_directory(work_dir)
    except OSError as error:
        raise DataError(f"cannot write a checkpoint to {work_dir}: {error.strerror}") from error


def load(work_dir: Path, fingerprint: str) -> Checkpoint | None:
    """The checkpoint of `work_dir`; None when there is none, or one of other inputs."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(work_dir / NAME, framework="pt") as file:
            state = json.loads((file.metadata() or {}).get("state", "{}"))
            if state.get("fingerprint") != fingerprint:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{work_dir / NAME} is damaged ({error}): delete it and the update starts over") from error
    return Checkpoint(state["step"], tensors, state["history"])
