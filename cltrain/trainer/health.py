"""Signs that a model is collapsing, seen on the anchors and in its weights, before any task shows it.

Watched, not optimised: entropy and how soon answers end against the base (OpenClaw-RL saw the first rise and lengths
fall before scores did), effective rank against the incumbent's. How much of the fresh loss an update could still take
away is only shown: a window that is known already looks like lost plasticity.
"""

from __future__ import annotations

from collections.abc import Sequence

from cltrain.config import HealthConfig
from cltrain.models.adapter import AdapterFile
from cltrain.objectives.geometry import effective_ranks
from cltrain.trainer.shrink import OnAnchors
from cltrain.trainer.terms import Measured

MIN_CHANCE = 1e-3  # below it the chance to end early is noise


def vital_signs(
    adapter: AdapterFile,
    incumbent: AdapterFile | None,
    candidate: OnAnchors,
    base: OnAnchors,
    history: Sequence[Measured],
) -> dict[str, float]:
    """What the report shows of a candidate's health; `plasticity` is the share of the fresh loss that was learned."""
    rank = _mean_rank(adapter)
    signs = {
        "entropy": candidate.entropy,
        "entropy_share": candidate.entropy / base.entropy if base.entropy > 0 else 1.0,
        "ending_ratio": (candidate.ending + MIN_CHANCE) / (base.ending + MIN_CHANCE),
        "effective_rank": rank,
    }
    if incumbent is not None and (before := min(_mean_rank(incumbent), adapter.rank)) > 0:
        signs["rank_share"] = rank / before
    first = history[0].get("nll_fresh")
    if first is not None and first > 0:
        signs["plasticity"] = 1 - history[-1].get("nll_fresh", first) / first
    return signs


def collapse(signs: dict[str, float], health: HealthConfig) -> str | None:
    """Why this candidate must not go on, or None."""
    if signs["entropy_share"] < health.min_entropy_share:
        return (
            f"its entropy on the anchors is {signs['entropy_share']:.2f} of the base's, below health.min_entropy_share "
            f"= {health.min_entropy_share}: it is becoming certain of everything"
        )
    if signs["entropy_share"] > health.max_entropy_share:
        return (
            f"its entropy on the anchors is {signs['entropy_share']:.2f} of the base's, above health.max_entropy_share "
            f"= {health.max_entropy_share}: it is losing its words"
        )
    if signs.get("rank_share", 1.0) < health.min_rank_share:
        return (
            f"its effective rank is {signs['effective_rank']:.2f}, {signs['rank_share']:.2f} of the incumbent's, below "
            f"health.min_rank_share = {health.min_rank_share}: what was learned gives way to one direction"
        )
    ratio = signs["ending_ratio"]
    if not 1 / health.max_ending_ratio <= ratio <= health.max_ending_ratio:
        return (
            f"it ends answers {ratio:.2f} times as soon as the base on the anchors; health.max_ending_ratio allows "
            f"{health.max_ending_ratio} either way"
        )
    return None


def _mean_rank(adapter: AdapterFile) -> float:
    ranks = effective_ranks(adapter)
    return sum(ranks.values()) / len(ranks)
