from __future__ import annotations

from scripts.bench_learning import PROMISES, SINGLE, alone

NO_SINGLE = PROMISES["no single regulariser: final >= 0.90 and base_kl <= 0.20"]
FAR, NEAR = {"final": 0.95, "base_kl": 0.21}, {"final": 0.9, "base_kl": 0.2}


def test_what_rehearsal_alone_reached_is_said_beside_the_promise_on_regularisers() -> None:
    means = {**dict.fromkeys(SINGLE, FAR), "replay": {"final": 0.972, "base_kl": 0.114}}
    assert NO_SINGLE(means)
    regularisers, rehearsal = alone(means)
    assert "reached by none" in regularisers
    assert all(name in regularisers for name in SINGLE)
    assert "reached by replay" in rehearsal
    assert "replay 0.972 / 0.114" in rehearsal


def test_one_regulariser_that_reaches_both_breaks_the_promise_and_is_named() -> None:
    means = {**dict.fromkeys(SINGLE, FAR), "distill": NEAR}
    assert not NO_SINGLE(means)
    assert "reached by distill" in alone(means)[0]
