"""How much evidence a decision needs, given what was decided before: levels shrink with every further try.

One gate at level alpha is honest by itself; a thousand in a row are not, because the lucky ones are served.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import select

from cltrain.config import GateConfig
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
    is_retry: bool = False  # the window was filtered after a rejection: this one spends half


@dataclass(frozen=True, slots=True)
class Levels:
    """1 / level is the e-value that refutes: for "no worse" (against every reference) and for "better" (in all suites
    together)."""

    non_inferior: float
    gain: float


def levels_of(config: GateConfig, past: Past) -> Levels:
    """The levels of one decision.

    No worse: alpha for the first `gate.patience` candidates against one incumbent, then alpha (patience / k)^2 for the
    k-th. So an incumbent is ever replaced by something worse than the margin allows with a chance of at most
    2 patience alpha, however many candidates are tried (the sum over k), and by what is far worse hardly ever.

    Better: alpha, or with `gate.fdr` e-LOND (Xu and Ramdas, "Online multiple testing with e-values", 2024):
    alpha gamma_t (promotions so far + 1) with gamma_t = 1 / (t (t + 1)). The expected share of promotions without a
    gain is then at most alpha, under any dependence of one gate's items on another's.
    """
    share = 0.5 if past.is_retry else 1.0
    k, t = past.num_tried + 1, past.num_decisions + 1
    gain = config.alpha * (past.num_promoted + 1) / (t * (t + 1)) if config.fdr else config.alpha
    tries = min(1.0, (config.patience / k) ** 2)
    return Levels(share * config.alpha * tries, share * gain)


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
