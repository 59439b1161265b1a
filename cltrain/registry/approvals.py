"""What a person may let serve: candidates that the gate said promote to, against what serves now."""

from __future__ import annotations

from sqlalchemy import select

from cltrain.errors import ConflictError
from cltrain.records import Verdict
from cltrain.registry.releases import get_in
from cltrain.store.database import Store
from cltrain.store.schema import releases, updates


def require_judged(store: Store, agent: str, name: str, serving: str) -> None:
    """Raise ConflictError unless `name` served before, or the gate said promote to it against `serving`.

    A candidate that is still being judged, was a trial, or grew from a release that no longer serves may not.
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
    if release.parent != serving:
        raise ConflictError(
            f"{name} was compared with {release.parent}, but {serving} serves now: let the gate judge a newer candidate"
        )


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
