"""What names a base and an adapter: hashes over their files. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from cltrain.errors import DataError

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
MANIFEST = "manifest.json"  # of a release: what it is, and the sha256 of its other files
SIGNATURE = "manifest.sig"  # over the manifest; where the owner signs
MEMORY_FILE = "memory.safetensors"  # what an update leaves for the next one; optional, and no part of the digest


def shipped_base() -> Path:
    """Directory of the small base that ships with the package."""
    return Path(__file__).resolve().parent.parent / "demo" / "base"


def base_path(path: Path | None) -> Path:
    """The configured base directory, or the shipped one for None."""
    return shipped_base() if path is None else Path(path).expanduser().resolve()


def changed_anchors(directory: Path) -> list[Path]:
    """Pinned anchors (see models/anchors.py) whose bytes are not those that their name promises."""
    pinned = sorted(directory.glob("*-*.jsonl"))
    return [file for file in pinned if not file.stem.endswith(hashlib.sha256(file.read_bytes()).hexdigest()[:12])]


def weight_files(directory: Path) -> list[Path]:
    """The base's safetensors files, sorted by name. Raises DataError when there is no loadable base there."""
    if not (directory / "config.json").is_file():
        raise DataError(f"{directory} is not a model directory (no config.json): set base.path to one")
    files = sorted(directory.glob("*.safetensors"))
    if files:
        return files
    pickled = sorted(p.name for suffix in ("bin", "pt", "pth", "pkl") for p in directory.glob(f"*.{suffix}"))
    if pickled:
        raise DataError(
            f"{directory} holds its weights as pickle ({pickled[0]}), which may run code when read: "
            "convert it to safetensors"
        )
    raise DataError(f"{directory} has no weights (*.safetensors)")


def base_digest(path: Path) -> str:
    """sha256 (hex) over config.json and the weight files, names and bytes. Cached by size and modification time."""
    files = [path / "config.json", *weight_files(path)]
    stats = [file.stat() for file in files]
    return _hash(tuple((str(file), s.st_size, s.st_mtime_ns) for file, s in zip(files, stats, strict=True)))


def adapter_digest(directory: Path) -> str:
    """sha256 (hex) over the two adapter files, names and bytes. Raises DataError when one is missing."""
    for name in ADAPTER_FILES:
        if not (directory / name).is_file():
            raise DataError(f"{directory} is not an adapter directory: {name} is missing")
    return _digest([directory / name for name in ADAPTER_FILES])


def check_manifest(directory: Path, manifest: bytes) -> dict[str, Any]:
    """The manifest.json of these bytes, once the directory has its name and holds exactly the files that it names under
    "files", each with its sha256. Raises DataError otherwise."""
    try:
        said = json.loads(manifest)
    except ValueError as error:
        raise DataError(f"{directory / MANIFEST} cannot be read as JSON: {error}") from None
    files = said.get("files") if isinstance(said, dict) else None
    present = {name for name in (*ADAPTER_FILES, MEMORY_FILE) if (directory / name).exists()}
    if not isinstance(files, dict) or set(files) != present:
        raise DataError(f'{directory / MANIFEST} does not name the sha256 of every adapter file under "files"')
    for name, expected in files.items():
        with (directory / name).open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != expected:
                raise DataError(f"{directory / name} is not the file that was sealed (sha256 differs from {MANIFEST})")
    if (name := said.get("name", directory.name)) != directory.name:
        raise DataError(f"{directory} holds what was sealed as {name}")
    return dict(said)


@lru_cache(maxsize=64)
def _hash(files: tuple[tuple[str, int, int], ...]) -> str:
    return _digest([Path(name) for name, _size, _time in files])


def _digest(files: list[Path]) -> str:
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        whole.update(f"{file.name}\0{content}\n".encode())
    return whole.hexdigest()
