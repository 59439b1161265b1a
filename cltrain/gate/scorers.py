"""What counts as the same answer, and what a canary forbids.

Arguments are equal as JSON values: key order and number spelling (1, 1.0) do not matter, runs of whitespace in strings
count as one space, unicode is NFC. Case does matter: an order number in the wrong case is a wrong order number.
Free text is compared whole, without regard to case and whitespace. Nothing is fuzzy, and nobody is asked to judge: that
is http_judge.py.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

import regex

from cltrain.errors import DataError
from cltrain.records import Message, SuiteItem

VERSION = "1"  # part of the key under which scores are cached: change it when a score may change
PATTERN_TIMEOUT_S = 1.0

Call = tuple[str, str]


def score_item(item: SuiteItem, answer: Message) -> float:
    """1.0 when the answer breaks none of the item's prohibitions and is right by its scorer (one of PURE), else 0.0.

    Raises DataError where a rule cannot be applied to the answer: that is no zero.
    """
    if violation(answer, item.forbidden) is not None:
        return 0.0
    return PURE[item.scorer](item, answer)


def _exact(item: SuiteItem, answer: Message) -> float:
    return 1.0 if item.expected is None else agreement(answer, item.expected)


def _tool_call(item: SuiteItem, answer: Message) -> float:
    """One call and no other, of the expected tool, with at least the expected arguments."""
    if item.expected is None:
        return 1.0
    ((name, wanted),) = _parsed_calls(item.expected)
    return float(len(tool_calls(answer)) == 1 and performs(answer, {"name": name, "arguments": wanted}))


def _regex(item: SuiteItem, answer: Message) -> float:
    """Whether the pattern (module regex) is found in the answer's text; a call without words has none."""
    try:
        found = regex.search(item.rule["pattern"], text_of(answer), timeout=PATTERN_TIMEOUT_S)
    except TimeoutError:
        raise DataError(
            f"item {item.id}: its pattern {item.rule['pattern']!r} took more than {PATTERN_TIMEOUT_S:g} s on one answer"
        ) from None
    return float(found is not None)


def _json_schema(item: SuiteItem, answer: Message) -> float:
    """The arguments of every call, else the text read as JSON, obey the schema. With `tool`: one call of it."""
    from jsonschema import Draft202012Validator
    from referencing import Registry

    calls = _parsed_calls(answer)
    tool = item.rule.get("tool")
    if tool is not None and [name for name, _ in calls] != [tool]:
        return 0.0
    try:
        values = [arguments for _, arguments in calls] or [json.loads(text_of(answer))]
    except (ValueError, RecursionError):
        return 0.0
    validator = Draft202012Validator(item.rule["schema"], registry=Registry())  # an empty one fetches nothing
    return float(all(validator.is_valid(value) for value in values))


PURE: Mapping[str, Callable[[SuiteItem, Message], float]] = {
    "exact": _exact,
    "tool_call": _tool_call,
    "regex": _regex,
    "json_schema": _json_schema,
}
"""The scorers that need nothing but item and answer, each in [0, 1]."""


def agreement(answer: Message, expected: Message) -> float:
    """1.0 when both make the same tool calls (in any order), or both make none and say the same; else 0.0.

    Text beside a tool call is ignored.
    """
    wanted = tool_calls(expected)
    given = tool_calls(answer)
    if wanted or given:
        return float(sorted(wanted) == sorted(given))
    return float(_plain(text_of(answer)) == _plain(text_of(expected)))


def performs(answer: Message, action: Mapping[str, Any]) -> bool:
    """Whether the answer does a flagged action: a call of its tool with at least its arguments, or its words.

    action: {"name": tool, "arguments": {...}}, or {"name": "text", "arguments": {"contains": words}}.
    """
    wanted = action.get("arguments") or {}
    if action["name"] == "text":
        words = _plain(str(wanted.get("contains", "")))
        return bool(words) and words in _plain(text_of(answer))
    return any(name == action["name"] and _covers(wanted, given) for name, given in _parsed_calls(answer))


def violation(answer: Message, forbidden: tuple[str, ...]) -> str | None:
    """The first forbidden tool name or text (in any case) that the answer contains, in its words or its arguments."""
    calls = _raw_calls(answer)
    names = {name.casefold() for name, _ in calls}
    words = _plain(" ".join([text_of(answer), *(_all_text(arguments) for _, arguments in calls)]))
    for entry in forbidden:
        if entry.casefold() in names or _plain(entry) in words:
            return entry
    return None


def tool_calls(message: Message) -> list[Call]:
    """(tool name, canonical arguments) of each call; arguments that are no JSON stay text and equal no object."""
    return [(name, json.dumps(_normal(arguments), sort_keys=True)) for name, arguments in _parsed_calls(message)]


def text_of(message: Message) -> str:
    """The message's text; parts of a content list are joined."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _raw_calls(message: Message) -> list[tuple[str, Any]]:
    calls = message.get("tool_calls")
    functions = [call.get("function") for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    return [(str(f.get("name", "")), f.get("arguments", "")) for f in functions if isinstance(f, dict)]


def _parsed_calls(message: Message) -> list[tuple[str, Any]]:
    return [(name, _parsed(arguments)) for name, arguments in _raw_calls(message)]


def _parsed(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        return arguments


def _normal(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _normal(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_normal(part) for part in value]
    if isinstance(value, str):
        return " ".join(unicodedata.normalize("NFC", value).split())
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _covers(wanted: Any, given: Any) -> bool:
    if not isinstance(wanted, dict) or not isinstance(given, dict):
        return _same(wanted, given)
    return all(key in given and _same(part, given[key]) for key, part in wanted.items())


def _same(one: Any, other: Any) -> bool:
    return json.dumps(_normal(one), sort_keys=True) == json.dumps(_normal(other), sort_keys=True)


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _all_text(value: Any) -> str:
    if isinstance(value, str):
        try:
            inner = json.loads(value)
        except ValueError:
            return value
        return value if isinstance(inner, str) else f"{value} {_all_text(inner)}"
    if isinstance(value, dict):
        return " ".join(f"{key} {_all_text(part)}" for key, part in value.items())
    if isinstance(value, list):
        return " ".join(_all_text(part) for part in value)
    return str(value)
