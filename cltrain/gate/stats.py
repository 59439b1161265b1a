"""Evidence from paired differences in [-1, 1]: betting e-values and the confidence bounds they invert to.

Valid whenever one looks (Ville's inequality), so a gate may score in chunks and stop early: wealth that grows by bets
on the next difference, against "the mean is at most `above`", exceeds 1/alpha with a chance of at most alpha, whatever
the bets (Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", 2023). The bets are a
fixed mixture. Where the number of items is planned, half of the wealth goes on bets that make it follow the
conditional power of a z-test of all of them: being able to stop at any time then costs little (Koning and van Meer,
"Sequentializing a test: anytime validity is free", 2025).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import log_ndtr, ndtri

BETS = (0.05, 0.1, 0.2, 0.4, 0.7, 0.95)  # fractions of the largest bet that cannot lose everything
STAKES = (0.05, 0.1, 0.25, 0.3, 0.2, 0.1)  # on each; most where the best bet lies when equals flip 2 to 12 % of answers
AIM = 0.4  # of alpha: the level of the z-test that planned bets follow; its wealth may end at 1 / (AIM alpha)
PRIOR_ITEMS, PRIOR_SQUARE = 20, 0.2  # the mean square of (difference - above) before any is known, and its weight
POWER = 0.8  # of forecasts
USUAL_FLIPS = 0.06  # share of answers that two equals give differently, where none is known
HALVINGS = 12  # of [-1, 1]: a bound within 5e-4, on the cautious side
MAX_ITEMS = 1_000_000  # a forecast beyond this says "never" rather than a number


class Plan(NamedTuple):
    """What is fixed before the first item is scored: how many there may be in all, and the level that is asked for.
    More items or another level than planned stay valid, with less power."""

    num_items: int
    alpha: float


def e_value(differences: Sequence[float], above: float, plan: Plan | None = None) -> float:
    """Evidence against "the mean difference is at most `above`": at least 1/alpha refutes it at level alpha.

    differences: each in [-1, 1], in the order they were drawn; above: in (-1, 1). Without items the evidence is 1.
    """
    return math.exp(min(_log_e(_checked(differences), above, plan), 700.0))


def lower_bound(differences: Sequence[float], alpha: float, num_planned: int | None = None) -> float:
    """The mean difference is above this with confidence 1 - alpha, at any stopping time; -1 when nothing is known."""
    values = _checked(differences)
    plan = None if num_planned is None else Plan(num_planned, alpha)
    low, high = -1.0, 1.0
    for _ in range(HALVINGS):  # the evidence falls as `above` grows
        middle = (low + high) / 2
        low, high = (middle, high) if _log_e(values, middle, plan) >= -math.log(alpha) else (low, middle)
    return low


def upper_bound(differences: Sequence[float], alpha: float, num_planned: int | None = None) -> float:
    """The mean difference is below this with confidence 1 - alpha, at any stopping time; 1 when nothing is known."""
    return -lower_bound([-d for d in differences], alpha, num_planned)


def sign_p(differences: Sequence[float]) -> float:
    """One-sided sign test: the chance of at least this many losses among the flips of two equals. For one look only."""
    losses = sum(d < 0 for d in differences)
    flips = losses + sum(d > 0 for d in differences)
    return sum(math.comb(flips, k) for k in range(losses, flips + 1)) / 2**flips


def items_needed(differences: Sequence[float], above: float, alpha: float, effect: float) -> int:
    """About how many items in all would refute "the mean is at most `above`" in four of five cases, if the rest looks
    like these.

    Where these point nowhere, the count is for a true mean of `above + effect` (> 0) at the share of flips seen here,
    or at USUAL_FLIPS where there are no items.
    """
    values = _checked(differences)
    mean, variance = (float(values.mean()), float(values.var())) if values.size else (above, 0.0)
    if mean <= above:
        flips = float((values != 0).mean()) if values.size else USUAL_FLIPS
        mean, variance = _like(above + effect, flips)
    return _items_to_refute(mean, variance, above, alpha)


def means(differences: Sequence[float], clusters: Sequence[str | None]) -> list[float]:
    """The mean of each cluster, in the order of its first item; an item without one (None) is its own."""
    if not any(clusters):
        return list(differences)
    groups: dict[object, list[float]] = {}
    for number, (difference, cluster) in enumerate(zip(differences, clusters, strict=True)):
        groups.setdefault(number if cluster is None else cluster, []).append(difference)
    return [values[0] if len(values) == 1 else math.fsum(values) / len(values) for values in groups.values()]


def items_for_margin(margin: float, alpha: float, discordance: float = 0.0) -> int:
    """About how many items show four of five equals to be no worse than `margin` (in (0, 1)).

    discordance: the share of items that they answer differently, half of them either way; n = (z_alpha + z_beta)^2 q /
    m^2 where that is not small. Plan suites and pools with it.
    """
    return _items_to_refute(*_like(0.0, discordance), -margin, alpha)


def _checked(differences: Sequence[float]) -> np.ndarray:
    values = np.asarray(differences, dtype=np.float64)
    assert values.size == 0 or (values.min() >= -1 and values.max() <= 1), "differences lie in [-1, 1]"
    return values


def _log_e(values: np.ndarray, above: float, plan: Plan | None) -> float:
    """Log wealth after all items. The largest bet that cannot lose everything is 1 / (1 + above), as no difference is
    below -1."""
    distinct, counts = np.unique(values, return_counts=True)
    bets = np.asarray(BETS)[:, None] / (1 + above)
    mixed = np.logaddexp.reduce(np.log1p(bets * (distinct - above)) @ counts + np.log(STAKES))
    return float(mixed if plan is None else np.logaddexp(mixed, _planned(values, above, plan)) - math.log(2))


def _planned(values: np.ndarray, above: float, plan: Plan) -> float:
    """With S the sum of (difference - above) so far and v its mean square per item, the z-test ends above its limit c
    with a chance of Phi((S - c) / sqrt(v left)) at the edge of the null; each bet is the slope of the log of that."""
    before = np.arange(values.size)
    excess = values - above
    sums = np.cumsum(excess) - excess
    squares = np.cumsum(excess**2) - excess**2
    v = (squares + PRIOR_ITEMS * PRIOR_SQUARE) / (before + PRIOR_ITEMS)
    width = np.sqrt(v * np.maximum(plan.num_items - before, 1))
    z = (sums + ndtri(AIM * plan.alpha) * np.sqrt(v * plan.num_items)) / width
    slope = np.exp(-0.5 * z**2 - 0.5 * math.log(2 * math.pi) - log_ndtr(z)) / width
    return float(np.log1p(np.minimum(slope, BETS[-1] / (1 + above)) * excess).sum())


def _like(mean: float, flips: float) -> tuple[float, float]:
    """Mean and variance of differences with this mean, at this share of flips or the fewest that give it."""
    return mean, min(1.0, max(flips, abs(mean))) - mean**2


def _items_to_refute(mean: float, variance: float, above: float, alpha: float) -> int:
    """How many items like these the z-test that planned bets follow needs for a power of POWER, and no fewer than the
    largest bets with half of the wealth do (a twentieth more: bets begin lower)."""
    edge = mean - above
    by_test = (ndtri(AIM * alpha) - ndtri(POWER)) ** 2 * variance / edge**2
    by_bets = -1.05 * math.log(alpha / 2) / math.log1p(BETS[-1] / (1 + above) * edge)
    return min(MAX_ITEMS, math.ceil(max(by_test, by_bets)))
