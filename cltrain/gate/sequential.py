"""Whether a candidate on live traffic does harm, or is shown to do none, beside the incumbent of the same hours.

Outcomes come in order of arrival. They are cut into blocks, each closed as soon as it holds both arms, and every block
gives one difference of means: given what came before it, its expectation is the difference of the arms' means, whatever
the share of either (block E-variables: Turner, Ly and Gruenwald, "Generic E-variables for exact sequential k-sample
tests that allow for optional stopping", 2024). The e-value that bets on them (stats.py) holds at any look. So that
neither arm is asked of other days than the other, nothing is compared across blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from cltrain.gate.stats import e_value
from cltrain.records import Verdict

Arm = Literal["incumbent", "candidate"]


class Outcome(NamedTuple):
    """One episode, or one answer to a request that both got. A score that nobody gave is None, never a number."""

    arm: Arm
    fault: bool
    score: float | None = None  # in [-1, 1]


@dataclass(frozen=True, slots=True)
class Weighed:
    """What one metric says. `harm`: e-value against "the candidate is no worse"; `no_harm`: against "it is worse by the
    margin or more"."""

    metric: str
    num_blocks: int
    mean_loss: float | None  # of the candidate against the incumbent, in [-1, 1]; None: nothing to compare yet
    harm: float
    no_harm: float


def losses(outcomes: Sequence[Outcome], metric: str) -> list[float]:
    """The candidate's loss in every block that is closed: more faults, or less of the score's range."""
    found: list[float] = []
    block: dict[str, list[float]] = {"incumbent": [], "candidate": []}
    for arm, loss in _values(outcomes, metric):
        block[arm].append(loss)
        if all(block.values()):
            theirs, ours = (sum(values) / len(values) for values in block.values())
            found.append(ours - theirs)
            for values in block.values():
                values.clear()
    return found


def weigh(outcomes: Sequence[Outcome], metrics: Sequence[str], margin: float) -> list[Weighed]:
    """The evidence of each metric so far."""
    found = []
    for metric in metrics:
        lost = losses(outcomes, metric)
        mean = sum(lost) / len(lost) if lost else None
        no_harm = e_value([-loss for loss in lost], -margin)
        found.append(Weighed(metric, len(lost), mean, e_value(lost, 0.0), no_harm))
    return found


def judge(evidence: Sequence[Weighed], alpha: float) -> tuple[Verdict, str]:
    """Reject where any metric shows harm, promote where all show that there is none, else hold; and why.

    The chance that equals are ever rejected is at most `alpha` over all metrics together (Ville's inequality,
    Bonferroni over the metrics); so is the chance to promote a candidate that is worse by the margin in any of them.
    """
    for one in evidence:
        if one.harm >= len(evidence) / alpha:
            return Verdict.REJECT, (
                f"it does harm: {one.metric} worse by {one.mean_loss:.2f} on average over {one.num_blocks} comparisons "
                f"(e-value {one.harm:.3g}, limit {len(evidence) / alpha:g})"
            )
    if all(one.no_harm >= 1 / alpha for one in evidence):
        shown = ", ".join(f"{one.metric} (e-value {one.no_harm:.3g}, {one.num_blocks} comparisons)" for one in evidence)
        return Verdict.PROMOTE, f"shown to do no harm in {shown}"
    open_ones = ", ".join(one.metric for one in evidence if one.no_harm < 1 / alpha)
    return Verdict.HOLD, f"neither harm nor its absence is shown in {open_ones}"


def _values(outcomes: Sequence[Outcome], metric: str) -> Iterator[tuple[Arm, float]]:
    """(arm, loss in [0, 1]) of those that say something of the metric."""
    for arm, fault, score in outcomes:
        if metric == "faults":
            yield arm, float(fault)
        elif score is not None:
            yield arm, (1 - score) / 2
