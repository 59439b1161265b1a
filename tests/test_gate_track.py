"""The track record: its numbers are those of theory, and it tells a stream that erodes from one that learns."""

from __future__ import annotations

import numpy as np
import pytest

from cltrain.config import GateConfig
from cltrain.gate.decision import decide
from cltrain.gate.levels import Past
from cltrain.gate.rows import GateScores, ItemScores
from cltrain.gate.track import Outcome, expected_gain, mean_and_spread, outcome_of
from cltrain.records import SuiteItem, Verdict

NOISE = 0.06 / 800  # variance of the mean of 800 differences of which 6 % are 1 or -1


def _record(mean: float, deviation: float, num: int, seed: int = 1) -> list[Outcome]:
    rng = np.random.default_rng(seed)
    true = rng.normal(mean, deviation, num)
    halves = true[:, None] + rng.normal(0, (2 * NOISE) ** 0.5, (num, 2))
    return [Outcome(float(first), float(second), 800) for first, second in halves]


def _differences(wins: int, losses: int, num: int = 800) -> list[float]:
    return [1.0] * wins + [-1.0] * losses + [0.0] * (num - wins - losses)


def test_halves_are_every_other_item() -> None:
    assert outcome_of([1.0, -1.0, 1.0, 0.0]) == Outcome(1.0, -0.5, 4)
    assert outcome_of([1.0]) is None


def test_the_spread_is_that_of_the_true_differences_less_its_standard_error() -> None:
    mean, spread = mean_and_spread(_record(-0.002, 0.01, 20_000))
    assert mean == pytest.approx(-0.002, abs=3e-4)
    assert spread == pytest.approx(1e-4, rel=0.05)
    few = [mean_and_spread(_record(-0.002, 0.01, 50, seed))[1] for seed in range(200)]
    assert 0.5e-4 < np.mean(few) < 0.9e-4


def test_an_apparent_gain_is_shrunk_as_the_normal_model_says() -> None:
    d = _differences(36, 24)  # +1.5 points
    mean, spread = mean_and_spread(_record(-0.002, 0.01, 20_000))
    noise = float(np.var(d)) / len(d)
    expected = (mean / spread + 0.015 / noise) / (1 / spread + 1 / noise)  # precisions add
    assert expected_gain(d, _record(-0.002, 0.01, 20_000), 0.02, 1e-9) == pytest.approx(expected)
    assert 0.005 < expected < 0.012


def test_where_candidates_hardly_differ_luck_is_not_believed_and_where_they_do_a_gain_is() -> None:
    lucky = _differences(38, 22)  # +2 points on 800 questions
    eroding = [expected_gain(lucky, _record(-0.005, 0.003, 100, seed), 0.02, 30) for seed in range(100)]
    honest = [expected_gain(lucky, _record(-0.002, 0.01, 100, seed), 0.02, 30) for seed in range(100)]
    assert np.mean([gain < 0 for gain in eroding]) >= 0.95
    assert np.mean([gain > 0 for gain in honest]) >= 0.95


def _scores(wins: int, losses: int, num: int = 800) -> GateScores:
    rows = []
    for number, d in enumerate(_differences(wins, losses, num)):
        item = SuiteItem(str(number), "own", f"s{number % 8}", "retention", ())
        rows.append(ItemScores(item, (1 + d) / 2, {"incumbent": (1 - d) / 2}))
    return GateScores(tuple(rows), 0.0)


def test_without_a_record_candidates_are_taken_to_be_a_little_worse() -> None:
    d = _differences(36, 24)  # +1.5 points
    noise = float(np.var(d)) / len(d)
    prior_mean, prior_spread = -0.005, 0.005**2  # a quarter of the margin of 2 points
    expected = (prior_mean / prior_spread + 0.015 / noise) / (1 / prior_spread + 1 / noise)
    assert expected_gain(d, (), 0.02, 30) == pytest.approx(expected)
    record = _record(-0.002, 0.01, 30)
    halfway, alone = (expected_gain(d, record, 0.02, weight) for weight in (30, 1e-9))
    assert expected < halfway < alone


def test_without_a_record_a_large_gain_must_be_seen_and_with_one_it_must_be_expected() -> None:
    config = GateConfig(promote_on="expected", margin=0.02)
    little, much = _scores(30, 22), _scores(50, 10)
    none, honest = Past(), Past(record=tuple(_record(-0.002, 0.01, 1000)))
    eroding = Past(record=tuple(_record(-0.005, 0.003, 1000)))
    held = decide(little, config, taught=(), past=none)
    assert held.verdict is Verdict.HOLD
    assert "expected, by this and the 0 candidates before" in held.reasons[0]
    assert decide(much, config, taught=(), past=none).verdict is Verdict.PROMOTE
    assert decide(little, config, taught=(), past=honest).verdict is Verdict.PROMOTE
    assert decide(little, config, taught=(), past=eroding).verdict is Verdict.HOLD
    assert decide(little, GateConfig(margin=0.02), taught={"s0"}, past=eroding).outcome == held.outcome
