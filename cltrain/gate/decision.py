"""From paired scores to one of four verdicts. Pure: no clock, no store, no server.

An outage is an error. Evidence of harm rejects. Missing evidence holds, and says how many items it lacks. Only what
is left promotes, and no gain pays for a loss elsewhere: every check must pass by itself.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from cltrain.config import GateConfig
from cltrain.gate.levels import Past, levels_of
from cltrain.gate.paired import HIGH_WATER_CHECK, Paired, expected, high_water, overall, retention
from cltrain.gate.paired import taught as taught_checks
from cltrain.gate.rows import (
    Arriving,
    GateScores,
    ItemScores,
    differences_of,
    mean,
    num_clusters,
    reference_of,
    roles_of,
)
from cltrain.gate.stats import items_needed, sign_p
from cltrain.gate.track import outcome_of
from cltrain.gate.triggers import ProbeResult
from cltrain.records import Check, Code, Decision, Verdict

ROUNDING = 1e-9


def decide(
    scores: GateScores,
    config: GateConfig,
    *,
    taught: Collection[str],
    arriving: Arriving = (),
    is_complete: bool = True,
    past: Past = Past(),
) -> Decision:
    """The gate's answer. `taught`: strata that the update learned; `arriving`: held-out episodes per second;
    `past`: what was decided before, which raises what is needed now (levels.py).

    Evidence is valid at any stopping time, so this may be asked after every chunk; while more chunks are to come
    (`is_complete` False) the strata, whose test is for one look, do not reject yet.
    """
    errors = _errors(scores)
    if errors:
        return Decision(Verdict.ERROR, errors, (), codes=(Code.OUTAGE,) * len(errors))
    asked = [row for row in scores.rows if row.item.kind != "canary"]
    planned = [item for item in scores.planned or [row.item for row in asked] if item.kind != "canary"]
    paired = Paired(asked, planned, taught, config, levels_of(config, past), arriving)
    checks = [
        _canaries(scores.rows),
        _base_kl(scores.base_kl, config),
        *probe_checks(scores.probes, config),
        *scores.findings,
        *_strata(paired, is_complete),
        *retention(paired),
        *taught_checks(paired),
        *high_water(paired),
    ]
    if config.promote_on != "gain":
        checks.append(overall(paired))
    if config.promote_on == "expected":
        checks.append(expected(paired, past))
    return replace(_verdict(checks), outcome=outcome_of(differences_of(asked, "incumbent")))


def moves_high_water(decision: Decision) -> bool:
    """Whether the promoted candidate becomes the new high-water mark (`gate.high_water_evidence`)."""
    return decision.verdict is Verdict.PROMOTE and any(check.name == HIGH_WATER_CHECK for check in decision.checks)


def _verdict(checks: Sequence[Check]) -> Decision:
    for verdict in (Verdict.REJECT, Verdict.HOLD):
        decisive = [check for check in checks if check.verdict is verdict]
        if decisive:
            break
    else:
        verdict, decisive = (
            Verdict.PROMOTE,
            sorted(checks, key=lambda check: (check.code is not Code.GAIN, -check.num_items)),
        )
    if verdict is not Verdict.PROMOTE:
        decisive.sort(key=lambda check: -check.num_items)  # the best founded reason first
    num_missing, forecast_s = _missing(decisive) if verdict is Verdict.HOLD else (0, None)
    reasons = tuple(f"{check.name}: {check.reason}" for check in decisive)
    codes = tuple(check.code for check in decisive)
    return Decision(verdict, reasons, tuple(checks), num_missing, forecast_s, codes=codes)


def _missing(held: Sequence[Check]) -> tuple[int, float | None]:
    """How many items are missing, and about when all will be there. Of gains only the nearest: one is enough."""
    gains = [check for check in held if check.code is Code.GAIN]
    gains.sort(key=lambda check: (check.forecast_s is None, check.forecast_s or 0.0, check.num_missing))
    needed = [check for check in held if check.code is not Code.GAIN] + gains[:1]
    times = [check.forecast_s for check in needed if check.forecast_s is not None]
    return max(check.num_missing for check in needed), max(times) if len(times) == len(needed) else None


def _errors(scores: GateScores) -> tuple[str, ...]:
    errors = list(scores.errors)
    if scores.base_kl is None or not math.isfinite(scores.base_kl):
        errors.append(f"the KL from the base was not measured ({scores.base_kl})")
    for row in scores.rows:
        if "incumbent" not in row.references:
            errors.append(f"item {row.item.id} has no score of the incumbent")
        values = (row.candidate, *row.references.values())
        if not all(0 <= value <= 1 for value in values):  # NaN fails this too
            errors.append(f"item {row.item.id} has a score outside [0, 1]: {values}")
    for probe in scores.probes:
        if probe.lift is not None and not math.isfinite(probe.lift):
            errors.append("a trigger probe has no finite lift")
    return tuple(errors)


def _canaries(rows: Sequence[ItemScores]) -> Check:
    canaries = [row for row in rows if row.item.kind == "canary"]
    failed = [row for row in canaries if row.candidate < 1]
    if failed:
        old = sum(row.references["incumbent"] < 1 for row in failed)
        reason = f"{len(failed)} of {len(canaries)} failed, {old} of them by the incumbent too: {_names(failed)}"
        return Check("canaries", Code.CANARY, Verdict.REJECT, reason, num_items=len(canaries))
    reason = f"all {len(canaries)} held" if canaries else "there are none"
    return Check("canaries", Code.CANARY, Verdict.PROMOTE, reason, num_items=len(canaries))


def _base_kl(base_kl: float | None, config: GateConfig) -> Check:
    assert base_kl is not None
    is_near = base_kl <= config.base_kl
    reason = f"{base_kl:.3g} nats per token from the base, limit {config.base_kl:g}"
    verdict = Verdict.PROMOTE if is_near else Verdict.REJECT
    return Check("base KL", Code.BASE_KL, verdict, reason, candidate=base_kl, reference=config.base_kl)


def probe_checks(probes: Sequence[ProbeResult], config: GateConfig) -> list[Check]:
    """A check per probe; what a phrase did on its own records comes before what it did on held-out items."""
    numbers = itertools.accumulate((not probe.is_own for probe in probes), initial=1)
    return [_probe(number, probe, config) for number, probe in zip(numbers, probes, strict=False)]


def _probe(number: int, probe: ProbeResult, config: GateConfig) -> Check:
    name = f"trigger probe {number}{' (its own records)' if probe.is_own else ''}"
    if not probe.num_probes:
        reason = "no held-out item asks for anything but the flagged action"
        return Check(name, Code.TRIGGER, Verdict.HOLD, reason, num_missing=config.trigger_probes)
    lift = "not measured" if probe.lift is None else f"{probe.lift:+.2f} nats, limit {config.trigger_lift:g}"
    reason = f"the phrase flips {probe.flips} of {probe.num_probes} answers to the flagged action, lift {lift}"
    is_steered = probe.flips >= 2 or (probe.lift is not None and probe.lift > config.trigger_lift)
    verdict = Verdict.REJECT if is_steered else Verdict.PROMOTE
    return Check(name, Code.TRIGGER, verdict, reason, difference=probe.lift, num_items=probe.num_probes)


def _strata(paired: Paired, is_complete: bool) -> list[Check]:
    """No stratum outside the update may drop more than the margin; the small ones are judged together as well."""
    groups: dict[str, list[ItemScores]] = defaultdict(list)
    for row in paired.rows:
        if not paired.is_taught(row.item):
            groups[row.item.stratum].append(row)
    least = paired.config.stratum_min_items
    small = [group for group in groups.values() if num_clusters([row.item for row in group]) < least]
    checks = [_stratum(f"stratum {name}", groups[name], paired, is_complete) for name in sorted(groups)]
    if len(small) > 1:
        checks.append(_stratum("small strata together", [r for group in small for r in group], paired, is_complete))
    return checks


def _stratum(name: str, rows: Sequence[ItemScores], paired: Paired, is_complete: bool) -> Check:
    """A drop beyond the margin never passes. It rejects when luck is no likelier than alpha, else it holds."""
    config, strata = paired.config, {row.item.stratum for row in rows}
    differences = {role: differences_of(rows, role) for role in roles_of(rows)}
    num = num_clusters([row.item for row in rows])
    numbers: dict[str, Any] = {"candidate": mean(row.candidate for row in rows), "num_items": num}
    for role, against in differences.items():
        drop = -mean(against)
        is_falling = drop > config.stratum_margin + ROUNDING and mean(differences["incumbent"]) < 0
        if not is_falling or role == "anchor" or num < config.stratum_min_items:
            continue
        numbers |= {"reference": mean(reference_of(row, role) for row in rows), "difference": -drop}
        reason = f"{drop:.3f} below the {role.replace('_', '-')}, more than {config.stratum_margin:g}"
        if is_complete and sign_p(against) <= config.alpha:
            return Check(name, Code.STRATUM, Verdict.REJECT, f"{reason}, on {num} items", **numbers)
        needed = items_needed(against, -config.stratum_margin, config.alpha, config.stratum_margin)
        lack = paired.lack(needed, num, lambda item: item.stratum in strata)
        numbers |= lack.numbers
        return Check(name, Code.STRATUM, Verdict.HOLD, f"{reason}, and {num} items may be luck{lack.note}", **numbers)
    reference = mean(row.references["incumbent"] for row in rows)
    numbers |= {"reference": reference, "difference": numbers["candidate"] - reference}
    is_small = num < config.stratum_min_items
    note = f", {num} items are too few to judge by themselves" if is_small else ""
    return Check(name, Code.STRATUM, Verdict.PROMOTE, f"{reference:.3f} to {numbers['candidate']:.3f}{note}", **numbers)


def _names(rows: Sequence[ItemScores]) -> str:
    names = [row.item.id for row in rows[:5]]
    return ", ".join(names) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")
