"""Do the weights look like this agent's own? Singular values and tails of one update's delta, per kind of module.

After "weight-space detection" (arXiv 2602.15195: top singular value, energy concentration, entropy and kurtosis per
q/k/v/o told poisoned adapters from sound ones), but against the agent's own accepted updates and not a population of
adapters. What is unlike them all is no proof of harm: it holds, and goes on holding until the owner raises the limit.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cltrain.config_gate import DetectorsConfig
from cltrain.records import Check, Code, Verdict

Array = np.ndarray[Any, Any]
Delta = tuple[Array, Array]
"""(A_RK, B_NR) of one module: its delta is B A, every scale included."""

Features = dict[str, float]
""""q_proj kurtosis" and so on -> the mean over the modules of that kind."""

FEATURES = ("top singular value", "energy concentration", "kurtosis")
SAMPLED_ROWS = 256
MAD_TO_SIGMA = 1.4826  # of a normal distribution
LEAST_SPREAD = 0.02  # of the median's size: a history of near-equal values must not make every other value an outlier


def minus(one: Mapping[str, Delta], other: Mapping[str, Delta]) -> dict[str, Delta]:
    """Module -> the delta between two adapters as factors of the summed rank; a missing module counts as zero."""
    found: dict[str, Delta] = {}
    for module, (a_RK, b_NR) in one.items():
        if module not in other:
            found[module] = (a_RK, b_NR)
            continue
        a_SK, b_NS = other[module]
        found[module] = (np.concatenate([a_RK, a_SK]), np.concatenate([b_NR, -b_NS], axis=1))
    return found


def features_of(deltas: Mapping[str, Delta]) -> Features:
    """What `look_at_spectrum` compares. Top singular values are logs, so that a ratio counts alike at every size."""
    groups: dict[str, list[float]] = defaultdict(list)
    for module, (a_RK, b_NR) in deltas.items():
        kind = module.rsplit(".", 1)[-1]
        for name, value in zip(FEATURES, _module_features(a_RK, b_NR), strict=True):
            groups[f"{kind} {name}"].append(value)
    return {name: math.fsum(values) / len(values) for name, values in groups.items()}


def look_at_spectrum(candidate: Features, history: Sequence[Features], config: DetectorsConfig) -> Check:
    """Robust z of every feature against the accepted updates: |x - median| / (1.4826 MAD), the largest of them decides.

    history: one entry per accepted update, in any order. With fewer than `spectrum_history` it says so and passes.
    """
    if len(history) < config.spectrum_history:
        reason = f"not judged: {len(history)} accepted updates, {config.spectrum_history} are needed to compare with"
        return Check("spectrum", Code.SPECTRUM, Verdict.PROMOTE, reason, num_items=len(history))
    scores: dict[str, float] = {}
    for name, value in candidate.items():
        known = np.array([past[name] for past in history if name in past])
        if len(known) >= config.spectrum_history:
            middle = float(np.median(known))
            spread = MAD_TO_SIGMA * float(np.median(np.abs(known - middle)))
            scores[name] = abs(value - middle) / max(spread, LEAST_SPREAD * abs(middle), 1e-9)
    if not scores:
        reason = "not judged: its modules are not those of the accepted updates"
        return Check("spectrum", Code.SPECTRUM, Verdict.HOLD, reason, num_items=len(history))
    worst = max(scores, key=lambda name: scores[name])
    is_odd = not scores[worst] <= config.spectrum_z  # NaN is odd too
    reason = f"{worst} is {scores[worst]:.1f} robust deviations from {len(history)} accepted updates"
    reason = f"{reason}, limit {config.spectrum_z:g} (gate.detectors.spectrum_z)"
    return Check(
        "spectrum", Code.SPECTRUM, Verdict.HOLD if is_odd else Verdict.PROMOTE,
        reason, candidate=scores[worst], reference=config.spectrum_z,
        num_items=len(history),
    )  # fmt: skip


def _module_features(a_RK: Array, b_NR: Array) -> tuple[float, float, float]:
    """log of the top singular value, its share of the energy, and the excess kurtosis of the delta's entries."""
    a, b = a_RK.astype(np.float64), b_NR.astype(np.float64)
    r_b, r_a = (np.linalg.qr(tall)[1] for tall in (b, a.T))
    sigmas = np.linalg.svd(r_b @ r_a.T, compute_uv=False)
    energy = float((sigmas**2).sum())
    if energy <= 0:
        return -50.0, 0.0, 0.0  # no delta at all
    entries = b[:: max(1, len(b) // SAMPLED_ROWS)] @ a  # all of them would be as large as the base matrix
    spread = entries - entries.mean()
    kurtosis = float((spread**4).mean() / (spread**2).mean() ** 2 - 3.0)
    return math.log(float(sigmas[0])), float(sigmas[0] ** 2) / energy, kurtosis
