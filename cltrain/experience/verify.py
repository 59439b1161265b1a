"""Is this example internally right: known tools, arguments that fit the schema and come from the conversation?

Checks form and grounding only. Whether the action was a good one is for scores, the trigger scan and the gate.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from cltrain.experience.strict_json import is_unicode, loads
from cltrain.records import Example, Message, Tool

MAX_COPIED_WORDS = (
    8  # a longer string argument is text that the agent composes (a summary, a mail), not a value it copies
)
WORD = re.compile(r"[^\W_]+")
JSON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


def verify(
    example: Example, *, tools_allowed: Sequence[str] | None = None, must_be_grounded: bool | None = None
) -> str | None:
    """Why `example` must not be learned from, or None when nothing is wrong with it.

    Every target must say something; every call must name a declared and allowed tool with JSON arguments that fit its
    schema, and every word of a string argument of up to MAX_COPIED_WORDS words must stand in an earlier message (values
    that the schema enumerates excepted). An example without tool definitions (an imported log) can only be checked for
    JSON. There, `must_be_grounded` None skips grounding too, because no schema tells copied values from composed ones
    and the calls have already run against real tools, but not for a correction: that is a claim joined from elsewhere.
    """
    is_grounding_due = bool(example.tools) or example.kind == "correction"
    if must_be_grounded is not None:
        is_grounding_due = must_be_grounded
    declared = {tool["function"]["name"]: tool for tool in example.tools if tool_fault(tool) is None}
    for turn in example.targets:
        message = example.messages[turn]
        calls = message.get("tool_calls") or []
        text = text_of(message)
        if not calls and not text.strip():
            return "the answer is empty"
        if "<tool_call>" in text:
            return "a tool call that could not be read stands in the answer's text"
        said = _Context(example.messages[:turn]) if calls and is_grounding_due else None
        for call in calls:
            reason = _wrong_call(call, declared, tools_allowed, said)
            if reason:
                return reason
    return None


def text_of(message: Message) -> str:
    """The text of a message whose content is a string, a list of parts, or None."""
    content = message.get("content")
    if isinstance(content, list):
        return "\n".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return content or ""


def arguments_of(call: dict[str, Any]) -> dict[str, Any] | str:
    """A tool call's arguments, or what is wrong with them."""
    try:
        arguments = loads(call["function"]["arguments"])
    except (KeyError, TypeError):
        return "a tool call without arguments"
    except ValueError:
        return f"the arguments of {call['function'].get('name')!r} are not JSON"
    if not isinstance(arguments, dict):
        return f"the arguments of {call['function'].get('name')!r} are not a JSON object"
    if not is_unicode(arguments):
        return f"the arguments of {call['function'].get('name')!r} are not valid Unicode"
    return arguments


def tool_fault(tool: Any) -> str | None:
    """Why a tool definition can be neither checked against nor rendered, or None."""
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict):
        kind = tool.get("type") if isinstance(tool, dict) else type(tool).__name__
        return f"is no function definition (its type is {kind!r})"
    if not isinstance(function.get("name"), str) or not function["name"]:
        return "is a function without a name"
    if function.get("parameters") is not None and not _is_schema(function["parameters"]):
        return f"has parameters that are no JSON schema ({function['name']!r})"
    return None


def _is_schema(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    required = value.get("required") or []
    has_names = isinstance(required, list) and all(isinstance(name, str) for name in required)
    return has_names and isinstance(value.get("properties") or {}, dict)


class _Context:
    """The words of the conversation so far."""

    def __init__(self, messages: Sequence[Message]) -> None:
        self.text = "\n".join(text_of(message) for message in messages).casefold()
        self.words = {_plain(word) for word in WORD.findall(self.text)}

    def missing(self, value: str) -> str | None:
        """The first word of `value` that was never said; scripts without spaces are looked up as substrings."""
        words = WORD.findall(value.casefold())
        if len(words) > MAX_COPIED_WORDS:
            return None
        for word in words:
            is_said = _plain(word) in self.words or (not word.isascii() and word in self.text)
            if not is_said:
                return word
        return None


def _plain(word: str) -> str:
    return word.lstrip("0") or "0" if word.isdecimal() else word


def _wrong_call(
    call: dict[str, Any], declared: dict[str, Tool], tools_allowed: Sequence[str] | None, said: _Context | None
) -> str | None:
    name = call.get("function", {}).get("name")
    if not isinstance(name, str) or not name:
        return "a tool call without a name"
    if declared and name not in declared:
        return f"calls {name!r}, which the episode does not declare"
    if tools_allowed is not None and name not in tools_allowed:
        return f"calls {name!r}, which agent.tools_allowed does not list"
    arguments = arguments_of(call)
    if isinstance(arguments, str):
        return arguments
    schema = (declared[name]["function"].get("parameters") or {}) if declared else {}
    reason = _misfit(arguments, schema, name)
    if reason or said is None:
        return reason
    for where, value in _copied_strings(arguments, schema, name):
        word = said.missing(value)
        if word is not None:
            return f"argument not grounded: {where} has {word!r}, which nobody said before"
    return None


def _misfit(value: Any, schema: Any, where: str) -> str | None:
    """How `value` breaks the part of JSON Schema that tool definitions use: type, enum, required, properties, items."""
    if not isinstance(schema, dict):
        return None
    kinds = schema.get("type")
    names = [kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, list) else []
    known = [name for name in names if name in JSON_TYPES]
    if known and not any(_is_a(value, name) for name in known):
        return f"{where} is {type(value).__name__}, its schema says {' or '.join(known)}"
    if isinstance(schema.get("enum"), list) and value not in schema["enum"]:
        return f"{where} is none of the values that its schema lists"
    if isinstance(value, dict):
        properties = schema.get("properties") or {}
        missing = [key for key in schema.get("required") or [] if key not in value]
        if missing:
            return f"{where} lacks the required {missing[0]!r}"
        unknown = [key for key in value if key not in properties]
        if unknown and properties and schema.get("additionalProperties", False) is False:
            return f"{where} has {unknown[0]!r}, which its schema does not know"
        reasons = (_misfit(value[key], properties.get(key), f"{where}.{key}") for key in value)
        return next((reason for reason in reasons if reason), None)
    if isinstance(value, list):
        reasons = (_misfit(item, schema.get("items"), f"{where}[{k}]") for k, item in enumerate(value))
        return next((reason for reason in reasons if reason), None)
    return None


def _is_a(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    if name == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, JSON_TYPES[name])


def _copied_strings(value: Any, schema: Any, where: str) -> Iterator[tuple[str, str]]:
    schema = schema if isinstance(schema, dict) else {}
    if isinstance(value, dict):
        properties = schema.get("properties") or {}
        for key, item in value.items():
            yield from _copied_strings(item, properties.get(key), f"{where}.{key}")
    elif isinstance(value, list):
        for k, item in enumerate(value):
            yield from _copied_strings(item, schema.get("items"), f"{where}[{k}]")
    elif isinstance(value, str) and "enum" not in schema and "const" not in schema:
        yield where, value
