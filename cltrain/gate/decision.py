"""From paired scores to one of four verdicts. Pure: no clock, no store, no server.

An outage is an error. Evidence of harm rejects. Missing evidence holds, and says how many items it lacks. Only what
is left promotes, and no gain pays for a loss elsewhere: every check must pass by itself.

The unit of all evidence is the cluster: items of one episode are averaged first, so that 50 episodes of 4 turns count
as 50. What is called a number of items below is a number of clusters; items without one count by themselves.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from cltrain.config import GateConfig
from cltrain.gate.levels import Levels, Past, levels_of
from cltrain.gate.stats import e_value, items_for_margin, items_needed, lower_bound, means, sign_p, upper_bound
from cltrain.gate.suites import is_taught
from cltrain.gate.track import expected_gain, outcome_of
from cltrain.gate.triggers import ProbeResult
from cltrain.records import Check, Code, Decision, SuiteItem, Verdict

Role = Literal["incumbent", "high_water", "anchor"]
HIGH_WATER_CHECK = "high-water mark moves"
ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class ItemScores:
    """How candidate and references answered one item, each in [0, 1]. A role whose release is the incumbent's (or
    another role's) may be left out; the incumbent may not."""

    item: SuiteItem
    candidate: float
    references: Mapping[Role, float]


@dataclass(frozen=True, slots=True)
class GateScores:
    """Everything that was measured about one candidate. `errors` names what could not be measured."""

    rows: tuple[ItemScores, ...]
    base_kl: float | None  # mean token KL(base || candidate) on the pinned anchors, nats; None: not measured
    probes: tuple[ProbeResult, ...] = ()
    findings: tuple[Check, ...] = ()  # what others looked at and say by themselves (character, detectors)
    errors: tuple[str, ...] = field(default=())


def decide(
    scores: GateScores,
    config: GateConfig,
    *,
    taught: Collection[str],
    rate_per_s: float | None = None,
    is_complete: bool = True,
    past: Past = Past(),
) -> Decision:
    """The gate's answer. `taught`: strata that the update learned; `rate_per_s`: held-out episodes arriving per second;
    `past`: what was decided before, which raises what is needed now (levels.py).

    Evidence is valid at any stopping time, so this may be asked after every chunk; while more chunks are to come
    (`is_complete` False) the strata, whose test is for one look, do not reject yet.
    """
    errors = _errors(scores)
    if errors:
        return Decision(Verdict.ERROR, errors, (), codes=(Code.OUTAGE,) * len(errors))
    asked = [row for row in scores.rows if row.item.kind != "canary"]
    strata = {stratum for stratum in {row.item.stratum for row in asked} if is_taught(stratum, taught)}
    taught_rows = [row for row in asked if row.item.stratum in strata]
    untaught_rows = [row for row in asked if row.item.stratum not in strata]
    protected = [row for row in asked if row.item.kind == "retention" or row.item.stratum not in strata]
    harm_alpha = config.alpha / _num_harm_tests(asked, taught_rows)
    levels = levels_of(config, past)
    checks = [
        _canaries(scores.rows),
        _base_kl(scores.base_kl, config),
        *_probes(scores.probes, config),
        *scores.findings,
        *_strata(untaught_rows, config, is_complete),
        *_retention(protected, taught_rows, config, levels, harm_alpha),
        *_taught(taught_rows, config, levels, harm_alpha),
        *_high_water(asked, config),
    ]
    differences = _differences(asked, "incumbent")
    if config.promote_on != "gain":
        checks.append(_non_inferior("overall", asked, differences, config, levels, harm_alpha))
    if config.promote_on == "expected":
        checks.append(_expected(differences, config, levels, past))
    return replace(_verdict(checks, rate_per_s), outcome=outcome_of(differences))


def moves_high_water(decision: Decision) -> bool:
    """Whether the promoted candidate becomes the new high-water mark (`gate.high_water_evidence`)."""
    return decision.verdict is Verdict.PROMOTE and any(check.name == HIGH_WATER_CHECK for check in decision.checks)


def _num_harm_tests(asked: Sequence[ItemScores], taught: Sequence[ItemScores]) -> int:
    """How many tests may find harm: their false alarms share one alpha."""
    suites, strata = {row.item.suite for row in taught}, {row.item.stratum for row in taught}
    return len(roles_of(asked)) + 1 + len(suites) + len(strata)


def _verdict(checks: Sequence[Check], rate_per_s: float | None) -> Decision:
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
    num_missing = max((check.num_missing for check in decisive), default=0) if verdict is Verdict.HOLD else 0
    forecast_s = num_missing / rate_per_s if num_missing and rate_per_s else None
    reasons = tuple(f"{check.name}: {check.reason}" for check in decisive)
    codes = tuple(check.code for check in decisive)
    return Decision(verdict, reasons, tuple(checks), num_missing, forecast_s, codes=codes)


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


def _probes(probes: Sequence[ProbeResult], config: GateConfig) -> list[Check]:
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


def _strata(rows: Sequence[ItemScores], config: GateConfig, is_complete: bool) -> list[Check]:
    """No stratum outside the update may drop more than the margin; the small ones are judged together as well."""
    groups: dict[str, list[ItemScores]] = defaultdict(list)
    for row in rows:
        groups[row.item.stratum].append(row)
    small = [group for group in groups.values() if num_clusters(group) < config.stratum_min_items]
    checks = [_stratum(f"stratum {name}", groups[name], config, is_complete) for name in sorted(groups)]
    if len(small) > 1:
        checks.append(_stratum("small strata together", [r for group in small for r in group], config, is_complete))
    return checks


def _stratum(name: str, rows: Sequence[ItemScores], config: GateConfig, is_complete: bool) -> Check:
    """A drop beyond the margin never passes. It rejects when luck is no likelier than alpha, else it holds."""
    differences = {role: _differences(rows, role) for role in roles_of(rows)}
    num = num_clusters(rows)
    numbers: dict[str, Any] = {"candidate": _mean(row.candidate for row in rows), "num_items": num}
    for role, against in differences.items():
        drop = -_mean(against)
        is_falling = drop > config.stratum_margin + ROUNDING and _mean(differences["incumbent"]) < 0
        if not is_falling or role == "anchor" or num < config.stratum_min_items:
            continue
        numbers |= {"reference": _mean(_reference(row, role) for row in rows), "difference": -drop}
        reason = f"{drop:.3f} below the {role.replace('_', '-')}, more than {config.stratum_margin:g}"
        if is_complete and sign_p(against) <= config.alpha:
            return Check(name, Code.STRATUM, Verdict.REJECT, f"{reason}, on {num} items", **numbers)
        needed = items_needed(against, -config.stratum_margin, config.alpha, config.stratum_margin)
        missing = max(1, needed - num)
        return Check(
            name,
            Code.STRATUM,
            Verdict.HOLD,
            f"{reason}, and {num} items may be luck",
            num_missing=missing,
            **numbers,
        )
    reference = _mean(row.references["incumbent"] for row in rows)
    numbers |= {"reference": reference, "difference": numbers["candidate"] - reference}
    is_small = num < config.stratum_min_items
    note = f", {num} items are too few to judge by themselves" if is_small else ""
    return Check(name, Code.STRATUM, Verdict.PROMOTE, f"{reference:.3f} to {numbers['candidate']:.3f}{note}", **numbers)


def _retention(
    protected: Sequence[ItemScores],
    taught: Sequence[ItemScores],
    config: GateConfig,
    levels: Levels,
    harm_alpha: float,
) -> list[Check]:
    """Non-inferiority on what was not taught, against every reference.

    When there are too few such items for any answer, the taught ones join with their gains cut to zero.
    """
    least = items_for_margin(config.margin, levels.non_inferior)
    ids = {row.item.id for row in protected}
    joined = [row for row in taught if row.item.id not in ids] if num_clusters(protected) < least else []
    rows = [*protected, *joined]
    checks = []
    for role in roles_of(rows):
        counted = (lambda row, d: d if row.item.id in ids else min(0.0, d)) if joined else None
        differences = _differences(rows, role, counted)
        name = f"retention against {role.replace('_', '-')}"
        checks.append(_non_inferior(name, rows, differences, config, levels, harm_alpha, role, num_joined=len(joined)))
    return checks


def _non_inferior(
    name: str,
    rows: Sequence[ItemScores],
    differences: Sequence[float],
    config: GateConfig,
    levels: Levels,
    harm_alpha: float,
    role: Role = "incumbent",
    num_joined: int = 0,
) -> Check:
    alpha, margin = levels.non_inferior, config.margin
    low, high = lower_bound(differences, alpha), upper_bound(differences, alpha)
    numbers: dict[str, Any] = {"low": low, "high": high, "num_items": len(differences)}
    if rows:
        numbers["candidate"] = _mean(row.candidate for row in rows)
        numbers["reference"] = _mean(_reference(row, role) for row in rows)
        numbers["difference"] = _mean(differences)
    about = f"between {low:+.3f} and {high:+.3f} of it on {len(differences)} items, margin {margin:g}"
    if num_joined:
        about += f" ({num_joined} of them taught, their gains not counted)"
    if low > -margin:
        return Check(name, Code.RETENTION, Verdict.PROMOTE, about, **numbers)
    # an older reference may be out of reach already; the candidate is to blame only for what it lost itself
    is_to_blame = role == "incumbent" or (bool(rows) and _mean(_differences(rows, "incumbent")) < 0)
    if is_to_blame and e_value([-d for d in differences], 0.0) >= 1 / harm_alpha:
        return Check(name, Code.RETENTION, Verdict.REJECT, f"worse: {about}", **numbers)
    missing = max(1, items_needed(differences, -margin, alpha, margin) - len(differences))
    return Check(name, Code.RETENTION, Verdict.HOLD, f"not shown: {about}", num_missing=missing, **numbers)


def _taught(rows: Sequence[ItemScores], config: GateConfig, levels: Levels, harm_alpha: float) -> list[Check]:
    """Gain per suite, and harm in any stratum that was taught. A gain in one suite is enough, a loss in none is."""
    suites = _by(rows, lambda row: row.item.suite)
    strata = _by(rows, lambda row: row.item.stratum)
    alpha = levels.gain / max(1, len(suites))
    gained = {name for name, differences in suites.items() if e_value(differences, 0.0) >= 1 / alpha}
    checks = [
        _gain(name, suites[name], alpha, harm_alpha, config, is_needed=config.promote_on == "gain" and not gained)
        for name in sorted(suites)
    ]
    if not suites and config.promote_on == "gain":
        missing = items_needed([], 0.0, levels.gain, config.margin)
        reason = "no held-out item asks for what was taught"
        checks.append(Check("gain", Code.GAIN, Verdict.HOLD, reason, num_missing=missing))
    for name in sorted(strata):
        if e_value([-d for d in strata[name]], 0.0) >= 1 / harm_alpha:
            difference = _mean(strata[name])
            reason = f"was taught and got worse by {-difference:.3f}"
            numbers: dict[str, Any] = {"difference": difference, "num_items": len(strata[name])}
            checks.append(Check(f"stratum {name}", Code.TAUGHT, Verdict.REJECT, reason, **numbers))
    return checks


def _gain(
    suite: str, differences: Sequence[float], alpha: float, harm_alpha: float, config: GateConfig, *, is_needed: bool
) -> Check:
    low, high = lower_bound(differences, alpha), upper_bound(differences, alpha)
    about = f"{_mean(differences):+.3f}, within [{low:+.3f}, {high:+.3f}], on {len(differences)} taught items"
    verdict, missing = Verdict.PROMOTE, 0
    if e_value([-d for d in differences], 0.0) >= 1 / harm_alpha:
        verdict, about = Verdict.REJECT, f"lost what was taught: {about}"
    elif is_needed:
        verdict, about = Verdict.HOLD, f"not shown: {about}"
        missing = max(1, items_needed(differences, 0.0, alpha, config.margin) - len(differences))
    numbers: dict[str, Any] = {"difference": _mean(differences), "low": low, "high": high}
    return Check(
        f"gain in {suite}", Code.GAIN, verdict, about, num_items=len(differences), num_missing=missing, **numbers
    )


def _expected(differences: Sequence[float], config: GateConfig, levels: Levels, past: Past) -> Check:
    """Where no gain must be shown, a loss must not be what this trainer's record makes one expect; without a record, a
    gain must be shown after all."""
    name, num = "gain by record", len(differences)
    evidence = e_value(differences, 0.0)
    numbers: dict[str, Any] = {"num_items": num}
    if num:
        numbers["difference"] = _mean(differences)
    if len(past.record) >= config.track_record and num:
        expected = expected_gain(differences, past.record)
        reason = f"{expected:+.4f} expected, by this and the {len(past.record)} candidates before"
        if expected >= 0:
            return Check(name, Code.GAIN, Verdict.PROMOTE, reason, **numbers)
    else:
        left = config.track_record - len(past.record)
        reason = f"e-value {evidence:.3g} that it is better, {1 / levels.gain:g} needed until {left} more were judged"
        if evidence >= 1 / levels.gain:
            return Check(name, Code.GAIN, Verdict.PROMOTE, reason, **numbers)
    missing = max(1, items_needed(differences, 0.0, levels.gain, config.margin) - num)
    return Check(name, Code.GAIN, Verdict.HOLD, reason, num_missing=missing, **numbers)


def _high_water(rows: Sequence[ItemScores], config: GateConfig) -> list[Check]:
    """Present only when the candidate beats the high-water mark by overwhelming evidence."""
    differences = _differences(rows, "high_water")
    evidence = e_value(differences, 0.0)
    if evidence < config.high_water_evidence:
        return []
    reason = f"evidence {evidence:.3g} that it is better than the best so far, {config.high_water_evidence:g} needed"
    numbers: dict[str, Any] = {"difference": _mean(differences), "num_items": len(differences)}
    return [Check(HIGH_WATER_CHECK, Code.HIGH_WATER, Verdict.PROMOTE, reason, **numbers)]


def roles_of(rows: Sequence[ItemScores]) -> list[Role]:
    """The references that were scored; the incumbent always, so that no items mean no evidence and not no check."""
    others: tuple[Role, ...] = ("high_water", "anchor")
    return ["incumbent", *(role for role in others if any(role in row.references for row in rows))]


def _reference(row: ItemScores, role: Role) -> float:
    return row.references.get(role, row.references["incumbent"])


def num_clusters(rows: Sequence[ItemScores]) -> int:
    """How many items that share nothing with each other these are worth."""
    clusters = [row.item.cluster for row in rows if row.item.cluster is not None]
    return len(rows) - len(clusters) + len(set(clusters))


def _differences(
    rows: Sequence[ItemScores], role: Role, counted: Callable[[ItemScores, float], float] | None = None
) -> list[float]:
    """Candidate less reference, averaged within each cluster; `counted` may change an item's before the average."""
    differences = [row.candidate - row.references.get(role, row.references["incumbent"]) for row in rows]
    if counted is not None:
        differences = [counted(row, d) for row, d in zip(rows, differences, strict=True)]
    return means(differences, [row.item.cluster for row in rows])


def _by(rows: Sequence[ItemScores], key: Callable[[ItemScores], str]) -> dict[str, list[float]]:
    """Differences to the incumbent of each group of rows."""
    groups: dict[str, list[ItemScores]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return {name: _differences(group, "incumbent") for name, group in groups.items()}


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def _names(rows: Sequence[ItemScores]) -> str:
    names = [row.item.id for row in rows[:5]]
    return ", ".join(names) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")
