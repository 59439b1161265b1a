"""The owner's questions: read from JSONL, each with a checkable answer. Which are asked: pool.py."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from cltrain.errors import DataError
from cltrain.gate.scorers import text_of, tool_calls, violation
from cltrain.records import Message, SuiteItem

KINDS = ("gain", "retention", "canary")
FIELDS = {"id", "suite", "stratum", "kind", "messages", "tools", "expected", "forbidden"}
MAX_SHOWN = 20  # bad lines named in one error


def load_suite(path: Path) -> list[SuiteItem]:
    """Read an owner's suite: one JSON object per line, blank lines ignored.

    Fields: messages (required, ends before the answer), tools, expected (an assistant message, a text, or
    {"name", "arguments"}), forbidden (a list of tool names or texts), kind (gain, retention or canary), stratum, id,
    suite (default: the file's name). Raises DataError naming every bad line by number; nothing is loaded then.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the suite {path} cannot be read: {error}") from None
    items: dict[str, SuiteItem] = {}
    problems = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = _item(json.loads(line), path.stem)
            if item.id in items:
                raise DataError(f"id {item.id} was used before")
            items[item.id] = item
        except ValueError as error:
            problems.append(f"line {number}: not valid JSON ({error})")
        except DataError as error:
            problems.append(f"line {number}: {error}")
    if problems:
        more = f"\n... and {len(problems) - MAX_SHOWN} more" if len(problems) > MAX_SHOWN else ""
        shown = "\n".join(problems[:MAX_SHOWN])
        raise DataError(f"{len(problems)} bad lines in the suite {path}:\n{shown}{more}")
    if not items:
        raise DataError(f"the suite {path} holds no items")
    return list(items.values())


def item_key(item: SuiteItem) -> str:
    """The item's id and a hash of its content: an edited question is a new one for caches and rotation."""
    content = [item.messages, item.tools, item.expected, item.forbidden]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return f"{item.id}~{digest[:12]}"


def skill_of(stratum: str) -> str:
    """The part of a stratum that can be taught: what the agent does, whatever the feedback was."""
    return stratum.split("/", 1)[0]


def is_taught(stratum: str, taught: Collection[str]) -> bool:
    """Whether an update that learned the strata `taught` was meant to change this one."""
    return skill_of(stratum) in {skill_of(name) for name in taught}


def _item(row: Any, suite: str) -> SuiteItem:
    if not isinstance(row, dict):
        raise DataError("a JSON object is needed")
    unknown = sorted(set(row) - FIELDS)
    if unknown:
        raise DataError(f"unknown field {unknown[0]!r}; known are {', '.join(sorted(FIELDS))}")
    messages = _messages(row.get("messages"))
    tools = row.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError("tools must be a list of tool definitions")
    expected = None if row.get("expected") is None else _expected(row["expected"])
    forbidden = _forbidden(row.get("forbidden"))
    kind = row.get("kind", "canary" if forbidden and expected is None else "gain")
    if kind not in KINDS:
        raise DataError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    if expected is None and not (kind == "canary" and forbidden):
        needed = "forbidden (or expected)" if kind == "canary" else "expected"
        raise DataError(f"a {kind} item needs {needed}: without it nothing can be checked")
    if expected is not None and (broken := violation(expected, forbidden)) is not None:
        raise DataError(f"its expected answer contains {broken!r}, which it forbids")
    content = json.dumps([row["messages"], tools, expected, forbidden], sort_keys=True)
    default_id = f"{suite}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    calls = tool_calls(expected) if expected is not None else []
    return SuiteItem(
        id=_text(row, "id", default_id),
        suite=_text(row, "suite", suite),
        stratum=_text(row, "stratum", calls[0][0] if calls else "text"),
        kind=kind,
        messages=messages,
        tools=tuple(tools),
        expected=expected,
        forbidden=forbidden,
    )


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise DataError("messages must be a list with at least one message")
    for message in value:
        if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant", "tool"):
            raise DataError("each message needs a role: system, user, assistant or tool")
    if value[-1]["role"] not in ("user", "tool"):
        raise DataError(f"messages end with the {value[-1]['role']}; they must end before the answer that is asked for")
    return tuple(value)


def _expected(value: Any) -> Message:
    if isinstance(value, str):
        value = {"content": value}
    if isinstance(value, dict) and "name" in value:
        function = {"name": value["name"], "arguments": value.get("arguments", {})}
        value = {"content": None, "tool_calls": [{"id": "call_0", "type": "function", "function": function}]}
    if not isinstance(value, dict) or value.get("role", "assistant") != "assistant":
        raise DataError('expected must be an assistant message, a text, or {"name": tool, "arguments": {...}}')
    message = {**value, "role": "assistant"}
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list) or not all(
        isinstance(call, dict) and isinstance(call.get("function"), dict) for call in calls
    ):
        raise DataError('tool_calls must be a list of {"type": "function", "function": {"name", "arguments"}}')
    for call in calls:
        if isinstance(call["function"].get("arguments"), dict):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    for name, arguments in tool_calls(message):
        if not name or not arguments.startswith("{"):
            raise DataError(
                f"the expected call of {name or 'a tool without name'} has arguments that are no JSON object"
            )
    if not tool_calls(message) and not text_of(message).strip():
        raise DataError("expected neither calls a tool nor says anything")
    return message


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
