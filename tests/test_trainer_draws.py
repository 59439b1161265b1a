"""The plan of an update: pure, order-free, every row before any twice, strata in equal parts."""

from collections import Counter

from cltrain.records import TokenRow
from cltrain.trainer.draws import Draws


def rows(prefix, count, strata=1):
    return [TokenRow(f"{prefix}{i}", f"s{i % strata}", "p", (i, i + 1), (0.0, 1.0)) for i in range(count)]


def records(draws, pool, step, size=16, share=0.5):
    source = draws.fresh if pool == "fresh" else draws.replay
    return [source[draw.index].record for draw in draws.batch(step, size, share) if draw.pool == pool]


def test_a_step_is_half_fresh_and_half_replay():
    draws = Draws(1, rows("f", 20), rows("r", 20, 4), 8)
    batch = draws.batch(3, 16, 0.5)
    assert [draw.slot for draw in batch] == list(range(16))
    assert [draw.pool for draw in batch] == ["fresh"] * 8 + ["replay"] * 8


def test_without_replay_every_slot_is_fresh():
    assert {draw.pool for draw in Draws(1, rows("f", 3), [], 8).batch(0, 16, 0.5)} == {"fresh"}


def test_every_fresh_row_is_used_before_any_is_used_twice():
    draws = Draws(1, rows("f", 12), rows("r", 5), 8)
    used = [name for step in range(9) for name in records(draws, "fresh", step)]
    for start in range(0, len(used), 12):
        assert len(set(used[start : start + 12])) == 12
    assert used[:12] != used[12:24], "each pass has its own order"


def test_replay_strata_take_turns_while_they_last_and_no_record_comes_twice_in_a_pass():
    replay = [TokenRow(f"r{i}", "big" if i < 90 else f"small{i}", "p", (1, 2), (0.0, 1.0)) for i in range(93)]
    draws = Draws(1, rows("f", 4), replay, 8)
    strata = {row.record: row.stratum for row in replay}
    used = [name for step in range(10) for name in records(draws, "replay", step)]
    assert len(set(used)) == len(used) == 80
    assert {strata[name] for name in used[:4]} == {"big", "small90", "small91", "small92"}
    assert Counter(strata[name] for name in used) == {"big": 77, "small90": 1, "small91": 1, "small92": 1}
    full = [TokenRow(f"r{i}", f"s{i % 3}", "p", (1, 2), (0.0, 1.0)) for i in range(90)]
    draws = Draws(1, rows("f", 4), full, 8)
    turns = Counter(int(name[1:]) % 3 for step in range(3) for name in records(draws, "replay", step))
    assert turns == {0: 8, 1: 8, 2: 8}, "strata that last are drawn equally often"


def test_the_order_in_which_rows_are_handed_in_does_not_matter():
    fresh, replay = rows("f", 7), rows("r", 9, 3)
    one, other = Draws(1, fresh, replay, 8), Draws(1, fresh[::-1], replay[3:] + replay[:3], 8)
    for step in (0, 1, 5):
        for pool in ("fresh", "replay"):
            assert records(one, pool, step) == records(other, pool, step)


def test_any_step_can_be_drawn_alone_and_another_seed_draws_otherwise():
    args = rows("f", 7), rows("r", 9, 3), 8
    walked = Draws(1, *args)
    for step in range(6):
        walked.batch(step, 16, 0.5)
    assert walked.batch(6, 16, 0.5) == Draws(1, *args).batch(6, 16, 0.5)
    assert walked.batch(6, 16, 0.5) != Draws(2, *args).batch(6, 16, 0.5)


def test_one_row_one_anchor_and_one_slot_are_enough():
    draws = Draws(1, rows("f", 1), rows("r", 1), 1)
    assert records(draws, "fresh", 4) == ["f0"] * 8
    assert draws.anchors(4, 8) == [0]
    assert records(draws, "fresh", 0, size=1) == ["f0"]


def test_anchors_rotate_without_repeats():
    draws = Draws(1, rows("f", 1), [], 12)
    used = [i for step in range(3) for i in draws.anchors(step, 4)]
    assert sorted(used) == list(range(12))
