"""How a candidate that the gate would promote takes over: at once, replica by replica, or tried on live traffic first.

Imports no torch.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cltrain.settings import Section

Kind = Literal["all", "rolling", "blue_green", "canary", "shadow"]
Metric = Literal["faults", "score"]
TRIED = ("canary", "shadow")  # kinds that judge the candidate on live traffic before it serves


class RolloutConfig(Section):
    """What mode auto does after the gate's yes; a human's yes moves the alias at once."""

    kind: Kind = "all"
    # canary: share of the new episodes that the candidate answers; shadow: of the requests that it is asked as well.
    # One after the other; after the last comes the promotion.
    weights: tuple[float, ...] = Field((0.05, 0.25), min_length=1)
    step_episodes: int = Field(50, ge=1)  # of the candidate's (shadow: answers), at each weight, before the next
    settle_s: float = Field(300.0, ge=0)  # after its first answer an episode counts with what was said of it by then
    # faults: broken tool calls, empty answers, of a canary errors and time-outs of the server too; score: feedback.
    metrics: tuple[Metric, ...] | None = Field(
        None, min_length=1
    )  # None: both; shadow: faults, nobody rates its answers
    alpha: float = Field(0.05, gt=0, lt=0.5)  # chance to take an equal back, and to promote one that is worse by margin
    margin: float = Field(0.1, gt=0, lt=1)  # more faults per episode, or less of the score's range, than the incumbent
    max_hours: float = Field(24.0, gt=0)
    on_timeout: Literal["back", "promote"] = "back"  # promote: after max_hours without harm, never without evidence
    shadow_in_flight: int = Field(8, ge=1)  # copies being answered; beyond it requests are not copied
    shadow_timeout_s: float = Field(60.0, gt=0)
    grace_s: float = Field(60.0, ge=0)  # before a server unloads what nobody wants any more

    @model_validator(mode="after")
    def _weights_grow(self) -> RolloutConfig:
        if wrong := [weight for weight in self.weights if not 0 < weight < 1]:
            raise ValueError(f"weights are shares between 0 and 1, and one is {wrong[0]:g}: after the last comes all")
        if list(self.weights) != sorted(self.weights):
            raise ValueError(f"weights grow from step to step, and these do not: {', '.join(map(str, self.weights))}")
        if self.kind == "shadow" and "score" in (self.metrics or ()):
            raise ValueError("metrics = 'score' needs answers that somebody sees: kind = 'shadow' has faults alone")
        if self.kind == "canary" and self.settle_s >= self.max_hours * 3600:
            raise ValueError(
                f"settle_s = {self.settle_s:g} is no shorter than max_hours = {self.max_hours:g} "
                f"({self.max_hours * 3600:g} s): no episode of a canary would count before its time is over"
            )
        return self

    @property
    def is_tried(self) -> bool:
        return self.kind in TRIED

    @property
    def judged_by(self) -> tuple[Metric, ...]:
        return self.metrics or (("faults",) if self.kind == "shadow" else ("faults", "score"))
