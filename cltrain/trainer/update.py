"""One update: from the incumbent's factors to a candidate directory that obeys the bounds, or UpdateDiscarded.

Same inputs and seed give the same bytes on a CPU, also across an interruption.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from cltrain.config import AdapterConfig, BoundsConfig, TrainerConfig
from cltrain.errors import ConfigError, DataError
from cltrain.models.adapter import AdapterFile, check_fits, new_factors, read_adapter, write_adapter
from cltrain.models.base import Base
from cltrain.models.forward import predicted
from cltrain.objectives.bounds import between, max_ratio
from cltrain.objectives.geometry import spectral_norms
from cltrain.records import BoundReport, Candidate, TokenRow
from cltrain.trainer.shrink import Ruler, largest_fraction
from cltrain.trainer.steps import OnStep, UpdateDiscarded, train

__all__ = ["UpdateDiscarded", "train_update", "verify_bounds"]


def train_update(
    base: Base,
    *,
    incumbent: AdapterFile | None,
    adapter: AdapterConfig,
    fresh: Sequence[TokenRow],
    replay: Sequence[TokenRow],
    anchors: Sequence[TokenRow],
    trainer: TrainerConfig,
    bounds: BoundsConfig,
    seed: int,
    work_dir: Path,
    on_step: OnStep = lambda step, measured: None,
) -> Candidate:
    """Train on `fresh` and `replay` rows from `incumbent` (None: the bare base) and write `work_dir`/candidate.

    `bounded_replay` keeps to all four bounds, measured on the file it wrote; `naive` leaves replay, KL and bounds out
    and reports the distances. A second call with the same arguments continues an interrupted one. `on_step(step,
    measured)` sees nll_fresh, nll_replay, kl (nats per token), grad_norm_nll, grad_norm_kl, grad_norm.

    Raises UpdateDiscarded (work_dir then holds no candidate and no checkpoint): loss or gradient not finite, no token
    to learn from, bounds that only a fraction below bounds.min_shrink would meet. ConfigError: rank, alpha or targets
    differ from the incumbent's. DataError: rows that the base cannot take, another base's adapter, a full disk.
    """
    start = _start(base, incumbent, adapter, seed)
    for name, rows in (("fresh", fresh), ("replay", replay), ("anchor", anchors)):
        _check_rows(base, name, rows)
    work_dir.mkdir(parents=True, exist_ok=True)
    path = work_dir / "candidate"
    shutil.rmtree(path, ignore_errors=True)
    try:
        return _train_update(base, incumbent, start, fresh, replay, anchors, trainer, bounds, seed, path, on_step)
    except UpdateDiscarded:
        shutil.rmtree(path, ignore_errors=True)
        for left in work_dir.glob("checkpoint.safetensors*"):
            left.unlink()
        raise


def verify_bounds(
    base: Base,
    adapter: AdapterFile,
    incumbent: AdapterFile | None,
    anchors: Sequence[TokenRow],
    bounds: BoundsConfig,
    *,
    shrink: float = 1.0,
) -> BoundReport:
    """The four distances of an adapter recomputed from its file, its incumbent's, the base and the pinned anchors."""
    return Ruler(base, incumbent, adapter, anchors).report(adapter, bounds, shrink)


def _train_update(
    base: Base,
    incumbent: AdapterFile | None,
    start: AdapterFile,
    fresh: Sequence[TokenRow],
    replay: Sequence[TokenRow],
    anchors: Sequence[TokenRow],
    trainer: TrainerConfig,
    bounds: BoundsConfig,
    seed: int,
    path: Path,
    on_step: OnStep,
) -> Candidate:
    is_bounded = trainer.method == "bounded_replay"
    fresh = [row for row in fresh if predicted(row)]
    replay = [row for row in replay if predicted(row)] if is_bounded else []
    anchors = [row for row in anchors if predicted(row)]
    if not fresh:
        raise UpdateDiscarded("no fresh row has a token to learn from")
    ruler = Ruler(base, incumbent, start, anchors)
    reference = ruler.of_base if is_bounded else None
    trained, history, reads = train(base, start, fresh, replay, anchors, reference, trainer, seed, path.parent, on_step)
    if not all(bool(torch.isfinite(factor).all()) for pair in trained.factors.values() for factor in pair):
        raise UpdateDiscarded("the trained factors hold NaN or infinity")
    shrink = largest_fraction(ruler, start, trained, bounds) if is_bounded else 1.0
    if shrink < bounds.min_shrink and is_bounded:
        raise UpdateDiscarded(
            f"only {shrink:.4f} of the step would keep to the bounds, less than bounds.min_shrink = {bounds.min_shrink}"
        )
    write_adapter(path, between(start, trained, shrink))
    exported = read_adapter(path)
    report = ruler.report(exported, bounds, shrink)
    distances = (report.step_frobenius, report.drift_frobenius, report.step_kl, report.drift_kl)
    if not all(math.isfinite(distance) for distance in distances):
        raise UpdateDiscarded(f"the exported adapter's distances are not finite: {report}")
    if is_bounded and not report.holds:
        raise UpdateDiscarded(f"the exported adapter breaks its bounds: {report}")
    return Candidate(
        path=str(path),
        bounds=report,
        metrics=_summary(ruler, exported, incumbent, history, fresh, replay),
        reads=tuple(reads),
        num_steps=trainer.num_steps,
    )


def _start(base: Base, incumbent: AdapterFile | None, adapter: AdapterConfig, seed: int) -> AdapterFile:
    if incumbent is None:
        return new_factors(base, adapter.rank, adapter.alpha, adapter.targets, seed)
    check_fits(base, incumbent)
    for name, ours, theirs in (
        ("rank", adapter.rank, incumbent.rank),
        ("alpha", adapter.alpha, incumbent.alpha),
        ("targets", tuple(sorted(adapter.targets)), incumbent.targets),
    ):
        if ours != theirs:
            raise ConfigError(
                f"adapter.{name} = {ours}, but the incumbent has {theirs}: an agent's adapter keeps its shape; "
                "set it back or start another agent"
            )
    return incumbent


def _check_rows(base: Base, name: str, rows: Sequence[TokenRow]) -> None:
    vocabulary = base.model.config.vocab_size
    for row in rows:
        if len(row.ids) != len(row.weights):
            raise DataError(f"{name} row {row.record}: {len(row.ids)} ids but {len(row.weights)} weights")
        if len(row.ids) > base.context:
            raise DataError(
                f"{name} row {row.record} has {len(row.ids)} tokens; the base takes {base.context} (base.context)"
            )
        if row.ids and not 0 <= min(row.ids) <= max(row.ids) < vocabulary:
            raise DataError(f"{name} row {row.record} has token ids outside the base's vocabulary of {vocabulary}")


def _summary(
    ruler: Ruler,
    exported: AdapterFile,
    incumbent: AdapterFile | None,
    history: list[dict[str, float]],
    fresh: Sequence[TokenRow],
    replay: Sequence[TokenRow],
) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name in history[-1]:
        values = [measured[name] for measured in history]
        metrics[f"{name}_first"], metrics[f"{name}_last"] = values[0], values[-1]
        metrics[f"{name}_mean"] = sum(values) / len(values)
    metrics["step_spectral"] = max_ratio(spectral_norms(exported, incumbent), ruler.base_norms)
    metrics["num_fresh"], metrics["num_replay"] = float(len(fresh)), float(len(replay))
    metrics["num_fresh_tokens"] = float(sum(len(predicted(row)) for row in fresh))
    return metrics
