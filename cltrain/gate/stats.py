"""Evidence from paired differences in [-1, 1]: a mixture betting e-value and the confidence bounds it inverts to.

Valid whenever one looks (Ville's inequality), so a gate may score in chunks and stop early. Formulas: Waudby-Smith and
Ramdas, "Estimating means of bounded random variables by betting" (2023), with a fixed mixture of bets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

BETS = (0.05, 0.1, 0.2, 0.4, 0.7, 0.95)  # fractions of the largest bet that cannot lose everything
STAKES = (0.05, 0.1, 0.25, 0.3, 0.2, 0.1)  # on each; most where the best bet lies when equals flip 2 to 12 % of answers
GRID = 32  # candidates for a bound per round; three rounds place it within 6e-5, on the cautious side
MAX_ITEMS = 1_000_000  # a forecast beyond this says "never" rather than a number


def e_value(differences: Sequence[float], above: float) -> float:
    """Evidence against "the mean difference is at most `above`": at least 1/alpha refutes it at level alpha.

    differences: each in [-1, 1], in the order they were drawn; above: in (-1, 1). Without items the evidence is 1.
    """
    return math.exp(min(float(_log_e(*_counted(differences), np.array([above]))[0]), 700.0))


def lower_bound(differences: Sequence[float], alpha: float) -> float:
    """The mean difference is above this with confidence 1 - alpha, at any stopping time; -1 when nothing is known."""
    values, counts = _counted(differences)
    low, high = -1.0, 1.0
    for _ in range(3):  # the evidence falls as `above` grows
        cuts = np.linspace(low, high, GRID + 2)
        num_refuted = int(np.count_nonzero(_log_e(values, counts, cuts[1:-1]) >= -math.log(alpha)))
        low, high = float(cuts[num_refuted]), float(cuts[num_refuted + 1])
    return low


def upper_bound(differences: Sequence[float], alpha: float) -> float:
    """The mean difference is below this with confidence 1 - alpha, at any stopping time; 1 when nothing is known."""
    return -lower_bound([-d for d in differences], alpha)


def sign_p(differences: Sequence[float]) -> float:
    """One-sided sign test: the chance of at least this many losses among the flips of two equals. For one look only."""
    losses = sum(d < 0 for d in differences)
    flips = losses + sum(d > 0 for d in differences)
    return sum(math.comb(flips, k) for k in range(losses, flips + 1)) / 2**flips


def items_needed(differences: Sequence[float], above: float, alpha: float, effect: float) -> int:
    """About how many items in all would refute "the mean is at most `above`", if the rest looks like these.

    Where these point nowhere, the count is for a true mean of `above + effect` (> 0) at the share of flips seen here.
    """
    values, counts = _counted(differences)
    needed = _items_to_refute(values, counts, above, alpha)
    if needed is None:
        flips = float(np.dot(counts, values != 0) / counts.sum()) if counts.size else 0.0
        needed = _items_to_refute(*_like(above + effect, flips), above, alpha)
    return needed or MAX_ITEMS


def means(differences: Sequence[float], clusters: Sequence[str | None]) -> list[float]:
    """The mean of each cluster, in the order of its first item; an item without one (None) is its own."""
    if not any(clusters):
        return list(differences)
    groups: dict[object, list[float]] = {}
    for number, (difference, cluster) in enumerate(zip(differences, clusters, strict=True)):
        groups.setdefault(number if cluster is None else cluster, []).append(difference)
    return [values[0] if len(values) == 1 else math.fsum(values) / len(values) for values in groups.values()]


def items_for_margin(margin: float, alpha: float, discordance: float = 0.0) -> int:
    """The fewest items on which two equals can be expected to be shown no worse than `margin` (in (0, 1)) apart.

    discordance: the share of items that they answer differently, half of them either way (at least 90 % power needs
    about twice as many; see research of the gate: n = (z_alpha + z_beta)^2 q / m^2). Plan suites and pools with it.
    """
    return _items_to_refute(*_like(0.0, discordance), -margin, alpha) or MAX_ITEMS


def _counted(differences: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    values, counts = np.unique(np.asarray(differences, dtype=np.float64), return_counts=True)
    assert values.size == 0 or (values[0] >= -1 and values[-1] <= 1), "differences lie in [-1, 1]"
    return values, counts


def _log_wealth(values: np.ndarray, counts: np.ndarray, above_G: np.ndarray) -> np.ndarray:
    """Log wealth of each bet (columns) against each `above` (rows) after all items.

    The largest bet is 1 / (1 + above), as no difference is below -1.
    """
    bets = np.asarray(BETS)[None, :, None] / (1 + above_G)[:, None, None]
    return np.log1p(bets * (values[None, :] - above_G[:, None])[:, None, :]) @ counts


def _log_e(values: np.ndarray, counts: np.ndarray, above_G: np.ndarray) -> np.ndarray:
    wealth = _log_wealth(values, counts, above_G) + np.log(STAKES)
    top = wealth.max(axis=1, keepdims=True)
    return top[:, 0] + np.log(np.exp(wealth - top).sum(axis=1))


def _like(mean: float, flips: float) -> tuple[np.ndarray, np.ndarray]:
    """Shares of wins, ties and losses with this mean difference, at this share of flips or the fewest that give it."""
    flips = min(1.0, max(flips, abs(mean)))
    return np.array([1.0, 0.0, -1.0]), np.array([(flips + mean) / 2, 1 - flips, (flips - mean) / 2])


def _items_to_refute(values: np.ndarray, counts: np.ndarray, above: float, alpha: float) -> int | None:
    """How many items like these the quickest single bet needs with its stake; None: none grows."""
    if not values.size:
        return None
    growth = _log_wealth(values, counts, np.array([above]))[0] / counts.sum()
    needed = [-math.log(alpha * stake) / rate for stake, rate in zip(STAKES, growth, strict=True) if rate > 0]
    return min(MAX_ITEMS, math.ceil(min(needed))) if needed else None
