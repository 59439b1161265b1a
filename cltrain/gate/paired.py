"""What the paired scores of one decision show: no loss beyond the margin, a gain, harm. Each check is a test by itself.

Evidence is valid at any stopping time as long as its plan (how many items there may be, at which level) was fixed
before the first of them was scored: so everything planned is counted over all items drawn, not those scored so far.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from cltrain.config import GateConfig
from cltrain.gate.levels import Levels, Past
from cltrain.gate.rows import Arriving, ItemScores, Role, by, differences_of, mean, num_clusters, reference_of, roles_of
from cltrain.gate.stats import Plan, e_value, items_for_margin, items_needed, lower_bound, upper_bound
from cltrain.gate.suites import is_taught
from cltrain.gate.track import expected_gain
from cltrain.records import Check, Code, SuiteItem, Verdict

HIGH_WATER_CHECK = "high-water mark moves"


class Lack(NamedTuple):
    """What a hold lacks: `note` goes on its reason, the rest into the check."""

    note: str
    num_missing: int
    forecast_s: float | None

    @property
    def numbers(self) -> dict[str, Any]:
        return {"num_missing": self.num_missing, "forecast_s": self.forecast_s}


@dataclass(frozen=True)
class Paired:
    """The scored rows without canaries, in the order drawn, and all items that may be scored."""

    rows: Sequence[ItemScores]
    planned: Sequence[SuiteItem]
    taught: Collection[str]
    config: GateConfig
    levels: Levels
    arriving: Arriving = ()

    def is_taught(self, item: SuiteItem) -> bool:
        return is_taught(item.stratum, self.taught)

    def is_protected(self, item: SuiteItem) -> bool:
        return item.kind == "retention" or not self.is_taught(item)

    def rows_of(self, is_meant: Callable[[SuiteItem], bool]) -> list[ItemScores]:
        return [row for row in self.rows if is_meant(row.item)]

    def num_planned(self, is_meant: Callable[[SuiteItem], bool]) -> int:
        return num_clusters([item for item in self.planned if is_meant(item)])

    def num_taught(self, key: Callable[[SuiteItem], str]) -> dict[str, int]:
        """How many of the planned items that were taught are in each group."""
        groups: dict[str, list[SuiteItem]] = defaultdict(list)
        for item in self.planned:
            if self.is_taught(item):
                groups[key(item)].append(item)
        return {name: num_clusters(items) for name, items in groups.items()}

    def lack(self, needed: int, num_items: int, is_meant: Callable[[SuiteItem], bool]) -> Lack:
        """How many of the meant items, of which it takes `needed` in all, are missing, and when they will be there.

        Others get half of what one gate draws, or all of them where they are fewer.
        """
        ours = [item for item in self.planned if is_meant(item)]
        size = self.config.items_per_gate
        most = size - min(len(self.planned) - len(ours), size // 2)
        most = most * num_clusters(ours) // len(ours) if ours else most
        missing = max(1, needed - num_items)
        if needed > most:
            note = f"; that takes about {needed} of them, and one gate draws at most {most}: raise gate.items_per_gate"
            return Lack(note, missing, None)
        rate_per_s = sum(rate for item, rate in self.arriving if is_meant(item))
        return Lack("", missing, missing / rate_per_s if rate_per_s else None)

    @cached_property
    def harm_alpha(self) -> float:
        """All tests that may find harm share one alpha for their false alarms."""
        num_groups = len(self.num_taught(lambda item: item.suite)) + len(self.num_taught(lambda item: item.stratum))
        return self.config.alpha / (len(roles_of(self.rows)) + 1 + num_groups)

    def is_harm(self, differences: Sequence[float], num_planned: int) -> bool:
        """Whether a loss is shown."""
        against = [-d for d in differences]
        return e_value(against, 0.0, Plan(num_planned, self.harm_alpha)) >= 1 / self.harm_alpha


def retention(paired: Paired) -> list[Check]:
    """Non-inferiority on what was not taught, against every reference.

    When there are too few such items for any answer, the taught ones join with their gains cut to zero.
    """
    least = items_for_margin(paired.config.margin, paired.levels.non_inferior)
    is_joined = paired.num_planned(paired.is_protected) < least

    def is_meant(item: SuiteItem) -> bool:
        return is_joined or paired.is_protected(item)

    rows = paired.rows_of(is_meant)
    num_joined = sum(not paired.is_protected(row.item) for row in rows)

    def no_gain(row: ItemScores, difference: float) -> float:
        return difference if paired.is_protected(row.item) else min(0.0, difference)

    note = f" ({num_joined} of them taught, their gains not counted)" if num_joined else ""
    checks = []
    for role in roles_of(rows):
        name = f"retention against {role.replace('_', '-')}"
        checks.append(_non_inferior(name, paired, rows, differences_of(rows, role, no_gain), is_meant, role, note))
    return checks


def overall(paired: Paired) -> Check:
    """Non-inferiority to the incumbent on all items."""
    rows = paired.rows
    return _non_inferior("overall", paired, rows, differences_of(rows, "incumbent"), lambda _: True, "incumbent")


def _non_inferior(
    name: str,
    paired: Paired,
    rows: Sequence[ItemScores],
    differences: Sequence[float],
    is_meant: Callable[[SuiteItem], bool],
    role: Role,
    note: str = "",
) -> Check:
    alpha, margin, num_planned = paired.levels.non_inferior, paired.config.margin, paired.num_planned(is_meant)
    low, high = (bound(differences, alpha, num_planned) for bound in (lower_bound, upper_bound))
    numbers: dict[str, Any] = {"low": low, "high": high, "num_items": len(differences)}
    if rows:
        numbers["candidate"] = mean(row.candidate for row in rows)
        numbers["reference"] = mean(reference_of(row, role) for row in rows)
        numbers["difference"] = mean(differences)
    about = f"between {low:+.3f} and {high:+.3f} of it on {len(differences)} items, margin {margin:g}{note}"
    if e_value(differences, -margin, Plan(num_planned, alpha)) >= 1 / alpha:
        return Check(name, Code.RETENTION, Verdict.PROMOTE, about, **numbers)
    # an older reference may be out of reach already; the candidate is to blame only for what it lost itself
    is_to_blame = role == "incumbent" or (bool(rows) and mean(differences_of(rows, "incumbent")) < 0)
    if is_to_blame and paired.is_harm(differences, num_planned):
        return Check(name, Code.RETENTION, Verdict.REJECT, f"worse: {about}", **numbers)
    lack = paired.lack(items_needed(differences, -margin, alpha, margin), len(differences), is_meant)
    numbers |= lack.numbers
    return Check(name, Code.RETENTION, Verdict.HOLD, f"not shown: {about}{lack.note}", **numbers)


def taught(paired: Paired) -> list[Check]:
    """Gain per suite, and harm in any stratum that was taught. A gain in one suite is enough, a loss in none is."""
    rows = paired.rows_of(paired.is_taught)
    suites, strata = by(rows, lambda item: item.suite), by(rows, lambda item: item.stratum)
    num_in_suite = paired.num_taught(lambda item: item.suite)
    num_in_stratum = paired.num_taught(lambda item: item.stratum)
    alpha = paired.levels.gain / max(1, len(num_in_suite))
    gained = {n for n, d in suites.items() if e_value(d, 0.0, Plan(num_in_suite[n], alpha)) >= 1 / alpha}
    is_needed = paired.config.promote_on == "gain" and not gained
    checks = [_gain(n, suites[n], num_in_suite[n], alpha, paired, is_needed=is_needed) for n in sorted(suites)]
    if not suites and paired.config.promote_on == "gain":
        lack = paired.lack(items_needed([], 0.0, paired.levels.gain, paired.config.margin), 0, paired.is_taught)
        reason = f"no held-out item asks for what was taught{lack.note}"
        checks.append(Check("gain", Code.GAIN, Verdict.HOLD, reason, **lack.numbers))
    for name in sorted(strata):
        if paired.is_harm(strata[name], num_in_stratum[name]):
            difference = mean(strata[name])
            reason = f"was taught and got worse by {-difference:.3f}"
            numbers: dict[str, Any] = {"difference": difference, "num_items": len(strata[name])}
            checks.append(Check(f"stratum {name}", Code.TAUGHT, Verdict.REJECT, reason, **numbers))
    return checks


def _gain(
    suite: str, differences: Sequence[float], num_planned: int, alpha: float, paired: Paired, *, is_needed: bool
) -> Check:
    low, high = (bound(differences, alpha, num_planned) for bound in (lower_bound, upper_bound))
    about = f"{mean(differences):+.3f}, within [{low:+.3f}, {high:+.3f}], on {len(differences)} taught items"
    numbers: dict[str, Any] = {"difference": mean(differences), "low": low, "high": high, "num_items": len(differences)}
    verdict = Verdict.PROMOTE
    if paired.is_harm(differences, num_planned):
        verdict, about = Verdict.REJECT, f"lost what was taught: {about}"
    elif is_needed:
        needed = items_needed(differences, 0.0, alpha, paired.config.margin)
        lack = paired.lack(needed, len(differences), lambda item: item.suite == suite and paired.is_taught(item))
        verdict, about = Verdict.HOLD, f"not shown: {about}{lack.note}"
        numbers |= lack.numbers
    return Check(f"gain in {suite}", Code.GAIN, verdict, about, **numbers)


def expected(paired: Paired, past: Past) -> Check:
    """Where no gain must be shown, a loss must not be what this trainer's record makes one expect."""
    name, config, alpha = "gain by record", paired.config, paired.levels.gain
    differences = differences_of(paired.rows, "incumbent")
    lack = paired.lack(items_needed(differences, 0.0, alpha, config.margin), len(differences), lambda _: True)
    if not differences:
        return Check(name, Code.GAIN, Verdict.HOLD, f"no item was asked{lack.note}", **lack.numbers)
    value = expected_gain(differences, past.record, config.margin, config.track_record)
    reason = f"{value:+.4f} expected, by this and the {len(past.record)} candidates before"
    numbers: dict[str, Any] = {"difference": mean(differences), "num_items": len(differences)}
    if value >= 0:
        return Check(name, Code.GAIN, Verdict.PROMOTE, reason, **numbers)
    return Check(name, Code.GAIN, Verdict.HOLD, f"{reason}{lack.note}", **numbers, **lack.numbers)


def high_water(paired: Paired) -> list[Check]:
    """Present only when the candidate beats the high-water mark by overwhelming evidence."""
    differences, needed = differences_of(paired.rows, "high_water"), paired.config.high_water_evidence
    evidence = e_value(differences, 0.0, Plan(paired.num_planned(lambda _: True), 1 / needed))
    if evidence < needed:
        return []
    reason = f"evidence {evidence:.3g} that it is better than the best so far, {needed:g} needed"
    numbers: dict[str, Any] = {"difference": mean(differences), "num_items": len(differences)}
    return [Check(HIGH_WATER_CHECK, Code.HIGH_WATER, Verdict.PROMOTE, reason, **numbers)]
