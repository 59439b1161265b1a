"""When to stop asking: the questions that are left cannot turn a hold into a promotion."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from cltrain.config import GateConfig
from cltrain.gate.decision import decide
from cltrain.gate.levels import Past
from cltrain.gate.rows import GateScores, ItemScores, roles_of
from cltrain.records import Check, Code, Decision, SuiteItem, Verdict


def is_futile(
    scores: GateScores,
    decision: Decision,
    left: Sequence[SuiteItem],
    config: GateConfig,
    *,
    taught: Collection[str],
    past: Past = Past(),
) -> bool:
    """Whether no answers to the questions that are `left` could show what is missing after a hold.

    The decision itself is asked, were every one of them won. While more than a gain is missing the gain does not count:
    whether a candidate does harm decides what becomes of its records. (A stop at an e-value
    below 0.05 after half of the questions was tried: in 3,600 simulated gates harm rejected first, or neither came.)
    """
    missing = _missing(decision)
    won = [ItemScores(item, 1.0, dict.fromkeys(roles_of(scores.rows), 0.0)) for item in left]
    settled = tuple(check for check in scores.findings if check.code is not Code.LENGTH)  # of answers still to come
    best = decide(replace(scores, rows=(*scores.rows, *won), findings=settled), config, taught=taught, past=past)
    return bool(_missing(best)) and (_is_gain(missing[0]) or not _is_gain(_missing(best)[0]))


def _missing(decision: Decision) -> list[Check]:
    """What holds; gains only where nothing else does."""
    held = [check for check in decision.checks if check.verdict is Verdict.HOLD]
    return [check for check in held if not _is_gain(check)] or held


def _is_gain(check: Check) -> bool:
    return check.code is Code.GAIN
