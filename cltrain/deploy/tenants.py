"""Which tenants' adapters a server holds beside the shared agent's: as many as fit.

Who has an episode open on its own release keeps it; the other places go to those that asked last. Whoever has none is
answered by the shared release until the worker's next look has loaded its own.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sqlalchemy import Connection, func, select

from cltrain.deploy.residents import UNDER_WAY, Wanted, wanted_releases
from cltrain.store.families import of_tenants
from cltrain.store.schema import aliases, records, releases, updates

SPARE = 1  # place that is left free: for a candidate, or for one tenant to come while another goes


def with_tenants(connection: Connection, state_dir: Path, wanted: Wanted, shared: str, max_adapters: int) -> Wanted:
    """The same (see residents.desired), and after it what updates of tenants under way need, and as many tenants'
    serving releases as leave room."""
    names = list(wanted.directories)
    names += sorted(_at_work(connection, shared) - set(names))
    for name in _serving(connection, shared):
        if len(names) < max_adapters - SPARE and name not in names:
            names.append(name)
    query = select(releases.c.name, releases.c.path).where(releases.c.name.in_(names), releases.c.path.is_not(None))
    places = {row.name: (state_dir / row.path).resolve() for row in connection.execute(query)}
    return replace(wanted, directories={name: places[name] for name in names if name in places})


def _at_work(connection: Connection, shared: str) -> set[str]:
    """What tenants' candidates are compared with."""
    running = select(updates.c.agent, updates.c.parent).where(
        of_tenants(updates.c.agent, shared), updates.c.state.in_(UNDER_WAY)
    )
    found = {
        name
        for row in connection.execute(running).all()
        for name in (row.parent, *wanted_releases(connection, row.agent))
    }
    bare = select(releases.c.name).where(releases.c.name.in_(found), releases.c.path.is_(None))
    return found - set(connection.scalars(bare))


def _serving(connection: Connection, shared: str) -> list[str]:
    """Tenants' own serving releases; whoever asked last comes first."""
    own = (
        select(aliases.c.agent, aliases.c.release)
        .join(releases, releases.c.name == aliases.c.release)
        .where(of_tenants(aliases.c.agent, shared), releases.c.path.is_not(None))
    )
    last = {row.release: _last_asked(connection, row.agent) for row in connection.execute(own).all()}
    return sorted(last, key=lambda release: (-last[release], release))


def _last_asked(connection: Connection, agent: str) -> int:
    """The newest record's seq, 0 where there is none; of each status by the index."""
    newest = select(func.max(records.c.seq)).where(records.c.agent == agent)
    return max(connection.scalar(newest.where(records.c.status == status)) or 0 for status in ("open", "ended"))
