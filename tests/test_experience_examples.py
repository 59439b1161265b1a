"""What one episode teaches: whose words, judged by whom, and checked how."""

import json

import pytest

from cltrain.experience.examples import accepted, example_of, suite_items_of
from cltrain.experience.verify import verify
from cltrain.records import Example, Feedback, Generation, Trajectory

LEARN_FROM = ("agent", "operator", "rehearsal")
TOOL = {
    "type": "function",
    "function": {
        "name": "repair",
        "parameters": {
            "type": "object",
            "properties": {
                "item": {"type": "string"},
                "count": {"type": "integer"},
                "speed": {"type": "string", "enum": ["slow", "fast"]},
                "note": {"type": "string"},
                "parts": {"type": "array", "items": {"type": "string"}},
            },
            "required": ["item"],
        },
    },
}


def called(name="repair", arguments=None, **named):
    function = {"name": name, "arguments": json.dumps(named) if arguments is None else arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": function}]}


def episode(*feedback, **changes):
    fields = {
        "id": "t",
        "agent": "support",
        "session": "s",
        "principal": "ann",
        "messages": (
            {"role": "user", "content": "my lamp is broken , 7 of them"},
            called(item="lamp"),
            {"role": "tool", "tool_call_id": "c", "content": "ok"},
            {"role": "assistant", "content": "done"},
        ),
        "producers": ("user", "agent", "tool", "agent"),
        "tools": (TOOL,),
        "generations": (Generation("g1", "t", 1, "r", (1, 2), (3,)), Generation("g3", "t", 3, "r", (1, 2, 3), (4,))),
        "feedback": feedback,
    }
    return Trajectory(**{**fields, **changes})


def score(value, source="user", at=1.0, target="t"):
    return Feedback(f"{source}{at}{target}", target, score=value, source=source, created_at=at)


def correction(message, target="g1", source="operator", at=1.0):
    return Feedback(f"c{at}{target}{source}", target, correction=message, source=source, created_at=at)


def learned(trajectory, learn_from=LEARN_FROM, tools_allowed=None):
    return example_of(trajectory, learn_from=learn_from, tools_allowed=tools_allowed)


def test_a_success_teaches_the_agents_turns_and_no_other():
    example = learned(episode(score(1.0)))
    assert (example.targets, example.stratum, example.kind) == ((1, 3), "repair/good", "success")
    assert example.prompt_ids is None, "two targets are no single recorded generation"
    handed_over = episode(score(1.0), producers=("user", "agent", "tool", "colleague"))
    assert learned(handed_over).targets == (1,)
    assert learned(handed_over).messages[-1] == called(item="lamp"), "nothing after the last target is kept"
    assert (learned(handed_over).prompt_ids, learned(handed_over).completion_ids) == ((1, 2), (3,))
    assert learned(handed_over, learn_from=("agent", "colleague")).targets == (1, 3)


@pytest.mark.parametrize(("given", "weight"), [(1.0, 1.0), (0.4, 0.4), (0.05, 0.1)])
def test_a_success_weighs_what_its_score_says_and_a_correction_one(given, weight):
    assert learned(episode(score(given))).weight == weight
    assert learned(episode(score(given), correction(called(item="door")))).weight == 1.0


@pytest.mark.parametrize(
    ("trajectory", "reason"),
    [
        (episode(score(1.0), split="eval"), "held out"),
        (episode(score(1.0), is_mixed=True), "rollback"),
        (episode(score(1.0), end="timeout"), "missing data"),
        (episode(), "nobody"),
        (episode(score(-1.0)), "failure"),
        (episode(score(0.0)), "failure"),
        (episode(score(1.0, source="agent")), "nobody"),
        (episode(score(1.0), producers=("user", None, "tool", None)), "unknown"),
        (episode(score(1.0), producers=("user", "peer", "tool", "peer")), "'peer'"),
        (episode(correction(called(item="lamp"), source="user")), "'user'"),
        (episode(correction(called(item="lamp"), target="t")), "names no turn"),
        (episode(correction({"role": "user", "content": "x"})), "role"),
        (episode(correction(called(item="lamp")), producers=("user", "peer", "tool", "agent")), "'peer'"),
    ],
)
def test_what_may_not_be_learned_says_why(trajectory, reason):
    assert reason in learned(trajectory)


def test_the_best_source_decides_and_its_latest_word_counts():
    assert "failure" in learned(episode(score(1.0, "user", 9), score(-1.0, "operator", 1)))
    assert "failure" in learned(episode(score(1.0, "operator", 9), score(-1.0, "verifier", 1)))
    assert learned(episode(score(-1.0, "user", 1), score(1.0, "user", 2))).targets == (1, 3)
    assert "failure" in learned(episode(score(-1.0, "user", 2), score(1.0, "user", 1)))


def test_a_turn_judged_badly_by_itself_is_left_out_of_a_success():
    assert learned(episode(score(-1.0, at=1, target="g3"), score(1.0, at=2))).targets == (1,)


def test_a_cut_short_answer_is_no_target():
    cut = Generation("g3", "t", 3, "r", finish_reason="length")
    assert learned(episode(score(1.0), generations=(cut,))).targets == (1,)


def test_a_correction_replaces_its_turn_and_is_the_only_target():
    example = learned(episode(correction(called(item="7")), score(1.0)))
    assert (example.targets, example.kind, example.stratum) == ((1,), "correction", "repair/corrected")
    assert example.messages == (episode().messages[0], called(item="7"))
    assert (example.prompt_ids, example.completion_ids) == (None, None)


def test_the_latest_correction_of_the_earliest_corrected_turn_counts():
    example = learned(
        episode(
            correction(called(item="old"), at=1),
            correction(called(item="new"), at=2),
            correction({"role": "assistant", "content": "later turn"}, target="g3", at=3),
        )
    )
    assert example.messages[1:] == (called(item="new"),)


def test_only_allowed_tools_are_learned():
    assert "tools_allowed" in learned(episode(score(1.0)), tools_allowed=("refund",))
    assert learned(episode(score(1.0)), tools_allowed=("repair",)).targets == (1, 3)


def test_a_held_out_episode_gives_one_item_per_accepted_turn():
    example = accepted(episode(score(1.0), split="eval"), learn_from=LEARN_FROM, tools_allowed=None)
    items = suite_items_of(example)
    assert [(i.id, i.stratum, len(i.messages)) for i in items] == [("t:1", "repair/good", 1), ("t:3", "text/good", 3)]
    assert [i.expected for i in items] == [called(item="lamp"), {"role": "assistant", "content": "done"}]


# ---------------------------------------------------------------- verification


def checked(answer, tools=(TOOL,), kind="success", **options):
    messages = ({"role": "user", "content": "my Lamp is broken, order AB-0012"}, answer)
    return verify(Example("r", "p", "s", messages, (1,), tools, kind), **options)


def test_a_right_call_passes():
    assert checked(called(item="lamp", count=2, speed="fast")) is None
    assert checked(called(item="AB 12")) is None, "case, punctuation and leading zeros are no difference"
    assert checked({"role": "assistant", "content": "done"}) is None


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (called("wire", item="lamp"), "does not declare"),
        (called(arguments="{"), "not JSON"),
        (called(arguments="[" * 100_000), "not JSON"),
        (called(arguments='"lamp"'), "not a JSON object"),
        (called(count=1), "lacks the required 'item'"),
        (called(item=3), "repair.item is int"),
        (called(item="lamp", count="two"), "repair.count is str"),
        (called(item="lamp", count=True), "repair.count is bool"),
        (called(item="lamp", speed="warp"), "none of the values"),
        (called(item="lamp", colour="red"), "does not know"),
        (called(item="desk"), "not grounded: repair.item has 'desk'"),
        (called(item="lamp", parts=["lamp", "bulb"]), "'bulb'"),
        ({"role": "assistant", "content": "  "}, "empty"),
        ({"role": "assistant", "content": None}, "empty"),
        ({"role": "assistant", "content": '<tool_call>{"name": </tool_call>'}, "could not be read"),
    ],
)
def test_what_fails_verification_says_why(answer, reason):
    assert reason in checked(answer)


def test_long_arguments_are_composed_and_not_looked_up():
    assert checked(called(item="lamp", note="the customer would like this to be done before the next weekend")) is None


def test_without_tool_definitions_only_json_is_checked_unless_it_is_a_correction_or_asked_for():
    assert checked(called("anything", item="desk"), tools=()) is None
    assert "not JSON" in checked(called("anything", arguments="{"), tools=())
    assert "not grounded" in checked(called("anything", item="desk"), tools=(), kind="correction")
    assert "not grounded" in checked(called("anything", item="desk"), tools=(), must_be_grounded=True)
    assert checked(called(item="desk"), must_be_grounded=False) is None


def test_only_what_was_said_before_the_turn_grounds_it():
    messages = ({"role": "user", "content": "hello"}, called(item="lamp"), {"role": "user", "content": "my lamp"})
    assert "not grounded" in verify(Example("r", "p", "s", messages, (1,), (TOOL,)))
