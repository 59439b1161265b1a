"""How much evidence a decision needs, given what was decided before.

One gate at level alpha is honest by itself; a thousand in a row are not, because the lucky ones are served.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import select

from cltrain.config import GateConfig
from cltrain.gate.track import Outcome
from cltrain.records import Verdict
from cltrain.store.database import Store
from cltrain.store.schema import updates

JUDGED = (Verdict.PROMOTE, Verdict.HOLD, Verdict.REJECT)
SERVING_MODES = ("auto", "approve")  # where a promotion would have served


@dataclass(frozen=True, slots=True)
class Past:
    """What this agent's gate decided before."""

    num_decisions: int = 0  # where a promotion would have served
    num_promoted: int = 0  # of these
    record: tuple[Outcome, ...] = ()  # what the newest candidates were like, oldest first
    is_retry: bool = False  # the window was filtered after a rejection: this one spends half


@dataclass(frozen=True, slots=True)
class Levels:
    """1 / level is the e-value needed: for "no worse", and for "better" in all suites together."""

    non_inferior: float
    gain: float


def levels_of(config: GateConfig, past: Past) -> Levels:
    """The levels of one decision: alpha, half of it for a retry.

    With `gate.fdr` the gain follows e-LOND (Xu and Ramdas, "Online multiple testing with e-values", 2024):
    alpha gamma_t (promotions so far + 1) with gamma_t = 1 / (t (t + 1)). The expected share of promotions without a
    gain is then at most alpha, under any dependence of one gate's items on another's.
    """
    alpha = config.alpha / 2 if past.is_retry else config.alpha
    t = past.num_decisions + 1
    return Levels(alpha, alpha * (past.num_promoted + 1) / (t * (t + 1)) if config.fdr else alpha)


def read_past(store: Store, agent: str, window: int) -> Past:
    """What the store knows of this agent's judged updates, of `window` candidates what they were like. Trials and what
    could not be judged do not count."""
    outcome = updates.c.summary[("decision", "outcome")]
    query = select(updates.c.mode, updates.c.verdict, outcome.label("outcome")).where(
        updates.c.agent == agent,
        updates.c.state == "done",
        updates.c.mode != "trial",
        updates.c.candidate.is_not(None),
        updates.c.verdict.in_([str(verdict) for verdict in JUDGED]),
    )
    with store.read() as connection:
        rows = connection.execute(query.order_by(updates.c.number)).all()
    verdicts = [row.verdict for row in rows if row.mode in SERVING_MODES]
    record = tuple(Outcome(*row.outcome) for row in rows if row.outcome)
    return Past(len(verdicts), verdicts.count(str(Verdict.PROMOTE)), record[-window:])
