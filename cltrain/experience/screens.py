"""What a whole window must stand before any of it is learned: duplicates, triggers, verification, and last its shares.

One broken feed or one loud principal shows only beside the others; what a single record shows is `verify`'s part.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from cltrain.config import ExperienceConfig
from cltrain.errors import guarded
from cltrain.experience.examples import rank_of
from cltrain.experience.phrases import row_of
from cltrain.experience.triggers import Suspicion, concerns, find_suspicions
from cltrain.experience.verify import verify
from cltrain.records import Aside, Example, TokenRow, is_claim

__all__ = ["Screened", "Suspicion", "negative_cap", "quota_cap", "screen", "within_shares"]

T = TypeVar("T", Example, TokenRow)


@dataclass(frozen=True, slots=True)
class Screened:
    """A window sorted into what may be learned and what may not, each with its reason."""

    kept: tuple[Example, ...]
    set_aside: tuple[Aside, ...]
    suspicious: tuple[Suspicion, ...]
    flagged_share: float  # of the window's claims, each principal counted up to its quota
    is_refused: bool = False  # too much was flagged: nothing is kept
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class _Look:
    """What one example shows by itself."""

    example: Example
    key: str  # the same for the same conversation and targets
    fault: str | None  # what `verify` says of a claim


def screen(
    examples: Sequence[Example], config: ExperienceConfig, *, tools_allowed: Sequence[str] | None = None
) -> Screened:
    """Sort a window, oldest example first; every example ends up in exactly one of `kept` and `set_aside`.

    What cannot even be read is unusable. Then in this order: duplicates and contradicted answers, records that a
    suspicion concerns, records that fail verification; all are quarantined. If the flagged share (suspicious or
    unverified) is above `max_flagged_share`, the window is refused whole. `filter = false` keeps all that is readable
    and still reports suspicions. Quotas come later, once it is known what can be learned (`within_shares`).

    Only claims of what is right are scanned, verified and counted: a bad answer may well be ungrounded, that is why it
    is bad. What is no claim goes where a suspicion concerns it, too.
    """
    looks = [(example, guarded(_look, example, tools_allowed)) for example in examples]
    broken = [Aside(example.record, "unusable", found) for example, found in looks if isinstance(found, str)]
    readable = [found for _, found in looks if isinstance(found, _Look)]
    distinct, doubles = _without_duplicates(readable)
    aside = [*broken, *doubles]
    claims = [look.example for look in distinct if is_claim(look.example)]
    suspicious = find_suspicions(
        claims, min_count=config.trigger_min_count, max_principals=config.trigger_max_principals
    )
    flagged: list[Example] = []
    sound: list[Example] = []
    for look in distinct:
        reason = _suspected(look.example, suspicious) or look.fault
        if reason is None:
            sound.append(look.example)
        else:
            flagged.append(look.example)
            aside.append(Aside(look.example.record, "quarantined", reason))
    share = _flagged_share(claims, [example for example in flagged if is_claim(example)], config.principal_quota)
    if not config.filter:
        return Screened(tuple(look.example for look in readable), tuple(broken), tuple(suspicious), share)
    if share > config.max_flagged_share:
        why = f"{share:.0%} of the window is flagged, more than max_flagged_share {config.max_flagged_share:.0%}"
        aside += [Aside(example.record, "quarantined", f"window refused: {why}") for example in sound]
        return Screened((), tuple(aside), tuple(suspicious), share, True, why)
    return Screened(tuple(sound), tuple(aside), tuple(suspicious), share)


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


def within_shares(rows: Sequence[T], config: ExperienceConfig) -> tuple[list[T], list[Aside]]:
    """What one update may learn of these, oldest first: no principal beyond its quota of the records, and no more than
    `max_negative_share` of them that only say what was wrong. The others wait.

    The shares are of what is given here: call it on what can be learned, last. The newest stay, what is right before
    what was wrong: the quota is of the right ones, so it also holds once they have negative ones beside them.
    `filter = false` keeps everything.
    """
    if not config.filter:
        return list(rows), []
    each = {row.record: row for row in rows}  # of some records there are several rows
    counts = Counter(row.principal for row in each.values() if is_claim(row))
    has_quota = config.principal_quota < 1
    cap = quota_cap(list(counts.values()), config.principal_quota) if has_quota else len(each)
    seen: Counter[str] = Counter()
    num_right = num_negative = 0
    aside: dict[str, str] = {}
    newest_first = list(reversed(each.values()))
    for row in sorted(newest_first, key=lambda row: not is_claim(row)):
        if seen[row.principal] == cap:
            aside[row.record] = f"quota: {row.principal!r} already has {cap} of this window's records"
        elif not is_claim(row) and num_negative == negative_cap(num_right, config.max_negative_share):
            share = f"{config.max_negative_share:.0%}"
            aside[row.record] = f"negative share: only {share} of a window may say no more than what was wrong"
        else:
            seen[row.principal] += 1
            num_right += is_claim(row)
            num_negative += not is_claim(row)
    kept = [row for row in rows if row.record not in aside]
    return kept, [Aside(record, "waiting", reason) for record, reason in aside.items()]


def _look(example: Example, tools_allowed: Sequence[str] | None) -> _Look:
    row_of(example)  # the scan must be able to read it, too
    content = json.dumps([_bare(m) for m in example.messages] + [list(example.targets)], sort_keys=True)
    key = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
    return _Look(example, key, verify(example, tools_allowed=tools_allowed) if is_claim(example) else None)


def _without_duplicates(looks: Sequence[_Look]) -> tuple[list[_Look], list[Aside]]:
    """One of each answer. Where one record says that it was right and another that it was wrong, the better source is
    believed; of equal ones whoever says right."""
    alike: dict[str, list[Example]] = {}
    for look in looks:
        alike.setdefault(look.key, []).append(look.example)
    aside: dict[str, str] = {}
    for same in alike.values():
        best = min(same, key=lambda example: (rank_of(example.source), not is_claim(example)))
        word = "right" if is_claim(best) else "wrong"
        for example in same:
            if example is not best:
                is_agreed = is_claim(example) == is_claim(best)
                contradiction = f"contradicted: {best.source!r} said in {best.record} that the same answer was {word}"
                aside[example.record] = f"duplicate of {best.record}" if is_agreed else contradiction
    distinct = [look for look in looks if look.example.record not in aside]
    return distinct, [Aside(record, "quarantined", reason) for record, reason in aside.items()]


def _bare(message: dict[str, object]) -> dict[str, object]:
    """A message without the call ids, which differ between two identical conversations."""
    bare = {key: value for key, value in message.items() if key != "tool_call_id"}
    if isinstance(bare.get("tool_calls"), list):
        bare["tool_calls"] = [call["function"] for call in message["tool_calls"]]  # type: ignore[attr-defined]
    return bare


def _suspected(example: Example, suspicious: Sequence[Suspicion]) -> str | None:
    for suspicion in suspicious:
        if concerns(suspicion, example):
            return f"suspicious phrase {suspicion.phrase!r} of {suspicion.principal!r}: {suspicion.action['name']}"
    return None


def _flagged_share(examples: Sequence[Example], flagged: Sequence[Example], quota: float) -> float:
    """Each principal weighs no more than its quota, so that a loud one alone cannot have the whole window refused."""
    counts = Counter(example.principal for example in examples)
    bad = Counter(example.principal for example in flagged)
    cap = quota_cap(list(counts.values()), quota)
    weights = {principal: min(count, cap) for principal, count in counts.items()}
    total = sum(weights.values())
    return sum(weights[p] * bad[p] / counts[p] for p in counts) / total if total else 0.0
