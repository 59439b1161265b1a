"""The alias: which release an agent serves. It moves by compare-and-swap only, forward here and back by `rollback`.

Nothing here needs a trainer, a gate, a server or an accelerator: one short transaction on the store each.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import Connection, Row, Select, case, or_, select, update

from cltrain.errors import ConflictError, DataError
from cltrain.records import Alias, Verdict
from cltrain.registry.approvals import refuse_withdrawn
from cltrain.registry.decisions import append, entries_of
from cltrain.registry.lease import agent_row, require_fence
from cltrain.registry.releases import change_status, get_in
from cltrain.registry.rollouts import Rollout, open_in, quarantine_learned, settle_in, take_back_in
from cltrain.registry.tenants import incumbent_in, outdate_followers, tenants_in
from cltrain.store.database import Store
from cltrain.store.schema import agents, aliases, releases, screenings, updates


@dataclass(frozen=True, slots=True)
class References:
    """What a candidate is compared with: the release that serves, the best so far, the last human-approved one."""

    incumbent: str
    high_water: str
    anchor: str
    previous: str | None


@dataclass(frozen=True, slots=True)
class Rollback:
    """What a rollback did: where from and to, which releases it undid, how many records it quarantined."""

    undone: str
    alias: Alias
    rolled_back: tuple[str, ...]
    num_quarantined: int
    is_frozen: bool


def read_alias(store: Store, agent: str) -> Alias:
    """Raises DataError for an agent that has no alias yet (`ensure_base_release` makes it)."""
    with store.read() as connection:
        return _alias(_row(connection, agent))


def serving_in(connection: Connection, agent: str) -> str:
    """The name of the release that answers, as the caller's transaction sees it."""
    return incumbent_in(connection, agent, _row(connection, agent).release)


def read_references(store: Store, agent: str) -> References:
    """The releases that a candidate is judged against. Raises DataError like `read_alias`."""
    with store.read() as connection:
        row = _row(connection, agent)
    return References(row.release, row.high_water, row.anchor, row.previous)


def move_alias(
    store: Store,
    agent: str,
    *,
    expected: str | Alias,
    to: str,
    fence: int | None,
    now: float,
    is_human: bool = False,
    raises_high_water: bool = False,
) -> Alias:
    """`move_alias_in` in a transaction of its own."""
    with store.write() as connection:
        return move_alias_in(
            connection, agent, expected=expected, to=to, fence=fence, now=now, is_human=is_human,
            raises_high_water=raises_high_water,
        )  # fmt: skip


def move_alias_in(
    connection: Connection,
    agent: str,
    *,
    expected: str | Alias,
    to: str,
    fence: int | None,
    now: float,
    is_human: bool = False,
    raises_high_water: bool = False,
    file_as: str | None = None,
) -> Alias:
    """Let `to` serve if the alias still is `expected`; marks it released, in the caller's write transaction.

    Give the Alias that the update started from as `expected`: its version also catches an alias that went away and came
    back, and a freeze that was lifted meanwhile. `fence` is the worker's lease; only a human may pass None. A human
    move makes `to` the new anchor, `raises_high_water` the new high-water mark. What is being tried on live traffic
    ends with the move. `file_as`: of a release whose update ended before, why its records get their new standing now.
    Raises ConflictError when the alias or the lease moved, learning is frozen (not for a human), or `to` may not serve:
    rejected, held, deleted and any verdict but promote never, rolled back only by a human, for the first time only if
    nothing that it read was quarantined or removed since.
    """
    if fence is None and not is_human:
        raise ConflictError(f"{agent}: a move without a lease is a human's; pass the fence of the lease")
    row = _row(connection, agent)
    _compare(row, expected)
    if fence is not None:
        require_fence(connection, agent, fence)
        if fence < row.fence:
            raise ConflictError(f"lease {fence} of {agent} is older than {row.fence}, which moved the alias last")
    switch = agent_row(connection, agent)
    if switch.is_frozen and not is_human:
        raise ConflictError(f"{agent} is frozen ({switch.frozen_reason}): unfreeze it to promote {to}")
    target = get_in(connection, to)
    if target.agent != agent:
        raise ConflictError(f"{to} belongs to {target.agent}, not to {agent}")
    if target.status == "rolled_back" and not is_human:
        raise ConflictError(f"{to} was rolled back: only a human can promote it again")
    _refuse_verdict(connection, agent, to)
    refuse_withdrawn(connection, target)
    settle_in(connection, agent, serving=to, now=now)
    change_status(connection, to, "released", now=now)
    moved = {
        "release": to,
        "previous": row.previous if to == row.release else row.release,
        "version": row.version + 1,
        "fence": row.fence if fence is None else fence,
        "anchor": to if is_human else row.anchor,
        "high_water": to if raises_high_water else row.high_water,
        "changed_at": now,
    }
    connection.execute(update(aliases).where(aliases.c.agent == agent).values(**moved))
    outdate_followers(connection, agent)
    payload = {
        "from": row.release,
        "to": to,
        "anchor": moved["anchor"],
        "high_water": moved["high_water"],
        "is_human": is_human,
        "fence": fence,
    }
    append(connection, agent, "promote", payload, now)
    if file_as is not None:
        file_learned_in(connection, agent, to, file_as, now)
    return _alias(_row(connection, agent))


def rollback(
    store: Store,
    agent: str,
    *,
    to: str | None = None,
    expected: str | None = None,
    now: float,
    reason: str,
    freeze: bool = True,
) -> Rollback:
    """Serve an earlier release again: `to`, else what served before, else the nearest released ancestor.

    What is being tried on live traffic is the newest: without `to` and `expected` it alone is undone, and what serves
    goes on. Else undone are the current release and its ancestors up to `to`: they become rolled_back, the records that
    their updates learned or could newly rehearse are quarantined, and an update that is under way loses its
    compare-and-swap.
    Tenants whose release grew from one that is undone are back at what all are served, in the same transaction.
    Learning is frozen unless `freeze` is False. Raises ConflictError when the bare base serves already, `to` may not
    serve, or another release serves than the one `expected` (None: whichever).
    """
    with store.write() as connection:
        done = _roll_back(connection, agent, to, expected, now, reason, freeze=freeze)
        for tenant in tenants_in(connection, agent):
            serving = _row(connection, tenant).release
            if not set(done.rolled_back).isdisjoint(ancestry_in(connection, serving)):
                bare, why = _lineage(connection, serving)[-1], f"it grew from {done.undone}: {reason}"
                _roll_back(connection, tenant, bare, None, now, why, freeze=freeze)
        return done


def _roll_back(
    connection: Connection, agent: str, to: str | None, expected: str | None, now: float, reason: str, *, freeze: bool
) -> Rollback:
    row = _row(connection, agent)
    if expected is not None and row.release != expected:
        raise ConflictError(f"{row.release} serves by now, not {expected}")
    tried = open_in(connection, agent)
    if tried is not None and expected is None and to in (None, row.release):
        return _end_rollout(connection, row, tried, reason=reason, freeze=freeze, now=now)
    take_back_in(connection, agent, reason=f"rollback of {row.release}: {reason}", now=now)
    lineage = _lineage(connection, row.release)
    target = to if to is not None else _before(connection, row, lineage)
    release = get_in(connection, target)
    if target == row.release:
        raise ConflictError(f"{agent} already serves {target}: nothing to roll back")
    if release.agent != agent or release.status != "released":
        raise ConflictError(f"{target} is {release.status} of {release.agent} and cannot serve {agent} again")
    kept = set(_lineage(connection, target))
    undone = [n for n in lineage if n not in kept and get_in(connection, n).status == "released"]
    for name in undone:
        change_status(connection, name, "rolled_back", now=now, reason=reason)
    num_quarantined = _quarantine(connection, agent, undone, kept, release.created_at, now)
    high_water, anchor = _marks_after(connection, agent, target)
    moved = {
        "release": target,
        "previous": next((n for n in _lineage(connection, target)[1:] if _is_released(connection, n)), None),
        "version": row.version + 1,
        "high_water": high_water if row.high_water in undone else row.high_water,
        "anchor": anchor if row.anchor in undone else row.anchor,
        "changed_at": now,
    }
    connection.execute(update(aliases).where(aliases.c.agent == agent).values(**moved))
    outdate_followers(connection, agent)
    if freeze:
        _switch(connection, agent, is_frozen=True, reason=f"rollback of {row.release}: {reason}")
    payload = {"from": row.release, "to": target, "undone": undone, "num_quarantined": num_quarantined}
    append(connection, agent, "rollback", {**payload, "reason": reason, "freeze": freeze}, now)
    is_frozen = bool(agent_row(connection, agent).is_frozen)
    return Rollback(row.release, _alias(_row(connection, agent)), tuple(undone), num_quarantined, is_frozen)


def freeze(store: Store, agent: str, *, now: float, reason: str) -> None:
    """Stop learning: no update that began before `unfreeze` is ever promoted, except by a human; serving goes on, and
    what is being tried is taken back. Freezing twice keeps the newer reason."""
    with store.write() as connection:
        take_back_in(connection, agent, reason=f"frozen: {reason}", now=now)
        _switch(connection, agent, is_frozen=True, reason=reason)
        append(connection, agent, "freeze", {"reason": reason}, now)


def unfreeze(store: Store, agent: str, *, now: float, reason: str = "") -> None:
    """Let learning go on with new updates: one that is still under way began under other orders and is discarded."""
    with store.write() as connection:
        if agent_row(connection, agent).is_frozen:
            connection.execute(update(aliases).where(aliases.c.agent == agent).values(version=aliases.c.version + 1))
        _switch(connection, agent, is_frozen=False, reason=None)
        append(connection, agent, "unfreeze", {"reason": reason}, now)


def frozen_reason(store: Store, agent: str) -> str | None:
    """Why learning is frozen, or None when it is not."""
    with store.read() as connection:
        row = connection.execute(select(agents).where(agents.c.agent == agent)).first()
    return None if row is None or not row.is_frozen else (row.frozen_reason or "no reason given")


def _compare(row: Row, expected: str | Alias) -> None:
    name = expected if isinstance(expected, str) else expected.release
    if row.release != name:
        raise ConflictError(f"{row.agent} serves {row.release} (version {row.version}) now, no longer {name} as then")
    if isinstance(expected, Alias) and row.version != expected.version:
        raise ConflictError(
            f"{row.agent} serves {name} again, but was rolled back, moved or frozen since "
            f"(version {row.version}, then {expected.version})"
        )


def _refuse_verdict(connection: Connection, agent: str, name: str) -> None:
    """The gate's word is final where it was written down, whoever asks."""
    query = select(updates.c.verdict).where(updates.c.agent == agent, updates.c.candidate == name)
    for verdict in connection.execute(query).scalars():
        if verdict not in (None, Verdict.PROMOTE):
            raise ConflictError(f"the gate said {verdict} to {name}: only promote ever serves")


def file_learned_in(connection: Connection, agent: str, name: str, reason: str, now: float) -> None:
    """The records behind a release that was promoted later are rehearsed from now on, and not read again; those that
    only show what was wrong (stratum `<tool>/bad`) are not even rehearsed, nor is any that the release was not sure of,
    whichever update learned it."""
    of_release = updates.c.agent == agent, updates.c.candidate == name
    summaries = connection.scalars(select(updates.c.summary).where(*of_release))
    doubtful = {record for summary in summaries for record in (summary or {}).get("doubtful", ())}
    is_doubted, status = screenings.c.record.in_(doubtful), screenings.c.status
    is_learned = screenings.c["update"].in_(select(updates.c.id).where(*of_release)) & (status == "waiting")
    standing = case((or_(screenings.c.stratum.endswith("/bad"), is_doubted), "learned"), else_="replay")
    connection.execute(
        update(screenings)
        .where(screenings.c.agent == agent, or_(is_learned, is_doubted & (status == "replay")))
        .values(status=standing, reason=reason, changed_at=now)
    )


def _before(connection: Connection, row: Row, lineage: list[str]) -> str:
    if row.previous is not None and _is_released(connection, row.previous):
        return str(row.previous)
    for name in lineage[1:]:
        if _is_released(connection, name):
            return name
    raise ConflictError(f"{row.agent} serves {row.release}, and nothing before it: there is nothing to roll back to")


def ancestry(store: Store, name: str) -> list[str]:
    """A release and what it grew from, nearest first, ending at the bare base: each place is one promotion earlier."""
    with store.read() as connection:
        return ancestry_in(connection, name)


def _lineage(connection: Connection, name: str) -> list[str]:
    """A release and its agent's own ones among its ancestors, nearest first, ending at the agent's bare base: for a
    tenant's that stands for whatever the shared agent serves."""
    agent = get_in(connection, name).agent
    names = ancestry_in(connection, name)
    own = set(connection.scalars(select(releases.c.name).where(releases.c.agent == agent, releases.c.name.in_(names))))
    bare = connection.scalar(select(releases.c.name).where(releases.c.agent == agent, releases.c.number == 0))
    return [one for one in names if one in own and one != bare] + ([] if bare is None else [str(bare)])


def ancestry_in(connection: Connection, name: str) -> list[str]:
    """A release and its ancestors, of whichever agent, nearest first, ending at a bare base."""
    names: list[str] = []
    current: str | None = name
    while current is not None and current not in names:
        names.append(current)
        current = connection.execute(select(releases.c.parent).where(releases.c.name == current)).scalar()
    return names


def _is_released(connection: Connection, name: str) -> bool:
    return connection.execute(select(releases.c.status).where(releases.c.name == name)).scalar() == "released"


def _quarantine(connection: Connection, agent: str, undone: list[str], kept: set[str], since: float, now: float) -> int:
    """What the undone releases learned is never replayed, nor what came into replay `since` their target was sealed:
    they rehearsed it, or it was found harmless beside them. Unusable records stay unusable."""

    def behind(names: Collection[str]) -> Select[tuple[str]]:
        return select(updates.c.id).where(updates.c.agent == agent, updates.c.candidate.in_(names))

    made_by = screenings.c["update"]
    rehearsed = (
        (screenings.c.agent == agent)
        & (screenings.c.status == "replay")
        & (screenings.c.changed_at > since)
        & or_(made_by.is_(None), made_by.not_in(behind(kept)))  # the target's own window is filed after it is sealed
    )
    num_quarantined = quarantine_learned(connection, agent, undone, now)
    reason = "may have been rehearsed by an update that was rolled back"
    values = {"status": "quarantined", "reason": reason, "changed_at": now}
    result = connection.execute(update(screenings).where(rehearsed).values(**values))
    return num_quarantined + int(result.rowcount)


def _end_rollout(
    connection: Connection, row: Row, tried: Rollout, *, reason: str, freeze: bool, now: float
) -> Rollback:
    """A rollback while something is being tried: what serves goes on serving, to everybody again."""
    take_back_in(connection, row.agent, reason=f"rollback: {reason}", now=now)
    num_quarantined = quarantine_learned(connection, row.agent, [tried.release], now)
    connection.execute(update(aliases).where(aliases.c.agent == row.agent).values(version=row.version + 1))
    if freeze:
        _switch(connection, row.agent, is_frozen=True, reason=f"rollback of {tried.release}: {reason}")
    payload = {"from": tried.release, "to": row.release, "undone": [tried.release], "num_quarantined": num_quarantined}
    append(connection, row.agent, "rollback", {**payload, "reason": reason, "freeze": freeze}, now)
    is_frozen = bool(agent_row(connection, row.agent).is_frozen)
    alias = _alias(_row(connection, row.agent))
    return Rollback(tried.release, alias, (tried.release,), num_quarantined, is_frozen)


def _marks_after(connection: Connection, agent: str, target: str) -> tuple[str, str]:
    """High-water mark and anchor as they stood when `target` was promoted last, if those still may serve."""
    marks = (target, target)
    for entry in entries_of(connection, agent, kind="promote"):
        if entry.payload["to"] == target:
            marks = (entry.payload["high_water"], entry.payload["anchor"])
    high_water, anchor = (name if _is_released(connection, name) else target for name in marks)
    return high_water, anchor


def _switch(connection: Connection, agent: str, *, is_frozen: bool, reason: str | None) -> None:
    agent_row(connection, agent)
    values = {"is_frozen": is_frozen, "frozen_reason": reason}
    connection.execute(update(agents).where(agents.c.agent == agent).values(**values))


def _row(connection: Connection, agent: str) -> Row:
    row = connection.execute(select(aliases).where(aliases.c.agent == agent)).first()
    if row is None:
        raise DataError(f"{agent} has no alias yet: it gets one when `cltrain run` first sees its base")
    return row


def _alias(row: Row) -> Alias:
    return Alias(row.agent, row.release, row.version, row.previous, row.fence)
