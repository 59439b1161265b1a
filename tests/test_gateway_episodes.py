"""Which episode a request joins and which release answers it, over alias moves, rollbacks and a store that is gone."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select

from cltrain.experience.recording import read_trajectories
from cltrain.gateway.episodes import Episodes, prefix_hashes
from cltrain.store.database import open_store
from cltrain.store.schema import records
from tests.gateway_parts import BASE, R1, R2, Gateway, add_release, point_alias, running, set_release
from tests.test_gateway_failures import until

S1 = {"X-Session-Id": "s1"}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def adapter(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == answer.headers["x-cltrain-adapter"]
    return answer.headers["x-cltrain-adapter"]


def said(answer: httpx.Response) -> dict[str, Any]:
    return answer.json()["choices"][0]["message"]


def two_releases(gateway: Gateway) -> None:
    for name in (BASE, R1, R2):
        add_release(gateway.store, name)
    point_alias(gateway.store, R1)


def test_an_episode_keeps_its_release_when_the_alias_moves_and_a_new_one_gets_the_new(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        two_releases(gateway)
        first = gateway.chat("one", headers=S1)
        bare = gateway.chat("alone")
        point_alias(gateway.store, R2)
        second = gateway.chat("one", said(first), "two", headers=S1)
        bare_again = gateway.chat("alone", said(bare), "more")
        fresh = gateway.chat("one", headers={"X-Session-Id": "s2"})
    assert [adapter(a) for a in (first, second, bare, bare_again, fresh)] == [R1, R1, R1, R1, R2]
    assert first.headers["x-cltrain-trajectory"] == second.headers["x-cltrain-trajectory"]
    assert bare.headers["x-cltrain-trajectory"] == bare_again.headers["x-cltrain-trajectory"]
    assert said(second)["content"] == f"{R1} heard two"  # the server was asked for the adapter by its own name


def test_only_an_exact_prefix_of_the_same_principal_continues(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        first = gateway.chat("hello", user="anna")
        other_words = gateway.chat("hello", {"role": "assistant", "content": "no"}, "next", user="anna")
        other_person = gateway.chat("hello", said(first), "next", user="ben")
        same = gateway.chat("hello", said(first), "next", user="anna")
        ids = [a.headers["x-cltrain-trajectory"] for a in (first, same, other_words, other_person)]
        kept = {t.id: t for t in read_trajectories(gateway.store, "support")}
    assert ids[0] == ids[1]
    assert len(set(ids)) == 3
    assert kept[ids[0]].producers == ("user", "agent", "user", "agent")
    assert kept[ids[2]].producers == ("user", None, "user", "agent")  # nobody saw who wrote that assistant turn


def test_the_same_question_asked_again_is_a_new_episode(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        first = gateway.chat("hello")
        second = gateway.chat("hello")
        assert first.headers["x-cltrain-trajectory"] != second.headers["x-cltrain-trajectory"]
        one = gateway.chat("hello", said(first), "left")
        two = gateway.chat("hello", said(first), "right")
        assert {a.headers["x-cltrain-trajectory"] for a in (one, two)} == {
            a.headers["x-cltrain-trajectory"] for a in (first, second)
        }


def test_requests_of_one_session_that_do_not_extend_each_other_are_branches_of_one_episode(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        first = gateway.chat("one", headers=S1)
        second = gateway.chat("something else", headers=S1)
        third = gateway.chat("something else", said(second), "more", headers=S1)
        kept = read_trajectories(gateway.store, "support")
    assert len({a.headers["x-cltrain-trajectory"] for a in (first, second, third)}) == 1
    assert [len(t.messages) for t in kept] == [2, 4]  # each record is one true conversation
    assert {t.session for t in kept} == {"s1"}
    assert {t.split for t in kept} in ({"train"}, {"eval"})


def test_parallel_first_requests_of_a_session_share_episode_and_release(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        two_releases(gateway)
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda i: gateway.chat(f"wait 0.{i % 3}", headers=S1), range(8)))
        kept = read_trajectories(gateway.store, "support")
    assert len({a.headers["x-cltrain-trajectory"] for a in answers}) == 1
    assert {a.headers["x-cltrain-recorded"] for a in answers} == {"1"}
    assert sorted(g.id for t in kept for g in t.generations) == sorted(a.headers["x-cltrain-record"] for a in answers)


def test_done_ends_the_episode_and_the_next_request_starts_another(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        first = gateway.chat("one", headers=S1)
        done = gateway.chat("one", said(first), "two", headers={**S1, "X-Session-Done": "true"})
        after = gateway.chat("one", said(first), "two", said(done), "three", headers=S1)
        kept = read_trajectories(gateway.store, "support")
    assert first.headers["x-cltrain-trajectory"] == done.headers["x-cltrain-trajectory"]
    assert after.headers["x-cltrain-trajectory"] != done.headers["x-cltrain-trajectory"]
    assert [t.end for t in kept] == ["ok", "open"]


def test_done_on_feedback_ends_the_episode(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        record = gateway.chat("one", headers=S1).headers["x-cltrain-record"]
        gateway.http.post("/v1/feedback", json={"target": record, "score": 1}, headers={"X-Session-Done": "1"})
        assert [t.end for t in read_trajectories(gateway.store, "support")] == ["ok"]


def test_an_idle_episode_ends(tmp_path: Path) -> None:
    with running(tmp_path, experience={"idle_end_s": 0.4}) as gateway:  # looked at every 0.1 s of real time
        gateway.chat("one", headers=S1)
        assert [t.end for t in read_trajectories(gateway.store, "support")] == ["open"]
        gateway.now += 1.0
        for _ in range(100):
            if [t.end for t in read_trajectories(gateway.store, "support")] == ["ok"]:
                break
            threading.Event().wait(0.02)
        else:
            pytest.fail("the idle episode is still open")


def test_an_episode_that_another_gateway_is_answering_is_not_idle(tmp_path: Path) -> None:
    quick = {"experience": {"idle_end_s": 0.4}}  # looked at every 0.1 s of real time
    with (
        running(tmp_path, **quick) as one,
        running(tmp_path, timeout_s=30.0, **quick) as other,
        ThreadPoolExecutor(1) as pool,
    ):

        def last_seen() -> float:
            with one.store.read() as connection:
                return float(connection.scalar(select(records.c.updated_at)))

        first = one.chat("one", headers=S1)
        turn = pool.submit(other.chat, "one", said(first), "hold", headers=S1)
        try:
            until(lambda: bool(other.fake.bodies), "the turn did not begin")
            other.now += 0.4
            until(lambda: last_seen() == other.now, "nobody noted that it is being answered")
            one.now += 0.7
            threading.Event().wait(0.3)
            assert [t.end for t in read_trajectories(one.store, "support")] == ["open"]
        finally:
            other.fake.lets_go.set()
        assert turn.result().headers["x-cltrain-trajectory"] == first.headers["x-cltrain-trajectory"]


def test_an_exact_release_name_pins_and_the_alias_does_not_matter(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        two_releases(gateway)
        assert adapter(gateway.chat("x", model=R2)) == R2
        assert adapter(gateway.chat("x", model=BASE)) == BASE
        assert gateway.fake.bodies[-1]["model"] == "base"


def test_a_rollback_moves_live_episodes_at_their_next_turn_and_marks_them_mixed(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        two_releases(gateway)
        point_alias(gateway.store, R2)
        live = gateway.chat("one", headers=S1)
        pinned = gateway.chat("one", model=R2, headers={"X-Session-Id": "p"})
        set_release(gateway.store, R2, "rolled_back")
        point_alias(gateway.store, R1)
        moved = gateway.chat("one", said(live), "two", headers=S1)
        again = gateway.chat("one", said(live), "two", said(moved), "three", headers=S1)
        pin = {"X-Session-Id": "p"}
        pinned_on = gateway.chat("one", said(pinned), "two", model=R2, headers=pin)
        pinned_more = gateway.chat("one", said(pinned), "two", said(pinned_on), "3", model=R2, headers=pin)
        refused = gateway.chat("new", model=R2)
        kept = {t.session: t for t in read_trajectories(gateway.store, "support")}
    assert [adapter(a) for a in (live, moved, again, pinned, pinned_on, pinned_more)] == [R2, R1, R1, R2, R1, R1]
    assert kept["s1"].is_mixed
    assert kept["s1"].release == R1
    assert [g.release for g in kept["s1"].generations] == [R2, R1, R1]
    assert kept["p"].is_mixed
    assert refused.status_code == 404
    assert "rolled back" in refused.json()["error"]["message"]


def test_a_session_whose_first_answer_is_under_way_does_not_go_on_with_what_was_rolled_back(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        two_releases(gateway)
        point_alias(gateway.store, R2)
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(gateway.chat, "wait 0.8", headers=S1)
            while not gateway.fake.bodies:
                threading.Event().wait(0.01)
            set_release(gateway.store, R2, "rolled_back")
            point_alias(gateway.store, R1)
            second = gateway.chat("meanwhile", headers=S1)
        assert [adapter(a) for a in (first.result(), second)] == [R2, R1]
    assert first.result().headers["x-cltrain-trajectory"] == second.headers["x-cltrain-trajectory"]


def test_a_request_cancelled_while_it_ends_does_not_keep_its_episode(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    episodes = Episodes(store, "support", BASE, timeout_s=5.0, secret=b"k")

    async def cancelled_at_its_end() -> None:
        lease = await episodes.begin("support", "s1", "anna", [user("one")])
        assert episodes.busy == {lease.record}
        begun = asyncio.ensure_future(episodes.begin("support", "s2", "anna", [user("one")]))
        await asyncio.sleep(0)  # it looks into the store now, and whoever ends has to wait
        ending = asyncio.ensure_future(episodes.finish(lease))
        await asyncio.sleep(0)
        ending.cancel()
        await asyncio.gather(ending, return_exceptions=True)
        assert ending.cancelled()
        other = await begun
        assert episodes.busy == {other.record}

    asyncio.run(cancelled_at_its_end())


def test_episodes_go_on_where_they_were_after_a_restart(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        two_releases(gateway)
        first = gateway.chat("one", headers=S1)
        point_alias(gateway.store, R2)
    with running(tmp_path) as gateway:
        second = gateway.chat("one", said(first), "two", headers=S1)
        (kept,) = read_trajectories(gateway.store, "support")
    assert first.headers["x-cltrain-trajectory"] == second.headers["x-cltrain-trajectory"]
    assert adapter(second) == R1
    assert kept.producers == ("user", "agent", "user", "agent")


def test_a_release_that_the_server_has_not_loaded_is_a_503_for_the_alias(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        two_releases(gateway)
        gateway.fake.adapters.remove(R1)
        answer = gateway.chat("x")
        assert answer.status_code == 503
        assert "not loaded" in answer.json()["error"]["message"]


def test_with_the_store_gone_the_last_alias_serves_unrecorded_and_says_so(tmp_path: Path) -> None:
    with running(tmp_path, gateway={"record_timeout_s": 0.3}) as gateway:
        two_releases(gateway)
        live = gateway.chat("one", headers=S1)
        point_alias(gateway.store, R2)
        gateway.chat("warm")  # the alias that was read last is R2
        holder = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")  # writers wait, as on a full or hung disk
        slow = gateway.chat("two")
        fast = gateway.chat("one", said(live), "three", headers=S1)  # no longer waits
        streamed = gateway.chat("four", stream=True)
        feedback = gateway.http.post("/v1/feedback", json={"target": live.headers["x-cltrain-record"], "score": 1})
        metrics = gateway.http.get("/metrics").text
        holder.execute("ROLLBACK")
        holder.close()
        threading.Event().wait(2.1)
        back = gateway.chat("five")
    assert [adapter(a) for a in (slow, fast, back)] == [R2, R1, R2]
    assert [a.headers["x-cltrain-recorded"] for a in (slow, fast, back)] == ["0", "0", "1"]
    assert fast.headers["x-cltrain-trajectory"] == live.headers["x-cltrain-trajectory"]
    assert '"cltrain":{"recorded":0' in streamed.text
    assert feedback.status_code == 503
    assert 'cltrain_unrecorded_total{reason="store unreachable"} 3.0' in metrics


def test_with_the_store_gone_new_episodes_get_what_was_promoted_while_only_old_ones_asked(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        two_releases(gateway)
        live = gateway.chat("one", headers=S1)
        point_alias(gateway.store, R2)
        pinned = gateway.chat("one", said(live), "two", headers=S1)
        gateway.app.state.door.episodes.watch.failed("for this test")
        fresh = gateway.chat("new")
    assert [adapter(a) for a in (live, pinned, fresh)] == [R1, R1, R2]


def test_a_full_queue_sends_answers_out_unrecorded_and_counts_them(tmp_path: Path) -> None:
    with running(tmp_path, gateway={"queue": 1, "record_timeout_s": 1.0}) as gateway:
        gateway.chat("warm")
        holder = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda i: gateway.chat(f"q{i}"), range(6)))
        holder.execute("ROLLBACK")
        holder.close()
        metrics = gateway.http.get("/metrics").text
    assert [a.status_code for a in answers] == [200] * 6
    assert {a.headers["x-cltrain-recorded"] for a in answers} == {"0"}
    assert "queue full" in {a.headers["x-cltrain-unrecorded"] for a in answers}
    assert 'reason="queue full"' in metrics


def test_prefix_hashes_ignore_what_clients_add_and_nothing_else() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "find", "arguments": "{}"}}
    sent = {"role": "assistant", "content": None, "tool_calls": [call]}
    dumped = {"role": "assistant", "content": "", "refusal": None, "audio": None, "tool_calls": [{**call, "index": 0}]}
    assert prefix_hashes([user("a"), sent]) == prefix_hashes([user("a"), dumped])
    parts = [{"type": "text", "text": "a"}]
    assert prefix_hashes([user("a")]) == prefix_hashes([{"role": "user", "content": parts}])
    other = {**sent, "tool_calls": [{**call, "function": {"name": "find", "arguments": '{"a":1}'}}]}
    assert prefix_hashes([user("a"), sent])[1] != prefix_hashes([user("a"), other])[1]
    assert prefix_hashes([user("a"), user("b")])[1] != prefix_hashes([user("ab")])[0]
    assert prefix_hashes([user("x"), sent])[1] != prefix_hashes([user("a"), sent])[1]


def test_the_gateway_never_imports_torch() -> None:
    code = (
        "import sys, cltrain.gateway.app, cltrain.gateway.__main__, cltrain.experience.recording\n"
        "print([m for m in ('torch', 'transformers', 'peft', 'triton', 'wandb') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
