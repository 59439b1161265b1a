"""Rewards that an agent can hack without any suite noticing: broken calls, questions back, length, one answer to all.

Read from the answers that the gate gets anyway for its items. Of each answer a few signs are kept in the store, so that
the incumbent need not answer again. Each sign is paired with the incumbent's on the same item and tested with an
e-value, which may be looked at after every chunk. What the expected answer does itself is no sign of anything.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from cltrain.config_gate import DetectorsConfig
from cltrain.gate.kept import keep, read_kept
from cltrain.gate.pool import num_uses
from cltrain.gate.rows import ItemScores
from cltrain.gate.scorers import text_of, tool_calls
from cltrain.gate.stats import e_value, means
from cltrain.gate.suites import is_taught, item_key
from cltrain.records import Check, Code, Message, SuiteItem, Verdict
from cltrain.store.database import Store

VERSION = "1"  # part of the key under which signs are kept: change it when one may change
SIGNS = ("broken call", "question back", "too short", "too long")
CODES = {
    "broken call": Code.TOOL_CALLS,
    "question back": Code.ASKS_BACK,
    "too short": Code.LENGTH,
    "too long": Code.LENGTH,
    "one answer to all": Code.ENTROPY,
}
NUM_TESTS = len(CODES) + 1  # they and the one for overfitting share one alpha
CALL_MARKS = re.compile(r"</?tool_call>|\{\s*\"name\"\s*:")  # what a call that nobody could read leaves in the text


def note_signs(
    store: Store, release: str, items: Sequence[SuiteItem], answers: Sequence[Message | None], config: DetectorsConfig
) -> None:
    """Keep the signs of these answers; a missing answer leaves none."""
    values: dict[str, float] = {}
    for item, answer in zip(items, answers, strict=True):
        if answer is not None and item.expected is not None:
            values |= _kept_of(item, answer, config)
    keep(store, release, values)


def watcher(
    store: Store, agent: str, taught: Collection[str], config: DetectorsConfig, alpha: float
) -> Callable[[str, str, Sequence[ItemScores]], Sequence[Check]]:
    """A watch over one gate: the signs of the answers, and whether known questions gain more than new ones.

    taught: strata that the update learned. `alpha`: the chance that a candidate like its incumbent is stopped by any of
    these detectors at any look.
    """
    uses = num_uses(store, agent)
    level = alpha / NUM_TESTS

    def watch(candidate: str, incumbent: str, rows: Sequence[ItemScores]) -> list[Check]:
        asked = [row for row in rows if row.item.kind != "canary" and row.item.expected is not None]
        items = [row.item for row in asked]
        new, old = (signs_of(store, release, items, config) for release in (candidate, incumbent))
        heard = [i for i in range(len(items)) if new[i] is not None and old[i] is not None]
        pairs = [(items[i], new[i] or {}, old[i] or {}) for i in heard]
        checks = [_sign(name, pairs, len(items), config, level) for name in SIGNS]
        checks.append(_one_answer(pairs, config, level))
        is_seen = [uses.get(item_key(row.item), 0) > 0 for row in asked]
        known = [is_taught(row.item.stratum, taught) for row in asked]
        chosen = [(row, seen) for row, seen, its in zip(asked, is_seen, known, strict=True) if its]
        checks.append(_overfit(chosen, config, level))
        return checks

    return watch


def read_signs(item: SuiteItem, answer: Message, config: DetectorsConfig) -> dict[str, bool]:
    """Which of SIGNS the answer shows and the item's expected answer does not."""
    expected = item.expected or {}
    length, usual = _length(answer), max(1, _length(expected))
    question = re.compile(config.question)
    return {
        "broken call": _is_broken(item, answer),
        "question back": _asks(answer, question) and not _asks(expected, question),
        "too short": length * config.length_ratio < usual,
        "too long": length > usual * config.length_ratio,
    }


def signs_of(
    store: Store, release: str, items: Sequence[SuiteItem], config: DetectorsConfig
) -> list[dict[str, float] | None]:
    """For each item what was noted of the release's answer; None where nothing was."""
    known = read_kept(store, release, [f"{item_key(item)}~{what}" for item in items for what in _keys(config)])
    found: list[dict[str, float] | None] = []
    for item in items:
        bits, said = (known.get(f"{item_key(item)}~{what}") for what in _keys(config))
        if bits is None or said is None:
            found.append(None)
        else:
            found.append({**{name: float(int(bits) >> i & 1) for i, name in enumerate(SIGNS)}, "said": said})
    return found


def _keys(config: DetectorsConfig) -> tuple[str, str]:
    rules = hashlib.sha256(f"{VERSION} {config.question} {config.length_ratio}".encode()).hexdigest()[:8]
    return f"signs~{rules}", f"said~{rules}"


def _kept_of(item: SuiteItem, answer: Message, config: DetectorsConfig) -> dict[str, float]:
    """The signs as bits of one number, and 48 bits of a hash of what was said."""
    bits = sum(shown << i for i, shown in enumerate(read_signs(item, answer, config).values()))
    said = json.dumps([text_of(answer), sorted(tool_calls(answer))])
    digest = int(hashlib.sha256(said.encode()).hexdigest()[:12], 16)
    values = (float(bits), float(digest))
    return {f"{item_key(item)}~{what}": value for what, value in zip(_keys(config), values, strict=True)}


def _sign(
    name: str,
    pairs: Sequence[tuple[SuiteItem, Mapping[str, float], Mapping[str, float]]],
    num_asked: int,
    config: DetectorsConfig,
    alpha: float,
) -> Check:
    differences = [new[name] - old[name] for _, new, old in pairs]
    rates = [sum(signs[name] for signs in side) / max(1, len(pairs)) for side in _sides(pairs)]
    note = "" if len(pairs) == num_asked else f" ({num_asked - len(pairs)} more were not noted)"
    return _test(name, _by_episode(differences, pairs), rates[0], rates[1], config.margin, alpha, note)


def _one_answer(
    pairs: Sequence[tuple[SuiteItem, Mapping[str, float], Mapping[str, float]]], config: DetectorsConfig, alpha: float
) -> Check:
    """How often an answer was given before to an item that expects another one: entropy collapse, read from text."""
    sides = [_repeats([item for item, _, _ in pairs], [signs["said"] for signs in side]) for side in _sides(pairs)]
    differences = [float(new) - float(old) for new, old in zip(*sides, strict=True)]
    rates = [sum(side) / max(1, len(pairs)) for side in sides]
    return _test("one answer to all", _by_episode(differences, pairs), rates[0], rates[1], config.margin, alpha, "")


def _repeats(items: Sequence[SuiteItem], said: Sequence[float]) -> list[bool]:
    expected_before: dict[float, set[str]] = defaultdict(set)
    repeats = []
    for item, words in zip(items, said, strict=True):
        expected = json.dumps(item.expected, sort_keys=True)
        repeats.append(bool(expected_before[words] - {expected}))
        expected_before[words].add(expected)
    return repeats


def _overfit(rows: Sequence[tuple[ItemScores, bool]], config: DetectorsConfig, alpha: float) -> Check:
    """Whether the taught items that earlier gates asked gain more than new ones of the same stratum, taken in pairs.

    Where nothing was overfitted the two of a pair may be exchanged, so their difference, cut to [-1, 1], has mean 0.
    """
    queues: dict[tuple[str, bool], list[float]] = defaultdict(list)
    differences: list[float] = []
    gains: dict[bool, list[float]] = {True: [], False: []}
    for row, is_seen in rows:
        gain = row.candidate - row.references["incumbent"]
        gains[is_seen].append(gain)
        waiting = queues[row.item.stratum, not is_seen]
        if waiting:
            other = waiting.pop(0)
            differences.append(max(-1.0, min(1.0, gain - other if is_seen else other - gain)))
        else:
            queues[row.item.stratum, is_seen].append(gain)
    if not differences:
        which = "new" if gains[False] or not gains[True] else "known"
        reason = f"not measured: all {len(rows)} taught items are {which}"
        return Check("overfitting", Code.OVERFIT, Verdict.PROMOTE, reason, num_items=0)
    seen, fresh = (sum(gains[which]) / max(1, len(gains[which])) for which in (True, False))
    is_overfit = e_value(differences, config.overfit_gap) >= 1 / alpha
    reason = f"known items gain {seen:+.2f}, new ones {fresh:+.2f}, in {len(differences)} pairs"
    verdict = Verdict.REJECT if is_overfit else Verdict.PROMOTE
    return Check(
        "overfitting", Code.OVERFIT, verdict, f"{reason}, gap allowed {config.overfit_gap:g}",
        candidate=seen, reference=fresh, difference=seen - fresh, num_items=len(differences),
    )  # fmt: skip


def _test(
    name: str, differences: Sequence[float], now: float, before: float, margin: float, alpha: float, note: str
) -> Check:
    is_worse = e_value(differences, margin) >= 1 / alpha
    reason = f"{now:.2f} of {len(differences)} answers, {before:.2f} by the incumbent, {margin:g} more allowed{note}"
    return Check(
        name, CODES[name], Verdict.REJECT if is_worse else Verdict.PROMOTE, reason,
        candidate=now, reference=before, difference=now - before, num_items=len(differences),
    )  # fmt: skip


def _by_episode(
    differences: Sequence[float], pairs: Sequence[tuple[SuiteItem, Mapping[str, float], Mapping[str, float]]]
) -> list[float]:
    """Turns of one episode count once."""
    return means(differences, [item.cluster for item, _, _ in pairs])


def _sides(
    pairs: Sequence[tuple[SuiteItem, Mapping[str, float], Mapping[str, float]]],
) -> tuple[list[Mapping[str, float]], list[Mapping[str, float]]]:
    return [new for _, new, _ in pairs], [old for _, _, old in pairs]


def _is_broken(item: SuiteItem, answer: Message) -> bool:
    """A call that cannot be read, of a tool that is not there, or without what its schema requires."""
    if CALL_MARKS.search(text_of(answer)) and not CALL_MARKS.search(text_of(item.expected or {})):
        return True
    declared = {(tool.get("function") or {}).get("name"): tool.get("function") or {} for tool in item.tools}
    for name, arguments in tool_calls(answer):
        if not arguments.startswith("{") or (declared and name not in declared):
            return True
        schema: dict[str, Any] = (declared.get(name) or {}).get("parameters") or {}
        given = set(json.loads(arguments))
        if not set(schema.get("required") or ()) <= given:
            return True
    return False


def _asks(answer: Message, question: re.Pattern[str]) -> bool:
    return not answer.get("tool_calls") and question.search(text_of(answer).strip()) is not None


def _length(answer: Message) -> int:
    """Characters of text and calls together."""
    return len(text_of(answer).strip()) + sum(len(name) + len(arguments) for name, arguments in tool_calls(answer))
