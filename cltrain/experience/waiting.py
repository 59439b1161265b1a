"""Which records wait to be learned from, as conditions on rows: what the window reads and what the owner is shown.

Feedback on a session's episode is feedback on each of its branches (`episode_of`), here as in `reading`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence

from sqlalchemy import ColumnElement, and_, case, exists, func, not_, or_, select

from cltrain.config import ObjectivesConfig
from cltrain.store.database import Store
from cltrain.store.schema import feedback, records, screenings

GIVEN_BACK = "given back"  # what the reason begins with where a person took a record out of quarantine
SCRUBBED = "no longer rehearsed"  # and where a failed canary had it taken out of what is rehearsed
EPISODE_CHARS = 37  # traj- and 32 hex digits: what a branch's id begins with

WITH_SCREENING = records.outerjoin(screenings, screenings.c.record == records.c.id)
EPISODE = case(
    (records.c.id.like("traj-" + "_" * 32 + "~%"), func.substr(records.c.id, 1, EPISODE_CHARS)), else_=records.c.id
)


def rules_mark(
    learn_from: Sequence[str], tools_allowed: Sequence[str] | None, objectives: ObjectivesConfig | None = None
) -> str:
    """What a reason ends with, so that a record found unusable is read again once the agent's rules have changed."""
    rules: list[object] = [sorted(learn_from), None if tools_allowed is None else sorted(tools_allowed)]
    if objectives is not None:
        rules.append([sorted(objectives.use), objectives.corrections])
    return f" (rules {hashlib.sha256(json.dumps(rules).encode()).hexdigest()[:8]})"


def without_rules(reason: str) -> str:
    """A reason as it was given, without the mark of `rules_mark`."""
    return reason.partition(" (rules ")[0]


def is_unread(agent: str, *, is_mature: ColumnElement[bool], rules: str | None = None) -> ColumnElement[bool]:
    """Ended records of the training split on which no update has concluded, and that are (or are not) mature: nothing
    is said of them, they were put back, or they were unusable until something new was said. With `rules` (see
    `rules_mark`) also those that were unusable under others. In rows of `WITH_SCREENING`.
    """
    is_news = _has_feedback(since=True)
    if rules is not None:
        is_news = or_(not_(func.coalesce(screenings.c.reason, "").endswith(rules, autoescape=True)), is_news)
    is_open = or_(
        screenings.c.record.is_(None),
        screenings.c.status == "waiting",
        and_(screenings.c.status == "unusable", is_news),
    )
    is_ours = and_(records.c.agent == agent, records.c.status == "ended", records.c.split == "train")
    return and_(is_ours, case((is_open, is_mature), else_=False))  # most are learned: look at those no further


def mature(now: float, mature_after_s: float) -> ColumnElement[bool]:
    """Has feedback, or has had none for `mature_after_s`."""
    return or_(_has_feedback(), records.c.updated_at <= now - mature_after_s)


def looked_at(store: Store, agent: str, names: Collection[str]) -> set[str]:
    """Those of these records that an update has read and left, less what a person gave back since: that is news."""
    is_given_back = func.coalesce(screenings.c.reason, "").startswith(GIVEN_BACK)
    is_old = and_(screenings.c.agent == agent, screenings.c.record.in_(names), not_(is_given_back))
    with store.read() as connection:
        return set(connection.scalars(select(screenings.c.record).where(is_old)))


def num_immature(store: Store, agent: str, mature_after_s: float, now: float) -> int:
    """How many ended records wait for feedback or for `mature_after_s`."""
    is_young = is_unread(agent, is_mature=not_(mature(now, mature_after_s)))
    with store.read() as connection:
        return connection.scalar(select(func.count()).select_from(WITH_SCREENING).where(is_young)) or 0


def num_late_feedback(store: Store, agent: str) -> int:
    """How many pieces of feedback came after their record was learned from: stored, and never learned silently."""
    is_learned = and_(screenings.c.agent == agent, screenings.c.status.in_(("learned", "replay")))
    is_late = and_(_is_about_record(), feedback.c.created_at > screenings.c.changed_at)
    with store.read() as connection:
        joined = screenings.join(records, records.c.id == screenings.c.record).join(feedback, is_late)
        query = select(func.count(feedback.c.id.distinct())).select_from(joined).where(is_learned)
        return connection.scalar(query) or 0


def _has_feedback(*, since: bool = False) -> ColumnElement[bool]:
    """`since`: said after the record was screened."""
    newer = (feedback.c.created_at >= screenings.c.changed_at,) if since else ()
    return or_(
        exists().where(feedback.c.record == records.c.id, *newer), exists().where(feedback.c.target == EPISODE, *newer)
    )


def _is_about_record() -> ColumnElement[bool]:
    return or_(feedback.c.record == records.c.id, feedback.c.target == EPISODE)
