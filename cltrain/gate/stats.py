"""Evidence from paired differences in [-1, 1]: a mixture betting e-value and the confidence bounds it inverts to.

Valid whenever one looks (Ville's inequality), so a gate may score in chunks and stop early. Formulas: Waudby-Smith and
Ramdas, "Estimating means of bounded random variables by betting" (2023), with a fixed mixture of bets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

BETS = (0.05, 0.1, 0.2, 0.4, 0.7, 0.95)  # fractions of the largest bet that cannot lose everything
BISECTIONS = 16  # bounds are exact to 3e-5, on the cautious side
MAX_ITEMS = 1_000_000  # a forecast beyond this says "never" rather than a number


def e_value(differences: Sequence[float], above: float) -> float:
    """Evidence against "the mean difference is at most `above`": at least 1/alpha refutes it at level alpha.

    differences: each in [-1, 1], in the order they were drawn; above: in (-1, 1). Without items the evidence is 1.
    """
    return math.exp(min(_log_e(*_counted(differences), above), 700.0))


def lower_bound(differences: Sequence[float], alpha: float) -> float:
    """The mean difference is above this with confidence 1 - alpha, at any stopping time; -1 when nothing is known."""
    values, counts = _counted(differences)
    target = -math.log(alpha)
    low, high = -1.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if _log_e(values, counts, middle) >= target:
            low = middle
        else:
            high = middle
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
    target = math.log(len(BETS) / alpha)
    growth = _growth(values, counts, above)
    if growth <= 0:
        flips = float(np.dot(counts, values != 0) / counts.sum()) if counts.size else 0.0
        mean = above + effect
        flips = min(1.0, max(flips, abs(mean)))
        wins, losses = (flips + mean) / 2, (flips - mean) / 2
        growth = _growth(np.array([1.0, 0.0, -1.0]), np.array([wins, 1 - flips, losses]), above)
    return min(MAX_ITEMS, math.ceil(target / growth)) if growth > 0 else MAX_ITEMS


def _counted(differences: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    values, counts = np.unique(np.asarray(differences, dtype=np.float64), return_counts=True)
    assert values.size == 0 or (values[0] >= -1 and values[-1] <= 1), "differences lie in [-1, 1]"
    return values, counts


def _log_wealth(values: np.ndarray, counts: np.ndarray, above: float) -> np.ndarray:
    """Log wealth of each bet after all items; the largest bet is 1 / (1 + above), as no difference is below -1."""
    bets = np.asarray(BETS) / (1 + above)
    return np.log1p(bets[:, None] * (values - above)[None, :]) @ counts


def _log_e(values: np.ndarray, counts: np.ndarray, above: float) -> float:
    if not values.size:
        return 0.0
    wealth = _log_wealth(values, counts, above)
    top = float(wealth.max())
    return top + math.log(float(np.exp(wealth - top).mean()))


def _growth(values: np.ndarray, counts: np.ndarray, above: float) -> float:
    """Log wealth per item of the best bet."""
    if not values.size:
        return 0.0
    return float(_log_wealth(values, counts, above).max() / counts.sum())
