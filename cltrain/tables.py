"""TOML files and `section.key=value` words as plain nested dictionaries: read, merged, compared. Knows no setting."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cltrain.errors import ConfigError


def read(file: Path, paths: Sequence[tuple[str, ...]]) -> dict[str, Any]:
    """One file, with the relative paths that stand at `paths` made relative to it. Raises ConfigError."""
    try:
        values = tomllib.loads(file.read_text())
    except FileNotFoundError:
        raise ConfigError(f"config file {file} does not exist") from None
    except OSError as error:
        raise ConfigError(f"config file {file} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {file} is not valid TOML: {error}") from None
    for *sections, key in paths:
        table: Any = values
        for section in sections:
            table = table.get(section) if isinstance(table, dict) else None
        if isinstance(table, dict) and isinstance(table.get(key), str):
            table[key] = str((file.parent / Path(table[key]).expanduser()).resolve())
    return values


def parse_override(text: str) -> dict[str, Any]:
    """`section.key=value`; what is no TOML value is a text. Raises ConfigError."""
    key, sep, raw = text.partition("=")
    if not sep or not key.strip():
        raise ConfigError(f"--set takes section.key=value; got {text!r}")
    try:
        value = tomllib.loads(f"v = {raw.strip()}")["v"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()  # a bare word is a string
    for part in reversed(key.strip().split(".")):
        value = {part: value}
    return value


def merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """Both, table by table; `high` where they disagree."""
    merged = dict(low)
    for key, value in high.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def differences(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """What `ours` says otherwise than `theirs`, in words."""
    for name, value in ours.items():
        other = theirs.get(name)
        if isinstance(value, dict) and isinstance(other, dict):
            yield from differences(value, other, f"{prefix}{name}.")
        elif value != other:
            yield f"{prefix}{name} = {json.dumps(other)}, not {json.dumps(value)}"
