"""What to expect of a candidate by what this trainer's candidates were like before: the guard against slow erosion.

A trainer whose every candidate is a little worse gets a lucky one past any single test now and then. Its record tells:
where candidates hardly differ in truth, an apparent gain is luck. So the apparent gain is shrunk towards the mean of
the record by as much as chance explains of the spread (empirical Bayes, normal-normal; Efron and Morris, "Data analysis
using Stein's estimator", 1975). How much candidates truly differ is read from two halves of the questions: what both
halves say of a candidate is no chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CLIP = 0.05  # a half's distance from the mean beyond which one candidate counts as just that far: breakage, not spread


class Outcome(NamedTuple):
    """How one judged candidate compared with its incumbent."""

    first: float  # mean difference on every other item, in [-1, 1]
    second: float  # on the rest
    num_items: int


def outcome_of(differences: Sequence[float]) -> Outcome | None:
    """None for fewer than two items. differences: candidate less incumbent, in the order asked."""
    if len(differences) < 2:
        return None
    halves = differences[::2], differences[1::2]
    first, second = (math.fsum(half) / len(half) for half in halves)
    return Outcome(first, second, len(differences))


def expected_gain(differences: Sequence[float], record: Sequence[Outcome], margin: float, weight: float) -> float:
    """The posterior mean of a candidate's true mean difference, given at least one item.

    Before there is a record, candidates are taken to be a little worse: by a quarter of `margin`, give or take another
    quarter. That prior counts as `weight` candidates beside those of the record. The spread that the record shows is
    taken a standard error lower than it was measured, as ignorance is no spread.
    """
    mean, spread = -margin / 4, (margin / 4) ** 2
    if record:
        known = len(record) / (len(record) + weight)
        shown_mean, shown_spread = mean_and_spread(record)
        mean, spread = mean + known * (shown_mean - mean), spread + known * (shown_spread - spread)
    values = np.asarray(differences, dtype=np.float64)
    noise = float(values.var()) / values.size
    trust = spread / (spread + noise) if spread > 0 else 0.0
    return mean + trust * (float(values.mean()) - mean)


def mean_and_spread(record: Sequence[Outcome]) -> tuple[float, float]:
    """Mean of the candidates' differences and variance of the true ones, candidates weighted by their items."""
    first, second, num_items = (np.array(column, dtype=np.float64) for column in zip(*record, strict=True))
    weights = num_items / num_items.sum()
    mean = float(weights @ (first + second)) / 2
    products = np.clip(first - mean, -CLIP, CLIP) * np.clip(second - mean, -CLIP, CLIP)
    error = math.sqrt(float(weights**2 @ products**2))
    return mean, max(0.0, float(weights @ products) - error)
