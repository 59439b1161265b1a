"""The way back to the bounds: along the straight line of both factors from incumbent to candidate, as far as allowed.

Norms give the largest fraction exactly (a quartic per module), KL by bisection below it; what counts is measured again
on the exported file.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cltrain.config import BoundsConfig
from cltrain.errors import DataError
from cltrain.models.adapter import AdapterFile, Factors, attach, parameters_of, set_factors
from cltrain.models.base import Base
from cltrain.models.forward import next_log_probs, predicted, token_kl
from cltrain.objectives.bounds import between, max_ratio, norm_step
from cltrain.objectives.geometry import base_norms, delta_norms, difference_norms
from cltrain.records import BoundReport, TokenRow
from cltrain.trainer.reference import Reference

KL_HALVINGS = 8
MARGIN = 1e-4  # float32 rounding of the exported factors moves a norm by less than this fraction


class Ruler:
    """Measures adapters on pinned anchors against one base and one incumbent. Holds one attached model."""

    def __init__(
        self, base: Base, incumbent: AdapterFile | None, shape: AdapterFile, anchors: Sequence[TokenRow]
    ) -> None:
        if not any(predicted(row) for row in anchors):
            raise DataError("there are no anchors to measure a KL on (trainer.num_anchors, trainer.anchors)")
        self.base, self.incumbent, self.anchors = base, incumbent, anchors
        self.base_norms = base_norms(base, list(shape.factors))
        self.of_base = Reference(base, base.model, anchors)
        self.of_incumbent = self.of_base if incumbent is None else Reference(base, attach(base, incumbent), anchors)
        self._model = attach(base, shape)
        self._live: Factors = parameters_of(self._model, shape)

    def kl(self, adapter: AdapterFile) -> tuple[float, float]:
        """Mean token KL(incumbent || adapter) and KL(base || adapter) on the anchors, nats."""
        set_factors(self._live, adapter.factors)
        step, drift = 0.0, 0.0
        for group in self.of_base.groups:
            logq_MV = next_log_probs(self.base, self._model, [self.anchors[i] for i in group])
            drift += float(token_kl(self.of_base.log_probs(group), logq_MV).double().sum())
            step += float(token_kl(self.of_incumbent.log_probs(group), logq_MV).double().sum())
        return step / self.of_base.num_tokens, drift / self.of_base.num_tokens

    def report(self, adapter: AdapterFile, bounds: BoundsConfig, shrink: float) -> BoundReport:
        """All four distances of an adapter beside their limits."""
        step_kl, drift_kl = self.kl(adapter)
        return BoundReport(
            step_frobenius=max_ratio(difference_norms(adapter, self.incumbent), self.base_norms),
            step_frobenius_limit=bounds.step_frobenius,
            drift_frobenius=max_ratio(delta_norms(adapter), self.base_norms),
            drift_frobenius_limit=bounds.drift_frobenius,
            step_kl=step_kl,
            step_kl_limit=bounds.step_kl,
            drift_kl=drift_kl,
            drift_kl_limit=bounds.drift_kl,
            shrink=shrink,
        )


def largest_fraction(ruler: Ruler, start: AdapterFile, trained: AdapterFile, bounds: BoundsConfig) -> float:
    """Largest fraction in [0, 1] of the way from `start` to `trained` that obeys all four bounds.

    Exact for the norms (every smaller fraction obeys too); for KL a bisection between 0 and that, KL_HALVINGS deep.
    """
    with torch.no_grad():
        slack = 1 - MARGIN
        high = norm_step(
            start, trained, ruler.base_norms, bounds.step_frobenius * slack, bounds.drift_frobenius * slack
        )

        def obeys(c: float) -> bool:
            step_kl, drift_kl = ruler.kl(between(start, trained, c))
            return step_kl <= bounds.step_kl and drift_kl <= bounds.drift_kl

        if high == 0 or obeys(high):
            return high
        low = 0.0
        for _ in range(KL_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if obeys(middle) else (low, middle)
        return low
