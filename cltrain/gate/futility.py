"""When to stop asking: the questions that are left cannot, or will hardly, turn a hold into a promotion."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from cltrain.config import GateConfig
from cltrain.gate.decision import GateScores, ItemScores, decide, roles_of
from cltrain.gate.levels import Past
from cltrain.records import Check, Code, Decision, SuiteItem, Verdict

FEW = 100  # questions; while more are left, wins alone could still show anything


def is_futile(
    scores: GateScores,
    decision: Decision,
    left: Sequence[SuiteItem],
    config: GateConfig,
    *,
    taught: Collection[str],
    past: Past = Past(),
) -> bool:
    """Whether the questions that are `left` are not worth asking after a hold.

    Either none of their answers could show what is missing (the decision itself is asked, were every one of them won),
    or at least half is asked and the evidence for what is missing has fallen below `gate.futility`. While more than a
    gain is missing the gain does not count: whether a candidate does harm decides what becomes of its records.
    """
    missing = _missing(decision)
    num_asked = sum(row.item.kind != "canary" for row in scores.rows)
    is_unlikely = any(check.evidence is not None and check.evidence < config.futility for check in missing)
    if is_unlikely and num_asked >= len(left):
        return True
    if len(left) > FEW and all(check.evidence is not None for check in missing):
        return False  # so many wins could show anything
    won = [ItemScores(item, 1.0, dict.fromkeys(roles_of(scores.rows), 0.0)) for item in left]
    best = decide(replace(scores, rows=(*scores.rows, *won)), config, taught=taught, past=past)
    return bool(_missing(best)) and (_is_gain(missing[0]) or not _is_gain(_missing(best)[0]))


def _missing(decision: Decision) -> list[Check]:
    """What holds; gains only where nothing else does."""
    held = [check for check in decision.checks if check.verdict is Verdict.HOLD]
    return [check for check in held if not _is_gain(check)] or held


def _is_gain(check: Check) -> bool:
    return check.code is Code.GAIN
