"""What was measured about a candidate: paired scores of items, and how rows become independent differences.

The unit of all evidence is the cluster: items of one episode are averaged first, so that 50 episodes of 4 turns count
as 50. What is called a number of items in the gate is a number of clusters; items without one count by themselves.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cltrain.gate.stats import means
from cltrain.gate.triggers import ProbeResult
from cltrain.records import Check, SuiteItem

Role = Literal["incumbent", "high_water", "anchor"]


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
    errors: tuple[str, ...] = ()
    planned: tuple[SuiteItem, ...] = ()  # all that may be scored, drawn before the first; (): `rows` are all


Arriving = Sequence[tuple[SuiteItem, float]]
"""An item of each stratum of the evaluation split, and how many episodes with such a one came in per second lately."""


def roles_of(rows: Sequence[ItemScores]) -> list[Role]:
    """The references that were scored; the incumbent always, so that no items mean no evidence and not no check."""
    others: tuple[Role, ...] = ("high_water", "anchor")
    return ["incumbent", *(role for role in others if any(role in row.references for row in rows))]


def reference_of(row: ItemScores, role: Role) -> float:
    return row.references.get(role, row.references["incumbent"])


def num_clusters(items: Sequence[SuiteItem]) -> int:
    """How many items that share nothing with each other these are worth."""
    clusters = [item.cluster for item in items if item.cluster is not None]
    return len(items) - len(clusters) + len(set(clusters))


def differences_of(
    rows: Sequence[ItemScores], role: Role, counted: Callable[[ItemScores, float], float] | None = None
) -> list[float]:
    """Candidate less reference, averaged within each cluster; `counted` may change an item's before the average."""
    differences = [row.candidate - row.references.get(role, row.references["incumbent"]) for row in rows]
    if counted is not None:
        differences = [counted(row, d) for row, d in zip(rows, differences, strict=True)]
    return means(differences, [row.item.cluster for row in rows])


def by(rows: Sequence[ItemScores], key: Callable[[SuiteItem], str]) -> dict[str, list[float]]:
    """Differences to the incumbent of each group of rows."""
    groups: dict[str, list[ItemScores]] = defaultdict(list)
    for row in rows:
        groups[key(row.item)].append(row)
    return {name: differences_of(group, "incumbent") for name, group in groups.items()}


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)
