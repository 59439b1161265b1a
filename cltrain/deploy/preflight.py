"""Checks an adapter directory before any server hears of it. Imports no torch.

A server's 200 proves nothing: vLLM 0.32 accepts NaN weights, wrong shapes and adapters of another base.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cltrain.errors import ConfigError, DataError
from cltrain.models import digest
from cltrain.models.digest import ADAPTER_FILES, MANIFEST, MEMORY_FILE, SIGNATURE
from cltrain.models.shapes import expected_shapes
from cltrain.models.signature import check_sealed

DIGEST_KEY = "cltrain_base_digest"
MAX_HEADER_BYTES = 16_000_000
MAX_RANK = 512  # vLLM's; what this server takes is declared in server.max_rank
FORBIDDEN = (  # PEFT features that vLLM refuses or that change more than our bounds measure
    "use_dora",
    "use_rslora",
    "use_qalora",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layer_replication",
    "fan_in_fan_out",
    "trainable_token_indices",
    "target_parameters",
)


def check_adapter(
    directory: Path,
    *,
    base_dir: Path,
    base_digest: str | None = None,
    trusted: Sequence[Path] = (),
) -> None:
    """Raise DataError, naming file and fix, unless the directory is a whole, finite adapter for exactly this base.

    `base_digest` is the base's digest where the caller knows it, else it is computed from `base_dir`. A manifest.json
    beside the adapter must name the files' sha256 under "files". One of the `trusted` keys must have signed it. File or
    manifest must say which base the adapter is for.
    """
    _check_files(directory)
    config = _read_json(directory / ADAPTER_FILES[0])
    rank, targets = _check_config(directory, config)
    try:
        shapes = expected_shapes(_read_json(base_dir / "config.json"), targets, rank)
    except ConfigError as error:
        raise DataError(f"{directory}: {error}") from None
    metadata = _check_weights(directory / ADAPTER_FILES[1], shapes)
    base = base_digest or digest.base_digest(base_dir)
    manifest = check_sealed(directory, trusted) if trusted or (directory / MANIFEST).exists() else {}
    made_for = {str(said) for said in (metadata.get(DIGEST_KEY), manifest.get("base")) if said}
    if made_for != {base}:
        named = ", ".join(sorted(said[:12] for said in made_for - {base})) or "that it does not name"
        raise DataError(f"{directory} was trained on base {named}; this one is {base[:12]}")


def _check_files(directory: Path) -> None:
    if not directory.is_dir():
        raise DataError(f"{directory} is not an adapter directory")
    names = {path.name for path in directory.iterdir()}
    if missing := sorted(set(ADAPTER_FILES) - names):
        raise DataError(f"{directory} lacks {', '.join(missing)}")
    odd = sorted(names - {*ADAPTER_FILES, MEMORY_FILE, MANIFEST, SIGNATURE})
    if odd:
        kind = "a pickle file" if odd[0].endswith((".bin", ".pt", ".pth", ".pkl")) else "a file that no adapter needs"
        raise DataError(f"{directory} holds {odd[0]}, {kind}: only safetensors adapters are served")
    for path in directory.iterdir():
        if path.is_symlink() or not path.is_file():
            raise DataError(f"{path} is not a plain file")


def _check_config(directory: Path, config: dict[str, Any]) -> tuple[int, list[str]]:
    if config.get("peft_type") != "LORA":
        raise DataError(f"{directory}: peft_type is {config.get('peft_type')!r}; only LORA is served")
    rank, alpha, targets = config.get("r"), config.get("lora_alpha"), config.get("target_modules")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise DataError(f"{directory}: rank {rank!r} is not a positive number")
    if rank > MAX_RANK:
        raise DataError(f"{directory}: rank {rank}; no server takes more than {MAX_RANK}")
    if not isinstance(alpha, int | float) or not np.isfinite(alpha) or alpha <= 0:
        raise DataError(f"{directory}: lora_alpha {alpha!r} is not a positive number")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise DataError(f"{directory}: target_modules must be a list of module names; got {targets!r}")
    used = [key for key in FORBIDDEN if config.get(key)] + (["bias"] if config.get("bias", "none") != "none" else [])
    if used:
        raise DataError(f"{directory} uses {', '.join(used)}: only plain LoRA is bounded and served")
    return rank, targets


def _check_weights(file: Path, shapes: dict[str, tuple[int, int]]) -> dict[str, str]:
    """Compare the safetensors header with the expected tensors, look at every number; returns the metadata."""
    header, start = _read_header(file)
    metadata = header.pop("__metadata__", {})
    if missing := sorted(shapes.keys() - header.keys()):
        raise DataError(f"{file} lacks {len(missing)} of {len(shapes)} tensors, the first {missing[0]}")
    if odd := sorted(header.keys() - shapes.keys()):
        raise DataError(f"{file} holds {len(odd)} tensors that this base has no place for, the first {odd[0]}")
    data = (
        np.memmap(file, dtype=np.uint8, mode="r", offset=start)
        if file.stat().st_size > start
        else np.zeros(0, np.uint8)
    )
    for name, shape in shapes.items():
        entry = header[name]
        try:
            kind, seen, (begin, end) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{file}: the header's entry for {name} is malformed") from None
        if seen != shape:
            raise DataError(f"{file}: {name} has shape {seen}, this base needs {shape}")
        width = {"F32": 4, "F16": 2, "BF16": 2}.get(kind)
        if width is None:
            raise DataError(f"{file}: {name} is {kind}; adapters are F32, F16 or BF16")
        if not 0 <= begin <= end <= data.size or end - begin != shape[0] * shape[1] * width:
            raise DataError(f"{file} is truncated or its header lies: {name}")
        if not _is_finite(data[begin:end], kind):
            raise DataError(f"{file}: {name} holds NaN or infinite weights")
    return metadata if isinstance(metadata, dict) else {}


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        raw = stream.read(size) if 2 <= size <= MAX_HEADER_BYTES else b""
    try:
        header = json.loads(raw)
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise DataError(f"{file} is not a safetensors file")
    return header, 8 + size


def _is_finite(raw: np.ndarray[Any, Any], kind: str) -> bool:
    if kind == "BF16":  # numpy has no bfloat16: the exponent's bits are all set for NaN and infinity
        return not bool(((raw.view("<u2") & 0x7F80) == 0x7F80).any())
    return bool(np.isfinite(raw.view("<f4" if kind == "F32" else "<f2")).all())


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{file} is not a JSON object")
    return value
