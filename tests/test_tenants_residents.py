"""More tenants than adapters fit: who asked last is resident, who has an episode open keeps its adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from sqlalchemy import insert, update

from cltrain.deploy.readiness import held, note_listed
from cltrain.deploy.residents import collect, desired, reconcile
from cltrain.deploy.tenants import with_tenants
from cltrain.errors import ServerError
from cltrain.store.database import Store, open_store
from cltrain.store.schema import aliases, records, releases, updates

MAX_ADAPTERS = 5
SHARED = "support-v000001-aaaaaaaaaaaa"
TENANTS = ("ann", "bob", "cat", "dan", "eve", "fay")


class Shelf:
    """A server's adapters in memory, which takes no more than it may hold."""

    def __init__(self) -> None:
        self.url = "http://one"
        self.held: dict[str, str] = {}

    def list(self) -> dict[str, str]:
        return dict(self.held)

    def load(self, name: str, path: Path) -> None:
        if len(self.held) == MAX_ADAPTERS:
            raise ServerError("no more fit")
        self.held[name] = str(path)

    def unload(self, name: str) -> None:
        del self.held[name]


def own(tenant: str, number: int = 1) -> str:
    return f"support@{tenant}-v{number:06d}-{'b' * 12}"


def add_release(store: Store, name: str) -> None:
    agent, number = name.rpartition("-v")[0], int(name.rpartition("-v")[2][:6])
    path = f"releases/{agent}/{name}" if number else None
    with store.write() as connection:
        connection.execute(insert(releases).values(
            name=name, agent=agent, number=number, digest="", path=path, status="released", manifest={}, created_at=0.0,
        ))  # fmt: skip


def point(store: Store, name: str) -> None:
    agent = name.rpartition("-v")[0]
    with store.write() as connection:
        connection.execute(aliases.delete().where(aliases.c.agent == agent))
        connection.execute(insert(aliases).values(
            agent=agent, release=name, previous=None, anchor=name, high_water=name, version=1, fence=0, changed_at=0.0,
        ))  # fmt: skip


def asked(store: Store, tenant: str, release: str, *, is_open: bool = False) -> None:
    with store.write() as connection:
        number = len(connection.execute(records.select()).all())
        connection.execute(insert(records).values(
            id=f"r{number}", agent=f"support@{tenant}", session=f"r{number}", principal=tenant, split="train",
            release=release, status="open" if is_open else "ended", is_mixed=False, end="ok", payload={},
            created_at=0.0, updated_at=0.0,
        ))  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = open_store(tmp_path)
    add_release(store, SHARED)
    point(store, SHARED)
    for tenant in TENANTS:
        add_release(store, own(tenant, 0))
        add_release(store, own(tenant))
        point(store, own(tenant))
        asked(store, tenant, own(tenant))
    yield store
    store.close()


def wanted(store: Store, tmp_path: Path, max_adapters: int = MAX_ADAPTERS) -> dict[str, Path]:
    with store.read() as connection:
        shared = desired(connection, tmp_path, "support")
        return dict(with_tenants(connection, tmp_path, shared, "support", max_adapters).directories)


def look(store: Store, shelf: Shelf, tmp_path: Path, now: float) -> None:
    """What a worker's look does on one server."""
    names = wanted(store, tmp_path)
    collect(shelf, store, agent="support", wanted=names, now=now, drain_s=60.0, max_adapters=MAX_ADAPTERS)
    with suppress(ServerError):
        reconcile(shelf, names)
    note_listed(store, shelf.url, shelf.list(), now)


def test_the_shared_adapter_and_those_who_asked_last_with_one_place_left_free(store: Store, tmp_path: Path) -> None:
    assert list(wanted(store, tmp_path)) == [SHARED, own("fay"), own("eve"), own("dan")]
    asked(store, "ann", SHARED)  # its own was not there
    assert list(wanted(store, tmp_path)) == [SHARED, own("ann"), own("fay"), own("eve")]
    assert wanted(store, tmp_path)[own("ann")] == tmp_path / "releases/support@ann" / own("ann")
    assert list(wanted(store, tmp_path, max_adapters=20)) == [
        SHARED,
        *map(own, ("ann", "fay", "eve", "dan", "cat", "bob")),
    ]


def test_an_open_episode_keeps_its_adapter_however_many_others_ask(store: Store, tmp_path: Path) -> None:
    asked(store, "bob", own("bob"), is_open=True)
    for tenant in ("cat", "dan", "eve", "fay"):
        asked(store, tenant, own(tenant))
    assert own("bob") in wanted(store, tmp_path)
    assert len(wanted(store, tmp_path)) == MAX_ADAPTERS - 1


def test_what_a_tenants_update_compares_with_is_resident_while_it_runs(store: Store, tmp_path: Path) -> None:
    candidate, mark = own("ann", 3), own("ann", 2)
    for name in (candidate, mark):
        add_release(store, name)
    with store.write() as connection:
        connection.execute(update(aliases).where(aliases.c.agent == "support@ann").values(high_water=mark))
        connection.execute(insert(updates).values(
            id="u", agent="support@ann", number=1, state="judging", parent=own("ann"), candidate=candidate,
            mode="auto", fence=0, manifest={}, started_at=0.0,
        ))  # fmt: skip
    assert {SHARED, own("ann"), mark, candidate} <= set(wanted(store, tmp_path))


@pytest.mark.parametrize("is_full", [False, True])
def test_a_tenant_who_asks_comes_in_and_whoever_leaves_is_drained_for_one_look(
    store: Store, tmp_path: Path, is_full: bool
) -> None:
    shelf = Shelf()
    look(store, shelf, tmp_path, 0.0)
    assert set(shelf.held) == {SHARED, *map(own, ("fay", "eve", "dan"))}
    asked(store, "ann", SHARED)
    asked(store, "bob", SHARED)
    if is_full:
        shelf.held["of another family"] = "/x"
    seen = []
    for now in (2.0, 4.0, 6.0, 8.0):
        before = set(shelf.held)
        with store.read() as connection:
            was_draining = {n for n, row in held(connection, shelf.url).items() if row.state == "draining"}
        look(store, shelf, tmp_path, now)
        seen.append(set(shelf.held))
        assert before - set(shelf.held) <= was_draining, "nothing goes that a gateway was told is ready"
        assert SHARED in shelf.held
    assert seen[-1] >= {SHARED, *map(own, ("ann", "bob", "fay"))}


def test_without_tenants_nothing_of_theirs_is_wanted(store: Store, tmp_path: Path) -> None:
    with store.read() as connection:
        assert list(desired(connection, tmp_path, "support").directories) == [SHARED]
