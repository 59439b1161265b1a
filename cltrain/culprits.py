"""What an update that failed leaves out when it tries once more: of its window, and of what is rehearsed beside it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cltrain.experience.buffer import learned_examples
from cltrain.experience.triggers import concerns, find_suspicions
from cltrain.experience.waiting import SCRUBBED
from cltrain.gate.scorers import violation
from cltrain.models.adapter import read_adapter
from cltrain.models.scoring import token_log_probs
from cltrain.plans import Plan
from cltrain.records import Aside, Candidate, Example, TokenRow, is_claim
from cltrain.rooms import Rooms, adapter_of

SURPRISING = 0.2  # share of a rejected window that the second attempt leaves out

log = logging.getLogger(__name__)


def without_most_surprising(
    rooms: Rooms, plan: Plan, learned: Sequence[TokenRow], candidate: Candidate | None
) -> tuple[list[TokenRow], list[Aside]]:
    """What the window shows to be right, less every suspicious record and the fifth that the failed candidate itself
    fits worst (the incumbent, where training ended without one); and what that leaves out."""
    suspicious = {record for suspicion in plan.suspicious for record in suspicion.records}
    why = {row.record: "it only says what was wrong" for row in learned if not is_claim(row)}
    why |= {row.record: "suspicious" for row in learned if row.record in suspicious}
    rows = [row for row in learned if row.record not in why]
    if len(rows) >= 2:
        adapter = read_adapter(Path(candidate.path)) if candidate else adapter_of(rooms, plan.parent)
        values = token_log_probs(rooms.base, adapter, rows)
        mean_nll = [-sum(row) / len(row) for row in values]
        num_kept = len(rows) - max(1, round(SURPRISING * len(rows)))
        calm = set(sorted(range(len(rows)), key=lambda i: mean_nll[i])[:num_kept])
        why |= {row.record: "too surprising" for i, row in enumerate(rows) if i not in calm}
    aside = [Aside(record, "quarantined", f"left out of the second attempt: {word}") for record, word in why.items()]
    return [row for row in rows if row.record not in why], aside


def scrubbed(rooms: Rooms, plan: Plan) -> Plan:
    """The plan without what may have broken a canary of what it rehearses: poison below every window's threshold passes
    update after update and piles up there.

    Left out, and quarantined with the window's records: what says or does what a canary forbids, and what the trigger
    scan suspects once all that is rehearsed lies before it as one window. The owner's rehearsal episodes stay.
    """
    config = rooms.config.experience
    examples = learned_examples(
        rooms.store, plan.agent, sorted({row.record for row in plan.replay}), learn_from=rooms.config.agent.learn_from,
        tools_allowed=rooms.config.agent.tools_allowed,
    )  # fmt: skip
    suspicions = find_suspicions(
        examples, min_count=config.trigger_min_count, max_principals=config.trigger_max_principals
    )
    forbidden = tuple(sorted({text for item in rooms.evidence.suite for text in item.forbidden}))
    why: dict[str, str] = {}
    for example in examples:
        if (said := _forbidden_in(example, forbidden)) is not None:
            why[example.record] = f"it says {said!r}, which a canary forbids"
        elif any(concerns(suspicion, example) for suspicion in suspicions):
            why[example.record] = "suspicious beside all that is rehearsed"
    if why:
        rooms.on_progress(f"update {plan.number}: a canary failed; {len(why)} records are rehearsed no longer")
    aside = [Aside(record, "quarantined", f"{SCRUBBED}: {word}") for record, word in why.items()]
    replay = tuple(row for row in plan.replay if row.record not in why)
    return replace(plan, replay=replay, set_aside=(*plan.set_aside, *aside))


def _forbidden_in(example: Example, forbidden: tuple[str, ...]) -> str | None:
    said = (violation(example.messages[target], forbidden) for target in example.targets)
    return next((text for text in said if text is not None), None)
