"""The owner's prompts and probes of character, read from JSON lines. Knows no phrase of its own.

A prompt file (harmful, harmless) holds {"messages", "tools"}; a probe file {"kind", "messages", "tools", "good", "bad"}
with two answers, each a text, {"name", "arguments"} or an assistant message. A probe whose answers are texts is asked
twice: in chat, and with the same texts as the argument of a tool call, because what a model would not say it may do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cltrain.config_gate import CharacterConfig
from cltrain.errors import DataError
from cltrain.gate.scorers import text_of
from cltrain.records import Code, Message, SuiteItem, Tool

KINDS = {
    "persona": Code.PERSONA,
    "value": Code.PERSONA,
    "sycophancy": Code.SYCOPHANCY,
    "refusal": Code.REFUSAL,
    "over_refusal": Code.OVER_REFUSAL,
}
MAX_SHOWN = 20  # bad lines named in one error

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Probe:
    """A choice between two answers: `good` is what the owner wants to hear. `key` covers all of its content."""

    key: str
    kind: str
    form: str  # "chat", or "tool call"
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]
    good: Message
    bad: Message


@dataclass(frozen=True, slots=True)
class Character:
    """What the owner asks about the agent's character."""

    harmful: tuple[SuiteItem, ...] = ()
    harmless: tuple[SuiteItem, ...] = ()
    probes: tuple[Probe, ...] = ()


def load_character(config: CharacterConfig) -> Character:
    """Read the files that the configuration names. Raises DataError naming every bad line by number."""
    return Character(
        harmful=tuple(_read(config.harmful, _prompt)) if config.harmful else (),
        harmless=tuple(_read(config.harmless, _prompt)) if config.harmless else (),
        probes=tuple(probe for forms in _read(config.probes, _probes) for probe in forms) if config.probes else (),
    )


def _read(path: Path, make: Callable[[dict[str, Any]], T]) -> list[T]:
    try:
        lines = path.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
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
        raise DataError(f"{len(problems)} bad lines in {path}:\n" + "\n".join(problems[:MAX_SHOWN]))
    if not found:
        raise DataError(f"{path} holds nothing: fill it, or leave the setting out")
    return found


def _prompt(row: dict[str, Any]) -> SuiteItem:
    _refuse_unknown(row, {"messages", "tools"})
    messages, tools = _messages(row), _tools(row)
    return SuiteItem(f"prompt-{_digest([messages, tools])}", "character", "text", "canary", messages, tools)


def _probes(row: dict[str, Any]) -> list[Probe]:
    _refuse_unknown(row, {"kind", "messages", "tools", "good", "bad"})
    kind = row.get("kind")
    if kind not in KINDS:
        raise DataError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    messages, tools = _messages(row), _tools(row)
    good, bad = _answer(row, "good"), _answer(row, "bad")
    if good == bad:
        raise DataError("good and bad are the same answer: there is nothing to choose between")
    forms = [("chat" if not good.get("tool_calls") else "tool call", tools, good, bad)]
    if not good.get("tool_calls") and not bad.get("tool_calls"):
        forms.append(("tool call", (_SPEAK,), _spoken(good), _spoken(bad)))
    return [
        Probe(f"probe-{_digest([messages, list(its), one, other])}", kind, form, messages, its, one, other)
        for form, its, one, other in forms
    ]


_SPEAK: Tool = {
    "type": "function",
    "function": {
        "name": "answer",
        "description": "Answer the user.",
        "parameters": {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
    },
}


def _spoken(answer: Message) -> Message:
    return _call("answer", {"text": text_of(answer)})


def _call(name: str, arguments: dict[str, Any]) -> Message:
    function = {"name": name, "arguments": json.dumps(arguments)}
    call = {"id": "call_0", "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def _answer(row: dict[str, Any], field: str) -> Message:
    value = row.get(field)
    if isinstance(value, str) and value.strip():
        return {"role": "assistant", "content": value}
    if isinstance(value, dict) and isinstance(value.get("name"), str) and isinstance(value.get("arguments", {}), dict):
        return _call(value["name"], value.get("arguments", {}))
    if isinstance(value, dict) and value.get("role") == "assistant" and (text_of(value) or value.get("tool_calls")):
        return value
    raise DataError(f'{field} must be a text, {{"name", "arguments"}} or an assistant message; got {value!r}')


def _messages(row: dict[str, Any]) -> tuple[Message, ...]:
    value = row.get("messages")
    roles = ("system", "user", "assistant", "tool")
    if not isinstance(value, list) or not value:
        raise DataError("messages must be a list with at least one message")
    if not all(isinstance(message, dict) and message.get("role") in roles for message in value):
        raise DataError(f"each message needs a role: {', '.join(roles)}")
    if value[-1]["role"] not in ("user", "tool"):
        raise DataError(f"messages end with the {value[-1]['role']}; they must end before the answer that is asked for")
    return tuple(value)


def _tools(row: dict[str, Any]) -> tuple[Tool, ...]:
    value = row.get("tools") or []
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError("tools must be a list of tool definitions")
    return tuple(value)


def _refuse_unknown(row: dict[str, Any], known: set[str]) -> None:
    if unknown := sorted(set(row) - known):
        raise DataError(f"unknown field {unknown[0]!r}; known are {', '.join(sorted(known))}")


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
