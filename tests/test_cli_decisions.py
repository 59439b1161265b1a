"""A person's yes to what waits, and the log of decisions, by command."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import delete, event, func, insert, select, update

from cltrain.api import Deployment
from cltrain.config import from_dict
from cltrain.models.base import load_base
from cltrain.registry.aliases import move_alias, read_alias
from cltrain.registry.decisions import append, verify_chain
from cltrain.registry.releases import ensure_base_release, seal
from cltrain.store.database import Store, open_store
from cltrain.store.schema import decisions, updates
from tests.command import Command, cltrain
from tests.deployments import base_server
from tests.serving import random_adapter

__all__ = ["cltrain"]  # a fixture


@pytest.fixture(scope="module")
def url():
    with base_server() as url:
        yield url


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = open_store(tmp_path / "state")
    ensure_base_release(store, "support", load_base(None).digest, now=1.0)
    return store


def waiting(store: Store, tmp_path: Path, seed: int, *, mode: str = "approve", verdict: str = "promote") -> str:
    """A candidate with that verdict, compared with what serves."""
    serving = read_alias(store, "support").release
    made = random_adapter(load_base(None), tmp_path / f"made-{seed}", seed)
    name = seal(store, tmp_path / "state", "support", made, serving, {}, now=2.0).name
    row = {"agent": "support", "state": "done", "parent": serving, "fence": 1, "manifest": {}, "started_at": 2.0}
    with store.write() as connection:
        values = {"id": f"u{seed}", "number": seed, "candidate": name, "verdict": verdict, "mode": mode}
        connection.execute(insert(updates).values(**row, **values))
    return name


def test_approve_without_a_name_serves_the_newest_that_waits_and_makes_it_the_anchor(
    cltrain: Command, store: Store, tmp_path: Path, url: str
) -> None:
    words = ["approve", f"--home={tmp_path / 'state'}", f"--set=server.url={url}", "--json"]
    done = cltrain(*words)
    assert (done.code, "nothing of support waits" in done.err) == (4, True), done
    waiting(store, tmp_path, 1, mode="observe")
    held = waiting(store, tmp_path, 2, verdict="hold")
    assert cltrain(*words).code == 4
    assert cltrain(*words, held).code == 4
    older, newer = waiting(store, tmp_path, 3), waiting(store, tmp_path, 4)
    status = ("status", *words[1:-1])
    assert (
        f"\nawaits     {older}: cltrain approve {older}\nawaits     {newer}: cltrain approve\n" in cltrain(*status).out
    )
    done = cltrain(*words)
    assert (done.code, done.json["release"]) == (0, newer), done
    assert "awaits" not in cltrain(*status).out, "the other was compared with what serves no more"
    assert f"{newer} already serves" in cltrain(*words, newer).err
    done = cltrain(*words)
    assert (done.code, "was compared with" in done.err) == (4, True), done
    assert cltrain(*words, older).code == 4
    assert read_alias(store, "support").release == newer
    named = waiting(store, tmp_path, 5)
    assert cltrain(*words, named[:-4]).json["release"] == named


def test_a_yes_that_is_cut_off_moved_nothing(store: Store, tmp_path: Path, url: str) -> None:
    name, serving = waiting(store, tmp_path, 1), read_alias(store, "support").release
    deployment = Deployment(from_dict({"home": str(tmp_path / "state"), "server": {"url": url}}))

    @event.listens_for(deployment.store.engine, "before_cursor_execute")
    def cut_off(connection: object, cursor: object, statement: str, *_: object) -> None:
        if statement.startswith("UPDATE screenings"):
            raise RuntimeError("cut off")

    with pytest.raises(RuntimeError, match="cut off"):
        deployment.promote(name)
    assert read_alias(store, "support").release == serving


def logged(store: Store) -> None:
    for number in range(3):
        with store.write() as connection:
            append(connection, "support", "verdict", {"update": f"u{number}", "verdict": "hold"}, 10.0 + number)


def test_log_prints_each_decision_and_the_head(cltrain: Command, store: Store, tmp_path: Path) -> None:
    logged(store)
    home = f"--home={tmp_path / 'state'}"
    done = cltrain("log", home, "--verify")
    *lines, verified, head = done.out.splitlines()
    assert done.code == 0
    assert [line.split()[3] for line in lines] == ["base", "verdict", "verdict", "verdict"]
    assert "1970-01-01 00:00:10" in lines[1]
    assert "update=u0" in lines[1]
    assert verified == "4 entries of all agents hang together"
    assert head == f"head {verify_chain(store).head}"
    found = cltrain("log", home, "--json").json
    assert [entry["kind"] for entry in found["entries"]] == ["base", "verdict", "verdict", "verdict"]
    assert found["head"] == verify_chain(store).head


def test_log_verify_ends_with_code_3_when_an_entry_was_changed(cltrain: Command, store: Store, tmp_path: Path) -> None:
    logged(store)
    with store.write() as connection:
        connection.execute(update(decisions).where(decisions.c.seq == 3).values(payload={"verdict": "promote"}))
    home = f"--home={tmp_path / 'state'}"
    assert cltrain("log", home).code == 0
    done = cltrain("log", home, "--verify", "--json")
    assert (done.code, "decision 3" in done.json["message"]) == (3, True), done


def test_a_head_noted_elsewhere_shows_a_cut_off_tail(cltrain: Command, store: Store, tmp_path: Path) -> None:
    logged(store)
    home, noted = f"--home={tmp_path / 'state'}", verify_chain(store).head
    assert cltrain("log", home, f"--head={noted}", "--json").json["num_since"] == 0
    logged(store)
    assert cltrain("log", home, f"--head={noted[:12]}", "--json").json["num_since"] == 3
    assert "3 of them came after" in cltrain("log", home, f"--head={noted}").out
    with store.write() as connection:
        last = connection.execute(select(func.max(decisions.c.seq))).scalar()
        connection.execute(delete(decisions).where(decisions.c.seq > last - 3))
        connection.execute(delete(decisions).where(decisions.c.hash == noted))
    assert cltrain("log", home, "--verify").code == 0  # from the inside nothing is missing
    done = cltrain("log", home, f"--head={noted}")
    assert (done.code, "cut off" in done.err) == (3, True), done
    done = cltrain("log", home, "--head=abc")
    assert (done.code, "at least 12" in done.err) == (3, True), done


def test_a_rollback_is_done_and_said_though_the_servers_key_is_not_set(
    cltrain: Command, store: Store, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = waiting(store, tmp_path, 1)
    move_alias(store, "support", expected=read_alias(store, "support"), to=first, fence=None, now=3.0, is_human=True)
    second = waiting(store, tmp_path, 2)
    move_alias(store, "support", expected=read_alias(store, "support"), to=second, fence=None, now=4.0, is_human=True)
    monkeypatch.delenv("KEY_OF_NOBODY", raising=False)
    server = (f"--set=server.url={url}", "--set=server.api_key_env=KEY_OF_NOBODY")
    done = cltrain("rollback", f"--home={tmp_path / 'state'}", *server, "--json")
    assert (done.code, done.json["release"]) == (0, first), done
    assert read_alias(store, "support").release == first
