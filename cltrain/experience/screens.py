"""What a whole window must stand before any of it is learned: duplicates, triggers, verification, quotas.

One broken feed or one loud principal shows only beside the others; what a single record shows is `verify`'s part.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cltrain.config import ExperienceConfig
from cltrain.experience.triggers import Suspicion, concerns, find_suspicions
from cltrain.experience.verify import verify
from cltrain.records import Example, is_claim, is_negative

__all__ = ["WAITS", "Screened", "Suspicion", "negative_cap", "quota_cap", "screen"]

WAITS = "negative share"  # what the reasons begin with of records that wait for more that is right


@dataclass(frozen=True, slots=True)
class Screened:
    """A window sorted into what may be learned and what may not, each with its reason."""

    kept: tuple[Example, ...]
    set_aside: tuple[tuple[Example, str], ...]
    suspicious: tuple[Suspicion, ...]
    flagged_share: float  # of the window's claims, each principal counted up to its quota
    is_refused: bool = False  # too much was flagged: nothing is kept
    reason: str | None = None


def screen(
    examples: Sequence[Example], config: ExperienceConfig, *, tools_allowed: Sequence[str] | None = None
) -> Screened:
    """Sort a window, oldest example first; every example ends up in exactly one of `kept` and `set_aside`.

    In this order: exact duplicates, records that a suspicion concerns, records that fail verification, what exceeds a
    principal's quota (its newest stay), what exceeds `max_negative_share`. If the flagged share (suspicious or
    unverified) is above `max_flagged_share`, the window is refused whole. `filter = false` keeps everything and still
    reports suspicions.

    Only claims of what is right are scanned, verified and counted: a bad answer may well be ungrounded, that is why it
    is bad. What is no claim goes where a suspicion concerns it, too.
    """
    distinct, aside = _without_duplicates(examples)
    claims = [example for example in distinct if is_claim(example)]
    suspicious = find_suspicions(
        claims, min_count=config.trigger_min_count, max_principals=config.trigger_max_principals
    )
    flagged: list[tuple[Example, str]] = []
    sound: list[Example] = []
    for example in distinct:
        reason = _reason(example, suspicious, tools_allowed)
        if reason is None:
            sound.append(example)
        else:
            flagged.append((example, reason))
    share = _flagged_share(claims, [one for one in flagged if is_claim(one[0])], config.principal_quota)
    if not config.filter:
        return Screened(tuple(examples), (), tuple(suspicious), share)
    if share > config.max_flagged_share:
        why = f"{share:.0%} of the window is flagged, more than max_flagged_share {config.max_flagged_share:.0%}"
        rest = [(example, f"window refused: {why}") for example in sound]
        return Screened((), (*aside, *flagged, *rest), tuple(suspicious), share, True, why)
    within, surplus = _within_quota(sound, config.principal_quota)
    kept, negative = _within_negative_share(within, config.max_negative_share)
    return Screened(tuple(kept), (*aside, *flagged, *surplus, *negative), tuple(suspicious), share)


def quota_cap(counts: Sequence[int], quota: float) -> int:
    """The most records that any principal may bring, given how many each has.

    The largest cap c with c <= quota * (records left under c), at least 1. Fewer than 1/quota principals cannot all
    stay below the quota: then they get equal parts, and no more than quota * (all records) each.
    """
    if not counts:
        return 1
    fair = max(quota, 1 / len(counts))
    cap = max(1, int(quota * sum(counts) + 1e-9))
    while cap > 1 and cap > fair * sum(min(count, cap) for count in counts) + 1e-9:
        cap -= 1
    return cap


def negative_cap(num_others: int, share: float) -> int:
    """The most negative records beside `num_others` of the rest, so that they are no more than `share` of the sum."""
    return int(share / (1 - share) * num_others + 1e-9)


def _within_negative_share(
    examples: Sequence[Example], share: float
) -> tuple[list[Example], list[tuple[Example, str]]]:
    """The newest stay."""
    negative = [example for example in examples if is_negative(example)]
    cap = negative_cap(len(examples) - len(negative), share)
    surplus = negative[: len(negative) - cap] if len(negative) > cap else []
    ids = {example.record for example in surplus}
    why = f"{WAITS}: only {share:.0%} of a window may say no more than what was wrong"
    return [e for e in examples if e.record not in ids], [(example, why) for example in surplus]


def _within_quota(examples: Sequence[Example], quota: float) -> tuple[list[Example], list[tuple[Example, str]]]:
    cap = quota_cap(list(Counter(example.principal for example in examples).values()), quota)
    kept: list[Example] = []
    surplus: list[tuple[Example, str]] = []
    seen: Counter[str] = Counter()
    for example in reversed(examples):
        seen[example.principal] += 1
        if seen[example.principal] <= cap:
            kept.append(example)
        else:
            surplus.append((example, f"quota: {example.principal!r} already has {cap} of this window's records"))
    return kept[::-1], surplus[::-1]


def _without_duplicates(examples: Sequence[Example]) -> tuple[list[Example], list[tuple[Example, str]]]:
    """An answer that one record says was right and another that it was wrong is learned as right."""
    first: dict[str, int] = {}
    aside: list[tuple[Example, str]] = []
    for i in sorted(range(len(examples)), key=lambda i: not is_claim(examples[i])):
        example = examples[i]
        content = json.dumps([_bare(m) for m in example.messages] + [list(example.targets)], sort_keys=True)
        key = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
        known = examples[first.setdefault(key, i)]
        if is_claim(known) and not is_claim(example):
            aside.append((example, f"contradicted: the same answer is learned as right from {known.record}"))
        elif known is not example:
            aside.append((example, f"duplicate of {known.record}"))
    return [examples[i] for i in sorted(first.values())], aside


def _bare(message: dict[str, object]) -> dict[str, object]:
    """A message without the call ids, which differ between two identical conversations."""
    bare = {key: value for key, value in message.items() if key != "tool_call_id"}
    if isinstance(bare.get("tool_calls"), list):
        bare["tool_calls"] = [call["function"] for call in message["tool_calls"]]  # type: ignore[attr-defined]
    return bare


def _reason(example: Example, suspicious: Sequence[Suspicion], tools_allowed: Sequence[str] | None) -> str | None:
    for suspicion in suspicious:
        if concerns(suspicion, example):
            return f"suspicious phrase {suspicion.phrase!r} of {suspicion.principal!r}: {suspicion.action['name']}"
    return verify(example, tools_allowed=tools_allowed) if is_claim(example) else None


def _flagged_share(examples: Sequence[Example], flagged: Sequence[tuple[Example, str]], quota: float) -> float:
    """Each principal weighs no more than its quota, so that a loud one alone cannot have the whole window refused."""
    counts = Counter(example.principal for example in examples)
    bad = Counter(example.principal for example, _ in flagged)
    cap = quota_cap(list(counts.values()), quota)
    weights = {principal: min(count, cap) for principal, count in counts.items()}
    total = sum(weights.values())
    return sum(weights[p] * bad[p] / counts[p] for p in counts) / total if total else 0.0
