"""How a line of a suite wants to be scored, checked when it is read: what cannot work is refused before anything is
trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import regex

from cltrain.errors import DataError
from cltrain.gate.leaks import refuse_leak
from cltrain.gate.scorers import PURE, tool_calls
from cltrain.records import SuiteItem

FIELDS: Mapping[str, tuple[str, ...]] = {  # of a line, by its scorer; the first is needed
    "exact": (),
    "tool_call": (),
    "regex": ("pattern",),
    "json_schema": ("schema", "tool"),
    "judge": ("rubric",),
}
OWN_FIELDS = frozenset(name for names in FIELDS.values() for name in names)
NEEDS_EXPECTED = ("exact", "tool_call")


def rule_of(row: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The scorer that a line names and what it goes by. Raises DataError for a rule that cannot be applied."""
    scorer = row.get("scorer", "exact")
    if not isinstance(scorer, str) or scorer not in FIELDS:
        raise DataError(f"scorer is {scorer!r}; it must be one of {', '.join(FIELDS)}")
    strange = sorted(name for name in OWN_FIELDS if row.get(name) is not None and name not in FIELDS[scorer])
    if strange:
        raise DataError(f"{strange[0]} means nothing to scorer {scorer}")
    rule = {name: row[name] for name in FIELDS[scorer] if row.get(name) is not None}
    if FIELDS[scorer] and FIELDS[scorer][0] not in rule:
        raise DataError(f"scorer {scorer} needs {FIELDS[scorer][0]}")
    for name in ("pattern", "rubric", "tool"):
        if name in rule and (not isinstance(rule[name], str) or not rule[name].strip()):
            raise DataError(f"{name} must be a text that is not blank; got {rule[name]!r}")
    if scorer == "regex":
        _check_pattern(rule["pattern"])
    if scorer == "json_schema":
        _check_schema(rule["schema"])
    return scorer, rule


def check_item(item: SuiteItem) -> None:
    """Raise DataError when the item contradicts itself or its prompt gives away what passes (gate/leaks.py)."""
    if item.scorer == "tool_call" and item.expected is not None and len(tool_calls(item.expected)) != 1:
        raise DataError("scorer tool_call needs an expected answer with exactly one call")
    if item.scorer in PURE and item.expected is not None and PURE[item.scorer](item, item.expected) != 1.0:
        raise DataError(f"its expected answer does not pass its own {item.scorer}")
    refuse_leak(item)


def _check_pattern(pattern: str) -> None:
    try:
        matches_nothing = regex.compile(pattern).search("") is not None
    except regex.error as error:
        raise DataError(f"pattern {pattern!r} is no regular expression: {error}") from None
    if matches_nothing:
        raise DataError(f"pattern {pattern!r} is found in an empty answer: everything would pass")


def _check_schema(schema: Any) -> None:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError

    if not isinstance(schema, dict) or not schema:
        raise DataError(f"schema must be a JSON Schema, an object that says something; got {schema!r}")
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise DataError(f"schema is no JSON Schema (2020-12): {error.message}") from None
    for target in _references(schema):
        if not target.startswith("#"):
            raise DataError(f"schema refers to {target!r}: only what is inside it (#...) is read, nothing is fetched")


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        yield from (str(schema[key]) for key in ("$ref", "$dynamicRef") if key in schema)
    parts = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ()
    for part in parts:
        yield from _references(part)
