"""What a server holds: wanted adapters come back after a restart, unwanted ones leave after the drain; and which of
them stay on disk."""

from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import insert, select, update

from cltrain.deploy.client import ServerClient
from cltrain.deploy.engine import Engine
from cltrain.deploy.readiness import mark_proved
from cltrain.deploy.residents import (
    KEPT_HELD,
    collect,
    desired,
    reconcile,
    unlisted,
    wanted_releases,
)
from cltrain.deploy.serve import running_server
from cltrain.errors import ServerError
from cltrain.models.base import load_base
from cltrain.registry.aliases import move_alias
from cltrain.registry.releases import delete_release, ensure_base_release, get, seal, set_status
from cltrain.store.database import open_store
from cltrain.store.schema import aliases, records, releases, replicas, updates
from tests.serving import random_adapter
from tests.tiny import make_tiny_base


class Shelf:
    """A server's adapters in memory; the embedded server itself is met in test_deploy_client.py."""

    def __init__(self, url="http://one"):
        self.url, self.held, self.is_down = url, {}, False

    def list(self):
        if self.is_down:
            raise ServerError("down")
        return dict(self.held)

    def load(self, name, path):
        self.held[name] = str(path)

    def unload(self, name):
        self.held.pop(name, None)


@pytest.fixture
def store(tmp_path):
    store = open_store(tmp_path)
    with store.write() as connection:
        for number, status in enumerate(["released"] * 6 + ["candidate", "rejected"]):
            path = f"releases/support/s-{number}" if number else None
            connection.execute(
                insert(releases).values(
                    name=f"s-{number}", agent="support", number=number, digest="", path=path, status=status,
                    manifest={}, created_at=0.0,
                )
            )  # fmt: skip
        connection.execute(
            insert(aliases).values(
                agent="support", release="s-5", previous="s-4", anchor="s-0", high_water="s-3", version=1, fence=0,
                changed_at=0.0,
            )
        )  # fmt: skip
        connection.execute(
            insert(updates).values(
                id="u", agent="support", number=1, state="judging", parent="s-5", candidate="s-6", mode="auto", fence=0,
                manifest={}, started_at=0.0,
            )
        )  # fmt: skip
        connection.execute(
            insert(records).values(
                id="r", agent="support", session="s", principal="p", split="train", release="s-1", status="open",
                is_mixed=False, end="ok", payload={}, created_at=0.0, updated_at=0.0,
            )
        )  # fmt: skip
    yield store
    store.close()


def test_everything_somebody_may_need_is_wanted(store, tmp_path):
    with store.read() as connection:
        assert wanted_releases(connection, "support") == {"s-0", "s-1", "s-3", "s-4", "s-5", "s-6"}
        assert wanted_releases(connection, "other") == set()
        found = desired(connection, tmp_path, "support")
    directories = found.directories
    assert (found.serving, found.needed) == ("s-5", {"s-5", "s-4"})
    assert directories["s-5"] == (tmp_path / "releases/support/s-5").resolve()
    assert "s-0" not in directories, "the bare base is no adapter"
    assert list(directories) == ["s-5", "s-4", "s-6", "s-3", "s-1"], "serving, what a rollback goes to, the newest"


@pytest.mark.parametrize("status", ["rejected", "rolled_back", "deleted"])
def test_what_answers_nobody_any_more_keeps_no_place_however_many_episodes_were_on_it(store, tmp_path, status):
    with store.write() as connection:
        connection.execute(update(releases).where(releases.c.name == "s-1").values(status=status))
    with store.read() as connection:
        assert "s-1" not in wanted_releases(connection, "support")
        assert list(desired(connection, tmp_path, "support").directories) == ["s-5", "s-4", "s-6", "s-3"]


def test_reconcile_loads_what_a_restart_lost():
    shelf, wanted = Shelf(), {"a": Path("/x/a"), "b": Path("/x/b")}
    shelf.held = {"a": "/x/a", "stranger": "/y"}
    assert reconcile(shelf, wanted) == ("b",)
    assert shelf.held == {"a": "/x/a", "b": "/x/b", "stranger": "/y"}
    assert reconcile(shelf, wanted) == ()


def test_an_adapter_that_the_server_refuses_keeps_no_other_away(tmp_path):
    base = load_base(make_tiny_base(tmp_path / "base"))
    good = [random_adapter(base, tmp_path / f"good-{seed}", seed) for seed in range(2)]
    wanted = {"torn": tmp_path / "torn", "serving": good[0], "lost": tmp_path / "lost", "previous": good[1]}
    wanted["torn"].mkdir()
    (wanted["torn"] / "adapter_config.json").write_text("{")
    with closing(Engine(base)) as engine, running_server(engine) as url, ServerClient(url, "base", 30) as client:
        with pytest.raises(ServerError, match=r"refused 2 of 4 adapters: torn: .*; lost: "):
            reconcile(client, wanted)
        assert client.list() == {"serving": str(good[0]), "previous": str(good[1])}


def test_a_full_server_gets_what_serves_before_anything_else(tmp_path):
    base = load_base(make_tiny_base(tmp_path / "base"))
    store = open_store(tmp_path)
    root = ensure_base_release(store, "support", "ab" * 32, now=1.0).name
    served = [
        seal(store, tmp_path, "support", random_adapter(base, tmp_path / f"c{seed}", seed), root, {}, now=2.0).name
        for seed in range(3)
    ]
    serving = served[0]
    for name in (*served, serving):
        with store.read() as connection:
            before = connection.scalar(select(aliases.c.release))
        move_alias(store, "support", expected=before, to=name, fence=None, now=3.0, is_human=True)
    with store.write() as connection:  # so that it is wanted, and newer than what serves
        connection.execute(update(aliases).values(high_water=served[1]))
    with closing(Engine(base, max_adapters=1)) as engine, running_server(engine) as url:
        with ServerClient(url, "base", 30) as client, store.read() as connection:
            with pytest.raises(ServerError, match="refused 2 of 3"):
                reconcile(client, desired(connection, tmp_path, "support").directories)
            assert set(client.list()) == {serving}
    store.close()


def test_unwanted_adapters_drain_before_they_go(store):
    shelf = Shelf()
    shelf.held = {"s-2": "/s-2", "s-5": "/s-5", "stranger": "/y"}
    mark_proved(store, shelf.url, "s-5", "/s-5", 1.0)
    keep = {"agent": "support", "wanted": {"s-5"}, "drain_s": 60.0}
    assert collect(shelf, store, now=100.0, **keep) == ()
    assert collect(shelf, store, now=159.0, **keep) == ()
    with store.read() as connection:
        rows = {row.release: row.state for row in connection.execute(select(replicas))}
    assert rows == {"": "up", "s-2": "draining", "s-5": "proved", "stranger": "loaded"}
    assert collect(shelf, store, now=160.0, **keep) == ("s-2",)
    assert shelf.held == {"s-5": "/s-5", "stranger": "/y"}


def test_an_adapter_wanted_again_starts_its_drain_anew(store):
    shelf = Shelf()
    shelf.held = {"s-2": "/s-2"}
    assert collect(shelf, store, agent="support", wanted=(), now=0.0, drain_s=60.0) == ()
    assert collect(shelf, store, agent="support", wanted={"s-2"}, now=50.0, drain_s=60.0) == ()
    assert collect(shelf, store, agent="support", wanted=(), now=70.0, drain_s=60.0) == ()
    assert collect(shelf, store, agent="support", wanted=(), now=131.0, drain_s=60.0) == ("s-2",)


def test_a_full_server_gives_up_the_longest_drained_first(store):
    shelf = Shelf()
    shelf.held = {"s-2": "/s-2", "s-5": "/s-5"}
    collect(shelf, store, agent="support", wanted={"s-5"}, now=0.0, drain_s=60.0)
    shelf.held["s-4"] = "/s-4"
    assert collect(shelf, store, agent="support", wanted={"s-5"}, now=1.0, drain_s=60.0, max_adapters=4) == ()
    assert collect(shelf, store, agent="support", wanted={"s-5"}, now=2.0, drain_s=60.0, max_adapters=3) == ("s-2",)


def update_of(store, candidate, *, state="done", verdict="promote", mode="approve"):
    """An update that made this release."""
    with store.write() as connection:
        connection.execute(
            insert(updates).values(
                id=f"u-{candidate}", agent="support", number=get(store, candidate).number, state=state, parent="base",
                candidate=candidate, verdict=verdict, mode=mode, fence=1, manifest={}, started_at=1.0,
            )
        )  # fmt: skip


@pytest.fixture
def sealing(tmp_path):
    """(store, make): `make(text)` seals an adapter of that content on the bare base."""
    store = open_store(tmp_path)
    root = ensure_base_release(store, "support", "ab" * 32, now=1.0).name

    def make(text):
        made = tmp_path / "made"
        made.mkdir(exist_ok=True)
        (made / "adapter_config.json").write_text("{}")
        (made / "adapter_model.safetensors").write_text(text)
        return seal(store, tmp_path, "support", made, root, {}, now=2.0).name

    yield store, make
    store.close()


def on_disk(tmp_path):
    return {path.name for path in (tmp_path / "releases" / "support").iterdir() if path.is_dir()}


def collected(store, tmp_path):
    """What the worker does after an update."""
    with store.read() as connection:
        gone = unlisted(connection, [Shelf()], "support")
    for name in gone:
        delete_release(store, tmp_path, name, now=9.0)
    return set(gone)


def test_a_hundred_held_updates_leave_a_few_adapters_on_disk_and_every_manifest(sealing, tmp_path):
    store, make = sealing
    names = [make("served")]
    with store.read() as connection:
        before = connection.scalar(select(aliases.c.release))
    move_alias(store, "support", expected=before, to=names[0], fence=None, now=3.0, is_human=True)
    for number in range(100):
        names.append(make(f"held {number}"))
        update_of(store, names[-1], verdict="hold")
        set_status(store, names[-1], "held", now=4.0)
        collected(store, tmp_path)
    assert on_disk(tmp_path) == {names[0], *names[-KEPT_HELD:]}
    assert {get(store, name).manifest["name"] for name in names} == set(names)


def test_a_candidate_waits_for_its_human_until_a_newer_one_does(sealing, tmp_path):
    store, make = sealing
    first, second = make("first"), make("second")
    update_of(store, first)
    assert collected(store, tmp_path) == {second}, "no update stands behind it"
    update_of(store, held := make("held"), verdict="hold")
    set_status(store, held, "held", now=4.0)
    assert collected(store, tmp_path) == set(), "a hold supersedes nothing"
    update_of(store, trial := make("trial"), mode="trial")
    assert collected(store, tmp_path) == {trial}
    update_of(store, newer := make("newer"))
    assert collected(store, tmp_path) == {first}
    assert on_disk(tmp_path) == {held, newer}


def test_while_an_update_is_under_way_no_candidate_goes(sealing, tmp_path):
    store, make = sealing
    update_of(store, make("waiting"))
    with store.write() as connection:  # it sealed its candidate and has not named it yet
        connection.execute(
            insert(updates).values(
                id="now", agent="support", number=9, state="training", parent="base", mode="auto", fence=1, manifest={},
                started_at=1.0,
            )
        )  # fmt: skip
    make("just sealed")
    assert collected(store, tmp_path) == set()


def test_what_a_server_lists_or_an_episode_needs_may_not_be_deleted(store):
    one, two = Shelf(), Shelf("http://two")
    with store.read() as connection:
        assert unlisted(connection, [one, two], "support") == ("s-7",)
        two.held["s-7"] = "/s-7"
        assert unlisted(connection, [one, two], "support") == ()
        two.is_down = True
        with pytest.raises(ServerError):
            unlisted(connection, [one, two], "support")
    two.held, two.is_down = {}, False
    with store.write() as connection:
        connection.execute(update(updates).values(state="done", verdict="hold"))
        connection.execute(update(records).values(release="s-6"))
    with store.read() as connection:
        assert unlisted(connection, [one, two], "support") == ("s-7",), "a candidate that nobody waits for, in use"
    with store.write() as connection:
        connection.execute(update(records).values(status="ended"))
    with store.read() as connection:
        assert unlisted(connection, [one, two], "support") == ("s-6", "s-7")
