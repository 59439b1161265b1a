"""From one trajectory to what may be learned from it: which assistant turns carry loss, or why none does.

Only turns whose producer is known and listed may carry loss; a missing score is missing data, never a reward.
Whether the result is right is `verify`'s question, what it does to a window is `screens`'.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from cltrain.experience.verify import tool_fault
from cltrain.records import Example, Feedback, Generation, Message, SuiteItem, Trajectory, is_claim

SOURCE_RANK = {"verifier": 0, "operator": 1, "import": 2, "user": 3}  # who is believed first; nobody else is
CUT_SHORT = frozenset({"length", "abort", "error", "content_filter"})  # finish reasons that make a turn no example
POOLED = "other"
MIN_WEIGHT = 0.1  # of a success that was hardly one
OURS = frozenset(
    {"agent", "operator", "rehearsal", "user", "tool", "system"}
)  # producers that no sender may claim to be


def score_of_reward(reward: float) -> float:
    """The score in [-1, 1] of a reward in [0, 1], of which 0 is failure and 1 is success."""
    return 2.0 * reward - 1.0


def rank_of(source: str | None) -> int:
    """0 is believed before 1, and so on; who may not judge comes last."""
    return SOURCE_RANK.get(source or "", len(SOURCE_RANK))


def example_of(
    trajectory: Trajectory, *, learn_from: Sequence[str], tools_allowed: Sequence[str] | None
) -> Example | str:
    """The Example that an ended training-split trajectory yields, or the reason why it yields none.

    A correction of turn k (from a source listed in `learn_from`) makes the prefix up to k with the corrected message
    as the only target; the earliest corrected turn counts, and of its corrections the latest. One that names a record
    with a single answer is of that answer; one that names the episode of a branch names no turn of the branch, and the
    branch is not learned. Otherwise the latest score of the best source decides (verifier, operator, import, user); a
    positive one makes every turn of a listed producer a target, except turns that have a non-positive score of their
    own, and is the example's weight (MIN_WEIGHT at least). `tools_allowed` None allows every tool.
    """
    if trajectory.split != "train":
        return "held out for evaluation"
    return accepted(trajectory, learn_from=learn_from, tools_allowed=tools_allowed)


def suite_items_of(example: Example) -> list[SuiteItem]:
    """The `agreement` items of an accepted evaluation-split episode, one per target turn.

    An item's id is `<record>:<turn>`; `expected` is the accepted or corrected message, `messages` all before it.
    """
    assert example.objective == "sft", "only an answer that was judged right can be asked for"
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
            cluster=example.record,
        )
        for turn in example.targets
    ]


def first_tool(messages: Iterable[Message]) -> str:
    """The name of the first tool that these assistant messages call, or `text`."""
    return next((name for message in messages for name in called_tools(message)), "text")


def called_tools(message: Message) -> list[str]:
    return [str(call["function"]["name"]) for call in message.get("tool_calls") or []]


def pool_rare(examples: Sequence[Example], minimum: int) -> list[Example]:
    """The same examples; strata with fewer than `minimum` of them become `other`. What is no claim keeps its own: by it
    a record that is never rehearsed is known."""
    sizes = Counter(example.stratum for example in examples)
    return [e if sizes[e.stratum] >= minimum or not is_claim(e) else replace(e, stratum=POOLED) for e in examples]


def accepted(
    trajectory: Trajectory, *, learn_from: Sequence[str], tools_allowed: Sequence[str] | None
) -> Example | str:
    """As `example_of`, for either split: what the episode shows to be right. Training goes through `example_of`."""
    if reason := unfit(trajectory):
        return reason
    turns = {generation.id: generation.turn for generation in trajectory.generations}
    corrections = [f for f in trajectory.feedback if f.correction is not None]
    example = (
        _corrected(trajectory, corrections, turns, learn_from) if corrections else _successful(trajectory, learn_from)
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
        return unlisted(trajectory.producers[turn])
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
        tools=trajectory.tools_at(turn),
        kind="correction",
        source=latest.source,
    )


def _successful(trajectory: Trajectory, learn_from: Sequence[str]) -> Example | str:
    verdict = decisive(trajectory.feedback)
    if verdict is None:
        return "nobody who may judge it gave a score"
    if score_of(verdict) <= 0:
        return "judged a failure and nobody corrected it"
    answers = [k for k, message in enumerate(trajectory.messages) if message.get("role") == "assistant"]
    listed = [k for k in answers if trajectory.producers[k] in learn_from]
    if not listed:
        return unlisted(next((trajectory.producers[k] for k in answers), None))
    bad = {k for k in listed if (own := decisive_of_turn(trajectory, k)) is not None and score_of(own) <= 0}
    targets = tuple(k for k in listed if is_whole(trajectory, k) and k not in bad)
    if not targets:
        return "every answer was cut short, empty or judged a failure"
    return replace(of_turns(trajectory, targets, "good", verdict.source), weight=max(MIN_WEIGHT, score_of(verdict)))


def of_turns(trajectory: Trajectory, targets: tuple[int, ...], feedback_class: str, source: str) -> Example:
    """The Example of these answers, judged by `source`, with the ids recorded where one generation is all of it. A row
    has one list of tools: of answers that were offered others than the last one, none is a target."""
    tools = trajectory.tools_at(targets[-1])
    targets = tuple(turn for turn in targets if trajectory.tools_at(turn) == tools)
    messages = trajectory.messages[: targets[-1] + 1]
    generation = sole_generation(trajectory, targets)
    has_ids = generation is not None and generation.prompt_ids and generation.completion_ids
    return Example(
        record=trajectory.id,
        principal=trajectory.principal,
        stratum=f"{first_tool(messages[k] for k in targets)}/{feedback_class}",
        messages=messages,
        targets=targets,
        tools=tools,
        prompt_ids=generation.prompt_ids if generation and has_ids else None,
        completion_ids=generation.completion_ids if generation and has_ids else None,
        source=source,
    )


def unfit(trajectory: Trajectory) -> str | None:
    """Why an episode is no evidence of anything, or None."""
    if trajectory.is_mixed:
        return "a rollback changed the adapter midway"
    if trajectory.end != "ok":
        return f"the episode's end is {trajectory.end!r}: missing data, not a result"
    tools = [*trajectory.tools, *(tool for _, earlier in trajectory.earlier_tools for tool in earlier)]
    fault = next((fault for tool in tools if (fault := tool_fault(tool))), None)
    return f"a tool that it declares {fault}" if fault else None


def decisive(given: Iterable[Feedback]) -> Feedback | None:
    """The score that is believed: the best source's latest."""
    scores = [f for f in given if f.score is not None and f.source in SOURCE_RANK]
    best = min((SOURCE_RANK[f.source] for f in scores), default=None)
    return max((f for f in scores if SOURCE_RANK[f.source] == best), key=_when, default=None)


def judged(given: Iterable[Feedback]) -> Feedback | None:
    """As `decisive`, where a correction says that the answer was wrong: -1, of a source that gave no score."""
    given = list(given)
    scored = {f.source for f in given if f.score is not None}
    return decisive(f if f.correction is None or f.source in scored else replace(f, score=-1.0) for f in given)


def decisive_of_turn(trajectory: Trajectory, turn: int) -> Feedback | None:
    """As `decisive`, of what was said of that turn's generation alone."""
    ids = {generation.id for generation in trajectory.generations if generation.turn == turn}
    return decisive(f for f in trajectory.feedback if f.target in ids)


def score_of(feedback: Feedback) -> float:
    assert feedback.score is not None
    return feedback.score


def is_whole(trajectory: Trajectory, turn: int) -> bool:
    """Whether the answer says something and nothing cut it short."""
    message = trajectory.messages[turn]
    if not message.get("tool_calls") and not message.get("content"):
        return False
    made = {generation.turn: generation for generation in trajectory.generations}
    return turn not in made or made[turn].finish_reason not in CUT_SHORT


def sole_generation(trajectory: Trajectory, targets: Sequence[int]) -> Generation | None:
    """The generation that is all there is to learn, None where there are several or none."""
    made = [g for g in trajectory.generations if g.turn in targets]
    return made[0] if len(targets) == len(made) == 1 else None


def _when(feedback: Feedback) -> tuple[float, str]:
    return feedback.created_at, feedback.id


def unlisted(producer: str | None) -> str:
    """Why answers of this producer are not learned from."""
    if producer is None:
        return "the producer of its answers is unknown: import it again with --producer agent if your agent wrote it"
    return f"its answers are by {producer!r}, which agent.learn_from does not list"
