"""What may serve for the first time: candidates that the gate said promote to, against what serves now, and that read
nothing that was quarantined or removed since."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import Connection, select

from cltrain.errors import ConflictError
from cltrain.records import Release, Verdict
from cltrain.registry.releases import get_in
from cltrain.store.database import Store
from cltrain.store.schema import records, releases, screenings, updates


def require_judged(store: Store, agent: str, name: str, serving: str) -> None:
    """Raise ConflictError unless `name` served before, or the gate said promote to it against `serving`.

    A candidate that is still being judged, was a trial, grew from a release that no longer serves, or read what was
    quarantined or removed since (`refuse_withdrawn`) may not.
    """
    with store.read() as connection:
        release = get_in(connection, name)
        if release.status != "candidate":
            return
        judged = select(updates.c.id).where(
            updates.c.agent == agent,
            updates.c.candidate == name,
            updates.c.state == "done",
            updates.c.verdict == Verdict.PROMOTE,
            updates.c.mode != "trial",
        )
        if connection.execute(judged).first() is None:
            raise ConflictError(f"the gate has not said promote to {name}: only promote ever serves")
        refuse_withdrawn(connection, release)
    if release.parent != serving:
        raise ConflictError(
            f"{name} was compared with {release.parent}, but {serving} serves now: let the gate judge a newer candidate"
        )


def refuse_withdrawn(connection: Connection, release: Release) -> None:
    """Raise ConflictError where a candidate, which never served, learned or rehearsed a record that is quarantined by
    now, or learned one that was removed. The owner's rehearsal episodes are no records, and have no standing."""
    if release.status != "candidate":
        return
    learned = set(release.manifest.get("learned", ()))
    kept = set(connection.scalars(select(records.c.id).where(records.c.id.in_(learned))))
    barred = quarantined_in(connection, learned.union(release.manifest.get("replayed", ())))
    if withdrawn := sorted(barred | (learned - kept)):
        named = ", ".join(withdrawn[:3]) + (", ..." if len(withdrawn) > 3 else "")
        raise ConflictError(
            f"{release.name} learned or rehearsed what was quarantined or removed since ({len(withdrawn)} records: "
            f"{named}): let the gate judge a newer candidate"
        )


def quarantined_in(connection: Connection, names: Collection[str]) -> set[str]:
    """Which of these records are quarantined, whoever's they are."""
    is_barred = screenings.c.record.in_(names) & (screenings.c.status == "quarantined")
    return set(connection.scalars(select(screenings.c.record).where(is_barred)))


def waiting_for_yes(store: Store, agent: str) -> list[str]:
    """Candidates to which the gate said promote in mode approve and nobody said anything yet, oldest first. Whether one
    is stale is for `require_judged` to say."""
    query = (
        select(updates.c.candidate)
        .join(releases, releases.c.name == updates.c.candidate)
        .where(
            updates.c.agent == agent,
            updates.c.state == "done",
            updates.c.verdict == Verdict.PROMOTE,
            updates.c.mode == "approve",
            releases.c.status == "candidate",
        )
        .order_by(updates.c.number)
    )
    with store.read() as connection:
        return list(connection.scalars(query))
