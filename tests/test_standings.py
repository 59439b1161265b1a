"""How replicas stand, as an owner sees it: ready for what serves, out, or why not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import insert

from cltrain.config import from_dict
from cltrain.deploy import readiness
from cltrain.status import lines_of, read_status
from cltrain.store.database import Store, open_store
from cltrain.store.schema import item_uses
from tests.command import free_port
from tests.gateway_parts import BASE, R1, R2, add_release, point_alias

ONE, TWO = "http://one", "http://two"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(open_store(tmp_path)) as store:
        for name in (BASE, R1, R2):
            add_release(store, name)
        point_alias(store, R1)
        yield store


def standings(store: Store) -> dict[str, str]:
    with store.read() as connection:
        return readiness.standings(connection, "support", [ONE, TWO])


def test_ready_is_who_answers_and_proved_exactly_what_serves(store: Store) -> None:
    assert standings(store) == {ONE: "unseen", TWO: "unseen"}
    readiness.note_listed(store, ONE, {R2: "/2"}, 1.0)
    assert standings(store) == {ONE: "absent", TWO: "unseen"}
    readiness.mark_proved(store, ONE, R2, "/2", 2.0)
    assert standings(store)[ONE] == "absent", "what it proved is not what serves"
    readiness.note_loading(store, ONE, R1, "/1", 3.0)
    assert standings(store)[ONE] == "loading"
    readiness.note_loaded(store, ONE, R1, "/1", 4.0)
    assert standings(store)[ONE] == "loaded"
    readiness.mark_proved(store, ONE, R1, "/1", 5.0)
    assert standings(store)[ONE] == "ready"
    readiness.mark_failed(store, ONE, R1, "/1", 6.0)
    assert standings(store)[ONE] == "failed"
    readiness.mark_proved(store, ONE, R1, "/1", 7.0)
    readiness.note_out(store, ONE, 8.0)
    assert standings(store) == {ONE: "out", TWO: "unseen"}


def test_for_the_bare_base_whoever_answers_is_ready(store: Store) -> None:
    point_alias(store, BASE)
    readiness.note_listed(store, ONE, {}, 1.0)
    assert standings(store) == {ONE: "ready", TWO: "unseen"}


def test_the_status_says_so_of_every_replica(store: Store, tmp_path: Path) -> None:
    urls = [f"http://127.0.0.1:{free_port()}" for _ in range(2)]
    config = from_dict({"home": str(tmp_path), "server": {"kind": "vllm", "urls": urls}})
    readiness.note_listed(store, urls[0], {R1: "/1"}, 1.0)
    readiness.mark_proved(store, urls[0], R1, "/1", 2.0)
    readiness.note_out(store, urls[1], 3.0)
    with store.write() as connection:
        for item, uses in (("worn", 50), ("young", 1)):
            connection.execute(insert(item_uses).values(agent="support", item=item, uses=uses))
    state = read_status(config, store)
    assert state["replicas"] == {urls[0]: "ready", urls[1]: "out"}
    shown = lines_of(state)
    assert f"replica    {urls[0]}: ready" in shown
    assert f"replica    {urls[1]}: out" in shown
    assert state["items"] == {"asked": 2, "retired": 1}
    assert "items      1 of 2 that gates asked are retired" in shown
