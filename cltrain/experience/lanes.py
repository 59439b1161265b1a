"""What each record is learned by, from what it carries: a success or a correction, a critique, or a bad score alone.

Pure. A policy example still carries its raw score: how it compares with the usual one and whether its log-probs are
fresh enough is settled when an update begins (`baselines`, `cltrain.staleness`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cltrain.config import ObjectivesConfig
from cltrain.experience.examples import (
    SOURCE_RANK,
    decisive,
    decisive_of_turn,
    example_of,
    is_whole,
    of_turns,
    rank_of,
    score_of,
    sole_generation,
    unfit,
    unlisted,
)
from cltrain.records import Example, Feedback, Message, Trajectory

CRITICS = ("verifier", "operator")  # whose words may be a hint


def lane_of(
    trajectory: Trajectory,
    objectives: ObjectivesConfig,
    *,
    learn_from: Sequence[str],
    tools_allowed: Sequence[str] | None,
) -> Example | str:
    """The Example of a training record with the objective it is learned by, or why it teaches nothing.

    Whatever `example_of` finds right is `sft` (a correction `dpo` where `corrections` says so; a success `kto` +1 where
    `sft` is not in use). Else a critique, text without a good score by someone listed in `learn_from` or who may judge,
    is `hindsight`; else a bad score is `policy` where the one answer it is about has recorded ids, `kto` -1 elsewhere.
    Of contradicting words the best source's latest counts, a correction before any score, a score before any text; the
    example's notes say so. What is said of a whole episode is said of every answer in it.
    """
    right = example_of(trajectory, learn_from=learn_from, tools_allowed=tools_allowed)
    if isinstance(right, Example):
        found = _claim(right, trajectory, objectives)
    else:
        found = _failure(trajectory, right, objectives, learn_from)
    if isinstance(found, str):
        return found
    return replace(found, notes=_contradictions(trajectory, found, learn_from))


def _claim(right: Example, trajectory: Trajectory, objectives: ObjectivesConfig) -> Example | str:
    if right.kind == "correction" and objectives.corrections == "dpo":
        (turn,) = right.targets
        original = trajectory.messages[turn]
        if is_whole(trajectory, turn) and not _is_same(original, right.messages[turn]):
            return replace(right, objective="dpo", rejected=original)
    if "sft" in objectives.use:
        return right
    if right.kind == "success" and "kto" in objectives.use:
        return replace(right, objective="kto", value=1.0)
    return f"a {right.kind}, and trainer.objectives.use lists nothing that it is learned by"


def _failure(
    trajectory: Trajectory, reason: str, objectives: ObjectivesConfig, learn_from: Sequence[str]
) -> Example | str:
    """What a record teaches that shows nothing right; `reason` is what is said of it if it teaches nothing at all."""
    verdict = decisive(trajectory.feedback)
    is_good = verdict is not None and score_of(verdict) > 0
    is_corrected = any(f.correction is not None for f in trajectory.feedback)
    if trajectory.split != "train" or unfit(trajectory) or is_corrected or is_good:
        return reason
    marked = reason if verdict is None else _blamed(trajectory, verdict, learn_from)
    critique = _critique(trajectory, learn_from) if "hindsight" in objectives.use else None
    if critique is not None:
        example = _blamed(trajectory, critique, learn_from)
        if isinstance(example, str):
            return example
        is_marked = isinstance(marked, Example) and set(example.targets) <= set(marked.targets)
        value = -1.0 if is_marked else 1.0
        return replace(example, kind="critique", objective="hindsight", hint=critique.text, value=value)
    if verdict is None or not {"policy", "kto"} & set(objectives.use):
        return reason
    if isinstance(marked, str):
        return marked
    generation = sole_generation(trajectory, marked.targets)
    if "policy" in objectives.use and generation and marked.completion_ids:
        return replace(
            marked, objective="policy", value=score_of(verdict), behaviour=generation.logprobs,
            release=generation.release,
        )  # fmt: skip
    return as_undesired(marked, objectives, "its token ids were not recorded")


def as_undesired(example: Example, objectives: ObjectivesConfig, because: str) -> Example | str:
    """The same failure learned by its mark alone, as far as `kto` is in use."""
    if "kto" not in objectives.use:
        return f"judged a failure, and no policy gradient: {because}"
    return replace(example, objective="kto", value=-1.0, behaviour=None, release=None)


def without_partner(example: Example, objectives: ObjectivesConfig, because: str) -> Example | str:
    """What a pair or a critique is learned by when the base cannot take the rejected answer or the hinted self: the
    correction alone, the bad score that came with the critique; as far as that is in use."""
    if example.objective == "dpo" and "sft" in objectives.use:
        found = replace(example, objective="sft", rejected=None)
    elif example.objective == "hindsight" and example.value < 0 and "kto" in objectives.use:
        found = replace(example, kind="failure", objective="kto", hint=None)
    else:
        return f"unusable: {because}"
    return replace(found, notes=(*found.notes, f"{found.objective} and no {example.objective}, {because}"))


def _blamed(trajectory: Trajectory, said: Feedback, learn_from: Sequence[str]) -> Example | str:
    """The answers that this feedback is about, less those with a good score of their own."""
    turns = {generation.id: generation.turn for generation in trajectory.generations}
    answers = [k for k, message in enumerate(trajectory.messages) if message.get("role") == "assistant"]
    meant = [k for k in answers if turns.get(said.target, k) == k]
    listed = [k for k in meant if trajectory.producers[k] in learn_from]
    if not listed:
        return unlisted(next((trajectory.producers[k] for k in meant), None))
    good = {k for k in listed if (own := decisive_of_turn(trajectory, k)) is not None and score_of(own) > 0}
    targets = tuple(k for k in listed if is_whole(trajectory, k) and k not in good)
    if not targets:
        return "judged a failure, but every answer was cut short, empty or judged good by itself"
    return replace(of_turns(trajectory, targets, "bad", said.source), kind="failure")


def _critique(trajectory: Trajectory, learn_from: Sequence[str]) -> Feedback | None:
    """The best trusted source's latest text that does not go with praise. Not a user's: what it says would be learned
    unseen by verification and trigger scan, as a correction of the same user would not."""
    said = [
        f
        for f in trajectory.feedback
        if (f.text or "").strip()
        and (f.source in CRITICS or f.source in learn_from)
        and (f.score is None or f.score <= 0)
    ]
    return max(said, key=lambda f: (-rank_of(f.source), f.created_at, f.id), default=None)


def _contradictions(trajectory: Trajectory, example: Example, learn_from: Sequence[str]) -> tuple[str, ...]:
    """What else was said of the very same answer or episode, and is not believed."""
    turns = {generation.id: generation.turn for generation in trajectory.generations}
    answers = [k for k, message in enumerate(trajectory.messages) if message.get("role") == "assistant"]
    only = answers[0] if len(answers) == 1 else None
    signs: dict[int | None, set[bool]] = {}
    fixes: list[Message] = []
    for said in trajectory.feedback:
        about = turns.get(said.target, only)
        if said.score is not None and said.source in SOURCE_RANK:
            signs.setdefault(about, set()).add(said.score > 0)
        if said.correction is not None and said.source in learn_from and about in example.targets:
            fixes.append(said.correction)
    if example.kind == "correction":
        is_praised = any(True in signs.get(about, ()) for about in (None, *example.targets))
        is_disputed = is_praised or any(not _is_same(fixes[0], other) for other in fixes[1:])
        return ("contradicting feedback: the latest correction counts",) if is_disputed else ()
    believed = decisive(trajectory.feedback)
    is_disputed = any(len(values) > 1 for values in signs.values())
    if not is_disputed or believed is None:
        return ()
    return (f"contradicting feedback: the latest score by {believed.source!r} counts",)


def _is_same(one: Message, other: Message) -> bool:
    """Equal but for the calls' ids."""
    return _said(one) == _said(other)


def _said(message: Message) -> tuple[Any, list[Any]]:
    return message.get("content") or "", [call["function"] for call in message.get("tool_calls") or []]
