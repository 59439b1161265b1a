"""What a person gives back of what was quarantined: which records an update or a rollback took, and which of them may
come back. Screens and gate look at them anew; the word goes into the log of decisions. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, and_, or_, select
from sqlalchemy import update as change

from cltrain.errors import ConfigError, ConflictError, DataError
from cltrain.experience.waiting import GIVEN_BACK, SCRUBBED
from cltrain.registry.aliases import ancestry_in, file_learned_in
from cltrain.registry.decisions import append, entries_of
from cltrain.registry.releases import find
from cltrain.store.database import Store
from cltrain.store.schema import aliases, records, screenings, updates

MAX_NAME = 100  # characters of a record's id that the log keeps: importers choose theirs
SHOWN = 3


@dataclass(frozen=True, slots=True)
class Returned:
    """A record that comes back. `reason`: why it was quarantined; `learned_by`: the release that learned it, where that
    serves or what serves grew from it: then it is rehearsed and not learned anew."""

    record: str
    stratum: str | None
    reason: str
    learned_by: str | None


def give_back(
    store: Store,
    agent: str,
    named: Collection[str] = (),
    *,
    numbers: Sequence[int] = (),
    release: str | None = None,
    reason: str,
    now: float,
    is_dry: bool = False,
) -> dict[str, Any]:
    """Let quarantined records be learned from again: the `named`, and what the updates with these numbers, or the one
    that made `release` or its rollback, put there. Dry: nothing changes, and no choice at all means every record.

    Returns `records` (Returned) and `refused` (record: why). Refused are records that were removed, or scrubbed from
    what is rehearsed. Raises ConflictError where a named one is refused or nothing is left to give back, DataError for
    an update or a release that is not there, ConfigError where nothing was chosen.
    """
    if not (named or numbers or release or is_dry):
        raise ConfigError("name records, --update or --release: --dry-run alone lists what is quarantined")
    release = None if release is None else find(store, agent, release).name
    with store.read() if is_dry else store.write() as connection:
        chosen: list[ColumnElement[bool]] = [screenings.c.record.in_(named)] if named else []
        chosen += [_of_updates(connection, agent, updates.c.number == number, f"update {number}") for number in numbers]
        chosen += [] if release is None else [_of_release(connection, agent, release)]
        rows = _quarantined(connection, agent, or_(*chosen) if chosen else None)
        refused = {row.record: why for row in rows if (why := _obstacle(row))}
        refused |= dict.fromkeys(sorted(set(named) - {row.record for row in rows}), f"is not quarantined for {agent}")
        rows = [row for row in rows if row.record not in refused]
        returned = _returned(connection, agent, rows)
        if not is_dry:
            _require_some(returned, {record: why for record, why in refused.items() if record in named}, refused)
            _file(connection, agent, returned, f"{GIVEN_BACK}: {reason}"[:300], now)
            names = [one.record[:MAX_NAME] for one in returned]
            choice = {"updates": list(numbers), "release": release}
            said = {"num_records": len(names), "records": names, **choice, "reason": reason, "is_human": True}
            append(connection, agent, "unquarantine", said, now)
    return {"agent": agent, "is_dry": is_dry, "records": [asdict(one) for one in returned], "refused": refused}


def _of_updates(connection: Connection, agent: str, which: ColumnElement[bool], name: str) -> ColumnElement[bool]:
    """What these updates learned, or put into quarantine when they ended."""
    query = select(updates.c.id, updates.c.finished_at).where(updates.c.agent == agent, which)
    found = connection.execute(query).all()
    if not found:
        raise DataError(f"{agent} has no {name}: `cltrain report` and `cltrain status` have its updates")
    ended = [row.finished_at for row in found if row.finished_at is not None]
    return or_(screenings.c["update"].in_([row.id for row in found]), screenings.c.changed_at.in_(ended))


def _of_release(connection: Connection, agent: str, release: str) -> ColumnElement[bool]:
    """What the update behind a release did, and a rollback of it, which also takes what was rehearsed since."""
    made_by = _of_updates(connection, agent, updates.c.candidate == release, f"update that made {release}")
    rollbacks = entries_of(connection, agent, kind="rollback")
    undone = [entry.at for entry in rollbacks if release in entry.payload["undone"]]
    return or_(made_by, screenings.c.changed_at.in_(undone))


def _quarantined(connection: Connection, agent: str, which: ColumnElement[bool] | None) -> list[Row]:
    """Rows of (record, stratum, reason, update, id): without `id` the record itself is gone."""
    columns = (*(screenings.c[name] for name in ("record", "stratum", "reason", "update")), records.c.id)
    joined = screenings.outerjoin(records, records.c.id == screenings.c.record)
    is_ours = and_(screenings.c.agent == agent, screenings.c.status == "quarantined")
    query = select(*columns).select_from(joined).where(is_ours).order_by(records.c.seq, screenings.c.record)
    return list(connection.execute(query if which is None else query.where(which)))


def _obstacle(row: Row) -> str | None:
    if row.id is None:
        return "was removed"
    if (row.reason or "").startswith(SCRUBBED):
        return f"was scrubbed from what is rehearsed ({row.reason})"
    return None


def _returned(connection: Connection, agent: str, rows: Sequence[Row]) -> list[Returned]:
    serving = connection.scalar(select(aliases.c.release).where(aliases.c.agent == agent))
    lineage = [] if serving is None else ancestry_in(connection, serving)
    of_lineage = and_(updates.c.agent == agent, updates.c.candidate.in_(lineage))
    learned_by = connection.execute(select(updates.c.id, updates.c.candidate).where(of_lineage))
    made = {row.id: row.candidate for row in learned_by}
    return [Returned(row.record, row.stratum, row.reason or "", made.get(row.update)) for row in rows]


def _require_some(returned: Sequence[Returned], barred: dict[str, str], refused: dict[str, str]) -> None:
    if barred or not returned:
        told = [f"{record} {why}" for record, why in (barred or refused).items()]
        more = f"; and {len(told) - SHOWN} more" if len(told) > SHOWN else ""
        raise ConflictError(
            f"nothing was given back: {'; '.join(told[:SHOWN]) or 'nothing of it is quarantined'}{more}"
        )


def _file(connection: Connection, agent: str, returned: Sequence[Returned], reason: str, now: float) -> None:
    """They wait for a window, but for what was learned by what serves: that has its standing from there."""
    names = [one.record for one in returned]
    where = and_(screenings.c.agent == agent, screenings.c.record.in_(names))
    connection.execute(change(screenings).where(where).values(status="waiting", reason=reason, changed_at=now))
    for release in sorted({one.learned_by for one in returned if one.learned_by is not None}):
        file_learned_in(connection, agent, release, reason, now)
