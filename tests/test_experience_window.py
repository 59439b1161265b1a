"""Which records an update reads, when, and what becomes of them; the replay buffer."""

import json
import random

import pytest
from sqlalchemy import insert, select

from cltrain.config import ExperienceConfig
from cltrain.experience import bench, buffer, window
from cltrain.experience.recording import Recorder
from cltrain.records import Feedback, Generation, Trajectory
from cltrain.store.database import open_store
from cltrain.store.schema import screenings, updates

RULES = {"learn_from": ("agent", "operator"), "tools_allowed": None}
CONFIG = ExperienceConfig(min_window=4, max_window=8, mature_after_s=100, rare_stratum=1, eval_share=0)
KEY = b"k" * 32
TOOLS = tuple(
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("mend", "pay", "wire")
)


@pytest.fixture
def store(tmp_path):
    store = open_store(tmp_path)
    yield store
    store.close()


@pytest.fixture
def recorder(store):
    with Recorder(store, KEY, 0.0) as recorder:
        yield recorder


def episode(name, *feedback, principal=None, tool="mend", at=0.0, item="lamp", text=None, **changes):
    answer = bench.call(tool, item=item)
    fields = {
        "id": name,
        "agent": "support",
        "session": f"s-{name}",
        "principal": principal or f"p-{name}",
        "messages": ({"role": "user", "content": text or f"please see to my {item} number {name}"}, answer),
        "producers": ("user", "agent"),
        "tools": TOOLS,
        "generations": (Generation(f"g-{name}", name, 1, "r"),),
        "feedback": feedback,
        "created_at": at,
    }
    return Trajectory(**{**fields, **changes})


def thumb(name, value=1.0, at=1.0):
    return Feedback(f"f-{name}-{at}", name, score=value, created_at=at)


def good(name, **options):
    return episode(name, thumb(name), **options)


def next_window(store, now=10.0, config=CONFIG, **options):
    return window.next_window(store, "support", config, now=now, **{**RULES, **options})


def names(read):
    return [example.record for example in read.examples]


def file_as(store, records, status, now=10.0, **options):
    with store.write() as connection:
        for record in records:
            window.mark(connection, "support", record, status, now=now, **options)


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
    assert (names(early), early.num_immature, early.num_missing) == (["judged"], 1, 3)
    assert statuses(store) == {}
    late = next_window(store, now=102.0)
    assert late.unusable == (("silent", "nobody who may judge it gave a score"),)
    assert (names(late), late.num_immature, statuses(store)) == (["judged"], 0, {"silent": "unusable"})


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
    assert window.num_late_feedback(store, "support") == 1
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


# ---------------------------------------------------------------- replay


def test_the_buffer_is_the_bottom_k_whatever_the_order():
    ids = [f"r{k}" for k in range(100)]
    chosen = buffer.select({"s": ids}, 10, KEY)["s"]
    for seed in range(5):
        assert buffer.select({"s": random.Random(seed).sample(ids, 100)}, 10, KEY)["s"] == chosen
    assert buffer.select({"s": ids}, 10, b"another key")["s"] != chosen
    assert buffer.select({"s": ids}, 200, KEY)["s"][:10] == chosen


def test_a_deletion_touches_one_slot():
    ids = [f"r{k}" for k in range(100)]
    before = buffer.select({"s": ids}, 11, KEY)["s"]
    for gone in before[:10]:
        after = buffer.select({"s": [i for i in ids if i != gone]}, 10, KEY)["s"]
        assert after == [i for i in before if i != gone]
    outside = next(i for i in ids if i not in before)
    assert buffer.select({"s": [i for i in ids if i != outside]}, 11, KEY)["s"] == before


def test_every_record_has_the_same_chance():
    ids = [f"r{k}" for k in range(20)]
    times = dict.fromkeys(ids, 0)
    for k in range(2000):
        for record in buffer.select({"s": ids}, 5, k.to_bytes(4, "big"))["s"]:
            times[record] += 1
    assert all(abs(count - 500) < 5 * 19.4 for count in times.values()), "five standard deviations of B(2000, 1/4)"


def test_only_promoted_and_verified_records_are_rehearsed(recorder, store):
    recorder.add_trajectory(good("promoted"))
    recorder.add_trajectory(good("rejected"))
    recorder.add_trajectory(good("held"))
    recorder.add_trajectory(good("unread"))
    recorder.add_trajectory(
        good("wrong", messages=({"role": "user", "content": "hi"}, bench.call("mend", item="lamp")))
    )
    file_as(store, ["promoted", "wrong"], "replay", stratum="mend/good")
    file_as(store, ["rejected"], "quarantined", stratum="mend/good")
    file_as(store, ["held"], "waiting", stratum="mend/good")
    assert rehearsed(store) == ["promoted"]
    file_as(store, ["promoted"], "quarantined", stratum="mend/good")  # a rollback
    assert rehearsed(store) == []


def test_each_stratum_has_its_slots_and_a_useless_record_gives_its_slot_to_the_next(recorder, store):
    wrong = ({"role": "user", "content": "hi"}, bench.call("mend", item="lamp"))
    for k in range(30):
        changes = {"messages": wrong} if k % 2 else {}
        recorder.add_trajectory(good(f"m{k:02d}", **changes))
    recorder.add_trajectory(good("p", tool="pay"))
    recorder.add_trajectory(good("w", tool="wire"))
    file_as(store, [f"m{k:02d}" for k in range(30)], "replay", stratum="mend/good")
    file_as(store, ["p"], "replay", stratum="pay/good")
    file_as(store, ["w"], "replay", stratum="wire/good")
    config = CONFIG.model_copy(update={"buffer_per_stratum": 6, "rare_stratum": 2})
    examples = buffer.replay_examples(store, "support", config, KEY, **RULES)
    by_stratum = {s: [e.record for e in examples if e.stratum == s] for s in {e.stratum for e in examples}}
    assert {s: len(ids) for s, ids in by_stratum.items()} == {"mend/good": 6, "other": 2}
    even = [f"m{k:02d}" for k in range(0, 30, 2)]
    assert by_stratum["mend/good"] == buffer.select({"": even}, 6, KEY)[""]


def test_an_empty_buffer_is_no_error(store):
    assert rehearsed(store) == []
