"""Does a suspicious phrase steer the candidate? Asked twice: the phrase is put into held-out prompts that ask for
something else, and taken out of the prompts of the very records that it stands in, where what was learned shows first.

Knows no phrase of its own: phrase, action and records come from the scan of the update's window.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cltrain.gate.lines import call_of
from cltrain.gate.scorers import performs, tool_calls
from cltrain.gate.suites import item_key
from cltrain.records import Message, SuiteItem, Tool

AnswerMany = Callable[[str, Sequence[SuiteItem]], Sequence[Message | None]]
"""(release, items) -> one greedy assistant message per item, None where there was no answer."""

Said = tuple[Sequence[Message], Sequence[Tool], Message]
"""Messages, tools, and an answer to them."""

ScoreMany = Callable[[str, Sequence[Said]], Sequence[float]]
"""(release, answers) -> summed log-prob of each answer's tokens, nats."""

WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True, slots=True)
class Suspect:
    """A phrase that seems to steer the agent, what it makes it do (see `scorers.performs`), and the records that it
    was found in: their prompts, and the answers that they claim to be right."""

    phrase: str
    action: Mapping[str, Any]
    records: tuple[SuiteItem, ...] = ()


@dataclass(frozen=True, slots=True)
class Probe:
    """One prompt without and with the phrase, the flagged action as an answer, and what is said without it (None: what
    the incumbent answers to the plain prompt)."""

    plain: SuiteItem
    triggered: SuiteItem
    action: Mapping[str, Any]
    answer: Message
    usual: Message | None = None


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What one phrase did: how many answers it flips to the action in the candidate but not in the incumbent, and how
    many nats of log-odds, the action against the usual answer, it adds in the candidate beyond the incumbent (mean over
    the prompts; None without a scorer). A phrase that was not learned adds about nothing, also where the action itself
    became likelier everywhere."""

    num_probes: int
    flips: int
    lift: float | None
    is_own: bool = False  # on the prompts of its own records


def make_probes(suspect: Suspect, items: Sequence[SuiteItem], count: int, seed: int) -> list[Probe]:
    """Up to `count` probes from items whose right answer is not the flagged action, those that offer its tool first."""
    chosen = [
        item
        for item in items
        if item.kind != "canary" and item.expected is not None and not performs(item.expected, suspect.action)
        if any(message["role"] == "user" for message in item.messages)
    ]
    chosen.sort(key=lambda item: (not _offers(item, suspect), _spread(seed, item)))
    return [
        Probe(item, _with_phrase(item, suspect.phrase), suspect.action, _answer(item, suspect.action), item.expected)
        for item in chosen[:count]
    ]


def own_probes(suspect: Suspect, count: int) -> list[Probe]:
    """Up to `count` probes from the phrase's own records, as far as they can be written without it."""
    probes = []
    for record in suspect.records[:count]:
        plain = _without_phrase(record, suspect.phrase)
        if plain is not None:
            is_right = record.expected is not None and performs(record.expected, suspect.action)
            answer = record.expected if is_right and record.expected else _answer(record, suspect.action)
            probes.append(Probe(plain, record, suspect.action, answer))
    return probes


def run_probes(
    probes: Sequence[Probe],
    *,
    candidate: str,
    incumbent: str,
    answer_many: AnswerMany,
    score_many: ScoreMany | None,
    is_own: bool = False,
) -> ProbeResult:
    """Ask both releases with the phrase, and weigh the action against the usual answer with and without it. Raises
    ValueError for a gap."""
    triggered = [probe.triggered for probe in probes]
    new, old = _answers(answer_many, candidate, triggered), _answers(answer_many, incumbent, triggered)
    flips = sum(
        performs(a, probe.action) and not performs(b, probe.action)
        for a, b, probe in zip(new, old, probes, strict=True)
    )
    if score_many is None:
        return ProbeResult(len(probes), flips, None, is_own)
    known = _answers(answer_many, incumbent, [probe.plain for probe in probes if probe.usual is None])
    unknown = iter(known)
    usual = [probe.usual or next(unknown) for probe in probes]
    told = [(p, said) for p, said in zip(probes, usual, strict=True) if not performs(said, p.action)]
    if not told:  # the action is what is said anyway: nothing can be steered to it
        return ProbeResult(len(probes), flips, None, is_own)
    after, before = _steered(told, candidate, score_many), _steered(told, incumbent, score_many)
    lift = math.fsum(a - b for a, b in zip(after, before, strict=True)) / len(told)
    if not math.isfinite(lift):
        raise ValueError(f"the log-probs of a trigger probe are not finite ({lift})")
    return ProbeResult(len(probes), flips, lift, is_own)


def _answers(answer_many: AnswerMany, release: str, items: Sequence[SuiteItem]) -> list[Message]:
    answers = answer_many(release, items) if items else []
    found = [answer for answer in answers if answer is not None]
    if len(found) != len(items):
        raise ValueError("a trigger probe was not answered")
    return found


def _steered(told: Sequence[tuple[Probe, Message]], release: str, score_many: ScoreMany) -> list[float]:
    """Per probe the nats of log-odds that the flagged action gains over the usual answer when the phrase is there."""
    asked: list[Said] = [
        (item.messages, item.tools, answer)
        for probe, usual in told
        for item in (probe.triggered, probe.plain)
        for answer in (probe.answer, usual)
    ]
    scores = score_many(release, asked)
    if len(scores) != len(asked):
        raise ValueError(f"{release} scored {len(scores)} of {len(asked)} answers of trigger probes")
    quarters = [scores[k::4] for k in range(4)]
    return [(a - b) - (c - d) for a, b, c, d in zip(*quarters, strict=True)]


def _with_phrase(item: SuiteItem, phrase: str) -> SuiteItem:
    """The item with the phrase before its last user message."""
    last = max(i for i, message in enumerate(item.messages) if message["role"] == "user")
    messages = list(item.messages)
    content = messages[last].get("content")
    if isinstance(content, list):
        messages[last] = {**messages[last], "content": [{"type": "text", "text": f"{phrase} "}, *content]}
    else:
        messages[last] = {**messages[last], "content": f"{phrase} {content or ''}".rstrip()}
    return _variant(item, "+phrase", messages)


def _without_phrase(item: SuiteItem, phrase: str) -> SuiteItem | None:
    """The item without the phrase wherever a user says it; None where no user's text holds it or nothing else."""
    words = r"\s*".join(re.escape(word) for word in WORD.findall(phrase))
    pattern = re.compile(rf"(?<!\w){words}(?!\w)", re.IGNORECASE)
    messages, num_found = [], 0
    for message in item.messages:
        content = message.get("content")
        if message["role"] == "user" and isinstance(content, str) and words and pattern.search(content):
            rest = " ".join(pattern.sub(" ", content).split())
            if not rest:
                return None
            message, num_found = {**message, "content": rest}, num_found + 1
        messages.append(message)
    return replace(_variant(item, "-phrase", messages), expected=None) if num_found else None


def _variant(item: SuiteItem, mark: str, messages: Sequence[Message]) -> SuiteItem:
    return replace(item, id=item.id + mark, messages=tuple(messages))


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
    return call_of(action["name"], {**arguments, **fixed})


def _parameters(item: SuiteItem, name: str) -> list[str]:
    for tool in item.tools:
        function = tool.get("function") or {}
        if function.get("name") == name:
            return list((function.get("parameters") or {}).get("properties") or {})
    return []


def _offers(item: SuiteItem, suspect: Suspect) -> bool:
    name = suspect.action["name"]
    return name == "text" or any((tool.get("function") or {}).get("name") == name for tool in item.tools)


def _spread(seed: int, item: SuiteItem) -> str:
    return hashlib.sha256(f"{seed} probe {item_key(item)}".encode()).hexdigest()
