"""One file that holds an interrupted update: factors, Adam's moments, the step, what was measured so far.

Written whole or not at all; it counts only for exactly the inputs that it was made from.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
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

    said = json.dumps({"fingerprint": fingerprint, "step": checkpoint.step, "history": checkpoint.history})
    content = to_bytes(checkpoint.tensors, metadata={"state": said, "sha256": _digest(said, checkpoint.tensors)})
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
    """The checkpoint of `work_dir`; None when there is none, or one of other inputs. Raises DataError for one that is
    damaged, were it by a single bit."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(work_dir / NAME, framework="pt") as file:
            metadata = file.metadata() or {}
            state = json.loads(metadata.get("state", "{}"))
            if state.get("fingerprint") != fingerprint:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, ValueError, AttributeError) as error:
        raise _damaged(work_dir, str(error)) from error
    if metadata.get("sha256") != _digest(metadata["state"], tensors):
        raise _damaged(work_dir, "not what was written")
    return Checkpoint(state["step"], tensors, state["history"])


def _digest(state: str, tensors: Mapping[str, Tensor]) -> str:
    whole = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        whole.update(name.encode() + tensors[name].numpy().tobytes())
    return whole.hexdigest()


def _damaged(work_dir: Path, why: str) -> DataError:
    return DataError(f"{work_dir / NAME} is damaged ({why}): delete it and the update starts over")
