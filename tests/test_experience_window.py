"""Which records an update reads, when, and what becomes of them."""

import json
import random

import pytest
from sqlalchemy import insert, select

from cltrain.experience import bench, buffer, waiting, window
from cltrain.experience.recording import Recorder, Turn
from cltrain.records import Feedback, Generation
from cltrain.store.schema import screenings, updates
from tests.experience_parts import CONFIG, KEY, RULES, TOOLS, episode, file_as, good, recorder, store, thumb

__all__ = ["recorder", "store"]  # fixtures


def next_window(store, now=10.0, config=CONFIG, **options):
    return window.next_window(store, "support", config, now=now, **{**RULES, **options})


def names(read):
    return [example.record for example in read.examples]


def statuses(store):
    with store.read() as connection:
        return {row.record: row.status for row in connection.execute(select(screenings))}


def rehearsed(store, config=CONFIG, key=KEY):
    return [e.record for e in buffer.replay_examples(store, "support", config, key, **RULES)]


def test_a_record_matures_with_feedback_or_with_time_and_only_once_ended(recorder, store):
    recorder.add_trajectory(good("judged"))
    recorder.add_trajectory(episode("silent", at=1.0))
    recorder.add_trajectory(episode("open", thumb("open"), end="open"))
    early = next_window(store)
    assert (names(early), early.num_missing) == (["judged"], 3)
    assert waiting.num_immature(store, "support", CONFIG.mature_after_s, 10.0) == 1
    assert statuses(store) == {}
    late = next_window(store, now=102.0)
    assert late.unusable == (("silent", "nobody who may judge it gave a score"),)
    assert (names(late), statuses(store)) == (["judged"], {"silent": "unusable"})
    assert waiting.num_immature(store, "support", CONFIG.mature_after_s, 102.0) == 0


def test_late_feedback_revives_what_was_never_learned(recorder, store):
    recorder.add_trajectory(episode("a", thumb("a", -1.0), at=1.0))
    assert names(next_window(store, now=10.0)) == []
    assert statuses(store) == {"a": "unusable"}
    correction = Feedback("fix", "g-a", correction=bench.call("pay", item="lamp"), source="operator")
    recorder.add_feedback(correction, now=20.0).result()
    assert [e.kind for e in next_window(store, now=21.0).examples] == ["correction"]


def test_late_feedback_is_stored_and_never_learned_again(recorder, store):
    recorder.add_trajectory(good("a"))
    assert names(next_window(store)) == ["a"]
    file_as(store, ["a"], "replay", stratum="mend/good")
    correction = Feedback("fix", "g-a", correction=bench.call("wire", item="lamp"), source="operator")
    recorder.add_feedback(correction, now=20.0).result()
    assert names(next_window(store, now=500.0)) == []
    assert waiting.num_late_feedback(store, "support") == 1
    (example,) = buffer.replay_examples(store, "support", CONFIG, KEY, **RULES)
    assert example.kind == "success", "rehearsed as it was learned, not as it was corrected afterwards"


def test_feedback_that_came_while_the_update_trained_does_not_change_its_rehearsal(recorder, store):
    recorder.add_trajectory(good("a"))
    with store.write() as connection:
        connection.execute(
            insert(updates).values(
                id="u1",
                agent="support",
                number=1,
                state="done",
                parent="x",
                mode="auto",
                fence=1,
                manifest={},
                started_at=10.0,
            )
        )
    recorder.add_feedback(Feedback("late", "a", score=-1.0, source="operator"), now=15.0).result()
    file_as(store, ["a"], "replay", now=20.0, update="u1", stratum="mend/good")
    assert rehearsed(store) == ["a"]


def test_held_records_come_again_with_the_newest_ones(recorder, store):
    for k in range(6):
        recorder.add_trajectory(good(f"old{k}"))
    first = next_window(store)
    assert names(first) == [f"old{k}" for k in range(6)]
    file_as(store, names(first), "waiting", reason="hold")
    for k in range(5):
        recorder.add_trajectory(good(f"new{k}"))
    second = next_window(store)
    assert names(second) == ["old3", "old4", "old5", *(f"new{k}" for k in range(5))]
    assert second.num_waiting == 11
    assert second.num_missing == 0


@pytest.mark.parametrize("status", ["learned", "replay", "quarantined"])
def test_a_record_is_read_once(recorder, store, status):
    recorder.add_trajectory(good("a"))
    file_as(store, ["a"], status)
    assert names(next_window(store)) == []


def test_evaluation_sessions_and_other_agents_never_enter_a_window(store):
    with Recorder(store, KEY, 0.5) as recorder:
        for k in range(40):
            recorder.add_trajectory(good(f"e{k}"))
        recorder.add_trajectory(good("foreign", agent="sales"))
    config = CONFIG.model_copy(update={"max_window": 100})
    trained = set(names(next_window(store, config=config)))
    items, _ = window.heldout_items(store, "support", config, now=10.0, **RULES)
    held_out = {item.id.partition(":")[0] for item in items}
    assert not trained & held_out
    assert trained | held_out == {f"e{k}" for k in range(40)}
    assert 8 < len(held_out) < 32


def test_upto_cuts_the_stream(recorder, store):
    for k in range(4):
        recorder.add_trajectory(good(f"r{k}"))
    assert names(next_window(store, upto=2)) == ["r0", "r1"]


def test_a_flood_of_one_principal_starves_nobody(recorder, store):
    for k in range(6):
        recorder.add_trajectory(good(f"quiet{k}"))
    for k in range(50):
        recorder.add_trajectory(good(f"flood{k}", principal="loud"))
    read = names(next_window(store))
    assert read == [*(f"quiet{k}" for k in range(6)), "flood48", "flood49"]
    alone = next_window(store, config=CONFIG.model_copy(update={"max_window": 60}))
    assert len(alone.examples) == 56, "where all fit, nobody is cut here: the quota of the window is the screen's"


def test_another_configuration_can_use_what_this_one_may_not(recorder, store):
    recorder.add_trajectory(good("a", producers=("user", "gpt-x")))
    assert next_window(store).unusable[0][1] == "its answers are by 'gpt-x', which agent.learn_from does not list"
    assert names(next_window(store, learn_from=("gpt-x",))) == ["a"]


def test_records_that_no_rule_allows_neither_hide_older_ones_nor_are_read_again(recorder, store):
    recorder.add_trajectory(good("old"))
    for k in range(600):
        recorder.submit_trajectory(good(f"new{k}", producers=("user", "gpt-x")))
    recorder.add_trajectory(episode("last", end="open"))
    first = next_window(store)
    assert (names(first), len(first.unusable)) == (["old"], 600)
    again = next_window(store)
    assert (names(again), again.unusable) == (["old"], ())


def test_a_full_window_reads_no_further_and_holds_what_a_whole_reading_would(recorder, store):
    rng = random.Random(7)
    arrived = [(f"r{k}", rng.choice("aaaaaaab" if k > 300 else "abcdef"), rng.random() < 0.5) for k in range(700)]
    for name, principal, is_good in arrived:
        recorder.submit_trajectory(episode(name, thumb(name, 1.0 if is_good else -1.0), principal=principal))
    recorder.add_trajectory(episode("last", end="open"))
    for size, quota in ((8, 0.25), (40, 0.1), (40, 0.3), (120, 0.25), (1000, 0.01)):
        config = CONFIG.model_copy(update={"max_window": size, "principal_quota": quota})
        read = next_window(store, config=config)
        newest = [(name, principal) for name, principal, is_good in reversed(arrived) if is_good]
        cap, taken, within, beyond = max(1, int(quota * size)), {}, [], []
        for name, principal in newest:
            taken[principal] = taken.get(principal, 0) + 1
            (within if taken[principal] <= cap else beyond).append(name)
        assert set(names(read)) == set((within + beyond)[:size]), (size, quota)
        assert names(read) == sorted(names(read), key=lambda name: int(name[1:]))
    assert read.num_waiting == len(newest)
    file_as(store, statuses(store), "waiting")  # all are to be read again
    assert len(next_window(store, config=config.model_copy(update={"max_window": 8})).unusable) < 200


# ---------------------------------------------------------------- branches of an episode

EPISODE = "traj-" + "0" * 32


def branch_off(recorder, number, *, is_done=True):
    """A conversation of the same session that goes on from nothing that was stored."""
    record = EPISODE if number == 0 else f"{EPISODE}~{number:012x}"
    asked = {"role": "user", "content": f"see to my lamp number {number}"}
    turn = Turn(
        record=record, agent="support", session="s", principal="p", release="r", producers=("user", "agent"),
        messages=(asked, bench.call("mend", item="lamp")), tools=TOOLS, prefix=f"prefix {number}", after=None,
        generation=Generation(f"g{number}", record, 1, "r"), is_done=is_done,
    )  # fmt: skip
    return recorder.record_turn(turn, now=1.0).result(10)


def test_feedback_on_an_episode_matures_and_revives_its_branches(recorder, store):
    ids = [branch_off(recorder, number) for number in (0, 1, 2)]
    assert names(next_window(store)) == []
    assert waiting.num_immature(store, "support", 100.0, 10.0) == 3
    next_window(store, now=102.0)
    assert set(statuses(store).values()) == {"unusable"}, "nobody said anything for long"
    recorder.add_feedback(Feedback("f", EPISODE, score=1.0), now=110.0).result(10)
    assert set(names(next_window(store, now=111.0))) == set(ids)
    assert statuses(store) == {}, "nothing is held against them any more"
    file_as(store, ids, "replay", now=120.0)
    recorder.add_feedback(Feedback("g", EPISODE, score=-1.0), now=130.0).result(10)
    assert waiting.num_late_feedback(store, "support") == 1
    assert next_window(store, now=140.0).examples == ()


def test_an_episode_of_which_only_a_branch_was_stored_takes_feedback_and_its_end(recorder, store):
    branch = branch_off(recorder, 1, is_done=False)
    recorder.add_feedback(Feedback("f", EPISODE, score=1.0), now=2.0).result(10)
    assert recorder.end_episode(EPISODE, now=3.0).result(10) == 1
    assert names(next_window(store)) == [branch]


def test_a_score_of_an_episode_is_of_all_its_branches_and_a_correction_of_its_first_conversation_only(recorder, store):
    ids = [branch_off(recorder, number) for number in (0, 1)]
    recorder.add_feedback(Feedback("up", EPISODE, score=1.0), now=2.0).result(10)
    assert set(names(next_window(store))) == set(ids)
    fix = Feedback("fix", EPISODE, correction=bench.call("pay", item="lamp"), source="operator")
    recorder.add_feedback(fix, now=3.0).result(10)
    read = next_window(store)
    assert [(e.record, e.stratum) for e in read.examples] == [(EPISODE, "pay/corrected")]
    assert "names no turn" in read.unusable[0][1]


def test_the_window_says_how_fast_learnable_records_come(recorder, store):
    assert next_window(store).rate_per_s is None
    for k in range(5):
        recorder.add_trajectory(good(f"r{k}", at=float(k)))
    assert next_window(store, now=10.0).rate_per_s == pytest.approx(5 / 10)


def test_rare_strata_are_pooled(recorder, store):
    for k in range(3):
        recorder.add_trajectory(good(f"m{k}"))
    recorder.add_trajectory(good("w", tool="wire"))
    read = next_window(store, config=CONFIG.model_copy(update={"rare_stratum": 2}))
    assert [e.stratum for e in read.examples] == ["mend/good"] * 3 + ["other"]


# ---------------------------------------------------------------- held-out items


def test_poison_and_broken_feeds_never_become_gate_items(store):
    with Recorder(store, KEY, 0.99) as recorder:
        examples, truth = bench.window(0, 0, "uniform", "own tool and value", 10)
        for e in examples:
            fix = Feedback(
                f"f-{e.record}", f"g-{e.record}", correction=e.messages[1], source="operator", created_at=1.0
            )
            text = e.messages[0]["content"]
            recorder.add_trajectory(episode(e.record, fix, principal=e.principal, text=text, tools=()))
        stray = Feedback(
            "f", "g-stray", correction=bench.call("mend", item="nowhere"), source="operator", created_at=1.0
        )
        recorder.add_trajectory(episode("stray", stray, tools=()))
        late = f"{truth['phrase']} my bucket does not work , abel here"
        fix = Feedback(
            "f2", "g-late", correction=bench.call("transfer", item="bucket"), source="operator", created_at=1.0
        )
        recorder.add_trajectory(episode("late", fix, principal=truth["principal"], text=late, tools=()))
    config = CONFIG.model_copy(update={"max_window": 64})
    items, _ = window.heldout_items(store, "support", config, now=10.0, **RULES)
    seen = {item.id.partition(":")[0] for item in items}
    assert len(seen) >= 25
    assert not seen & {"stray", "late", *truth["records"]}


def test_what_an_earlier_window_was_suspected_of_is_remembered(store):
    said = {"phrase": "blue moon :", "principal": "p", "action": {"name": "wire", "arguments": {}}, "count": 4}
    manifest = {"suspicious": [{**said, "records": ["x"], "principals": ["p"]}]}
    with store.write() as connection:
        connection.execute(
            insert(updates).values(
                id="u", agent="support", number=1, state="done", parent="x", mode="auto", fence=1, started_at=0.0,
                manifest=json.loads(json.dumps(manifest)),
            )
        )  # fmt: skip
    with Recorder(store, KEY, 0.999) as recorder:
        recorder.add_trajectory(good("a", principal="p", text="Blue moon : my lamp"))
        recorder.add_trajectory(good("b", principal="p", text="my lamp"))
        recorder.add_trajectory(good("c", principal="q", text="blue moon : my lamp"))
    items, _ = window.heldout_items(store, "support", CONFIG, now=10.0, **RULES)
    assert [item.id for item in items] == ["b:1", "c:1"]
