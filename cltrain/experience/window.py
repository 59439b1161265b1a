"""Which records the next update reads, and what becomes of them afterwards.

A record is read once: after learning it only ever comes back through replay. What a held update read waits again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, and_, exists, func, insert, or_, select
from sqlalchemy import update as change

from cltrain.config import ExperienceConfig
from cltrain.experience.examples import accepted, example_of, pool_rare, suite_items_of
from cltrain.experience.reading import read_trajectories
from cltrain.experience.triggers import Suspicion, concerns, find_suspicions
from cltrain.experience.verify import verify
from cltrain.records import Example, SuiteItem
from cltrain.store.database import Store
from cltrain.store.schema import feedback, records, screenings, updates

STATUSES = frozenset({"waiting", "learned", "replay", "quarantined", "unusable"})
PAGE = 200  # records read at once
MAX_READ = 5000  # waiting records looked at for one window, newest first
MAX_HELD_OUT = 2000  # evaluation records that items are made of, newest first
NUM_RATED = 200  # newest records that a rate is taken over


@dataclass(frozen=True, slots=True)
class Window:
    """What may be learned from now, oldest record first, and what is still missing."""

    examples: tuple[Example, ...]
    num_waiting: int  # learnable records that wait, those of this window included
    num_missing: int  # learnable records until `min_window` is reached, 0 when it is
    rate_per_s: float | None  # learnable records a second lately; None: unknown
    unusable: tuple[tuple[str, str], ...]  # record and reason: mature, and nothing in it may be learned
    num_immature: int  # ended records that wait for feedback or for `mature_after_s`
    as_of: float  # feedback up to this time was seen


def next_window(
    store: Store,
    agent: str,
    config: ExperienceConfig,
    *,
    learn_from: Sequence[str],
    tools_allowed: Sequence[str] | None,
    now: float,
    upto: int | None = None,
) -> Window:
    """The newest `max_window` learnable, mature, never learned records of the training split, as examples.

    Mature: ended, and has feedback or has had none for `mature_after_s`. Where more wait than fit, no principal takes
    more than its quota before everybody had their turn, so a flood of one starves nobody. `upto`: only records with
    seq at most this. Records in which nothing can ever be learned become `unusable` here, until new feedback arrives.
    """
    is_ours = and_(records.c.agent == agent, records.c.status == "ended", records.c.split == "train", _is_unread())
    if upto is not None:
        is_ours = and_(is_ours, records.c.seq <= upto)
    is_mature = or_(_has_feedback(), records.c.updated_at <= now - config.mature_after_s)
    joined = records.outerjoin(screenings, screenings.c.record == records.c.id)
    with store.read() as connection:
        num_ended = connection.scalar(select(func.count()).select_from(joined).where(is_ours)) or 0
        query = select(records.c.id).select_from(joined).where(is_ours, is_mature).order_by(records.c.seq.desc())
        ids = list(connection.scalars(query))
    learnable: list[tuple[float, Example]] = []  # newest first
    unusable: list[tuple[str, str]] = []
    for start in range(0, min(len(ids), MAX_READ), PAGE):
        page = read_trajectories(store, agent, records_in=ids[start : start + PAGE])
        for trajectory in reversed(page):
            example = example_of(trajectory, learn_from=learn_from, tools_allowed=tools_allowed)
            if isinstance(example, Example):
                learnable.append((trajectory.created_at, example))
            else:
                unusable.append((trajectory.id, example))
    _write_unusable(store, agent, unusable, now)
    chosen = _fair(
        [example for _, example in learnable],
        config.max_window,
        max(1, int(config.principal_quota * config.max_window)),
    )
    return Window(
        examples=tuple(pool_rare(chosen[::-1], config.rare_stratum)),
        num_waiting=len(learnable),
        num_missing=max(0, config.min_window - len(chosen)),
        rate_per_s=rate_per_s([at for at, _ in learnable], now),
        unusable=tuple(unusable),
        num_immature=num_ended - len(ids),
        as_of=now,
    )


def mark(
    connection: Connection,
    agent: str,
    record: str,
    status: str,
    *,
    now: float,
    reason: str | None = None,
    stratum: str | None = None,
    update: str | None = None,
) -> None:
    """Write what the worker thinks of a record: waiting, learned, replay, quarantined or unusable.

    `update` is the update that read it, `stratum` the one it was learned in. Replaces the former word on this record.
    """
    assert status in STATUSES, status
    values = {"status": status, "reason": reason, "stratum": stratum, "update": update, "changed_at": now}
    where = (screenings.c.record == record) & (screenings.c.agent == agent)
    if connection.execute(change(screenings).where(where).values(**values)).rowcount == 0:
        connection.execute(insert(screenings).values(record=record, agent=agent, **values))


def heldout_items(
    store: Store,
    agent: str,
    config: ExperienceConfig,
    *,
    learn_from: Sequence[str],
    tools_allowed: Sequence[str] | None,
    now: float,
) -> tuple[list[SuiteItem], float | None]:
    """The `agreement` items of the evaluation split, and how many a second came in lately (None: unknown).

    Poison and broken feeds hit this split too: only verified episodes count, and none that the trigger scan suspects,
    here or in the window of any update so far. With `filter = false` nothing is left out.
    """
    is_ours = and_(records.c.agent == agent, records.c.status == "ended", records.c.split == "eval")
    is_mature = or_(_has_feedback(), records.c.updated_at <= now - config.mature_after_s)
    with store.read() as connection:
        newest = select(records.c.id).where(is_ours, is_mature).order_by(records.c.seq.desc()).limit(MAX_HELD_OUT)
        ids = list(connection.scalars(newest))
        suspicions = _known_suspicions(connection, agent)
    examples: list[Example] = []
    times: list[float] = []
    for trajectory in read_trajectories(store, agent, records_in=ids):
        example = accepted(trajectory, learn_from=learn_from, tools_allowed=tools_allowed)
        if isinstance(example, Example) and (not config.filter or verify(example, tools_allowed=tools_allowed) is None):
            examples.append(example)
            times.append(trajectory.created_at)
    if config.filter:
        for start in range(0, len(examples), config.max_window):
            suspicions += find_suspicions(
                examples[start : start + config.max_window],
                min_count=config.trigger_min_count,
                max_principals=config.trigger_max_principals,
            )
        is_clean = [not any(concerns(s, example) for s in suspicions) for example in examples]
        times = [at for at, clean in zip(times, is_clean, strict=True) if clean]
        examples = [example for example, clean in zip(examples, is_clean, strict=True) if clean]
    return [item for example in examples for item in suite_items_of(example)], rate_per_s(times, now)


def num_late_feedback(store: Store, agent: str) -> int:
    """How many pieces of feedback came after their record was learned from: stored, and never learned silently."""
    is_late = and_(
        feedback.c.agent == agent,
        screenings.c.status.in_(("learned", "replay")),
        feedback.c.created_at > screenings.c.changed_at,
    )
    joined = feedback.join(screenings, screenings.c.record == feedback.c.record)
    with store.read() as connection:
        return connection.scalar(select(func.count()).select_from(joined).where(is_late)) or 0


def rate_per_s(times: Sequence[float], now: float) -> float | None:
    """Events a second since the oldest of the newest NUM_RATED; None where that says nothing."""
    newest = sorted(times)[-NUM_RATED:]
    return len(newest) / (now - newest[0]) if newest and now > newest[0] else None


def _has_feedback() -> ColumnElement[bool]:
    return exists().where(feedback.c.record == records.c.id)


def _is_unread() -> ColumnElement[bool]:
    news = exists().where(feedback.c.record == records.c.id, feedback.c.created_at >= screenings.c.changed_at)
    return or_(
        screenings.c.record.is_(None),
        screenings.c.status == "waiting",
        and_(screenings.c.status == "unusable", news),
    )


def _write_unusable(store: Store, agent: str, unusable: Sequence[tuple[str, str]], now: float) -> None:
    """What another configuration could use is read again next time; the rest needs new feedback first."""
    final = [(record, reason) for record, reason in unusable if "agent." not in reason]
    if final:
        with store.write() as connection:
            for record, reason in final:
                mark(connection, agent, record, "unusable", now=now, reason=reason)


def _fair(examples: Sequence[Example], size: int, cap: int) -> list[Example]:
    """The first `size`, but no principal beyond `cap` while others are left; in the order given."""
    seen: Counter[str] = Counter()
    within: list[int] = []
    beyond: list[int] = []
    for index, example in enumerate(examples):
        seen[example.principal] += 1
        (within if seen[example.principal] <= cap else beyond).append(index)
    return [examples[index] for index in sorted((within + beyond)[:size])]


def _known_suspicions(connection: Connection, agent: str) -> list[Suspicion]:
    """What the windows of earlier updates were suspected of, from their manifests."""
    found = []
    for manifest in connection.scalars(select(updates.c.manifest).where(updates.c.agent == agent)):
        for said in manifest.get("suspicious", ()):
            lists = {name: tuple(said[name]) for name in ("records", "principals")}
            found.append(Suspicion(**{**said, **lists}))
    return found
