"""Levels: what was decided before raises what is needed now, and the rates that this promises hold by simulation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import insert

from cltrain.config import GateConfig
from cltrain.gate.levels import Past, levels_of, read_past
from cltrain.gate.track import Outcome
from cltrain.store.database import Store, open_store
from cltrain.store.schema import updates

FDR = GateConfig(fdr=True)


def test_a_retry_spends_half_of_alpha() -> None:
    first, again = levels_of(GateConfig(), Past()), levels_of(GateConfig(), Past(is_retry=True))
    assert first.gain == first.non_inferior == 0.05
    assert again.gain == again.non_inferior == 0.025


def test_e_lond_spends_alpha_over_all_decisions_and_earns_by_promotions() -> None:
    without = [levels_of(FDR, Past(num_decisions=t)).gain for t in range(2000)]
    assert without[0] == pytest.approx(0.025)
    assert sum(without) <= 0.05
    assert levels_of(FDR, Past(num_decisions=9, num_promoted=4)).gain == pytest.approx(5 * without[9])
    assert all(levels_of(FDR, Past(num_decisions=t, num_promoted=t)).gain <= 0.05 for t in range(100))


def _false_share(config: GateConfig, rng: np.random.Generator, num_decisions: int = 60) -> float:
    """Share of the promotions without a true gain. Nine of ten candidates have none; their e-values are the worst that
    there are (1 / level with chance level, else 0), and half of them share their luck with the candidate before."""
    promoted = wrong = 0
    luck = 1.0
    for t in range(num_decisions):
        luck = luck if rng.random() < 0.5 else rng.random()
        is_null = t % 10 != 9
        level = levels_of(config, Past(num_decisions=t, num_promoted=promoted)).gain
        if not is_null or luck < level:
            promoted += 1
            wrong += is_null
    return wrong / max(1, promoted)


def test_of_all_promotions_at_most_alpha_have_no_gain_under_dependence() -> None:
    rng = np.random.default_rng(5)
    assert np.mean([_false_share(FDR, rng) for _ in range(1000)]) <= 0.05
    assert np.mean([_false_share(GateConfig(), rng) for _ in range(100)]) > 0.2  # what it is for


def _update(store: Store, number: int, verdict: str, mode: str = "auto", candidate: str | None = "c") -> None:
    summary = {"decision": {"verdict": verdict, "outcome": [number / 100, 0.0, 50]}}
    with store.write() as connection:
        connection.execute(
            insert(updates).values(
                id=f"u{number}", agent="support", number=number, state="done", parent="a", candidate=candidate,
                verdict=verdict, mode=mode, fence=1, manifest={}, summary=summary, started_at=0.0,
            )
        )  # fmt: skip


def test_what_was_decided_before_is_read_from_the_updates(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for number, verdict in enumerate(["hold", "reject", "promote", "hold", "error"]):
        _update(store, number, verdict)
    _update(store, 7, "hold", mode="trial")
    _update(store, 8, "promote", mode="observe")  # served nothing, but shows what candidates are like
    _update(store, 9, "hold", candidate=None)  # nothing was judged
    record = tuple(Outcome(number / 100, 0.0, 50) for number in (0, 1, 2, 3, 8))
    assert read_past(store, "support", 200) == Past(num_decisions=4, num_promoted=1, record=record)
    assert read_past(store, "support", 2).record == record[-2:]
    assert read_past(store, "billing", 200) == Past()
