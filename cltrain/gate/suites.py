"""The owner's questions: read from JSONL, each with a checkable answer. Which are asked: pool.py."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from cltrain.errors import DataError
from cltrain.gate.lines import answer_of, messages_of, read_lines, refuse_unknown, tools_of
from cltrain.gate.rules import NEEDS_EXPECTED, OWN_FIELDS, check_item, rule_of
from cltrain.gate.scorers import tool_calls, violation
from cltrain.records import SuiteItem

KINDS = ("gain", "retention", "canary")
FIELDS = OWN_FIELDS | {"id", "suite", "stratum", "kind", "messages", "tools", "expected", "forbidden", "scorer"}


def load_suite(path: Path, defaults: Mapping[str, str] | None = None) -> list[SuiteItem]:
    """Read an owner's suite: one JSON object per line, blank lines ignored.

    Fields: messages (required, ends before the answer), tools, expected (an assistant message, a text, or
    {"name", "arguments"}), forbidden (a list of tool names or texts), kind (gain, retention or canary), stratum, id,
    suite (default: the file's name), scorer with its own fields (gate/rules.py). `defaults` are fields of lines that do
    not say. Raises DataError naming every bad line by number; nothing is loaded then.
    """
    usual, seen = dict(defaults or {}), set[str]()

    def make(row: dict[str, Any]) -> SuiteItem:
        item = _item(row, path.stem, usual)
        if item.id in seen:
            raise DataError(f"id {item.id} was used before")
        seen.add(item.id)
        return item

    return read_lines(path, "the suite", make)


def item_key(item: SuiteItem) -> str:
    """The item's id and a hash of its content: an edited question is a new one for caches and rotation."""
    content: list[Any] = [item.messages, item.tools, item.expected, item.forbidden]
    if item.scorer != "exact":
        content += [item.scorer, item.rule]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return f"{item.id}~{digest[:12]}"


def skill_of(stratum: str) -> str:
    """The part of a stratum that can be taught: what the agent does, whatever the feedback was."""
    return stratum.split("/", 1)[0]


def is_taught(stratum: str, taught: Collection[str]) -> bool:
    """Whether an update that learned the strata `taught` was meant to change this one."""
    return skill_of(stratum) in {skill_of(name) for name in taught}


def _item(row: dict[str, Any], suite: str, usual: Mapping[str, str]) -> SuiteItem:
    row = {name: value for name, value in usual.items() if name != "rubric" or row.get("scorer") == "judge"} | row
    suite = usual.get("suite", suite)
    scorer, rule = rule_of(row)
    refuse_unknown(row, FIELDS)
    messages, tools = messages_of(row), tools_of(row)
    expected = None if row.get("expected") is None else answer_of(row, "expected")
    forbidden = _forbidden(row.get("forbidden"))
    is_ban = bool(forbidden) and expected is None and scorer in NEEDS_EXPECTED
    kind = row.get("kind", "canary" if is_ban else "gain")
    if kind not in KINDS:
        raise DataError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    if expected is None and scorer in NEEDS_EXPECTED and not (kind == "canary" and forbidden):
        needed = "forbidden (or expected)" if kind == "canary" else "expected"
        raise DataError(f"a {kind} item needs {needed}: without it nothing can be checked")
    if expected is not None and (broken := violation(expected, forbidden)) is not None:
        raise DataError(f"its expected answer contains {broken!r}, which it forbids")
    content = [row["messages"], list(tools), expected, forbidden, *([scorer, rule] if scorer != "exact" else ())]
    default_id = f"{suite}-{hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]}"
    calls = tool_calls(expected) if expected is not None else []
    item = SuiteItem(
        id=_text(row, "id", default_id),
        suite=_text(row, "suite", suite),
        stratum=_text(row, "stratum", calls[0][0] if calls else "text"),
        kind=kind,
        messages=messages,
        tools=tools,
        expected=expected,
        forbidden=forbidden,
        scorer=scorer,
        rule=rule,
    )
    check_item(item)
    return item


def _forbidden(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, list) or not all(isinstance(entry, str) and entry.strip() for entry in entries):
        raise DataError("forbidden must be a list of tool names or texts, none of them blank")
    return tuple(entries)


def _text(row: dict[str, Any], field: str, default: str) -> str:
    value = row.get(field, default)
    if not isinstance(value, str) or not value:
        raise DataError(f"{field} must be a text; got {value!r}")
    return value
