"""From TOML files and `--set` to one dictionary of settings, and from what is wrong with it to a sentence. Knows no
setting but those that are paths: config.py and config_gate.py have them all.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from cltrain.errors import ConfigError

PATHS = (
    ("base", "path"), ("experience", "rehearsal"), ("trainer", "anchors"), ("gate", "suite"),
    ("gate", "character", "harmful"), ("gate", "character", "harmless"), ("gate", "character", "probes"),
    ("signing", "key"),
)  # fmt: skip


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("true and false are for switches only")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _each_once(cls, value: Any) -> Any:
        if isinstance(value, tuple) and len(set(value)) < len(value):
            raise ValueError("something is listed twice")
        return value


def merged(files: Sequence[Path], overrides: Sequence[str]) -> dict[str, Any]:
    """The files left to right, then the overrides. Raises ConfigError for what cannot be read."""
    found: dict[str, Any] = {}
    for file in files:
        found = _merge(found, _read(Path(file)))
    for override in overrides:
        found = _merge(found, _parse_override(override))
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(file.read_text())
    except FileNotFoundError:
        raise ConfigError(f"config file {file} does not exist") from None
    except OSError as error:
        raise ConfigError(f"config file {file} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {file} is not valid TOML: {error}") from None
    for *sections, key in PATHS:
        table: Any = values
        for section in sections:
            table = table.get(section) if isinstance(table, dict) else None
        if isinstance(table, dict) and isinstance(table.get(key), str):
            table[key] = str((file.parent / Path(table[key]).expanduser()).resolve())
    signing = values.get("signing")
    if isinstance(signing, dict) and isinstance(signing.get("trusted"), list):
        signing["trusted"] = [_beside(file, key) for key in signing["trusted"]]
    gate = values.get("gate")
    suites = gate.get("suites") if isinstance(gate, dict) else None
    for suite in suites if isinstance(suites, list) else ():
        if isinstance(suite, dict):
            for key in {"path", "python"} & set(suite):
                suite[key] = _beside(file, suite[key])
            if isinstance(words := suite.get("command"), list):
                suite["command"] = [_beside(file, w) if str(w).startswith(("./", "../")) else w for w in words]
    return values


def _beside(file: Path, path: Any) -> Any:
    """A relative path made absolute; links stay, as the interpreter of a virtual environment is one."""
    return os.path.abspath(file.parent / Path(path).expanduser()) if isinstance(path, str) else path


def _parse_override(text: str) -> dict[str, Any]:
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


def _merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    merged = dict(low)
    for key, value in high.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def differences(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """`section.name = their value, not our value`, of every setting of ours that is another one there."""
    for name, value in ours.items():
        other = theirs.get(name)
        if isinstance(value, dict) and isinstance(other, dict):
            yield from differences(value, other, f"{prefix}{name}.")
        elif value != other:
            yield f"{prefix}{name} = {json.dumps(other)}, not {json.dumps(value)}"


def explain(problem: Any, root: type[BaseModel]) -> str:
    """What pydantic found wrong with one setting of `root`, with the setting that may have been meant."""
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown setting {where}{_suggest(problem['loc'], root)}"
    seen = problem.get("input")
    shown = "" if isinstance(seen, dict | BaseModel) else f"; got {seen!r}"
    return f"{where or 'config'}: {problem['msg']}{shown}"


def _suggest(loc: tuple[Any, ...], root: type[BaseModel]) -> str:
    section = root
    for part in loc[:-1]:
        if not isinstance(part, int):  # a number counts the tables of a list
            section = _section_in(section.model_fields[str(part)].annotation)
    prefix = ".".join(str(part) for part in loc[:-1])
    near = difflib.get_close_matches(str(loc[-1]), section.model_fields, n=1, cutoff=0.5)
    if near:
        return f". Did you mean {prefix + '.' if prefix else ''}{near[0]}?"
    return f". {prefix or 'The top level'} has: {', '.join(section.model_fields)}"


def _section_in(annotation: Any) -> type[BaseModel]:
    """The section that a setting is, may be, or is a list of."""
    if isinstance(annotation, type):
        return annotation
    (section,) = (part for part in get_args(annotation) if isinstance(part, type) and issubclass(part, BaseModel))
    return section
