"""A store whose file went away while it is open: nothing is acknowledged that nobody could find again."""

from __future__ import annotations

import logging
import shutil
import threading
from pathlib import Path

import pytest
from sqlalchemy import func, select

from cltrain.errors import DataError
from cltrain.store.database import Store, open_store
from cltrain.store.schema import generations, workers
from tests.gateway_parts import running


def move(home: Path, to: Path) -> None:
    to.mkdir(exist_ok=True)
    for file in home.glob("store.db*"):
        shutil.move(file, to / file.name)


def add_worker(store: Store, agent: str) -> None:
    with store.write() as connection:
        connection.execute(workers.insert().values(agent=agent, settings={}))


def num_workers(store: Store) -> int:
    with store.read() as connection:
        return int(connection.scalar(select(func.count()).select_from(workers)) or 0)


def test_without_its_file_a_store_takes_nothing_and_makes_no_other(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    add_worker(store, "a")
    move(tmp_path, tmp_path / "away")
    with pytest.raises(DataError, match="moved, removed or replaced"):
        num_workers(store)
    with pytest.raises(DataError, match="moved, removed or replaced"):
        add_worker(store, "b")
    store.engine.dispose()  # whoever connects anew finds no file either
    with pytest.raises(Exception, match="unable to open"):
        store.engine.connect()
    assert not list(tmp_path.glob("store.db*"))
    move(tmp_path / "away", tmp_path)
    add_worker(store, "c")
    assert num_workers(store) == 2


def test_what_is_written_when_the_file_goes_away_is_rolled_back(tmp_path: Path) -> None:
    store = open_store(tmp_path)

    def write() -> None:
        with store.write() as connection:
            connection.execute(workers.insert().values(agent="a", settings={}))
            move(tmp_path, tmp_path / "away")

    with pytest.raises(DataError, match="moved, removed or replaced"):
        write()
    move(tmp_path / "away", tmp_path)
    assert num_workers(store) == 0


def test_another_file_in_its_place_is_not_taken_for_it(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    move(tmp_path, tmp_path / "away")
    open_store(tmp_path).close()
    with pytest.raises(DataError, match="moved, removed or replaced"):
        add_worker(store, "a")


def test_a_gateway_whose_store_is_gone_answers_unrecorded_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home = tmp_path / "state"
    with running(home) as gateway, caplog.at_level(logging.WARNING):
        before = gateway.chat("before")
        move(home, tmp_path / "away")
        health = gateway.http.get("/health").json()  # said without a request that would have to be recorded
        threading.Event().wait(2.1)  # it looks again after two seconds
        during = [gateway.chat("during"), gateway.chat("streamed", stream=True)]
        assert not list(home.glob("store.db*"))
        move(tmp_path / "away", home)
        threading.Event().wait(2.1)
        after = gateway.chat("after")
        assert gateway.http.get("/health").json()["store"] == "ok"
        with gateway.store.read() as connection:
            assert connection.scalar(select(func.count()).select_from(generations)) == 2
    assert health["store"] == "down"
    assert {a.status_code for a in (before, *during, after)} == {200}
    assert [a.headers["x-cltrain-recorded"] for a in (before, during[0], after)] == ["1", "0", "1"]
    assert '"cltrain":{"recorded":0' in during[1].text
    assert "answers go out unrecorded" in caplog.text
