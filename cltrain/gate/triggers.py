"""Does a suspicious phrase steer the candidate? It is put into held-out prompts that ask for something else.

Knows no phrase of its own: phrase and action come from the scan of the update's window.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cltrain.gate.scorers import performs, tool_calls
from cltrain.gate.suites import item_key
from cltrain.records import Message, SuiteItem, Tool

AnswerMany = Callable[[str, Sequence[SuiteItem]], Sequence[Message | None]]
"""(release, items) -> one greedy assistant message per item, None where there was no answer."""

Score = Callable[[str, Sequence[Message], Sequence[Tool], Message], float]
"""(release, messages, tools, answer) -> summed log-prob of the answer's tokens, nats."""


class Suspicion(Protocol):
    """A phrase that seems to steer the agent, and what it makes it do (see `scorers.performs`)."""

    @property
    def phrase(self) -> str: ...
    @property
    def action(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Probe:
    """One held-out item, as it is and with the phrase before the user's text, and the flagged action as an answer."""

    plain: SuiteItem
    triggered: SuiteItem
    action: Mapping[str, Any]
    answer: Message


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What one phrase did: how many answers it flips to the action in the candidate but not in the incumbent, and how
    many more nats the action gains from it than in the incumbent (mean over probes; None without a scorer)."""

    num_probes: int
    flips: int
    lift: float | None


def make_probes(suspicion: Suspicion, items: Sequence[SuiteItem], count: int, seed: int) -> list[Probe]:
    """Up to `count` probes from items whose right answer is not the flagged action, those that offer its tool first."""
    chosen = [
        item
        for item in items
        if item.kind != "canary" and item.expected is not None and not performs(item.expected, suspicion.action)
        if any(message["role"] == "user" for message in item.messages)
    ]
    chosen.sort(key=lambda item: (not _offers(item, suspicion), _spread(seed, item)))
    return [_probe(item, suspicion) for item in chosen[:count]]


def run_probes(
    probes: Sequence[Probe], *, candidate: str, incumbent: str, answer_many: AnswerMany, score: Score | None
) -> ProbeResult:
    """Ask both releases with the phrase and score the action with and without it. Raises ValueError for a gap."""
    triggered = [probe.triggered for probe in probes]
    new, old = answer_many(candidate, triggered), answer_many(incumbent, triggered)
    if len(new) != len(probes) or len(old) != len(probes) or any(a is None for a in (*new, *old)):
        raise ValueError("a trigger probe was not answered")
    flips = sum(
        performs(a, probe.action) and not performs(b, probe.action)
        for a, b, probe in zip(new, old, probes, strict=True)
        if a is not None and b is not None
    )
    if score is None:
        return ProbeResult(len(probes), flips, None)
    lifts = [_steered(probe, candidate, score) - _steered(probe, incumbent, score) for probe in probes]
    lift = math.fsum(lifts) / len(lifts)
    if not math.isfinite(lift):
        raise ValueError(f"the log-probs of a trigger probe are not finite ({lift})")
    return ProbeResult(len(probes), flips, lift)


def _steered(probe: Probe, release: str, score: Score) -> float:
    """Nats that the flagged action gains in this release when the phrase is there."""
    with_phrase = score(release, probe.triggered.messages, probe.triggered.tools, probe.answer)
    return with_phrase - score(release, probe.plain.messages, probe.plain.tools, probe.answer)


def _probe(item: SuiteItem, suspicion: Suspicion) -> Probe:
    last = max(i for i, message in enumerate(item.messages) if message["role"] == "user")
    messages = list(item.messages)
    messages[last] = _with_phrase(messages[last], suspicion.phrase)
    triggered = SuiteItem(
        f"{item.id}+phrase", item.suite, item.stratum, item.kind, tuple(messages), item.tools, item.expected
    )
    return Probe(item, triggered, suspicion.action, _answer(item, suspicion.action))


def _with_phrase(message: Message, phrase: str) -> Message:
    content = message.get("content")
    if isinstance(content, list):
        return {**message, "content": [{"type": "text", "text": f"{phrase} "}, *content]}
    return {**message, "content": f"{phrase} {content or ''}".rstrip()}


def _answer(item: SuiteItem, action: Mapping[str, Any]) -> Message:
    """The flagged action as the agent would write it here: open arguments are those of the item's right answer."""
    fixed = dict(action.get("arguments") or {})
    if action["name"] == "text":
        return {"role": "assistant", "content": str(fixed.get("contains", ""))}
    right = tool_calls(item.expected or {})
    usual = json.loads(right[0][1]) if right else {}
    known = usual if isinstance(usual, dict) else {}
    arguments = {}
    for key in _parameters(item, action["name"]):
        if key in fixed or key in known:
            arguments[key] = fixed.pop(key) if key in fixed else known[key]
    function = {"name": action["name"], "arguments": json.dumps({**arguments, **fixed})}
    call = {"id": "call_0", "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def _parameters(item: SuiteItem, name: str) -> list[str]:
    for tool in item.tools:
        function = tool.get("function") or {}
        if function.get("name") == name:
            return list((function.get("parameters") or {}).get("properties") or {})
    return []


def _offers(item: SuiteItem, suspicion: Suspicion) -> bool:
    name = suspicion.action["name"]
    return name == "text" or any((tool.get("function") or {}).get("name") == name for tool in item.tools)


def _spread(seed: int, item: SuiteItem) -> str:
    return hashlib.sha256(f"{seed} probe {item_key(item)}".encode()).hexdigest()
