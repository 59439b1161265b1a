"""How what serves stands against the releases that it must not have lost to: its base, the best so far, the anchor.

The gate compares a candidate with what it would replace; nobody there looks back over many promotions. Pure: no clock,
no store, no server.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cltrain.config import GateConfig
from cltrain.gate.stats import Plan, e_value, lower_bound, upper_bound
from cltrain.gate.stats import means as cluster_means
from cltrain.records import Check, Code, SuiteItem, Verdict


@dataclass(frozen=True, slots=True)
class Standing:
    """Scores in [0, 1] of what serves and of its references on the same items, in the order of `items`."""

    items: tuple[SuiteItem, ...]
    serving: tuple[float, ...]
    references: Mapping[str, tuple[float, ...]]  # by what the reference is: "base", "high-water mark and anchor", ...


def compare(standing: Standing, config: GateConfig) -> list[Check]:
    """One check for every reference and every suite, every stratum and all items together.

    REJECT (an alarm): the mean loss is beyond the margin, and a loss is shown by an e-value whose alpha all of these
    checks share. HOLD (a warning): it is beyond the margin and may be luck, or a smaller loss is shown. Nothing is said
    of a stratum with fewer than `stratum_min_items` items but what evidence shows. ERROR: a score that is none, or
    references without an item to be asked about.
    """
    if not standing.references:
        return []
    if not standing.items:
        reason = "no item of the pool is left to ask: add items to gate.suite, or wait for held-out episodes"
        return [Check("items", Code.SUITE, Verdict.ERROR, reason)]
    columns = (standing.serving, *standing.references.values())
    if any(len(values) != len(standing.items) for values in columns):
        return [Check("items", Code.SUITE, Verdict.ERROR, "some items have no score")]
    if not all(0 <= value <= 1 for values in columns for value in values):  # NaN fails this too
        return [Check("items", Code.SUITE, Verdict.ERROR, "some scores are outside [0, 1]")]
    groups = groups_of(standing.items)
    alpha = config.alpha / (len(groups) * len(standing.references))
    found = []
    for role, values in standing.references.items():
        for name, places in groups.items():
            items = [standing.items[i] for i in places]
            serving, reference = ([column[i] for i in places] for column in (standing.serving, values))
            found.append(_against(f"{name} against {role}", items, serving, reference, alpha, config))
    return found


def groups_of(items: Sequence[SuiteItem]) -> dict[str, list[int]]:
    """Places of the items that are compared together: `overall`, `suite NAME`, `stratum NAME`."""
    groups: dict[str, list[int]] = defaultdict(list)
    for place, item in enumerate(items):
        for name in ("overall", f"suite {item.suite}", f"stratum {item.stratum}"):
            groups[name].append(place)
    return {name: groups[name] for name in sorted(groups)}


def means(standing: Standing) -> dict[str, dict[str, float]]:
    """Group -> the mean score of what serves and of each reference, and `num_items`: what trends are made of."""
    return {
        name: {
            "serving": _mean([standing.serving[i] for i in places]),
            **{role: _mean([values[i] for i in places]) for role, values in standing.references.items()},
            "num_items": float(len(places)),
        }
        for name, places in groups_of(standing.items).items()
    }


def _against(
    name: str,
    items: Sequence[SuiteItem],
    serving: Sequence[float],
    reference: Sequence[float],
    alpha: float,
    config: GateConfig,
) -> Check:
    is_stratum = name.startswith("stratum ")
    margin = config.stratum_margin if is_stratum else config.margin
    pairs = [ours - theirs for ours, theirs in zip(serving, reference, strict=True)]
    differences = cluster_means(pairs, [item.cluster for item in items])  # an episode counts once
    loss = -_mean(differences)
    num = len(differences)
    low, high = lower_bound(differences, alpha, num), upper_bound(differences, alpha, num)
    is_shown = e_value([-d for d in differences], 0.0, Plan(num, alpha)) >= 1 / alpha
    is_large, is_small_group = loss > margin, is_stratum and len(differences) < config.stratum_min_items
    verdict = Verdict.PROMOTE
    if is_large and is_shown:
        verdict = Verdict.REJECT
    elif is_shown or (is_large and not is_small_group):
        verdict = Verdict.HOLD
    said = f"{loss:.3f} below it" if loss > 0 else f"{-loss:.3f} above it"
    about = f"{said}, between {low:+.3f} and {high:+.3f}, on {len(differences)} items, margin {margin:g}"
    return Check(
        name,
        Code.STRATUM if is_stratum else Code.RETENTION,
        verdict,
        f"{about}; it may be luck" if verdict is Verdict.HOLD and not is_shown else about,
        candidate=_mean(serving),
        reference=_mean(reference),
        difference=-loss,
        low=low,
        high=high,
        num_items=len(differences),
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
