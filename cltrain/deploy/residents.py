"""Which adapters a server holds: the desired set against what it lists, and what may go when nobody wants it.

Runtime loads vanish when a server restarts, and a directory that a server still lists must never be deleted (it kills
vLLM); so: alias away, drain, unload everywhere, and only then may the registry delete. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from sqlalchemy import Connection, delete, insert, select

from cltrain.errors import ServerError
from cltrain.records import Verdict
from cltrain.store.database import Store
from cltrain.store.schema import aliases, records, releases, replicas, updates

KEPT_HELD = 5  # newest held releases that stay on disk to be looked at
UNDER_WAY = ("training", "judging")


class Residence(Protocol):
    """The part of ServerClient that loads and unloads."""

    url: str

    def list(self) -> dict[str, str]: ...
    def load(self, name: str, path: Path) -> None: ...
    def unload(self, name: str) -> None: ...


def wanted_releases(connection: Connection, agent: str) -> set[str]:
    """Serving, previous, anchor, high-water, candidates of unfinished updates, and whatever an open episode is pinned
    to. The bare base may be among them: it needs no adapter. What waits for approval is loaded by the approval."""
    names: set[str | None] = set()
    for row in connection.execute(select(aliases).where(aliases.c.agent == agent)):
        names |= {row.release, row.previous, row.anchor, row.high_water}
    running = select(updates.c.candidate).where(updates.c.agent == agent, updates.c.state.in_(UNDER_WAY))
    names |= set(connection.execute(running).scalars())
    pinned = select(records.c.release).where(records.c.agent == agent, records.c.status == "open").distinct()
    names |= set(connection.execute(pinned).scalars())
    return {name for name in names if name is not None}


def desired(connection: Connection, state_dir: Path, agent: str) -> dict[str, Path]:
    """Name -> absolute directory of every wanted release that has one; what serves comes first, then the newest."""
    serving = connection.execute(select(aliases.c.release).where(aliases.c.agent == agent)).scalar()
    query = (
        select(releases.c.name, releases.c.path)
        .where(releases.c.name.in_(wanted_releases(connection, agent)), releases.c.path.is_not(None))
        .order_by(releases.c.name != serving, releases.c.number.desc())
    )
    return {row.name: (state_dir / row.path).resolve() for row in connection.execute(query)}


def reconcile(client: Residence, wanted: Mapping[str, Path]) -> tuple[str, ...]:
    """Load what is wanted and missing, in the order of `wanted`; returns the names.

    One that the server refuses keeps none of the others away. Raises ServerError at the end, naming all it refused.
    """
    present = client.list()
    missing = [name for name in wanted if present.get(name) != str(wanted[name])]
    refused = []
    for name in missing:
        try:
            client.load(name, wanted[name])
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
    at once. What the server lists is written to the table replicas; another agent's adapters are left alone.
    """
    present = client.list()
    with store.read() as connection:
        ours = set(connection.execute(select(releases.c.name).where(releases.c.agent == agent)).scalars())
        known = {row.release: row for row in connection.execute(select(replicas).where(replicas.c.url == client.url))}
    keep = set(wanted)
    since = {
        name: known[name].seen_at if name in known and known[name].state == "draining" else now
        for name in present
        if name in ours and name not in keep
    }
    num_over = len(present) - max_adapters + 1 if max_adapters is not None else 0  # room for one more
    gone = []
    for place, (name, begun) in enumerate(sorted(since.items(), key=lambda item: (item[1], item[0]))):
        if now - begun >= drain_s or place < num_over:
            client.unload(name)
            gone.append(name)
    with store.write() as connection:
        connection.execute(delete(replicas).where(replicas.c.url == client.url))
        for name, root in present.items():
            if name in gone:
                continue
            proved = name in known and known[name].state == "proved"
            state = "draining" if name in since else "proved" if proved else "loaded"
            seen_at = since.get(name, now)
            connection.execute(
                insert(replicas).values(url=client.url, release=name, root=root, state=state, seen_at=seen_at)
            )
    return tuple(gone)


def mark_proved(store: Store, url: str, release: str, root: str, now: float) -> None:
    """Remember that this server was shown to answer with exactly this release."""
    with store.write() as connection:
        connection.execute(delete(replicas).where(replicas.c.url == url, replicas.c.release == release))
        connection.execute(insert(replicas).values(url=url, release=release, root=root, state="proved", seen_at=now))


def unlisted(connection: Connection, clients: Iterable[Residence], agent: str) -> tuple[str, ...]:
    """Releases whose files may be deleted: nobody needs them, no server lists them and nothing refers to them.

    What ever served stays on disk, so that its bounds can be recomputed; raises ServerError when a server cannot be
    asked, because then nothing is known to be unlisted.
    """
    listed = {name for client in clients for name in client.list()}
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
