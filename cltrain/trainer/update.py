"""One update: from the incumbent's factors to a candidate directory that obeys the bounds, or UpdateDiscarded.

Same inputs and seed give the same bytes on a CPU, also across an interruption.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from cltrain_kernels.flat import FlatLoRA

from cltrain.config import AdapterConfig, BoundsConfig, HealthConfig, TrainerConfig
from cltrain.errors import ConfigError
from cltrain.models.adapter import (
    AdapterFile,
    attach,
    check_fits,
    new_factors,
    parameters_of,
    read_adapter,
    snapshot,
    write_adapter,
)
from cltrain.models.base import Base
from cltrain.models.forward import check_row, predicted
from cltrain.objectives.fisher import decayed, measure_fisher
from cltrain.objectives.geometry import combine
from cltrain.records import BoundReport, Candidate, TokenRow, is_claim
from cltrain.trainer.draws import Draws
from cltrain.trainer.fingerprint import fingerprint_of
from cltrain.trainer.fused import fused, run_by
from cltrain.trainer.health import collapse, vital_signs
from cltrain.trainer.memory import Memory, write_memory
from cltrain.trainer.methods import Method, method_of
from cltrain.trainer.recipe import Recipe, make_recipe
from cltrain.trainer.reference import Reference
from cltrain.trainer.shrink import Ruler, Spent, drift_radii, shrink_to_bounds
from cltrain.trainer.steps import OnStep, UpdateDiscarded, train
from cltrain.trainer.terms import Measured

__all__ = ["UpdateDiscarded", "check_continues", "train_update", "verify_bounds"]


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
    health: HealthConfig | None = None,
    memory: Memory | None = None,
    spent_today: float = 0.0,
    of_base: Reference | None = None,
    on_step: OnStep = lambda step, measured: None,
) -> Candidate:
    """Train on `fresh` and `replay` rows from `incumbent` (None: the bare base) and write `work_dir`/candidate.

    A bounded method keeps to all bounds, measured on the file it wrote; the others report the distances. `memory` is
    what earlier updates left (see Memory), `spent_today` the sum of the step_frobenius promoted in the 24 hours before,
    `of_base` the base on the anchors if it is at hand. A second call with the same arguments continues an interrupted
    one. `on_step(step, measured)` sees each term (nats per token) and the norms of their gradients.

    Raises UpdateDiscarded (work_dir then holds no candidate and no checkpoint): a loss or gradient not finite, no token
    to learn from, collapse (HealthConfig), bounds that only a fraction below bounds.min_shrink would meet. ConfigError:
    targets differ from the incumbent's. DataError: rows that the base cannot take, another base's adapter, a full disk.
    """
    for row in (*fresh, *replay, *anchors):
        check_row(base, row)
    update = _Update(
        base, incumbent, adapter, trainer, bounds, health or HealthConfig(), memory or Memory(), seed, spent_today
    )
    work_dir.mkdir(parents=True, exist_ok=True)
    path = work_dir / "candidate"
    shutil.rmtree(path, ignore_errors=True)
    try:
        with run_by(trainer.kernels):
            return update.run(fresh, replay, anchors, of_base, path, on_step)
    except UpdateDiscarded:
        shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(path.with_name(f".{path.name}.writing"), ignore_errors=True)
        for left in work_dir.glob("checkpoint.safetensors*"):
            left.unlink()
        raise


def check_continues(incumbent: AdapterFile | None, adapter: AdapterConfig) -> None:
    """Raise ConfigError when the settings ask for other modules than the incumbent has. Another rank or alpha is fine:
    the incumbent is re-compressed, and what that loses counts as part of the step."""
    wanted = tuple(sorted(adapter.targets))
    if incumbent is not None and incumbent.targets != wanted:
        raise ConfigError(
            f"adapter.targets = {wanted}, but the incumbent has {incumbent.targets}: an agent's adapter keeps its "
            "modules; set it back or start another agent"
        )


def verify_bounds(
    base: Base,
    adapter: AdapterFile,
    incumbent: AdapterFile | None,
    anchors: Sequence[TokenRow],
    bounds: BoundsConfig,
    *,
    spent: Spent | None = None,
    shrink: float = 1.0,
) -> BoundReport:
    """The distances of an adapter recomputed from its file, its incumbent's, the base and the pinned anchors; `spent`
    (None: nothing) is what those do not show."""
    return Ruler(base, incumbent, adapter, anchors).report(adapter, bounds, spent or Spent(0.0, 0, 0), shrink)


@dataclasses.dataclass(frozen=True)
class _Update:
    base: Base
    incumbent: AdapterFile | None
    adapter: AdapterConfig
    trainer: TrainerConfig
    bounds: BoundsConfig
    health: HealthConfig
    memory: Memory
    seed: int
    spent_today: float

    @property
    def method(self) -> Method:
        return method_of(self.trainer)

    def run(
        self,
        fresh: Sequence[TokenRow],
        replay: Sequence[TokenRow],
        anchors: Sequence[TokenRow],
        of_base: Reference | None,
        path: Path,
        on_step: OnStep,
    ) -> Candidate:
        fresh = [row for row in fresh if predicted(row)]
        replay = [row for row in replay if predicted(row)]
        if not fresh:
            raise UpdateDiscarded("no fresh row has a token to learn from")
        if self.method.is_joint:
            fresh, replay = [*fresh, *replay], []
        uses_replay = self.method.remember & {"replay", "agem"}
        replay = [row for row in replay if uses_replay and is_claim(row)]
        anchors = [row for row in anchors if predicted(row)]
        start = self._start()
        ruler = Ruler(self.base, self.incumbent, start, anchors, of_base)
        start, trained, recipe, history = self._train(start, ruler, fresh, replay, path.parent, on_step)
        if not all(bool(torch.isfinite(factor).all()) for pair in trained.factors.values() for factor in pair):
            raise UpdateDiscarded("the trained factors hold NaN or infinity")
        spent = Spent(self.spent_today, _num_tokens(recipe, range(len(history))), len(history))
        served = self._served(trained)
        shrink = 1.0
        if self.method.is_bounded:
            grew = not self.method.is_merged and "ema" not in self.method.remember and ruler.is_at_incumbent(start)
            served, shrink = shrink_to_bounds(ruler, start if grew else None, served, self.bounds, spent)
            if shrink < self.bounds.min_shrink:
                raise UpdateDiscarded(
                    f"only {shrink:.4f} of the step would keep to the bounds, less than bounds.min_shrink = "
                    f"{self.bounds.min_shrink}"
                )
        write_adapter(path, served)
        exported = read_adapter(path)
        report = ruler.report(exported, self.bounds, spent, shrink)
        self._check(report)
        signs = vital_signs(exported, self.incumbent, ruler.on_anchors(exported), ruler.base_on_anchors(), history)
        if self.method.is_bounded and (reason := collapse(signs, self.health)) is not None:
            raise UpdateDiscarded(reason)
        write_memory(path, self._remember(exported, trained, fresh))
        return Candidate(
            path=str(path),
            bounds=report,
            metrics={**_summary(history, fresh, replay), **signs},
            reads=tuple(recipe.reads(len(history))),
            num_steps=len(history),
        )

    def _start(self) -> AdapterFile:
        """The factors that training begins with."""
        fresh = new_factors(self.base, self.adapter.rank, self.adapter.alpha, self.adapter.targets, self.seed)
        if self.incumbent is None:
            return fresh
        check_fits(self.base, self.incumbent)
        check_continues(self.incumbent, self.adapter)
        if self.method.is_merged:
            return fresh
        start = (self.memory.fast if "ema" in self.method.remember else None) or self.incumbent
        is_shaped = (start.rank, start.alpha) == (self.adapter.rank, self.adapter.alpha)
        if is_shaped and not self.method.is_bounded:  # the baselines go on with their factors as others do
            return start
        # Balanced anew, whatever the rank: many updates leave A and B of unlike lengths, and such factors learn badly.
        return combine([(start, 1.0)], self.adapter.rank, self.adapter.alpha)[0]

    def _train(
        self,
        start: AdapterFile,
        ruler: Ruler,
        fresh: Sequence[TokenRow],
        replay: Sequence[TokenRow],
        work_dir: Path,
        on_step: OnStep,
    ) -> tuple[AdapterFile, AdapterFile, Recipe, list[Measured]]:
        """Where training began and ended, what its steps were made of, and what each of them measured."""
        below = self.incumbent if self.method.is_merged else None
        model = ruler.lend(start) if below is None else attach(_merged(self.base, below), start)
        state = FlatLoRA(parameters_of(model, start))
        draws = Draws(self.seed, fresh, replay, len(ruler.of_base.rows))
        radii = drift_radii(ruler.base_norms, self.bounds) if self.method.is_bounded else None
        recipe = make_recipe(
            self.base, model, ruler.incumbent_model, state, start, self.incumbent, draws, ruler.of_base, self.method,
            self.trainer, self.memory, ruler.base_norms, radii, self.bounds.min_shrink,
        )  # fmt: skip
        start = start.with_factors(snapshot(state.factors()))
        num_steps = _affordable_steps(recipe, self.trainer.num_steps, self.bounds.max_tokens)
        if not num_steps:
            raise UpdateDiscarded(f"its first step has more tokens than bounds.max_tokens = {self.bounds.max_tokens}")
        key = fingerprint_of(
            self.base, start, self.incumbent, fresh, replay, ruler.of_base.rows, self.trainer, radii,
            self.bounds.min_shrink, self.memory, num_steps, self.seed,
        )  # fmt: skip
        with fused(model, self.trainer.kernels):
            history = train(recipe, state, self.trainer, num_steps, self.health.max_grad_norm, key, work_dir, on_step)
        state.release()
        return start, start.with_factors(snapshot(parameters_of(model, start))), recipe, history

    def _served(self, trained: AdapterFile) -> AdapterFile:
        """What is to be served of what was trained: itself, or its sum or average with the incumbent, re-compressed."""
        rank, alpha = self.adapter.rank, float(self.adapter.alpha)
        old = [] if self.incumbent is None else [self.incumbent]
        if self.method.is_merged:
            return combine([*((one, 1.0) for one in old), (trained, 1.0)], rank, alpha)[0]
        if "ema" in self.method.remember:
            decay = self.trainer.ema_decay
            return combine([*((one, decay) for one in old), (trained, 1.0 - decay)], rank, alpha)[0]
        return trained

    def _remember(self, exported: AdapterFile, trained: AdapterFile, fresh: Sequence[TokenRow]) -> Memory:
        remember, fisher = self.method.remember, self.memory.fisher
        if "ewc" in remember:
            model = attach(self.base, exported)
            learned = sorted((row for row in fresh if row.objective == "sft"), key=lambda row: (row.record, row.ids))
            if learned:
                new = measure_fisher(self.base, model, list(exported.factors), learned, self.trainer.max_grad_norm)
                fisher = new if fisher is None else decayed(fisher, new, self.trainer.ewc_decay)
        return Memory(fisher, trained if "ema" in remember else None)

    def _check(self, report: BoundReport) -> None:
        distances = (report.step_frobenius, report.drift_frobenius, report.step_kl, report.drift_kl)
        if not all(math.isfinite(distance) for distance in distances):
            raise UpdateDiscarded(f"the exported adapter's distances are not finite: {report}")
        if self.method.is_bounded and not report.holds:
            raise UpdateDiscarded(f"the exported adapter breaks {', '.join(report.broken)}: {report}")


def _merged(base: Base, adapter: AdapterFile) -> Base:
    """The base with the adapter's delta added to a copy of its weights."""
    model = copy.deepcopy(base.model)
    with torch.no_grad():
        for module, (a_RK, b_NR) in adapter.factors.items():
            weight_NK = model.get_submodule(module).weight
            weight_NK += (adapter.scale * (b_NR.double() @ a_RK.double())).to(weight_NK.device, weight_NK.dtype)
    return dataclasses.replace(base, model=model)


def _affordable_steps(recipe: Recipe, num_steps: int, max_tokens: int) -> int:
    """How many of the first `num_steps` steps stay within `max_tokens` together."""
    spent = 0
    for step in range(num_steps):
        spent += _num_tokens(recipe, [step])
        if spent > max_tokens:
            return step
    return num_steps


def _num_tokens(recipe: Recipe, steps: Iterable[int]) -> int:
    """Supervised tokens of these steps, a row counted as often as it fills a slot: its own and those of the answer that
    a pair rejects. What is only compared with (a hinted self, KTO's exchanged answers) gets no gradient."""
    total = 0
    for step in steps:
        fresh, old = recipe.drawn(step)
        rejected = [row.partner for row in fresh if row.objective == "dpo" and row.partner is not None]
        total += sum(len(predicted(row)) for row in (*fresh, *old, *rejected))
    return total


def _summary(history: Sequence[Measured], fresh: Sequence[TokenRow], replay: Sequence[TokenRow]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name in dict.fromkeys(name for measured in history for name in measured):
        values = [measured[name] for measured in history if name in measured]
        metrics[f"{name}_first"], metrics[f"{name}_last"] = values[0], values[-1]
        metrics[f"{name}_mean"] = sum(values) / len(values)
    metrics["num_fresh"], metrics["num_replay"] = float(len(fresh)), float(len(replay))
    metrics["num_fresh_tokens"] = float(sum(len(predicted(row)) for row in fresh))
    largest = max(Counter(row.principal for row in fresh).values())
    metrics["principal_share"] = largest / len(fresh)
    return metrics
