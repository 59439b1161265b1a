"""Which adapters a server holds: the desired set against what it lists, and what may go when nobody wants it.

Runtime loads vanish when a server restarts, and a directory that a server still lists must never be deleted (it kills
vLLM); so: alias away, drain, unload everywhere, and only then may the registry delete. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from sqlalchemy import Connection, select

from cltrain.deploy import readiness
from cltrain.errors import ServerError, UnavailableError
from cltrain.records import UNDONE, Verdict
from cltrain.store.database import Store
from cltrain.store.families import of_family
from cltrain.store.schema import aliases, records, releases, rollouts, updates
from cltrain.store.trials import is_open

KEPT_HELD = 5  # newest held releases that stay on disk to be looked at
UNDER_WAY = ("training", "judging")


class Residence(Protocol):
    """The part of ServerClient that loads and unloads."""

    url: str

    def list(self) -> dict[str, str]: ...
    def load(self, name: str, path: Path) -> None: ...
    def unload(self, name: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a server should hold: name -> absolute directory, in the order of loading."""

    serving: str
    directories: Mapping[str, Path]
    needed: frozenset[str]  # of them, without which it is not ready: what serves, what a rollback would go to
    barred: frozenset[str] = frozenset()  # of them, what must not be loaded; see trust.py
    tried: str | None = None  # on live traffic beside what serves: proved again like it

    @property
    def loadable(self) -> dict[str, Path]:
        return {name: directory for name, directory in self.directories.items() if name not in self.barred}

    def without(self, names: Iterable[str]) -> Wanted:
        """The same, without the leave to load these: whoever holds one keeps it."""
        return replace(self, barred=self.barred | frozenset(names))


def wanted_releases(connection: Connection, agent: str) -> set[str]:
    """Serving, previous, anchor, high-water, candidates of unfinished updates, what is tried on live traffic, and
    whatever an open episode is pinned to, those of its tenants as well, unless its next turn goes elsewhere. The bare
    base may be among them: it needs no adapter. What waits for approval is loaded by the approval."""
    names: set[str | None] = set()
    for row in connection.execute(select(aliases).where(aliases.c.agent == agent)):
        names |= {row.release, row.previous, row.anchor, row.high_water}
    names |= under_way(connection, agent)
    names.add(_tried(connection, agent))
    pinned = select(records.c.release).where(of_family(records.c.agent, agent), records.c.status == "open").distinct()
    undone = select(releases.c.name).where(releases.c.status.in_(UNDONE))
    names |= set(connection.execute(pinned.where(records.c.release.not_in(undone))).scalars())
    return {name for name in names if name is not None}


def under_way(connection: Connection, agent: str) -> set[str]:
    """The candidates of unfinished updates."""
    running = select(updates.c.candidate).where(updates.c.agent == agent, updates.c.state.in_(UNDER_WAY))
    return {name for name in connection.execute(running).scalars() if name is not None}


def _tried(connection: Connection, agent: str) -> str | None:
    """The candidate that is tried on live traffic."""
    name: str | None = connection.scalar(select(rollouts.c.release).where(is_open(agent)))
    return name


def desired(connection: Connection, state_dir: Path, agent: str) -> Wanted:
    """Wanted releases that have files: what serves comes first, then what a rollback would go to, then the newest."""
    alias = connection.execute(select(aliases).where(aliases.c.agent == agent)).first()
    serving, previous = (alias.release, alias.previous) if alias is not None else ("", None)
    query = (
        select(releases.c.name, releases.c.path, releases.c.status)
        .where(releases.c.name.in_(wanted_releases(connection, agent)), releases.c.path.is_not(None))
        .order_by(releases.c.name != serving, releases.c.name.is_distinct_from(previous), releases.c.number.desc())
    )
    rows = connection.execute(query).all()
    needed = frozenset(row.name for row in rows if row.name in (serving, previous) and row.status == "released")
    directories = {row.name: (state_dir / row.path).resolve() for row in rows}
    return Wanted(serving, directories, needed, tried=_tried(connection, agent))


def reconcile(client: Residence, wanted: Mapping[str, Path]) -> tuple[str, ...]:
    """Load what is wanted and missing, in the order of `wanted`; returns the names.

    One that the server refuses keeps none of the others away. Raises ServerError at the end, naming all it refused, and
    UnavailableError at once where nobody answers.
    """
    present = client.list()
    missing = [name for name in wanted if present.get(name) != str(wanted[name])]
    refused = []
    for name in missing:
        try:
            client.load(name, wanted[name])
        except UnavailableError:
            raise
        except ServerError as error:
            refused.append(f"{name}: {error}")
    if refused:
        raise ServerError(f"{client.url} refused {len(refused)} of {len(missing)} adapters: {'; '.join(refused)}")
    return tuple(missing)


def collect(
    client: Residence,
    store: Store,
    *,
    agent: str,
    wanted: Iterable[str],
    now: float,
    drain_s: float,
    max_adapters: int | None = None,
) -> tuple[str, ...]:
    """Unload this agent's adapters that nobody wants, `drain_s` after that was first seen; returns their names.

    Requests that began on one finish anyway, so when the server is full (`max_adapters` listed) the longest drained go
    at once: but a tenant's only after one look, so that no gateway is just giving it an episode. What the server lists
    is written to the table replicas; adapters of agents of other families are left alone.
    """
    present = client.list()
    with store.read() as connection:
        family = select(releases.c.name, releases.c.agent).where(of_family(releases.c.agent, agent))
        ours = {row.name: row.agent for row in connection.execute(family)}
        known = readiness.held(connection, client.url)
    keep = set(wanted)
    since = {
        name: known[name].seen_at if name in known and known[name].state == "draining" else now
        for name in present
        if name in ours and name not in keep
    }
    num_over = len(present) - max_adapters + 1 if max_adapters is not None else 0  # room for one more
    gone = []
    for place, (name, begun) in enumerate(sorted(since.items(), key=lambda item: (item[1], item[0]))):
        may_go = begun < now or ours[name] == agent
        if now - begun >= drain_s or (place < num_over and may_go):
            client.unload(name)
            gone.append(name)
    left = {name: root for name, root in present.items() if name not in gone}
    readiness.note_listed(store, client.url, left, now, draining=since)
    return tuple(gone)


def unload_idle(
    client: Residence, store: Store, *, agent: str, wanted: Iterable[str], now: float, idle_s: float
) -> None:
    """Unload what nobody wants of this family and was neither loaded nor proved for `idle_s`: so long, because a
    command (approve, gate) may be at work on what was just loaded."""
    with store.read() as connection:
        ours = set(connection.scalars(select(releases.c.name).where(of_family(releases.c.agent, agent))))
        known = readiness.held(connection, client.url)
    for name in sorted((known.keys() & ours) - set(wanted)):
        if now - known[name].seen_at >= idle_s:
            client.unload(name)


def unlisted(connection: Connection, clients: Iterable[Residence], agent: str) -> tuple[str, ...]:
    """Releases whose files may be deleted: nobody needs them, no server lists them and nothing refers to them.

    What ever served stays on disk, so that its bounds can be recomputed. A server that is away counts with what it
    listed last, because it may come back with it. Raises ServerError when one cannot be asked and never was, because
    then nothing is known to be unlisted.
    """
    listed: set[str] = set()
    for client in clients:
        last = readiness.listed_last(connection, client.url)
        listed |= last or set()
        try:
            listed |= set(client.list())
        except UnavailableError:
            if last is None:
                raise
    return tuple(sorted(_expendable(connection, agent) - listed - wanted_releases(connection, agent)))


def _expendable(connection: Connection, agent: str) -> set[str]:
    """Every rejected release, held ones but the newest few, and candidates but the newest that a human may approve."""
    running = select(updates.c.id).where(updates.c.agent == agent, updates.c.state.in_(UNDER_WAY))
    approvable = select(updates.c.candidate).where(
        updates.c.agent == agent,
        updates.c.state == "done",
        updates.c.verdict == Verdict.PROMOTE,
        updates.c.mode != "trial",
    )

    def newest_first(status: str) -> list[str]:
        query = select(releases.c.name).where(releases.c.agent == agent, releases.c.status == status)
        return list(connection.execute(query.order_by(releases.c.number.desc())).scalars())

    expendable = {*newest_first("rejected"), *newest_first("held")[KEPT_HELD:]}
    if connection.execute(running).first() is None:  # else one may be sealed whose update does not name it yet
        candidates = newest_first("candidate")
        judged = set(connection.execute(approvable).scalars())
        waiting = next((name for name in candidates if name in judged), None)
        expendable |= set(candidates) - {waiting}
    return expendable
