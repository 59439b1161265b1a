"""The nouns that stages pass to each other: plain frozen dataclasses, no behaviour beyond small derived facts.

Times are seconds since the epoch. Log-probs are natural. A field that may be unknown is None, never a stand-in value.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

Message = dict[str, Any]
"""An OpenAI chat message: role, content, and for the assistant tool_calls with `arguments` as a JSON string."""

Tool = dict[str, Any]
"""An OpenAI tool definition: {"type": "function", "function": {"name", "description", "parameters"}}."""

Split = Literal["train", "eval"]

UNDONE = frozenset({"rejected", "rolled_back", "deleted"})
"""Statuses of a release that answers nobody any more: an episode that is pinned to one goes on elsewhere."""

Objective = Literal["sft", "dpo", "kto", "policy", "hindsight"]
"""What a record is learned by: likelihood, a pair, a lone label, a scored sample, or itself having seen a hint."""


class Verdict(StrEnum):
    """What the gate says. Only promote ever serves."""

    PROMOTE = "promote"
    HOLD = "hold"
    REJECT = "reject"
    ERROR = "error"


class Code(StrEnum):
    """What a check of the gate is about; with its verdict, why a candidate may or may not serve. The whole list."""

    INTEGRITY = "integrity"  # the file: not finite, another base, another shape, a broken bound
    CANARY = "canary"  # something forbidden was done or said
    BASE_KL = "base_kl"
    TRIGGER = "trigger"  # a phrase steers it
    REFUSAL = "refusal"  # it does harm that its base refuses
    OVER_REFUSAL = "over_refusal"  # it refuses what is harmless
    PERSONA = "persona"  # it says other things of itself than its base
    SYCOPHANCY = "sycophancy"  # it agrees with what is wrong
    TOOL_CALLS = "tool_calls"  # its calls are broken
    ASKS_BACK = "asks_back"
    LENGTH = "length"
    ENTROPY = "entropy"
    CONTAGION = "contagion"  # phrases or traits move between agents
    SPECTRUM = "spectrum"  # its weights look like none of this agent's before
    OVERFIT = "overfit"  # it answers known questions better than new ones
    STRATUM = "stratum"  # one skill was lost
    RETENTION = "retention"  # not shown to be as good as incumbent, high-water mark or base
    TAUGHT = "taught"  # what was taught got worse
    GAIN = "gain"
    HIGH_WATER = "high_water"
    SUITE = "suite"  # a suite is too small for its margin, changed, or does not answer the same twice
    WINDOW = "window"  # there was nothing that may be learned, or the day's displacement is spent
    TRAINING = "training"  # it broke down, or its result could not be brought within its bounds: no candidate
    OUTAGE = "outage"  # a server, a judge or a disk failed, or something moved meanwhile


class LearningMode(StrEnum):
    OFF = "off"
    OBSERVE = "observe"
    APPROVE = "approve"
    AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer of a model inside an episode. Token truth where the server gave it, else None."""

    id: str
    record: str
    turn: int  # index in the trajectory's messages of the assistant message this answer became
    release: str
    prompt_ids: tuple[int, ...] | None = None
    completion_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Feedback:
    """Something said about a generation or a whole episode; late, repeatable, with a source."""

    id: str
    target: str  # a generation id or a trajectory id
    score: float | None = None  # in [-1, 1]
    text: str | None = None
    correction: Message | None = None  # the assistant message that should have been sent
    source: str = "user"  # user, operator, verifier, ...
    principal: str | None = None
    created_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One episode of the agent's work, with all that was said about it."""

    id: str
    agent: str
    session: str
    principal: str
    messages: tuple[Message, ...]
    producers: tuple[str | None, ...]  # per message: agent, user, tool, system, operator, a model's name; None unknown
    tools: tuple[Tool, ...] = ()
    generations: tuple[Generation, ...] = ()
    feedback: tuple[Feedback, ...] = ()
    split: Split = "train"
    release: str | None = None  # the release that answered; None when imported from elsewhere
    is_mixed: bool = False  # a rollback changed the adapter midway: never learned from
    end: str = "ok"  # ok, open, timeout, aborted, error; left: the client hung up
    created_at: float = 0.0
    seq: int = 0
    earlier_tools: tuple[tuple[int, tuple[Tool, ...]], ...] = ()  # (before which message, what was offered), in order

    def tools_at(self, turn: int) -> tuple[Tool, ...]:
        """What the request of this answer offered."""
        return next((tools for before, tools in self.earlier_tools if turn < before), self.tools)


@dataclass(frozen=True, slots=True)
class Example:
    """What may be learned from one episode: a prefix of messages and the assistant turns that are targets."""

    record: str
    principal: str
    stratum: str
    messages: tuple[Message, ...]
    targets: tuple[int, ...]  # indices of the assistant messages that carry loss
    tools: tuple[Tool, ...] = ()
    kind: Literal["success", "correction", "rehearsal", "critique", "failure"] = "success"
    weight: float = 1.0  # of its loss; a success has that of its score
    prompt_ids: tuple[int, ...] | None = None  # recorded ids, when one untouched generation is the whole target
    completion_ids: tuple[int, ...] | None = None
    objective: Objective = "sft"
    value: float = 1.0  # kto: +1 or -1; policy: the score, then the advantage; hindsight: -1 if also scored as bad
    rejected: Message | None = None  # dpo: the answer that the target replaces
    hint: str | None = None  # hindsight: what was said of the target
    behaviour: tuple[float, ...] | None = None  # policy: recorded log-probs of completion_ids
    release: str | None = None  # policy: what generated completion_ids
    notes: tuple[str, ...] = ()  # what the report should say of how it is learned
    source: str | None = None  # who called it right or wrong: user, operator, verifier, ...; None: nobody had to


@dataclass(frozen=True, slots=True)
class Aside:
    """A record of a window from which an update does not learn: what becomes of it, and why."""

    record: str
    status: Literal["waiting", "quarantined", "unusable"]  # unusable: until new feedback or other rules
    reason: str


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One training row: T token ids and T loss weights (0 for everything the agent did not write)."""

    record: str
    stratum: str
    principal: str
    ids: tuple[int, ...]
    weights: tuple[float, ...]
    objective: Objective = "sft"
    value: float = 1.0  # kto: +1 desirable, -1 undesirable; policy: the advantage; else unused
    behaviour: tuple[float, ...] | None = None  # policy: log-probs of the predicted tokens when they were sampled
    partner: TokenRow | None = None  # dpo: the rejected answer; hindsight: the same answer behind the hint


def is_claim(one: Example | TokenRow) -> bool:
    """Whether learning it makes its own answer likelier: what is verified, scanned, asked by the gate and rehearsed.

    All else is negative: it only says what was wrong, by a score or in words.
    """
    return one.objective in ("sft", "dpo") or (one.objective == "kto" and one.value > 0)


@dataclass(frozen=True, slots=True)
class Read:
    """Which record filled which slot of which step: what `forget` needs to replay an update without it."""

    step: int
    slot: int
    record: str


@dataclass(frozen=True, slots=True)
class BoundReport:
    """How far a candidate moved, measured on the exported file; every *_limit is what was configured."""

    step_frobenius: float  # max over modules of ||dW_cand - dW_inc||_F / ||W0||_F
    step_frobenius_limit: float
    drift_frobenius: float  # max over modules of ||dW_cand||_F / ||W0||_F
    drift_frobenius_limit: float
    step_spectral: float  # the same with the spectral norm of the difference; still over ||W0||_F
    step_spectral_limit: float
    drift_spectral: float
    drift_spectral_limit: float
    step_kl: float  # mean token KL(incumbent || candidate) on the anchors, nats
    step_kl_limit: float
    drift_kl: float  # mean token KL(base || candidate) on the anchors, nats
    drift_kl_limit: float
    day_frobenius: float  # step_frobenius and those of all that were promoted in the 24 hours before
    day_frobenius_limit: float
    num_tokens: int  # supervised tokens of the fresh and replayed rows that were trained on
    num_tokens_limit: int
    num_steps: int
    num_steps_limit: int
    shrink: float  # fraction of the way from incumbent to trained weights that was kept, in (0, 1]

    @property
    def broken(self) -> tuple[str, ...]:
        """Names of the distances that exceed their limit."""
        return tuple(name for name in BOUNDS if not getattr(self, name) <= getattr(self, f"{name}_limit"))

    @property
    def holds(self) -> bool:
        return not self.broken


BOUNDS = (
    "step_frobenius", "drift_frobenius", "step_spectral", "drift_spectral", "step_kl", "drift_kl", "day_frobenius",
    "num_tokens", "num_steps",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Candidate:
    """What one update made: an adapter directory (not yet named), how it got there, and what it read."""

    path: str
    bounds: BoundReport
    metrics: dict[str, float]
    reads: tuple[Read, ...]
    num_steps: int


@dataclass(frozen=True, slots=True)
class Release:
    """An adapter that has a name: sealed, immutable. `path` is None for the bare base."""

    name: str
    agent: str
    number: int
    digest: str
    parent: str | None
    path: str | None
    status: str  # candidate, released, rejected, held, rolled_back, deleted
    created_at: float = 0.0
    manifest: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Alias:
    """agent -> release. `version` grows by one at every move, `fence` is the highest lease number that moved it."""

    agent: str
    release: str
    version: int
    previous: str | None
    fence: int


@dataclass(frozen=True, slots=True)
class SuiteItem:
    """One question with a checkable answer."""

    id: str
    suite: str
    stratum: str
    kind: Literal["gain", "retention", "canary"]
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    expected: Message | None = None  # the assistant message that is right (tool name and arguments are compared)
    forbidden: tuple[str, ...] = ()  # canary: tool names or substrings that must not appear
    scorer: str = "exact"  # exact, regex, json_schema, tool_call, judge; program: its suite asks and scores by itself
    rule: dict[str, Any] = field(default_factory=dict)  # what that scorer goes by
    cluster: str | None = None  # what it shares with others (an episode): together they count once; None: nothing


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the gate's reasoning: what was compared, the numbers, and what it says by itself."""

    name: str
    code: Code
    verdict: Verdict
    reason: str
    candidate: float | None = None
    reference: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    num_items: int = 0
    num_missing: int = 0  # items still needed for an answer, 0 when decided
    forecast_s: float | None = None  # about when they will be there; None: unknown, or more than one gate draws


@dataclass(frozen=True, slots=True)
class Decision:
    """The gate's whole answer for one candidate; `codes` say in a word what each of `reasons` says in a sentence."""

    verdict: Verdict
    reasons: tuple[str, ...]
    checks: tuple[Check, ...]
    num_missing: int = 0
    forecast_s: float | None = None  # about when the missing items will be there
    items_used: tuple[str, ...] = ()
    codes: tuple[Code, ...] = ()
    num_planned: int = 0  # items drawn; fewer are asked when the answer is clear before
    num_asked: int = 0
    outcome: tuple[float, float, int] | None = None  # gain over the incumbent on either half, and number of items
