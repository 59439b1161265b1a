"""A person gives quarantined records back: which ones, what may not come back, and that a later window reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import delete, insert, select

from cltrain.api import Deployment
from cltrain.config import ExperienceConfig, from_dict
from cltrain.errors import ConfigError, ConflictError, DataError
from cltrain.experience import waiting, window
from cltrain.experience.buffer import replay_examples
from cltrain.experience.rows import write_feedback, write_trajectory
from cltrain.records import Feedback, Trajectory
from cltrain.registry import aliases, releases
from cltrain.registry.decisions import read_decisions
from cltrain.store.database import Store
from cltrain.store.schema import decisions, records, updates
from tests.command import Command, cltrain
from tests.registry_parts import BASE, BASE_DIGEST, new_store, sealed
from tests.windows import standing

__all__ = ["cltrain"]  # a fixture

ASKED, SAID = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello to you"}


def add(store: Store, *names: str, agent: str = "support") -> None:
    """Ended episodes of the agent that somebody praised."""
    with store.write() as connection:
        for name in names:
            messages = ({**ASKED, "content": f"hello from {name}"}, SAID)
            made = Trajectory(name, agent, name, name, messages, ("user", "agent"), created_at=1.0)
            assert write_trajectory(connection, made)
            write_feedback(connection, Feedback(f"f-{name}", name, 1.0, source="operator"), 1.0)


def concluded(
    store: Store,
    number: int,
    verdict: str,
    learned: str,
    *,
    candidate: str | None = None,
    agent: str = "support",
    **aside: str,
) -> None:
    """An update of that number, with what became of the records of its window: one learned, others set aside."""
    status = "quarantined" if verdict == "reject" else "replay"
    now, update = 10.0 * number, f"{agent}-u{number}"
    row = {"state": "done", "mode": "auto", "fence": 1, "manifest": {}, "started_at": now - 1.0, "finished_at": now}
    values = {
        "id": update,
        "agent": agent,
        "number": number,
        "verdict": verdict,
        "parent": BASE,
        "candidate": candidate,
    }
    with store.write() as connection:
        connection.execute(insert(updates).values(**row, **values))
        reason = f"update {number}: {verdict}"
        window.mark(connection, agent, learned, status, now=now, reason=reason, stratum="text", update=update)
        for record, why in aside.items():
            window.mark(connection, agent, record, "quarantined", now=now, reason=why, stratum="text")


def ready(store: Store, agent: str = "support") -> set[str]:
    config = ExperienceConfig(min_window=1)
    found = window.next_window(store, agent, config, learn_from=["agent"], tools_allowed=None, now=1000.0)
    return {example.record for example in found.examples}


def rehearsed(store: Store) -> set[str]:
    config = ExperienceConfig(principal_quota=1.0)
    found = replay_examples(store, "support", config, b"k" * 32, learn_from=["agent"], tools_allowed=None)
    return {example.record for example in found}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two rejected updates: of the first `a` was learned and `dup` set aside, of the second `b` learned."""
    store = new_store(tmp_path)
    add(store, "a", "b", "dup", "old")
    concluded(store, 1, "reject", "a", dup="duplicate of a", old="no longer rehearsed: suspicious beside all")
    concluded(store, 2, "reject", "b")
    return store


@pytest.fixture
def home(tmp_path: Path) -> str:
    return f"--home={tmp_path / 'state'}"


def test_what_an_update_quarantined_is_named_comes_back_and_is_read_again(
    cltrain: Command, store: Store, home: str
) -> None:
    before = standing(store)
    assert ready(store) == set()
    dry = cltrain("unquarantine", "--update=1", "--dry-run", home)
    assert dry.code == 0, dry
    assert dry.out.splitlines() == [
        "a  text  update 1: reject",
        "dup  text  duplicate of a",
        "old  stays: it was scrubbed from what is rehearsed (no longer rehearsed: suspicious beside all)",
        "support: 2 records would come back",
    ]
    assert standing(store) == before
    assert read_decisions(store, "support", kind="unquarantine") == []

    done = cltrain("unquarantine", "--update=1", "--reason=the judge was down", home)
    assert (done.code, done.out.splitlines()[-1]) == (0, "support: 2 records came back"), done
    assert ready(store) == {"a", "dup"}
    assert standing(store)["b"][0] == standing(store)["old"][0] == "quarantined"
    (entry,) = read_decisions(store, "support", kind="unquarantine")
    assert entry.payload == {
        "num_records": 2, "records": ["a", "dup"], "updates": [1], "release": None, "reason": "the judge was down",
        "is_human": True,
    }  # fmt: skip
    assert "unquarantine" in cltrain("log", "--verify", home).out
    again = cltrain("unquarantine", "--update=1", home)
    assert (again.code, "nothing was given back: old was scrubbed" in again.err) == (4, True), again


def test_what_came_back_is_news_to_a_worker_until_an_update_has_read_it(
    cltrain: Command, store: Store, home: str
) -> None:
    assert waiting.looked_at(store, "support", ["a", "b"]) == {"a", "b"}
    assert cltrain("unquarantine", "a", home).code == 0
    assert waiting.looked_at(store, "support", ["a", "b"]) == {"b"}
    with store.write() as connection:
        window.mark(connection, "support", "a", "waiting", now=50.0, reason="update 3: hold")
    assert waiting.looked_at(store, "support", ["a", "b"]) == {"a", "b"}


@pytest.mark.parametrize(
    ("record", "why"),
    [("gone", "gone was removed"), ("old", "old was scrubbed from what is rehearsed"),
     ("kept", "kept is not quarantined"), ("nobody", "nobody is not quarantined for support"),
     ("theirs", "theirs is not quarantined for support")],
)  # fmt: skip
def test_a_record_that_may_not_come_back_keeps_those_named_with_it_where_they_are(
    cltrain: Command, store: Store, home: str, record: str, why: str
) -> None:
    add(store, "gone", "kept")
    add(store, "theirs", agent="other")
    concluded(store, 3, "reject", "gone")
    concluded(store, 4, "promote", "kept")
    concluded(store, 1, "reject", "theirs", agent="other")
    with store.write() as connection:
        connection.execute(delete(records).where(records.c.id == "gone"))
    before = standing(store)
    done = cltrain("unquarantine", "a", record, home)
    assert (done.code, f"nothing was given back: {why}" in done.err) == (4, True), done
    assert standing(store) == before
    with store.read() as connection:
        assert connection.execute(select(decisions).where(decisions.c.kind == "unquarantine")).all() == []


def test_without_a_choice_all_are_only_listed(cltrain: Command, store: Store, home: str) -> None:
    listed = cltrain("unquarantine", "--dry-run", "--json", home).json
    assert [one["record"] for one in listed["records"]] == ["a", "b", "dup"]
    done = cltrain("unquarantine", home)
    assert (done.code, "name records, --update or --release" in done.err) == (2, True), done
    for words in (["--update=9"], ["--release=support-v000009"]):
        assert cltrain("unquarantine", *words, home).code == 3
    both = cltrain("unquarantine", "--update=1", "--update=2", "--json", home).json
    assert [one["record"] for one in both["records"]] == ["a", "b", "dup"]


def test_the_status_says_how_to_get_at_them(cltrain: Command, store: Store, home: str) -> None:
    concluded(store, 3, "reject", "b")
    said = cltrain("status", home).out
    assert "`cltrain unquarantine --dry-run` lists them" in said
    assert "`cltrain unquarantine --update NUMBER` gives it back" in said


def served(store: Store, home: Path) -> str:
    """A release that learned `kept`, and serves."""
    add(store, "kept")
    name = sealed(store, home, BASE, "one")
    concluded(store, 3, "promote", "kept", candidate=name)
    alias = aliases.read_alias(store, "support")
    aliases.move_alias(store, "support", expected=alias, to=name, fence=None, now=31.0, is_human=True)
    return name


def test_what_a_rollback_took_comes_back_by_the_name_of_the_release(
    cltrain: Command, store: Store, tmp_path: Path, home: str
) -> None:
    name = served(store, tmp_path)
    add(store, "beside")
    with store.write() as connection:  # found harmless by an update that was held, and rehearsed since
        window.mark(connection, "support", "beside", "replay", now=32.0, update="support-u9")
    assert rehearsed(store) == {"kept", "beside"}
    assert aliases.rollback(store, "support", now=40.0, reason="curt", freeze=False).num_quarantined == 2
    assert (rehearsed(store), ready(store)) == (set(), set())
    done = cltrain("unquarantine", f"--release={name[:-4]}", home)
    assert (done.code, done.out.splitlines()[-1]) == (0, "support: 2 records came back"), done
    assert (rehearsed(store), ready(store)) == (set(), {"kept", "beside"})


@pytest.mark.parametrize("is_first", [True, False])
def test_what_serves_again_is_rehearsed_and_not_learned_a_second_time(
    cltrain: Command, store: Store, tmp_path: Path, home: str, is_first: bool
) -> None:
    name = served(store, tmp_path)
    aliases.rollback(store, "support", now=40.0, reason="curt", freeze=False)

    def give_back() -> str:
        return cltrain("unquarantine", "kept", home).out

    def serve() -> None:
        with store.write() as connection:
            aliases.move_alias_in(
                connection, "support", expected=aliases.read_alias(store, "support"), to=name, fence=None, now=50.0,
                file_as="promoted by a human", is_human=True,
            )  # fmt: skip

    if is_first:
        give_back()
        serve()
    else:
        serve()
        assert f"{name} learned it and is not undone: rehearsed" in give_back()
    assert (rehearsed(store), ready(store)) == ({"kept"}, set())


def test_a_tenants_records_come_back_by_its_own_name_alone(cltrain: Command, store: Store, tmp_path: Path) -> None:
    acme = "support@acme"
    releases.ensure_base_release(store, acme, BASE_DIGEST, now=1.0)
    add(store, "acmes", agent=acme)
    concluded(store, 1, "reject", "acmes", agent=acme)
    home = f"--home={tmp_path / 'state'}"
    assert cltrain("unquarantine", "acmes", home).code == 4
    done = cltrain("unquarantine", "--update=1", f"--agent={acme}", home, "--json")
    assert [one["record"] for one in done.json["records"]] == ["acmes"]
    assert (ready(store, acme), ready(store)) == ({"acmes"}, set())
    assert len(read_decisions(store, acme, kind="unquarantine")) == 1
    assert read_decisions(store, "support", kind="unquarantine") == []


def test_python_says_the_same(store: Store, tmp_path: Path) -> None:
    deployment = Deployment(from_dict({"home": str(tmp_path / "state")}))
    with pytest.raises(ConfigError):
        deployment.unquarantine()
    with pytest.raises(DataError):
        deployment.unquarantine(numbers=[7])
    with pytest.raises(ConflictError):
        deployment.unquarantine(["nobody"])
    assert [one["record"] for one in deployment.unquarantine(["b"])["records"]] == ["b"]
