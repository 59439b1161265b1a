"""What is known of every replica, durably: what it listed last, what was proved of it, and whether it answers at all.

A replica is ready for a release when its row says proved. Worker and commands write here what they saw; gateways read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from sqlalchemy import Connection, Row, bindparam, delete, insert, select, update

from cltrain.errors import ConflictError
from cltrain.store.database import Store
from cltrain.store.schema import aliases, releases, replicas

ITSELF = ""  # the row that stands for the server: `up` or `out`
PROVED = (  # built once: making a statement costs more than running it
    select(replicas.c.url)
    .where(replicas.c.release == bindparam("release"), replicas.c.state == "proved")
    .where(replicas.c.url.in_(bindparam("urls", expanding=True)))
    .limit(1)
)
HELD = ("loaded", "proved", "failed", "draining")  # it answers and listed it
LOADING_S = 600.0  # a load that nobody saw the end of may still come true for so long

Values = tuple[str | None, str, float]  # root, state, since when


def rows_of(connection: Connection, url: str) -> dict[str, Row]:
    """What is known of one replica, by release, the server itself among them."""
    return {row.release: row for row in connection.execute(select(replicas).where(replicas.c.url == url))}


def held(connection: Connection, url: str) -> dict[str, Row]:
    """What a replica that answers listed last."""
    return {name: row for name, row in rows_of(connection, url).items() if row.state in HELD}


def is_out(store: Store, url: str) -> bool:
    """Whether it did not answer when it was last asked."""
    with store.read() as connection:
        row = rows_of(connection, url).get(ITSELF)
    return row is not None and row.state == "out"


def places(connection: Connection, urls: Collection[str]) -> dict[str, dict[str, Row]]:
    """URL -> release -> row, of these replicas; one that nobody looked at yet has no rows."""
    found: dict[str, dict[str, Row]] = {url: {} for url in urls}
    for row in connection.execute(select(replicas).where(replicas.c.url.in_(list(urls)))):
        found[row.url][row.release] = row
    return found


def is_ready(rows: Mapping[str, Row], release: str) -> bool:
    """Whether one replica, of which these rows are known, may answer as the release."""
    itself, row = rows.get(ITSELF), rows.get(release)
    return itself is not None and itself.state == "up" and row is not None and row.state == "proved"


def is_ready_somewhere(connection: Connection, release: str, urls: Collection[str]) -> bool:
    """Whether one of these replicas has proved the release and answers: one that is out is ready for nothing."""
    return connection.execute(PROVED, {"release": release, "urls": list(urls)}).first() is not None


def standings(connection: Connection, agent: str, urls: Collection[str]) -> dict[str, str]:
    """URL -> how each replica stands to what serves: `ready` for it, `out`, `unseen` by anybody yet, `absent` where it
    lacks it, else the state of the release there. For the bare base whoever is up is ready."""
    serving = select(releases.c.name, releases.c.path).join(aliases, aliases.c.release == releases.c.name)
    release = connection.execute(serving.where(aliases.c.agent == agent)).first()

    def of(rows: Mapping[str, Row]) -> str:
        itself = rows.get(ITSELF)
        if itself is None or itself.state == "out":
            return "unseen" if itself is None else "out"
        if release is None or release.path is None or is_ready(rows, release.name):
            return "ready"
        return str(rows[release.name].state) if release.name in rows else "absent"

    return {url: of(rows) for url, rows in places(connection, urls).items()}


def note_listed(
    store: Store, url: str, listed: Mapping[str, str], now: float, draining: Mapping[str, float] | None = None
) -> None:
    """It answers, and lists these (name -> root). What was proved stays so as long as it is listed without a break.

    `draining`: since when nobody wants them; None: as it was. Nothing is written when nothing changed.
    """
    with store.read() as connection:
        known = _as_values(rows_of(connection, url))
    if _after_listing(known, listed, now, draining) == known:
        return
    with store.write() as connection:
        rows = _after_listing(_as_values(rows_of(connection, url)), listed, now, draining)
        connection.execute(delete(replicas).where(replicas.c.url == url))
        for name, (root, state, since) in rows.items():
            _insert(connection, url, name, root, state, since)


def note_out(store: Store, url: str, now: float) -> None:
    """It does not answer: ready for nothing from now on, but it may come back with what it listed last."""
    with store.read() as connection:
        states = {row.state for row in rows_of(connection, url).values()}
    if "out" in states and not states & {"up", *HELD}:
        return
    with store.write() as connection:
        ours = replicas.c.url == url
        connection.execute(update(replicas).where(ours, replicas.c.state != "loading").values(state="out", seen_at=now))
        if ITSELF not in rows_of(connection, url):
            _insert(connection, url, ITSELF, None, "out", now)


def note_loading(store: Store, url: str, release: str, root: str, now: float) -> None:
    """Written before a load is sent: whatever becomes of the request, the replica may hold it."""
    with store.read() as connection:
        before = rows_of(connection, url).get(release)
    if before is not None and before.root == root:
        return
    with store.write() as connection:
        _delete(connection, url, release)
        _insert(connection, url, release, root, "loading", now)


def note_loaded(store: Store, url: str, release: str, root: str, now: float) -> None:
    """It said that it has loaded this; what was proved of it stays."""
    with store.read() as connection:
        before = held(connection, url).get(release)
    if before is None or before.root != root:
        _set(store, url, release, root, "loaded", now)


def note_gone(store: Store, url: str, release: str) -> None:
    """It said that it has unloaded this, or will not load it."""
    with store.write() as connection:
        _delete(connection, url, release)


def note_not_held(store: Store, url: str, release: str) -> None:
    """It answers, but not as this; a load under way may still come true."""
    with store.write() as connection:
        ours = (replicas.c.url == url) & (replicas.c.release == release)
        connection.execute(delete(replicas).where(ours, replicas.c.state.in_(HELD)))


def mark_proved(store: Store, url: str, release: str, root: str, now: float) -> None:
    """This replica answers with exactly this release: it is ready for it. Where the update is too small to tell from
    the one before, that rests on name, path and hash."""
    _set(store, url, release, root, "proved", now)


def mark_failed(store: Store, url: str, release: str, root: str, now: float) -> None:
    """It answers under this name with other weights."""
    _set(store, url, release, root, "failed", now)


def require_ready(connection: Connection, urls: Sequence[str], release: str, min_ready: int) -> None:
    """Raise ConflictError unless enough replicas are ready for `release` now and none failed its proof."""
    known = places(connection, urls)
    failed = sorted(url for url, rows in known.items() if release in rows and rows[release].state == "failed")
    num_ready = sum(is_ready(rows, release) for rows in known.values())
    if failed:
        raise ConflictError(f"{', '.join(failed)} answered as {release} with other weights: see the log of decisions")
    if num_ready < min_ready:
        raise ConflictError(
            f"{num_ready} of {len(urls)} replicas hold and proved {release} now (server.min_ready = {min_ready})"
        )


def listed_last(connection: Connection, url: str) -> set[str] | None:
    """What a replica may hold as far as anybody knows, loads under way among it; None for one that never answered."""
    rows = rows_of(connection, url)
    return set(rows) - {ITSELF} if rows else None


def _as_values(rows: Mapping[str, Row]) -> dict[str, Values]:
    return {name: (row.root, row.state, row.seen_at) for name, row in rows.items()}


def _after_listing(
    known: Mapping[str, Values], listed: Mapping[str, str], now: float, draining: Mapping[str, float] | None
) -> dict[str, Values]:
    is_back = known.get(ITSELF, (None, "out", now))[1] != "up"
    rows: dict[str, Values] = {ITSELF: (None, "up", now) if is_back else known[ITSELF]}
    for name, root in listed.items():
        before = known.get(name)
        rows[name] = before if before is not None and before[0] == root and before[1] in HELD else (root, "loaded", now)
        if draining is not None and name in draining:
            rows[name] = (root, "draining", draining[name])
        elif draining is not None and rows[name][1] == "draining":  # wanted again
            rows[name] = (root, "loaded", now)
    for name, (_, state, since) in known.items():
        if state == "loading" and name not in rows and now - since < LOADING_S:
            rows[name] = known[name]
    return rows


def _set(store: Store, url: str, release: str, root: str, state: str, now: float) -> None:
    with store.write() as connection:
        _delete(connection, url, release)
        _insert(connection, url, release, root, state, now)


def _delete(connection: Connection, url: str, release: str) -> None:
    connection.execute(delete(replicas).where(replicas.c.url == url, replicas.c.release == release))


def _insert(connection: Connection, url: str, release: str, root: str | None, state: str, at: float) -> None:
    connection.execute(insert(replicas).values(url=url, release=release, root=root, state=state, seen_at=at))
