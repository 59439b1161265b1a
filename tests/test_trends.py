"""Forecasts are those of a textbook line and its band, and say nothing where they know nothing."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize, stats
from sqlalchemy import insert, update

from cltrain.config import Config, from_dict
from cltrain.registry.aliases import move_alias, read_alias, rollback
from cltrain.registry.lease import acquire
from cltrain.registry.releases import get, seal
from cltrain.store.database import Store
from cltrain.store.schema import audits, releases, updates
from cltrain.trends import Trend, forecast, read_trends, sentence
from tests.registry_parts import BASE, new_store

DAY_S = 86400.0


def band(xs: list[float], ys: list[float], edge: int):
    """The mean line (edge 0) or an edge of its 90 % band, by scipy's regression and the textbook's variance."""
    fit = stats.linregress(xs, ys)
    n, middle, spread = len(xs), np.mean(xs), np.var(xs) * len(xs)
    rest = np.asarray(ys) - fit.intercept - fit.slope * np.asarray(xs)
    noise = np.sqrt(np.sum(rest**2) / (n - 2))
    t = stats.t.ppf(0.95, n - 2)
    return lambda x: fit.intercept + fit.slope * x + edge * t * noise * np.sqrt(1 / n + (x - middle) ** 2 / spread)


@pytest.mark.parametrize("seed", range(20))
def test_the_line_and_its_band_meet_the_limit_where_scipy_says(seed: int):
    rng = random.Random(seed)
    xs = [float(x) for x in sorted(rng.sample(range(1, 40), rng.randint(4, 12)))]
    ys = [0.02 * x + rng.gauss(0, 0.05) for x in xs]
    limit = max(1.5, 1.5 * max(ys))
    found = forecast(xs, ys, limit, is_ceiling=True)
    assert found is not None
    for value, edge in ((found.expected, 0), (found.earliest, 1), (found.latest, -1)):
        line = band(xs, ys, edge)
        if value is None:
            assert all(line(x) < limit for x in np.linspace(max(xs), 1e5, 1000))
        else:
            assert value == pytest.approx(optimize.brentq(lambda x, line=line: line(x) - limit, max(xs), 1e6), rel=1e-6)


def test_a_floor_is_a_ceiling_upside_down():
    xs, ys = [1.0, 2.0, 3.0, 4.0, 5.0], [0.9, 0.88, 0.89, 0.86, 0.85]
    assert forecast(xs, ys, 0.8, is_ceiling=False) == forecast(xs, [-y for y in ys], -0.8, is_ceiling=True)


def test_a_level_or_rising_score_never_meets_its_floor():
    found = forecast([1, 2, 3, 4, 5], [0.9, 0.91, 0.92, 0.93, 0.94], 0.8, is_ceiling=False)
    assert found is not None
    assert found.expected is None
    assert forecast([1, 2, 3, 4, 5], [0.9] * 5, 0.8, is_ceiling=False).earliest is None


def test_what_is_beyond_its_limit_met_it_at_the_last_version():
    found = forecast([1, 2, 3, 4], [1.0, 2.0, 3.0, 4.0], 3.5, is_ceiling=True)
    assert (found.expected, found.earliest) == (4, 4)


def test_a_limit_inside_the_band_may_be_met_already():
    xs, ys = [1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 2.2, 2.9, 4.1, 4.8]
    line, edge = band(xs, ys, 0)(5.0), band(xs, ys, 1)(5.0)
    found = forecast(xs, ys, line + 0.95 * (edge - line), is_ceiling=True)
    assert found.earliest == 5.0
    assert found.expected > 5.0


@pytest.mark.parametrize("xs", [[], [1.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 3.0], [5.0] * 6])
def test_below_four_versions_there_is_no_forecast(xs: list[float]):
    assert forecast(xs, [0.1] * len(xs), 1.0, is_ceiling=True) is None


# ---------------------------------------------------------------- read from a store


@pytest.fixture
def served(tmp_path: Path) -> tuple[Store, Config]:
    """Six releases, one a day: KL grows by 0.001 each, `refund` falls by 0.01 each."""
    store = new_store(tmp_path)
    fence = acquire(store, "support", "test", 1e9, 0.0)
    for version in range(1, 7):
        bounds = {
            "drift_kl": 0.001 * version,
            "drift_frobenius": 0.1,
            "drift_spectral": 0.02 * version,
            "drift_kl_limit": 0.02,
        }
        made = tmp_path / f"made-{version}"
        made.mkdir()
        (made / "adapter_config.json").write_text("{}")
        (made / "adapter_model.safetensors").write_text(f"weights {version}")
        alias = read_alias(store, "support")
        name = seal(
            store, tmp_path / "state", "support", made, alias.release, {"bounds": bounds}, now=version * DAY_S
        ).name
        check = {"name": "stratum refund", "candidate": 0.9 - 0.01 * version}
        with store.write() as connection:
            connection.execute(
                insert(updates).values(
                    id=f"u{version}", agent="support", number=version, parent=alias.release, candidate=name,
                    state="done", verdict="promote", mode="auto", fence=fence, manifest={}, started_at=1.0,
                    summary={"decision": {"checks": [check]}},
                )
            )  # fmt: skip
        move_alias(store, "support", expected=alias, to=name, fence=fence, now=version * DAY_S)
    return store, from_dict({"bounds": {"drift_kl": 0.02}, "gate": {"stratum_margin": 0.12}})


def trends_of(store: Store, config: Config) -> dict[str, Trend]:
    return {trend.name: trend for trend in read_trends(store, config)}


def test_a_budget_is_forecast_to_the_version_and_the_day(served):
    kl = trends_of(*served)["drift_kl"]
    assert kl.version.expected == pytest.approx(20)
    assert kl.at.expected == pytest.approx(20 * DAY_S)
    assert [point.number for point in kl.points] == [1, 2, 3, 4, 5, 6]
    assert "at about v000020 (between v000020 and v000020), about 1970-01-21" in sentence(kl)


def test_a_budget_is_the_one_that_updates_are_shrunk_to(served):
    store, config = served
    tight = config.model_copy(update={"gate": config.gate.model_copy(update={"base_kl": 0.01})})
    assert trends_of(store, tight)["drift_kl"].version.expected == pytest.approx(10)


def test_the_spectral_drift_has_a_trend_of_its_own(served):
    spectral = trends_of(*served)["drift_spectral"]
    assert spectral.limit == served[1].bounds.drift_spectral
    assert spectral.version.expected == pytest.approx(spectral.limit / 0.02)


def test_a_stratum_is_forecast_against_its_best_version_less_the_margin(served):
    refund = trends_of(*served)["stratum refund"]
    assert refund.limit == pytest.approx(0.89 - 0.12)
    assert refund.version.expected == pytest.approx(13)


def test_an_audits_own_score_counts_for_more_than_the_gates(served):
    store, config = served
    name = read_alias(store, "support").release
    with store.write() as connection:
        row = {"agent": "support", "release": name, "trigger": "timer", "outcome": "ok", "started_at": 1.0}
        summary = {"scores": {"stratum refund": {"serving": 0.5, "num_items": 40.0}}}
        connection.execute(insert(audits).values(summary=summary, finished_at=2.0, **row))
    assert trends_of(store, config)["stratum refund"].points[-1].value == 0.5


def test_what_was_rolled_back_is_shown_and_not_fitted(served):
    store, config = served
    alias = read_alias(store, "support")
    with store.write() as connection:
        wild = {**get(store, alias.release).manifest, "bounds": {"drift_kl": 0.019, "drift_frobenius": 0.1}}
        connection.execute(update(releases).where(releases.c.name == alias.release).values(manifest=wild))
    rollback(store, "support", now=7 * DAY_S, reason="test")
    kl = trends_of(store, config)["drift_kl"]
    assert kl.points[-1].value == 0.019
    assert kl.version.expected == pytest.approx(20)


def test_too_few_versions_are_said_to_be_too_few(served):
    store, config = served
    rollback(store, "support", to=BASE, now=7 * DAY_S, reason="test")
    assert "not enough versions for a forecast: 0 of 4" in sentence(trends_of(store, config)["drift_kl"])


def test_before_anything_served_there_are_no_trends(tmp_path: Path):
    assert read_trends(new_store(tmp_path), from_dict({})) == []
