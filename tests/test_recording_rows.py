"""What the recorder acknowledged is in the store, once, and reads back as it was given."""

from __future__ import annotations

import stat
import threading
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import func, select

from cltrain.errors import ConflictError, DataError
from cltrain.experience.recording import (
    Recorder,
    RecorderFull,
    Turn,
    UnknownTarget,
    episode_of,
    load_secret,
    read_trajectories,
    read_trajectory,
    split_of,
)
from cltrain.records import Feedback, Generation, Trajectory
from cltrain.store.database import Store, open_store
from cltrain.store.schema import generations, records, set_aside

SECRET = bytes(range(32))
EPISODE = "traj-" + "0" * 32
ASKED = {"role": "user", "content": "where is my lamp"}
CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"item": "lamp"}'}}],
}


def turn(**changes: object) -> Turn:
    given = Generation("gen-1", EPISODE, 1, "support-v000001-aaaaaaaaaaaa", (1, 2), (3, 4), (-0.5, -0.25), "tool_calls")
    first = Turn(
        record=EPISODE,
        agent="support",
        session="s1",
        principal="anna",
        release="support-v000001-aaaaaaaaaaaa",
        messages=(ASKED, CALLED),
        producers=("user", "agent"),
        tools=({"type": "function", "function": {"name": "find"}},),
        prefix="p1",
        after=None,
        generation=given,
    )
    return replace(first, **changes)  # type: ignore[arg-type]


def test_a_turn_reads_back_as_it_was_recorded(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with Recorder(store, SECRET, 0.0) as recorder:
        assert recorder.record_turn(turn(), now=10.0).result(10) == EPISODE
    with store.read() as connection:
        read = read_trajectory(connection, EPISODE)
    assert read.messages == (ASKED, CALLED)
    assert read.producers == ("user", "agent")
    assert read.generations == (turn().generation,)
    assert (read.end, read.split, read.release, read.created_at) == ("open", "train", turn().release, 10.0)


def test_missing_token_truth_is_null_in_the_database(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    bare = Generation("gen-1", EPISODE, 1, "r")
    with Recorder(store, SECRET, 0.0) as recorder:
        recorder.record_turn(turn(generation=bare), now=1.0).result(10)
    with store.read() as connection:
        assert connection.scalar(select(func.count()).where(generations.c.prompt_ids.is_(None))) == 1
        assert read_trajectory(connection, EPISODE).generations == (bare,)


def test_a_turn_that_lost_the_race_for_its_record_is_kept_as_a_branch(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with Recorder(store, SECRET, 0.0) as recorder:
        recorder.record_turn(turn(), now=1.0).result(10)
        late = Generation("gen-2", EPISODE, 1, "r")
        branch = recorder.record_turn(turn(generation=late, after="older"), now=2.0).result(10)
        recorder.add_feedback(Feedback("f1", EPISODE, score=1.0), now=3.0).result(10)
        recorder.add_feedback(Feedback("f2", "gen-2", score=-1.0), now=3.0).result(10)
    assert branch != EPISODE
    assert episode_of(branch) == EPISODE
    one, two = read_trajectories(store, "support")
    assert [f.id for f in one.feedback] == ["f1"]
    assert [f.id for f in two.feedback] == ["f1", "f2"]  # what is said of the episode is said of each branch
    assert [g.id for g in two.generations] == ["gen-2"]


def test_a_failed_turn_leaves_the_conversation_and_says_why(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with Recorder(store, SECRET, 0.0) as recorder:
        recorder.record_turn(turn(), now=1.0).result(10)
        failed = turn(generation=None, messages=(ASKED,), producers=("user",), prefix="px", after="p1", end="timeout")
        recorder.record_turn(failed, now=2.0).result(10)
        assert recorder.end_episode(EPISODE, now=3.0).result(10) == 1
    (read,) = read_trajectories(store, "support", is_ended=True)
    assert read.end == "timeout"
    assert read.messages == (ASKED, CALLED)
    assert read.feedback == ()


def test_idle_episodes_end_and_busy_ones_do_not(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    other = "traj-" + "1" * 32
    with Recorder(store, SECRET, 0.0) as recorder:
        recorder.record_turn(turn(), now=1.0).result(10)
        recorder.record_turn(turn(record=other, generation=Generation("g", other, 1, "r")), now=1.0).result(10)
        assert recorder.sweep_idle("support", idle_s=100, now=50.0).result(10) == 0
        assert recorder.sweep_idle("support", idle_s=100, now=101.0, busy=frozenset({other})).result(10) == 1
    assert {t.id: t.end for t in read_trajectories(store, "support")} == {EPISODE: "ok", other: "open"}


def test_a_trajectory_sent_many_times_at_once_exists_once(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    said = (Feedback("fa", "a", score=0.5),)
    sent = Trajectory("a", "support", "s", "anna", (ASKED, CALLED), ("user", "model-x"), feedback=said, split="eval")
    with Recorder(store, SECRET, 0.0) as recorder:
        futures = [recorder.submit_trajectory(sent) for _ in range(50)]
        assert sorted(f.result(10) for f in futures) == [False] * 49 + [True]
        assert recorder.add_trajectory(sent) is False
    (read,) = read_trajectories(store, "support")
    assert read.split == "train"  # never the sender's choice
    assert [f.score for f in read.feedback] == [0.5]


def test_feedback_is_idempotent_and_an_unknown_target_is_refused(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with Recorder(store, SECRET, 0.0) as recorder:
        recorder.record_turn(turn(), now=1.0).result(10)
        assert recorder.add_feedback(Feedback("f", "gen-1", score=1.0), now=2.0).result(10) is True
        assert recorder.add_feedback(Feedback("f", "gen-1", score=1.0), now=3.0).result(10) is False
        with pytest.raises(ConflictError, match="new id"):
            recorder.add_feedback(Feedback("f", EPISODE, score=1.0), now=3.0).result(10)
        with pytest.raises(UnknownTarget, match="nowhere"):
            recorder.add_feedback(Feedback("g", "nowhere"), now=3.0).result(10)
    (read,) = read_trajectories(store, "support")
    assert [f.created_at for f in read.feedback] == [2.0]


def test_one_bad_record_does_not_take_its_neighbours_with_it(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    good = Trajectory("a", "support", "s", "anna", (ASKED,), ("user",))
    broken = replace(good, id="b", principal="\ud800")  # no UTF-8 for a lone surrogate
    with Recorder(store, SECRET, 0.0) as recorder, store.write():  # hold the writer so that all join one group
        futures = [recorder.submit_trajectory(t) for t in (good, broken, replace(good, id="c"))]
        wait(futures, timeout=0.2)
    assert futures[0].result(10)
    assert futures[2].result(10)
    with pytest.raises(UnicodeEncodeError):
        futures[1].result(10)
    assert {t.id for t in read_trajectories(store, "support")} == {"a", "c"}


def test_a_full_queue_refuses_at_once_and_what_was_cancelled_is_not_written(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with Recorder(store, SECRET, 0.0, capacity=2) as recorder:
        with store.write():
            first = recorder.record_turn(turn(), now=1.0)
            while recorder.num_waiting:  # taken by the writer, which now waits for the lock
                threading.Event().wait(0.001)
            waiting = [
                recorder.record_turn(turn(record=f"traj-{i:032x}", generation=None, end="error"), now=1.0)
                for i in (1, 2)
            ]
            with pytest.raises(RecorderFull, match=r"gateway\.queue"):
                recorder.record_turn(turn(), now=1.0)
            assert waiting[0].cancel()
        assert first.result(10) == EPISODE
        waiting[1].result(10)
    with store.read() as connection:
        assert set(connection.scalars(select(records.c.id))) == {EPISODE, f"traj-{2:032x}"}


def test_many_waiting_answers_share_one_commit(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with store.read() as watcher:
        before = watcher.exec_driver_sql("PRAGMA data_version").scalar_one()
        with Recorder(store, SECRET, 0.0) as recorder:
            with store.write():
                futures = [
                    recorder.submit_trajectory(Trajectory(str(i), "support", "s", "p", (ASKED,), ("user",)))
                    for i in range(100)
                ]
            assert all(f.result(10) for f in futures)
        after = watcher.exec_driver_sql("PRAGMA data_version").scalar_one()
    assert after - before <= 3  # data_version counts other connections' commits


def test_lines_set_aside_are_kept_once(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with Recorder(store, SECRET, 0.0) as recorder:
        assert recorder.set_aside("support", "f.jsonl", 3, "no JSON", b"\xff{", now=1.0).result(10) is True
        assert recorder.set_aside("support", "f.jsonl", 3, "no JSON", b"\xff{", now=2.0).result(10) is False
    with store.read() as connection:
        assert connection.execute(select(set_aside.c.raw)).all() == [(b"\xff{",)]


def test_about_the_configured_share_of_sessions_is_for_evaluation_and_the_secret_decides_which() -> None:
    sessions = [f"s{i}" for i in range(4000)]
    held = {s for s in sessions if split_of(SECRET, s, 0.1) == "eval"}
    assert 0.08 < len(held) / len(sessions) < 0.12  # 4 standard errors around 0.1
    other = {s for s in sessions if split_of(bytes(32), s, 0.1) == "eval"}
    assert len(held & other) < 0.3 * len(held)
    assert not any(split_of(SECRET, s, 0.0) == "eval" for s in sessions)


def test_the_secret_is_made_once_private_and_checked(tmp_path: Path) -> None:
    secret = load_secret(tmp_path)
    assert len(secret) == 32
    assert load_secret(tmp_path) == secret
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["secret"]
    (tmp_path / "secret").write_text("abcd")
    with pytest.raises(DataError, match="not 32"):
        load_secret(tmp_path)


def test_reading_an_unknown_record_says_so(tmp_path: Path) -> None:
    store: Store = open_store(tmp_path)
    with store.read() as connection, pytest.raises(DataError, match="no record 'x'"):
        read_trajectory(connection, "x")
