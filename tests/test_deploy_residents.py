"""What a server holds: wanted adapters come back after a restart, unwanted ones leave after the drain."""

from pathlib import Path

import pytest
from sqlalchemy import insert, select, update

from cltrain.deploy.residents import (
    collect,
    desired,
    mark_proved,
    reconcile,
    unlisted,
    wanted_releases,
)
from cltrain.errors import ServerError
from cltrain.store.database import open_store
from cltrain.store.schema import aliases, records, releases, replicas, updates


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
        directories = desired(connection, tmp_path, "support")
    assert directories["s-5"] == (tmp_path / "releases/support/s-5").resolve()
    assert "s-0" not in directories, "the bare base is no adapter"


def test_reconcile_loads_what_a_restart_lost():
    shelf, wanted = Shelf(), {"a": Path("/x/a"), "b": Path("/x/b")}
    shelf.held = {"a": "/x/a", "stranger": "/y"}
    assert reconcile(shelf, wanted) == ("b",)
    assert shelf.held == {"a": "/x/a", "b": "/x/b", "stranger": "/y"}
    assert reconcile(shelf, wanted) == ()


def test_unwanted_adapters_drain_before_they_go(store):
    shelf = Shelf()
    shelf.held = {"s-2": "/s-2", "s-5": "/s-5", "stranger": "/y"}
    mark_proved(store, shelf.url, "s-5", "/s-5", 1.0)
    keep = {"agent": "support", "wanted": {"s-5"}, "drain_s": 60.0}
    assert collect(shelf, store, now=100.0, **keep) == ()
    assert collect(shelf, store, now=159.0, **keep) == ()
    with store.read() as connection:
        rows = {row.release: row.state for row in connection.execute(select(replicas))}
    assert rows == {"s-2": "draining", "s-5": "proved", "stranger": "loaded"}
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


def test_only_rejected_and_unlisted_releases_may_be_deleted(store):
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
        connection.execute(update(records).values(release="s-7"))
    with store.read() as connection:
        assert unlisted(connection, [one, two], "support") == ()
