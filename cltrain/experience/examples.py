"""From one trajectory to what may be learned from it: which assistant turns carry loss, or why none does.

Only turns whose producer is known and listed may carry loss; a missing score is missing data, never a reward.
Whether the result is right is `verify`'s question, what it does to a window is `screens`'.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from cltrain.records import Example, Feedback, Generation, Message, SuiteItem, Trajectory

SOURCE_RANK = {"verifier": 0, "operator": 1, "import": 2, "user": 3}  # who is believed first; nobody else is
CUT_SHORT = frozenset({"length", "abort", "error", "content_filter"})  # finish reasons that make a turn no example
POOLED = "other"
OURS = frozenset(
    {"agent", "operator", "rehearsal", "user", "tool", "system"}
)  # producers that no sender may claim to be


def example_of(
    trajectory: Trajectory, *, learn_from: Sequence[str], tools_allowed: Sequence[str] | None
) -> Example | str:
    """The Example that an ended training-split trajectory yields, or the reason why it yields none.

    A correction of turn k (from a source listed in `learn_from`) makes the prefix up to k with the corrected message
    as the only target; the earliest corrected turn counts, and of its corrections the latest. One that names a record
    with a single answer is of that answer; one that names the episode of a branch names no turn of the branch, and the
    branch is not learned. Otherwise the latest score of the best source decides (verifier, operator, import, user); a
    positive one makes every turn of a listed producer a target, except turns that have a non-positive score of their
    own. `tools_allowed` None allows every tool.
    """
    if trajectory.split != "train":
        return "held out for evaluation"
    return accepted(trajectory, learn_from=learn_from, tools_allowed=tools_allowed)


def suite_items_of(example: Example) -> list[SuiteItem]:
    """The `agreement` items of an accepted evaluation-split episode, one per target turn.

    An item's id is `<record>:<turn>`; `expected` is the accepted or corrected message, `messages` all before it.
    """
    feedback_class = example.stratum.rpartition("/")[2]
    return [
        SuiteItem(
            id=f"{example.record}:{turn}",
            suite="agreement",
            stratum=f"{first_tool([example.messages[turn]])}/{feedback_class}",
            kind="gain",
            messages=example.messages[:turn],
            tools=example.tools,
            expected=example.messages[turn],
        )
        for turn in example.targets
    ]


def first_tool(messages: Iterable[Message]) -> str:
    """The name of the first tool that these assistant messages call, or `text`."""
    return next((name for message in messages for name in called_tools(message)), "text")


def called_tools(message: Message) -> list[str]:
    return [str(call["function"]["name"]) for call in message.get("tool_calls") or []]


def pool_rare(examples: Sequence[Example], minimum: int) -> list[Example]:
    """The same examples; strata with fewer than `minimum` of them become `other`."""
    sizes = Counter(example.stratum for example in examples)
    return [e if sizes[e.stratum] >= minimum else replace(e, stratum=POOLED) for e in examples]


def accepted(
    trajectory: Trajectory, *, learn_from: Sequence[str], tools_allowed: Sequence[str] | None
) -> Example | str:
    """As `example_of`, for either split: what the episode shows to be right. Training goes through `example_of`."""
    if trajectory.is_mixed:
        return "a rollback changed the adapter midway"
    if trajectory.end != "ok":
        return f"the episode's end is {trajectory.end!r}: missing data, not a result"
    turns = {generation.id: generation.turn for generation in trajectory.generations}
    corrections = [f for f in trajectory.feedback if f.correction is not None]
    example = (
        _corrected(trajectory, corrections, turns, learn_from)
        if corrections
        else _successful(trajectory, turns, learn_from)
    )
    if isinstance(example, str) or tools_allowed is None:
        return example
    refused = [name for k in example.targets for name in called_tools(example.messages[k]) if name not in tools_allowed]
    return f"calls {refused[0]!r}, which agent.tools_allowed does not list" if refused else example


def _corrected(
    trajectory: Trajectory, corrections: list[Feedback], turns: dict[str, int], learn_from: Sequence[str]
) -> Example | str:
    answers = [k for k, message in enumerate(trajectory.messages) if message.get("role") == "assistant"]
    allowed = [f for f in corrections if f.source in learn_from]
    if not allowed:
        return f"corrected by {corrections[-1].source!r}, which agent.learn_from does not list"
    located: list[tuple[int, Feedback]] = []
    for feedback in allowed:
        if feedback.target in turns:
            located.append((turns[feedback.target], feedback))
        elif feedback.target == trajectory.id and len(answers) == 1:
            located.append((answers[0], feedback))
    if not located:
        return "a correction of a whole episode with several answers names no turn; send the generation's id"
    turn = min(k for k, _ in located)
    if turn not in answers:
        return f"the corrected turn {turn} is not an answer of the assistant"
    if trajectory.producers[turn] not in learn_from:
        return _unlisted(trajectory.producers[turn])
    latest = max((f for k, f in located if k == turn), key=_when)
    assert latest.correction is not None
    if latest.correction.get("role", "assistant") != "assistant":
        return f"the correction's role is {latest.correction['role']!r}, not assistant"
    message = {**latest.correction, "role": "assistant"}
    return Example(
        record=trajectory.id,
        principal=trajectory.principal,
        stratum=f"{first_tool([message])}/corrected",
        messages=(*trajectory.messages[:turn], message),
        targets=(turn,),
        tools=trajectory.tools,
        kind="correction",
    )


def _successful(trajectory: Trajectory, turns: dict[str, int], learn_from: Sequence[str]) -> Example | str:
    scores = [f for f in trajectory.feedback if f.score is not None and f.source in SOURCE_RANK]
    verdict = _latest_score(scores)
    if verdict is None:
        return "nobody who may judge it gave a score"
    if verdict <= 0:
        return "judged a failure and nobody corrected it"
    answers = [k for k, message in enumerate(trajectory.messages) if message.get("role") == "assistant"]
    listed = [k for k in answers if trajectory.producers[k] in learn_from]
    if not listed:
        return _unlisted(next((trajectory.producers[k] for k in answers), None))
    made = {generation.turn: generation for generation in trajectory.generations}
    targets = tuple(
        k for k in listed if _is_target(k, trajectory, made, [f for f in scores if turns.get(f.target) == k])
    )
    if not targets:
        return "every answer was cut short, empty or judged a failure"
    messages = trajectory.messages[: targets[-1] + 1]
    is_whole = len(targets) == 1 and sum(g.turn == targets[0] for g in trajectory.generations) == 1
    generation = made[targets[0]] if is_whole else None
    return Example(
        record=trajectory.id,
        principal=trajectory.principal,
        stratum=f"{first_tool(messages[k] for k in targets)}/good",
        messages=messages,
        targets=targets,
        tools=trajectory.tools,
        prompt_ids=generation.prompt_ids if generation and generation.completion_ids else None,
        completion_ids=generation.completion_ids if generation and generation.prompt_ids else None,
    )


def _is_target(turn: int, trajectory: Trajectory, made: dict[int, Generation], own: list[Feedback]) -> bool:
    message = trajectory.messages[turn]
    if not message.get("tool_calls") and not message.get("content"):
        return False
    if turn in made and made[turn].finish_reason in CUT_SHORT:
        return False
    score = _latest_score(own)
    return score is None or score > 0


def _latest_score(scores: Sequence[Feedback]) -> float | None:
    if not scores:
        return None
    best = min(SOURCE_RANK[f.source] for f in scores)
    return max((f for f in scores if SOURCE_RANK[f.source] == best), key=_when).score


def _when(feedback: Feedback) -> tuple[float, str]:
    return feedback.created_at, feedback.id


def _unlisted(producer: str | None) -> str:
    if producer is None:
        return "the producer of its answers is unknown"
    return f"its answers are by {producer!r}, which agent.learn_from does not list"
