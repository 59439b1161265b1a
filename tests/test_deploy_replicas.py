"""Several replicas as one server: who is asked, who is out, what stops an update, and when a replica is ready again."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import insert, select

from cltrain.deploy import probes, readiness, residents
from cltrain.deploy.proof import NotProvedError
from cltrain.deploy.replicas import Replicas
from cltrain.deploy.residents import Wanted
from cltrain.errors import ConflictError, NotHeldError, ServerError, UnavailableError
from cltrain.store.database import open_store
from cltrain.store.schema import releases
from cltrain.store.schema import replicas as rows
from tests.fleet_parts import Shelf, probes_of

OLD, NEW, PINNED = Path("/r/old"), Path("/r/new"), Path("/r/pinned")


class Fleet:
    """Three replicas that hold and proved `old`."""

    def __init__(self, store, min_ready=1):
        self.store, self.now = store, 100.0
        self.shelves = [Shelf(f"http://{letter}") for letter in "abc"]
        self.servers = Replicas(store, self.shelves, min_ready, clock=lambda: self.now)
        for name, root in {"old": OLD, "new": NEW, "pinned": PINNED}.items():
            probes.keep(store, name, probes_of(root), 0.0)

    def tend(self, serving="old", needed=("old",), again_s=300.0, **directories):
        wanted = Wanted(serving, directories or {"old": OLD}, frozenset(needed))
        return self.servers.look_after(wanted, again_s)

    def states(self, release):
        with self.store.read() as connection:
            found = connection.execute(select(rows).where(rows.c.release == release))
            return {row.url[-1]: row.state for row in found}


@pytest.fixture
def fleet(tmp_path):
    store = open_store(tmp_path)
    fleet = Fleet(store)
    assert fleet.tend() == []
    yield fleet
    store.close()


def test_a_look_loads_and_proves_on_every_replica(fleet):
    assert [shelf.held for shelf in fleet.shelves] == [{"old": str(OLD)}] * 3
    assert fleet.states("old") == dict.fromkeys("abc", "proved")
    assert fleet.states(readiness.ITSELF) == dict.fromkeys("abc", "up")


def test_one_that_is_away_is_out_at_once_and_the_others_load_and_prove(fleet):
    fleet.shelves[1].is_down = True
    fleet.servers.load("new", NEW)
    assert fleet.states("old") == {"a": "proved", "b": "out", "c": "proved"}
    assert fleet.servers.prove("new", probes_of(NEW)).verdict == "proved"
    assert fleet.states("new") == {"a": "proved", "c": "proved"}, "nothing was sent to b"


def test_too_few_that_answer_stop_the_update(tmp_path):
    store = open_store(tmp_path)
    fleet = Fleet(store, min_ready=2)
    fleet.tend()
    fleet.shelves[0].is_down = fleet.shelves[1].is_down = True
    with pytest.raises(UnavailableError, match=r"1 of 3 replicas answer \(server.min_ready = 2\)"):
        fleet.servers.load("new", NEW)
    store.close()


def test_one_that_refuses_the_file_stops_the_update(fleet):
    fleet.shelves[2].refuses.add("new")
    with pytest.raises(ServerError, match="http://c did not load new"):
        fleet.servers.load("new", NEW)
    assert fleet.states("new") == {"a": "loaded", "b": "loaded"}


def test_one_that_fails_the_proof_stops_the_promotion(fleet):
    fleet.servers.load("new", NEW)
    fleet.shelves[1].lies["new"] = str(OLD)
    with pytest.raises(NotProvedError):
        fleet.servers.prove("new", probes_of(NEW))
    assert fleet.states("new")["b"] == "failed"
    with fleet.store.read() as connection, pytest.raises(ConflictError, match="http://b answered as new with other"):
        readiness.require_ready(connection, fleet.servers.urls, "new", 1)


def test_the_flip_asks_again_how_many_are_ready(fleet):
    fleet.servers.load("new", NEW)
    fleet.servers.prove("new", probes_of(NEW))
    with fleet.store.read() as connection:
        readiness.require_ready(connection, fleet.servers.urls, "new", 3)
    fleet.shelves[0].restart()  # while the gate was judging
    fleet.shelves[2].is_down = True
    fleet.tend()
    with fleet.store.read() as connection:
        readiness.require_ready(connection, fleet.servers.urls, "new", 1)
        with pytest.raises(ConflictError, match="1 of 3 replicas hold and proved new now"):
            readiness.require_ready(connection, fleet.servers.urls, "new", 2)


def test_a_base_that_is_another_one_is_not_taken_for_noise(fleet):
    fleet.shelves[1]._base = "a fine-tune of it"
    fleet.servers.load("new", NEW)
    with pytest.raises(NotProvedError, match=r"the bare base \(base\) itself is .* nats from the trainer's"):
        fleet.servers.prove("new", probes_of(NEW))


def test_the_noise_is_measured_on_the_bare_base_of_each_replica(fleet):
    noisy = Shelf("http://noisy")
    noisy.held["new"] = str(NEW)
    kept, exact = probes_of(NEW), noisy.score_many
    for shift_base, shift_new, is_proved in ((0.003, 0.005, True), (0.0, 0.005, False), (0.003, 0.007, False)):
        noisy.score_many = lambda model, pairs, b=shift_base, n=shift_new: [
            [value + (b if model == "base" else n) for value in row] for row in exact(model, pairs)
        ]
        servers = Replicas(fleet.store, [noisy])
        if is_proved:
            assert servers.prove("new", kept).verdict == "proved"
        else:
            with pytest.raises(NotProvedError):
                servers.prove("new", kept)


def test_an_update_too_small_to_tell_rests_on_name_and_path_and_is_ready(fleet):
    fleet.servers.load("new", NEW)
    assert fleet.servers.prove("new", probes_of(NEW, before=NEW)).verdict == "indistinguishable"
    assert fleet.states("new") == dict.fromkeys("abc", "proved")


def test_an_update_too_small_to_tell_is_not_ready_under_its_name_from_another_path(fleet):
    probes.keep(fleet.store, "new", probes_of(NEW, before=NEW), 0.0)
    for shelf in fleet.shelves[:2]:
        shelf.held["new"], shelf.lies["new"] = "/r/elsewhere", str(NEW)  # whoever loaded it there
    for _ in range(2):
        assert fleet.tend(serving="new", needed=("new",), new=NEW, old=OLD, pinned=PINNED) == []
        assert [url for url, state in fleet.states("new").items() if state == "proved"] == ["c"]
    assert fleet.states("pinned")["c"] == "proved"
    with pytest.raises(ServerError, match="from elsewhere"):
        fleet.servers.load("new", NEW)


def test_questions_are_spread_over_those_that_hold_the_release(fleet):
    fleet.shelves[0].unload("old")
    fleet.tend(serving="", needed=(), pinned=PINNED)  # notes that a lost it
    answers = fleet.servers.generate_many("old", [((), ())] * 10, 5)
    assert {answer.finish_reason for answer in answers} == {"http://b", "http://c"}
    assert {answer.message["content"] for answer in answers} == {str(OLD)}
    assert [len(shelf.asked) for shelf in fleet.shelves] == [0, 5, 5]
    assert fleet.servers.url_for("old") == "http://b"


def test_what_a_replica_that_went_away_was_asked_goes_to_another_in_the_right_order(fleet):
    fleet.shelves[0].is_down = True
    fleet.shelves[1].held.clear()  # restarted, and nobody looked yet
    scores = fleet.servers.score_many("old", [((1,), (2,) * n) for n in range(1, 8)])
    assert [len(row) for row in scores] == list(range(1, 8))
    assert fleet.states("old") == {"a": "out", "c": "proved"}
    assert fleet.states(readiness.ITSELF) == {"a": "out", "b": "up", "c": "up"}
    fleet.shelves[2].is_down = True
    with pytest.raises(UnavailableError):
        fleet.servers.score_many("old", [((1,), (2,))])


def test_a_replica_that_does_not_hold_one_release_stays_ready_for_the_others(fleet):
    fleet.servers.load("new", NEW)
    for shelf in fleet.shelves[:2]:
        shelf.unload("new")  # by another process
    assert len(fleet.servers.score_many("new", [((1,), (2,))] * 6)) == 6
    assert fleet.states("new") == {"c": "loaded"}
    fleet.shelves[2].unload("new")
    with pytest.raises(NotHeldError):
        fleet.servers.score_many("new", [((1,), (2,))])
    assert fleet.states("new") == {}
    assert fleet.states("old") == dict.fromkeys("abc", "proved")
    assert fleet.states(readiness.ITSELF) == dict.fromkeys("abc", "up")


def test_a_load_under_way_is_remembered_though_the_replica_does_not_hold_it_yet(fleet):
    lone = Replicas(fleet.store, fleet.shelves[:1])
    readiness.note_loading(fleet.store, "http://a", "new", str(NEW), fleet.now)
    with pytest.raises(NotHeldError):
        lone.score_many("new", [((1,), (2,))])
    assert fleet.states("new") == {"a": "loading"}, "its files must not be deleted"


def test_who_proved_it_is_asked_before_who_only_lists_it_and_who_failed_never(fleet):
    fleet.servers.load("new", NEW)
    assert fleet.servers.url_for("new") == "http://a"
    fleet.shelves[0].lies["new"] = str(OLD)
    with pytest.raises(NotProvedError):
        fleet.servers.members[0].prove("new", probes_of(NEW))
    assert fleet.servers.url_for("new") == "http://b"
    fleet.servers.members[2].prove("new", probes_of(NEW))
    assert fleet.servers.url_for("new") == "http://c"


def test_a_restarted_replica_is_ready_when_everything_needed_is_there_and_proved(fleet):
    everything = {"old": OLD, "new": NEW, "pinned": PINNED}
    fleet.tend(serving="new", needed=("new", "old"), **everything)
    lost = fleet.shelves[0]
    lost.restart()
    lost.scored.clear()
    lost.refuses.add("old")
    assert fleet.tend(serving="new", needed=("new", "old"), **everything) == []
    assert fleet.states("new")["a"] == "loaded", "without what a rollback would go to it must not serve"
    lost.refuses.clear()
    fleet.tend(serving="new", needed=("new", "old"), **everything)
    assert fleet.states("new")["a"] == "proved"
    assert [name for name in lost.scored if name != "base"] == ["old", "pinned", "new"], "what serves comes last"


def test_a_file_that_is_refused_and_not_needed_keeps_nobody_from_serving(fleet):
    fleet.shelves[0].restart()
    fleet.shelves[0].refuses.add("pinned")
    fleet.tend(old=OLD, pinned=PINNED)
    assert fleet.states("old")["a"] == "proved"


def test_a_replica_that_was_cut_off_is_proved_again_before_it_is_ready(fleet):
    fleet.shelves[0].is_down = True
    fleet.tend()
    assert fleet.states("old")["a"] == "out"
    fleet.shelves[0].is_down = False
    fleet.shelves[0].lies["old"] = str(NEW)  # somebody changed it meanwhile
    (failure,) = fleet.tend()
    assert (failure.url, failure.release, fleet.states("old")["a"]) == ("http://a", "old", "failed")
    assert fleet.tend() == [], "said once"


def test_what_serves_is_proved_again_every_few_minutes_and_nothing_else_is(fleet):
    for shelf in fleet.shelves:
        shelf.scored.clear()
    fleet.now += 299
    fleet.tend(old=OLD, pinned=PINNED)
    assert all("old" not in shelf.scored for shelf in fleet.shelves)
    fleet.now += 1
    fleet.shelves[1].lies["old"] = str(NEW)
    (failure,) = fleet.tend(old=OLD, pinned=PINNED)
    assert failure.url == "http://b"
    assert fleet.states("old") == {"a": "proved", "b": "failed", "c": "proved"}
    assert [shelf.scored.count("pinned") for shelf in fleet.shelves] == [1, 1, 1]
    fleet.shelves[1].lies.clear()
    fleet.now += 300
    assert fleet.tend() == []
    assert fleet.states("old")["b"] == "proved"


def test_a_load_that_timed_out_after_success_is_found_and_proved(fleet):
    fleet.shelves[0].times_out_after_load = True
    fleet.servers.load("new", NEW)
    assert fleet.states("new")["a"] == "loading"
    fleet.shelves[0].times_out_after_load = False
    fleet.tend(old=OLD, new=NEW)
    assert fleet.states("new")["a"] == "proved"
    assert fleet.states("old")["a"] == "proved"


def test_what_an_absent_replica_may_come_back_with_is_not_deleted(fleet):
    with fleet.store.write() as connection:
        for number, name in enumerate(("old", "new", "pinned")):
            of_agent = {"agent": "support", "number": number, "digest": "", "manifest": {}, "created_at": 0.0}
            connection.execute(insert(releases).values(name=name, path=name, status="rejected", **of_agent))
    fleet.shelves[0].times_out_after_load = True
    fleet.servers.load("new", NEW)
    fleet.shelves[0].is_down = True
    for shelf in fleet.shelves[1:]:
        shelf.restart()
    with fleet.store.read() as connection:
        assert residents.unlisted(connection, fleet.servers.members, "support") == ("pinned",)
    stranger = Replicas(fleet.store, [Shelf("http://new")])
    stranger.members[0].server.is_down = True
    with fleet.store.read() as connection, pytest.raises(UnavailableError):
        residents.unlisted(connection, stranger.members, "support")


def test_nothing_is_written_while_nothing_changes(fleet):
    with fleet.store.read() as connection:
        before = connection.exec_driver_sql("PRAGMA data_version").scalar()
        for _ in range(3):
            fleet.tend()
        assert connection.exec_driver_sql("PRAGMA data_version").scalar() == before
