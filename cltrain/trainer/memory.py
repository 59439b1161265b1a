"""What an update leaves for the next one beside the adapter itself: the Fisher of EWC, the fast weights of EMA.

Sealed with the release in one safetensors file, so that rolling back a release rolls its memory back too.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cltrain.errors import DataError
from cltrain.models.adapter import AdapterFile
from cltrain.models.digest import MEMORY_FILE
from cltrain.objectives.fisher import Fisher, from_tensors, to_tensors


@dataclass(frozen=True)
class Memory:
    """`fisher` weighs what earlier updates learned; `fast` is where training goes on while a slower average serves."""

    fisher: Fisher | None = None
    fast: AdapterFile | None = None


def write_memory(directory: Path, memory: Memory) -> None:
    """Write the file beside the adapter, or nothing when there is nothing to remember. Raises DataError for a disk that
    is full."""
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    if memory.fisher is not None:
        tensors |= {f"fisher/{name}": value.contiguous() for name, value in to_tensors(memory.fisher).items()}
    if memory.fast is not None:
        for module, (a_RK, b_NR) in memory.fast.factors.items():
            tensors |= {f"fast/{module}/A": a_RK.contiguous(), f"fast/{module}/B": b_NR.contiguous()}
    if not tensors:
        return
    try:
        with (directory / MEMORY_FILE).open("wb") as stream:
            stream.write(save(tensors))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise DataError(f"cannot write {directory / MEMORY_FILE}: {error.strerror}") from error


def sealed_memory(directory: Path | None, adapter: AdapterFile | None, sha256: str | None) -> Memory:
    """The memory of a release whose manifest gives its file this hash; None: nothing was sealed, and a file that lies
    there all the same is not read. Raises DataError for another file than the sealed one."""
    if directory is None or sha256 is None:
        return Memory()
    try:
        with (directory / MEMORY_FILE).open("rb") as stream:
            seen = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{directory / MEMORY_FILE} cannot be read: {error.strerror}") from error
    if seen != sha256:
        raise DataError(f"{directory / MEMORY_FILE} is not the file that was sealed: restore it from a backup")
    return read_memory(directory, adapter)


def read_memory(directory: Path | None, adapter: AdapterFile | None) -> Memory:
    """The memory beside `adapter`, sealed or not; empty when there is none. Raises DataError for a damaged file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if directory is None or adapter is None or not (directory / MEMORY_FILE).exists():
        return Memory()
    try:
        tensors = load_file(directory / MEMORY_FILE)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{directory / MEMORY_FILE} is damaged: {error}") from error
    fisher = {name.removeprefix("fisher/"): value for name, value in tensors.items() if name.startswith("fisher/")}
    fast = {
        module: (tensors[f"fast/{module}/A"], tensors[f"fast/{module}/B"])
        for module in adapter.factors
        if f"fast/{module}/A" in tensors
    }
    return Memory(from_tensors(fisher) if fisher else None, adapter.with_factors(fast) if fast else None)
