"""The replay buffer: uniform within a principal, quotas, and what may be rehearsed at all."""

import random
from collections import Counter

from cltrain.experience import bench, buffer
from cltrain.records import TokenRow
from tests.experience_parts import CONFIG, KEY, RULES, episode, file_as, good, recorder, store

__all__ = ["recorder", "store"]  # fixtures


def rehearsed(store, config=CONFIG, key=KEY):
    return [e.record for e in buffer.replay_examples(store, "support", config, key, **RULES)]


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


def held_by(store, config, **options):
    """Principal -> slots, and what they hold, in the order of the buffer."""
    examples = buffer.replay_examples(store, "support", config, KEY, **{**RULES, **options})
    return Counter(e.principal for e in examples), [e.record for e in examples]


def test_no_principal_takes_more_than_its_quota_of_a_stratum_however_long_it_floods(recorder, store):
    for k in range(120):
        recorder.submit_trajectory(good(f"flood{k}", principal="loud"))
    for k in range(20):
        recorder.submit_trajectory(good(f"quiet{k}", principal=f"p{k}"))
    recorder.add_trajectory(episode("last", end="open"))
    ids = [*(f"flood{k}" for k in range(120)), *(f"quiet{k}" for k in range(20))]
    file_as(store, ids, "replay", stratum="mend/good")
    config = CONFIG.model_copy(update={"buffer_per_stratum": 16, "principal_quota": 0.25})
    held, chosen = held_by(store, config)
    assert (held["loud"], len(chosen)) == (4, 16)
    order = buffer.select({"": ids}, len(ids), KEY)[""]
    loudest = [i for i in order if i.startswith("flood")][:4]
    assert chosen == [i for i in order if i in loudest or i.startswith("quiet")][:16], "the order is the hash's still"
    for gone in chosen:
        file_as(store, [gone], "quarantined", stratum="mend/good")
        _, after = held_by(store, config)
        assert len(set(chosen) - set(after)) == len(set(after) - set(chosen)) == 1, "a deletion touches one slot"
        file_as(store, [gone], "replay", stratum="mend/good")


def test_a_stratum_that_one_principal_alone_taught_is_rehearsed_within_its_quota(recorder, store):
    wrong = ({"role": "user", "content": "hi"}, bench.call("mend", item="lamp"))
    for k in range(60):
        recorder.submit_trajectory(good(f"m{k}", principal="only", **({"messages": wrong} if k % 2 else {})))
    recorder.add_trajectory(good("pooled", principal="only", tool="pay"))
    file_as(store, [f"m{k}" for k in range(60)], "replay", stratum="mend/good")
    file_as(store, ["pooled"], "replay", stratum="pay/good")
    config = CONFIG.model_copy(update={"buffer_per_stratum": 8, "principal_quota": 0.25})
    assert held_by(store, config)[0] == {"only": 3}, "two of mend, which are sound, and one of pay"
    alone = config.model_copy(update={"principal_quota": 0.01})
    assert held_by(store, alone)[0] == {"only": 2}, "never less than one of each stratum"


def test_an_empty_buffer_is_no_error(store):
    assert rehearsed(store) == []


def row_of(record, stratum="mend/good", **changes):
    return TokenRow(record, stratum, "p", (1, 2, 3), (0.0, 1.0, 1.0), **changes)


SURE, ODD = [-0.1, -0.1], [-0.1, -0.7]  # e^-0.7 < 0.5: greedy decoding may write another token


def doubted(fresh, replay=(), *, odd=(), taught=("mend/good",), max_share=0.25):
    def log_probs_of(rows):
        return [ODD if row.record in odd else SURE for row in rows]

    return buffer.doubtful(fresh, replay, taught, log_probs_of, max_share)


def test_what_the_adapter_would_not_repeat_is_doubtful_once_it_knows_the_rest_of_that_work():
    fresh = [*(row_of(f"m{k}") for k in range(8)), *(row_of(f"w{k}", "wire/good") for k in range(4))]
    assert doubted(fresh, odd={"m0", "m1", "w0"}) == {"m0", "m1", "w0"}
    assert doubted(fresh, odd={"m0", "m1", "m2", "w0"}) == {"w0"}, "three of eight: it does not know how to mend yet"
    assert doubted(fresh, odd={"m0"}, max_share=0.0) == frozenset()


def test_a_lone_odd_record_is_judged_beside_what_is_rehearsed_of_its_work():
    lone, old = row_of("lone", "wire/good"), [row_of(f"w{k}", "wire/good") for k in range(5)]
    fresh = [*(row_of(f"m{k}") for k in range(8)), lone]
    assert doubted(fresh, odd={"lone"}) == frozenset(), "one of one: a new kind of work looks like this"
    assert doubted(fresh, old, odd={"lone"}) == {"lone"}


def test_what_is_rehearsed_is_doubted_only_while_its_work_is_taught():
    fresh = [row_of("m0"), row_of("w0", "wire/good")]
    old = [row_of(f"{name}{k}", f"{work}/good") for name, work in (("m", "mend"), ("w", "wire")) for k in range(1, 9)]
    old += [row_of("p", "pay/good")]
    assert doubted(fresh, old, odd={"m5", "w5", "p"}) == {"m5"}


def test_what_only_says_what_was_wrong_is_no_matter_of_doubt():
    rows = [row_of("bad", objective="kto", value=-1.0), *(row_of(f"m{k}") for k in range(5))]
    assert doubted(rows, odd={"bad", "m4"}) == {"m4"}
