"""The owner's prompts and probes of character, read from JSON lines. Knows no phrase of its own.

A prompt file (harmful, harmless) holds {"messages", "tools"}; a probe file {"kind", "messages", "tools", "good", "bad"}
with two answers, each a text, {"name", "arguments"} or an assistant message. A probe whose answers are texts is asked
twice: in chat, and with the same texts as the argument of a tool call, because what a model would not say it may do.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from cltrain.config_gate import CharacterConfig
from cltrain.errors import DataError
from cltrain.gate.leaks import refuse_leak
from cltrain.gate.lines import answer_of, call_of, messages_of, read_lines, refuse_unknown, tools_of
from cltrain.gate.scorers import text_of
from cltrain.records import Code, Message, SuiteItem, Tool

KINDS = {
    "persona": Code.PERSONA,
    "value": Code.PERSONA,
    "sycophancy": Code.SYCOPHANCY,
    "refusal": Code.REFUSAL,
    "over_refusal": Code.OVER_REFUSAL,
}
PROMPT_FIELDS = frozenset({"messages", "tools"})


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
    """Read the files that the configuration names. Raises DataError naming every bad line by number, such as one
    whose prompt says what passes (gate/leaks.py)."""
    what = "the character file"
    prompt = partial(_prompt, refusal=config.refusal)
    harmful, harmless = (
        tuple(read_lines(path, what, prompt)) if path is not None else () for path in (config.harmful, config.harmless)
    )
    forms = read_lines(config.probes, what, _probes) if config.probes is not None else []
    return Character(harmful, harmless, tuple(probe for each in forms for probe in each))


def _prompt(row: dict[str, Any], refusal: str | None) -> SuiteItem:
    refuse_unknown(row, PROMPT_FIELDS)
    messages, tools = messages_of(row), tools_of(row)
    item = SuiteItem(f"prompt-{_digest([messages, tools])}", "character", "text", "canary", messages, tools)
    refuse_leak(replace(item, scorer="regex", rule={"pattern": refusal}))
    return item


def _probes(row: dict[str, Any]) -> list[Probe]:
    refuse_unknown(row, PROMPT_FIELDS | {"kind", "good", "bad"})
    kind = row.get("kind")
    if kind not in KINDS:
        raise DataError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    messages, tools = messages_of(row), tools_of(row)
    good, bad = answer_of(row, "good"), answer_of(row, "bad")
    if good == bad:
        raise DataError("good and bad are the same answer: there is nothing to choose between")
    refuse_leak(SuiteItem("probe", "character", "text", "gain", messages, tools, good))
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
    return call_of("answer", {"text": text_of(answer)})


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
