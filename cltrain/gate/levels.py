"""How much evidence a decision needs, given what was decided before: levels shrink with every further try.

One gate at level alpha is honest by itself; a thousand in a row are not, because the lucky ones are served.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sqlalchemy import select

from cltrain.config import GateConfig
from cltrain.gate.stats import e_value
from cltrain.records import Verdict
from cltrain.store.database import Store
from cltrain.store.schema import updates

JUDGED = (Verdict.PROMOTE, Verdict.HOLD, Verdict.REJECT)


@dataclass(frozen=True, slots=True)
class Past:
    """What this agent's gate decided before, where a promotion would have served."""

    num_tried: int = 0  # candidates judged against the present incumbent
    num_decisions: int = 0  # in all
    num_promoted: int = 0
    has_kept_mark: bool = True  # the incumbent is the high-water mark, or was shown to be no worse (`keeps_mark`)
    is_retry: bool = False  # the window was filtered after a rejection: this one spends half


@dataclass(frozen=True, slots=True)
class Levels:
    """What has to be shown: no worse than the incumbent by the margin at `non_inferior`, no worse than high-water mark
    and anchor by `mark_margin` at `mark`, better at `gain` in all suites together. 1 / level is the e-value needed."""

    non_inferior: float
    mark: float
    mark_margin: float
    gain: float


def levels_of(config: GateConfig, past: Past) -> Levels:
    """The levels of one decision.

    Marks: while the incumbent was not shown to have kept the high-water mark, only `gate.unproven_share` of the margin
    is left, and after `gate.patience` candidates the k-th has alpha (patience / k)^2 unless it is shown to be better
    than the incumbent: whatever their number, what falls below is served with a chance of at most 2 patience alpha (the sum over k). Without this a stream of candidates each
    a little worse goes down by the whole margin and more, as one in a hundred passes at its edge.

    Gain: alpha, or with `gate.fdr` e-LOND (Xu and Ramdas, "Online multiple testing with e-values", 2024):
    alpha gamma_t (promotions so far + 1) with gamma_t = 1 / (t (t + 1)). The expected share of promotions without a
    gain is then at most alpha, under any dependence of one gate's items on another's.
    """
    share = 0.5 if past.is_retry else 1.0
    alpha = share * config.alpha
    k, t = past.num_tried + 1, past.num_decisions + 1
    gain = alpha * (past.num_promoted + 1) / (t * (t + 1)) if config.fdr else alpha
    if past.has_kept_mark:
        return Levels(alpha, alpha, config.margin, gain)
    return Levels(alpha, alpha * min(1.0, (config.patience / k) ** 2), config.margin * config.unproven_share, gain)


def keeps_mark(differences: Sequence[float], config: GateConfig) -> bool:
    """Whether what serves is shown to be no worse than the mark by more than `gate.kept_share` of the margin.

    differences: incumbent less mark on questions that neither was promoted on, a cluster each: those that made it pass
    flatter it.
    """
    return e_value(differences, -config.kept_share * config.margin) >= 1 / config.alpha


def read_past(store: Store, agent: str, incumbent: str) -> Past:
    """What the store knows of this agent's judged updates; trials, observation and errors serve nothing."""
    query = select(updates.c.parent, updates.c.verdict).where(
        updates.c.agent == agent,
        updates.c.state == "done",
        updates.c.mode.in_(("auto", "approve")),
        updates.c.candidate.is_not(None),
        updates.c.verdict.in_([str(verdict) for verdict in JUDGED]),
    )
    with store.read() as connection:
        rows = connection.execute(query).all()
    promoted = sum(row.verdict == Verdict.PROMOTE for row in rows)
    return Past(sum(row.parent == incumbent for row in rows), len(rows), promoted)


def judged_on(store: Store, agent: str, releases: Collection[str]) -> set[str]:
    """Ids of the items on which these releases were judged when they were candidates."""
    query = select(updates.c.summary).where(updates.c.agent == agent, updates.c.candidate.in_(releases))
    with store.read() as connection:
        found = connection.execute(query).scalars().all()
    return {item for one in found if one for item in one.get("decision", {}).get("items_used", ())}
