"""The pool: items are drawn in rotation and retire."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from cltrain.gate.pool import count_uses, draw, num_uses
from cltrain.gate.suites import item_key
from cltrain.records import SuiteItem
from cltrain.store.database import open_store


def _pool(sizes: dict[str, int]) -> list[SuiteItem]:
    return [
        SuiteItem(f"{stratum}-{i}", "own", stratum, "gain", ({"role": "user", "content": str(i)},))
        for stratum, size in sizes.items()
        for i in range(size)
    ]


def test_rotation_draws_the_least_used_and_retires_the_worn(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    pool = _pool({"a": 20})
    seen: Counter[str] = Counter()
    for seed in range(8):
        drawn = draw(store, "support", pool, 5, taught=(), max_uses=2, seed=seed)
        assert len(drawn) == 5
        with store.write() as connection:
            count_uses(connection, "support", drawn)
        seen.update(item.id for item in drawn)
        assert max(seen.values()) - min(seen[item.id] for item in pool) <= 1
    assert set(seen.values()) == {2}
    assert draw(store, "support", pool, 5, taught=(), max_uses=2, seed=9) == []
    assert len(draw(store, "billing", pool, 5, taught=(), max_uses=2, seed=9)) == 5
    assert num_uses(store, "support") == {item_key(item): 2 for item in pool}


def test_drawing_hears_rare_strata_gives_half_to_what_is_taught_and_depends_on_the_seed_alone(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    pool = _pool({"refund/good": 100, "show/good": 100, "rare/none": 3, "ask/none": 100})
    drawn = draw(store, "support", pool, 60, taught={"refund/corrected"}, max_uses=5, seed=1)
    counts = Counter(item.stratum for item in drawn)
    assert counts["refund/good"] == 30
    assert counts["rare/none"] == 3
    assert counts["show/good"] + counts["ask/none"] == 27
    assert drawn == draw(store, "support", list(reversed(pool)), 60, taught={"refund/x"}, max_uses=5, seed=1)
    assert drawn != draw(store, "support", pool, 60, taught={"refund/x"}, max_uses=5, seed=2)
    rest = draw(store, "support", pool, 400, taught=(), max_uses=5, seed=1, exclude={item.id for item in drawn})
    assert not {item.id for item in rest} & {item.id for item in drawn}
    assert len(rest) == 303 - 60
