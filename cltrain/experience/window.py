"""Which records the next update reads, and what becomes of them afterwards.

A record is read once: after learning it only ever comes back through replay. What a held update read waits again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, delete, func, insert, select
from sqlalchemy import update as change

from cltrain.config import ExperienceConfig, ObjectivesConfig
from cltrain.errors import guarded
from cltrain.experience.examples import accepted, example_of, pool_rare, suite_items_of
from cltrain.experience.lanes import lane_of
from cltrain.experience.phrases import row_of
from cltrain.experience.reading import read_trajectories
from cltrain.experience.screens import negative_cap
from cltrain.experience.triggers import Suspicion, concerns, find_suspicions
from cltrain.experience.verify import verify
from cltrain.experience.waiting import WITH_SCREENING, is_unread, mature, rules_mark, without_rules
from cltrain.records import Code, Decision, Example, SuiteItem, Trajectory, Verdict, is_claim
from cltrain.store.database import Store
from cltrain.store.schema import records, screenings, updates

STATUSES = frozenset({"waiting", "learned", "replay", "quarantined", "unusable"})
PAGE = 100  # records read at once
Page = Sequence[Any]  # rows of (seq, id, principal, status)
Teach = Callable[[Trajectory], "Example | str"]
MAX_HELD_OUT = 2000  # evaluation records that items are made of, newest first
OUTDATED = "says only what was wrong, and a whole window of newer records does so too"
NUM_RATED = 200  # newest records that a rate is taken over


@dataclass(frozen=True, slots=True)
class Window:
    """What may be learned from now, oldest record first, and what is still missing."""

    examples: tuple[Example, ...]
    num_waiting: (
        int  # learnable records that were found, those of this window included; all of them while some are missing
    )
    num_missing: int  # records until `min_window` is reached, 0 when it is
    num_negative_waiting: int  # learnable records that say no more than what was wrong, too many for this window
    rate_per_s: float | None  # such records a second lately, negative ones aside; None: unknown
    unusable: tuple[tuple[str, str], ...]  # record and reason: mature, and nothing in it may be learned


def next_window(
    store: Store,
    agent: str,
    config: ExperienceConfig,
    *,
    learn_from: Sequence[str],
    tools_allowed: Sequence[str] | None,
    now: float,
    upto: int | None = None,
    objectives: ObjectivesConfig | None = None,
) -> Window:
    """The newest `max_window` learnable, mature, never learned records of the training split, as examples.

    Mature: ended, and has feedback or has had none for `mature_after_s`. Where more wait than fit, no principal takes
    more than its quota before everybody had their turn, so a flood of one starves nobody, and reading stops where the
    window is full. `upto`: only records with seq at most this. Records in which nothing can be learned become
    `unusable` here, until new feedback arrives or the rules (`learn_from`, `tools_allowed`, `objectives`) change.

    `objectives` None: only what is right is learned. Else also what was wrong (see `lanes`), in at most
    `max_negative_share` of the window: the newest; as many as fill a window wait, and older ones are unusable. All that
    the window holds counts for `min_window`.
    """
    rules = rules_mark(learn_from, tools_allowed, objectives)

    def teach(trajectory: Trajectory) -> Example | str:
        if objectives is None:
            return example_of(trajectory, learn_from=learn_from, tools_allowed=tools_allowed)
        return lane_of(trajectory, objectives, learn_from=learn_from, tools_allowed=tools_allowed)

    is_wanted = is_unread(agent, is_mature=mature(now, config.mature_after_s), rules=rules)
    unusable: list[tuple[str, str]] = []
    num_negative = 0

    def read(page: Page) -> list[_Found]:
        nonlocal num_negative
        found, useless = _read(store, agent, page, teach)
        negative = [one for one in found if not is_claim(one.example)]
        outdated = {one.seq for one in negative[max(0, config.max_window - num_negative) :]}
        num_negative += len(negative) - len(outdated)
        useless += [(one.example.record, OUTDATED) for one in found if one.seq in outdated]
        found = [one for one in found if one.seq not in outdated]
        _file(store, agent, page, found, [(record, reason + rules) for record, reason in useless], now)
        unusable.extend(useless)
        return found

    cap = max(1, int(config.principal_quota * config.max_window))
    learnable = _newest(_pages(store, is_wanted, upto), read, config.max_window, cap)
    chosen = [found.example for found in _balanced(learnable, config.max_window, cap, config.max_negative_share)]
    return Window(
        examples=tuple(pool_rare(chosen[::-1], config.rare_stratum)),
        num_waiting=len(learnable),
        num_missing=max(0, config.min_window - len(chosen)),
        num_negative_waiting=num_negative - sum(not is_claim(example) for example in chosen),
        rate_per_s=rate_per_s([found.created_at for found in learnable if is_claim(found.example)], now),
        unusable=tuple(unusable),
    )


def standing(decision: Decision, *, is_right: bool, is_sure: bool, is_served: bool) -> str:
    """What becomes of a learned record. A hold that lacks nothing but gain means that they teach nothing new: what was
    right was verified and did no harm, so it is rehearsed from now on and leaves the next window to what is new; where
    the adapter that learned it is not sure of it (see buffer.doubtful), it leaves and is not rehearsed. What was wrong
    is never rehearsed: it is learned once something serves that learned it, and waits until then."""
    if decision.verdict is Verdict.REJECT:
        return "quarantined"
    if is_served:
        return "replay" if is_right and is_sure else "learned"
    harmless = all(c.verdict is Verdict.PROMOTE or c.code is Code.GAIN for c in decision.checks)
    if is_right and decision.verdict is Verdict.HOLD and decision.checks and harmless:
        return "replay" if is_sure else "learned"
    return "waiting"


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
    """Write what the worker thinks of a record: waiting, learned (once, and never rehearsed), replay, quarantined or
    unusable.

    `update` is the update that learned from it, `stratum` the one it was in. Replaces the former word on this record.
    """
    assert status in STATUSES, status
    reason, stratum = _unicode(reason), _unicode(stratum)  # both may quote the record
    values = {"status": status, "reason": reason, "stratum": stratum, "update": update, "changed_at": now}
    where = (screenings.c.record == record) & (screenings.c.agent == agent)
    if connection.execute(change(screenings).where(where).values(**values)).rowcount == 0:
        connection.execute(insert(screenings).values(record=record, agent=agent, **values))


def forget_rehearsal(
    connection: Connection, agent: str, doubtful: Iterable[str], *, reason: str, now: float, status: str = "learned"
) -> None:
    """What is rehearsed of these records no longer is; which update learned them stays. Not the owner's rehearsal
    episodes: they have no standing."""
    where = (screenings.c.agent == agent) & screenings.c.record.in_(doubtful) & (screenings.c.status == "replay")
    connection.execute(change(screenings).where(where).values(status=status, reason=reason, changed_at=now))


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
    is_usable = and_(is_ours, mature(now, config.mature_after_s))
    with store.read() as connection:
        newest = select(records.c.id).where(is_usable).order_by(records.c.seq.desc()).limit(MAX_HELD_OUT)
        ids = list(connection.scalars(newest))
        suspicions = _known_suspicions(connection, agent)
    examples: list[Example] = []
    times: list[float] = []
    for trajectory in read_trajectories(store, agent, records_in=ids):
        example = guarded(_asked_for, trajectory, learn_from, tools_allowed, is_filtered=config.filter)
        if isinstance(example, Example):
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


def most_often(reasons: Mapping[str, int]) -> str:
    """How many records are unusable, and why most of them are, in words; `reasons` are not empty."""
    reason, count = Counter(reasons).most_common(1)[0]
    return f"{sum(reasons.values())} are unusable, most often ({count}): {reason}"


def unusable_reasons(store: Store, agent: str) -> Counter[str]:
    """Why records are unusable, and how many for each reason, whichever rules it was found under."""
    columns = (screenings.c.reason, func.count())
    is_ours = and_(screenings.c.agent == agent, screenings.c.status == "unusable")
    reasons: Counter[str] = Counter()
    with store.read() as connection:
        for reason, count in connection.execute(select(*columns).where(is_ours).group_by(screenings.c.reason)):
            reasons[without_rules(reason or "")] += count
    return reasons


def nothing_to_learn(store: Store, agent: str, serving: str, waiting: Window) -> dict[str, Any]:
    """The answer when no update was worth starting: a hold without a number."""
    reason = f"{waiting.num_waiting} learnable records are waiting, {waiting.num_missing} are missing"
    if waiting.num_negative_waiting:
        reason += f"; {waiting.num_negative_waiting} only say what was wrong (experience.max_negative_share)"
    if unusable := unusable_reasons(store, agent):
        reason += f"; {most_often(unusable)}"
    forecast_s = waiting.num_missing / waiting.rate_per_s if waiting.rate_per_s else None
    if forecast_s is not None:
        reason += f"; at the present rate they will be there in about {forecast_s / 60:.0f} minutes"
    return {
        "agent": agent, "number": None, "verdict": str(Verdict.HOLD), "reasons": [reason], "candidate": None,
        "serving": serving, "num_missing": waiting.num_missing, "forecast_s": forecast_s,
    }  # fmt: skip


def rate_per_s(times: Sequence[float], now: float) -> float | None:
    """Events a second since the oldest of the newest NUM_RATED; None where that says nothing."""
    newest = sorted(times)[-NUM_RATED:]
    return len(newest) / (now - newest[0]) if newest and now > newest[0] else None


def _asked_for(
    trajectory: Trajectory, learn_from: Sequence[str], tools_allowed: Sequence[str] | None, *, is_filtered: bool
) -> Example | str:
    """An accepted episode that questions can be made of, or why none can."""
    example = accepted(trajectory, learn_from=learn_from, tools_allowed=tools_allowed)
    if isinstance(example, str):
        return example
    row_of(example)  # scan and items must be able to read it, too
    suite_items_of(example)
    return (verify(example, tools_allowed=tools_allowed) if is_filtered else None) or example


def _unicode(text: str | None) -> str | None:
    return None if text is None else text.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True, slots=True)
class _Found:
    """A record that can be learned from."""

    seq: int
    created_at: float
    example: Example


def _pages(store: Store, is_wanted: ColumnElement[bool], upto: int | None) -> Iterator[Page]:
    """Newest first, a query each: who stops early has read no further."""
    columns = (records.c.seq, records.c.id, records.c.principal, screenings.c.status)
    query = select(*columns).select_from(WITH_SCREENING).where(is_wanted).order_by(records.c.seq.desc()).limit(PAGE)
    last = None if upto is None else upto + 1
    while True:
        with store.read() as connection:
            page = connection.execute(query if last is None else query.where(records.c.seq < last)).all()
        if page:
            yield page
        if len(page) < PAGE:
            return
        last = page[-1].seq


def _read(store: Store, agent: str, page: Page, teach: Teach) -> tuple[list[_Found], list[tuple[str, str]]]:
    """What can be learned from, newest first, and the others with their reason."""
    found: list[_Found] = []
    useless: list[tuple[str, str]] = []
    for trajectory in reversed(read_trajectories(store, agent, records_in=[row.id for row in page])):
        example = guarded(teach, trajectory)
        if isinstance(example, Example):
            found.append(_Found(trajectory.seq, trajectory.created_at, example))
        else:
            useless.append((trajectory.id, example))
    return found, useless


def _file(
    store: Store,
    agent: str,
    page: Page,
    found: Sequence[_Found],
    useless: Sequence[tuple[str, str]],
    now: float,
) -> None:
    """What is of no use is not read again soon; of what became useful nothing is held against it any more."""
    learnable = {one.example.record for one in found}
    revived = [row.id for row in page if row.status == "unusable" and row.id in learnable]
    if not useless and not revived:
        return
    with store.write() as connection:
        for record, reason in useless:
            mark(connection, agent, record, "unusable", now=now, reason=reason)
        is_stale = and_(screenings.c.agent == agent, screenings.c.status == "unusable")
        connection.execute(delete(screenings).where(is_stale, screenings.c.record.in_(revived)))


def _newest(pages: Iterable[Page], read: Callable[[Page], list[_Found]], size: int, cap: int) -> list[_Found]:
    """At least what `_balanced` chooses from all that waits, newest first: once a principal has `cap`, its other
    records are read only if the rest does not fill the window. Negative ones fill no window."""
    seen: Counter[str] = Counter()
    found: list[_Found] = []
    passed_over: list[Any] = []
    for page in pages:
        passed_over += [row for row in page if seen[row.principal] >= cap]
        here = read([row for row in page if seen[row.principal] < cap])
        seen.update(one.example.principal for one in here if is_claim(one.example))
        found += here
        if sum(min(count, cap) for count in seen.values()) >= size:
            return found
    surplus = size - sum(min(count, cap) for count in seen.values())
    extra = sorted(_beyond([one for one in found if is_claim(one.example)], cap), reverse=True)
    while passed_over and sum(seq > passed_over[0].seq for seq in extra) < surplus:
        here = read(passed_over[:PAGE])
        passed_over = passed_over[PAGE:]
        extra += [one.seq for one in here if is_claim(one.example)]
        found += here
    return sorted(found, key=lambda one: one.seq, reverse=True)


def _balanced(found: Sequence[_Found], size: int, cap: int, share: float) -> list[_Found]:
    """What `_fair` chooses, but of negative ones no more than their share: the newest, and others take their places."""
    chosen = _fair(found, size, cap)
    others = [one for one in found if is_claim(one.example)]
    if sum(not is_claim(one.example) for one in chosen) <= int(share * len(chosen) + 1e-9):
        return chosen
    num_negative = min(int(share * size + 1e-9), negative_cap(len(others), share))
    negative = _fair([one for one in chosen if not is_claim(one.example)], num_negative, cap)
    kept = {one.seq for one in [*negative, *_fair(others, size - len(negative), cap)]}
    return [one for one in found if one.seq in kept]


def _fair(found: Sequence[_Found], size: int, cap: int) -> list[_Found]:
    """The first `size`, but no principal beyond `cap` while others are left; in the order given."""
    beyond = _beyond(found, cap)
    within = [one for one in found if one.seq not in beyond]
    chosen = {one.seq for one in [*within, *(one for one in found if one.seq in beyond)][:size]}
    return [one for one in found if one.seq in chosen]


def _beyond(found: Sequence[_Found], cap: int) -> set[int]:
    """The seq of every record that comes after `cap` others of its principal."""
    seen: Counter[str] = Counter()
    beyond: set[int] = set()
    for one in found:
        seen[one.example.principal] += 1
        if seen[one.example.principal] > cap:
            beyond.add(one.seq)
    return beyond


def _known_suspicions(connection: Connection, agent: str) -> list[Suspicion]:
    """What the windows of earlier updates were suspected of, from their manifests."""
    found = []
    for manifest in connection.scalars(select(updates.c.manifest).where(updates.c.agent == agent)):
        for said in manifest.get("suspicious", ()):
            lists = {name: tuple(said[name]) for name in ("records", "principals")}
            found.append(Suspicion(**{**said, **lists}))
    return found
