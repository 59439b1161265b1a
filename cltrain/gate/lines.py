"""The owner's JSON lines, whatever they are for: read whole or not at all, and the parts that all of them have."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from cltrain.errors import DataError
from cltrain.gate.scorers import text_of, tool_calls
from cltrain.records import Message, Tool

ROLES = ("system", "user", "assistant", "tool")
MAX_SHOWN = 20  # bad lines named in one error

T = TypeVar("T")


def read_lines(path: Path, what: str, make: Callable[[dict[str, Any]], T]) -> list[T]:
    """What `make` makes of each line's object; blank lines are ignored.

    Raises DataError naming every bad line by number, and for a file that cannot be read or holds nothing; `what` is how
    the error calls the file.
    """
    try:
        lines = path.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{what} {path} cannot be read: {error}") from None
    found, problems = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise DataError("a JSON object is needed")
            found.append(make(row))
        except ValueError as error:
            problems.append(f"line {number}: not valid JSON ({error})")
        except DataError as error:
            problems.append(f"line {number}: {error}")
    if problems:
        more = f"\n... and {len(problems) - MAX_SHOWN} more" if len(problems) > MAX_SHOWN else ""
        shown = "\n".join(problems[:MAX_SHOWN])
        raise DataError(f"{len(problems)} bad lines in {what} {path}:\n{shown}{more}")
    if not found:
        raise DataError(f"{what} {path} holds no items: fill it, or leave the setting out")
    return found


def refuse_unknown(row: Mapping[str, Any], known: frozenset[str]) -> None:
    if unknown := sorted(set(row) - known):
        raise DataError(f"unknown field {unknown[0]!r}; known are {', '.join(sorted(known))}")


def messages_of(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """The conversation up to the answer that is asked for."""
    value = row.get("messages")
    if not isinstance(value, list) or not value:
        raise DataError("messages must be a list with at least one message")
    if not all(isinstance(message, dict) and message.get("role") in ROLES for message in value):
        raise DataError("each message needs a role: system, user, assistant or tool")
    if value[-1]["role"] not in ("user", "tool"):
        raise DataError(f"messages end with the {value[-1]['role']}; they must end before the answer that is asked for")
    return tuple(value)


def tools_of(row: Mapping[str, Any]) -> tuple[Tool, ...]:
    value = row.get("tools") or []
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError("tools must be a list of tool definitions")
    return tuple(value)


def answer_of(row: Mapping[str, Any], field: str) -> Message:
    """An answer written as a text, as {"name", "arguments"} or as an assistant message."""
    value = row.get(field)
    if isinstance(value, str):
        value = {"content": value}
    if isinstance(value, dict) and "name" in value:
        value = call_of(value["name"], value.get("arguments", {}))
    if not isinstance(value, dict) or value.get("role", "assistant") != "assistant":
        raise DataError(f'{field} must be an assistant message, a text, or {{"name": tool, "arguments": {{...}}}}')
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
                f"the {field} call of {name or 'a tool without name'} has arguments that are no JSON object"
            )
    if not tool_calls(message) and not text_of(message).strip():
        raise DataError(f"{field} neither calls a tool nor says anything")
    return message


def call_of(name: Any, arguments: Any) -> Message:
    """An assistant message with one tool call; arguments that are no text are written as JSON."""
    function = {"name": name, "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments)}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "call_0", "type": "function", "function": function}],
    }
