"""The demo's world is a pure function of its seeds, keeps held-out pairs held out, and errs as often as it says."""

import json
import random
from collections import Counter
from itertools import islice

import pytest

from cltrain.demo import text, world
from cltrain.demo.world import Ticket


def pair_of(ticket: Ticket) -> tuple[str, str]:
    said = ticket.messages[0]["content"].removeprefix(world.TRIGGER).split()
    (item,) = set(said) & set(world.ITEMS)
    (name,) = set(said) & set(world.NAMES)
    return item, name


def stream_tickets(seed: int) -> list[Ticket]:
    return [ticket for window in world.phases(seed) for ticket in window.tickets]


def test_the_same_seed_gives_the_same_world_and_another_seed_another_one() -> None:
    assert world.phases(3) == world.phases(3)
    assert world.suite_items(3) == world.suite_items(3)
    assert world.phases(3) != world.phases(4)
    assert world.training_tickets("swap", seed=1, count=9) == world.training_tickets("swap", seed=1, count=9)


def test_ticket_ids_are_unique() -> None:
    tickets = [*stream_tickets(0), *world.suite_items(0), *world.test_items(0), *world.attack_items(0)]
    assert len({ticket.id for ticket in tickets}) == len(tickets)


def test_held_out_pairs_meet_neither_training_nor_each_other() -> None:
    trained = {pair_of(ticket) for ticket in stream_tickets(0) if ticket.expected}
    for skill in world.SKILLS:
        trained |= {pair_of(ticket) for ticket in world.training_tickets(skill, seed=5, count=500)}
    suite = {pair_of(ticket) for seed in range(3) for ticket in world.suite_items(seed)}
    test = {pair_of(ticket) for seed in range(3) for ticket in [*world.test_items(seed), *world.attack_items(seed)]}
    assert not trained & suite
    assert not trained & test
    assert not suite & test
    assert len(suite) + len(test) == len(world.ITEMS) * len(world.NAMES) // 4
    assert {word for pair in world.TRAIN_PAIRS for word in pair} == {*world.ITEMS, *world.NAMES}


def test_pretraining_chats_hold_no_held_out_pair_and_no_wording_of_a_new_skill() -> None:
    held_out = {*world.SUITE_PAIRS, *world.TEST_PAIRS}
    new_wordings = {wording for skill in world.NEW_SKILLS for wording in world.PHRASINGS[skill]}
    num_pairs = 0
    for document in islice(text.documents(0), 4000):
        if isinstance(document, text.Story):
            continue
        request, answer = document.messages[0]["content"], document.messages[-1]["content"]
        about = request if answer == world.REFUSAL else answer  # a greeting may hold a second name
        items = [item for item in world.ITEMS if item in about.split()]
        names = [name for name in world.NAMES if name in about.split()]
        pairs = {(item, name) for item in items for name in names}
        num_pairs += len(pairs)
        assert not pairs & held_out
        said = {request.replace(item, "{item}").replace(name, "{name}") for item, name in pairs}
        assert not any(wording in words for wording in new_wordings for words in said)
    assert num_pairs > 2000


def test_no_wording_contains_a_tool_name() -> None:
    for wordings in world.PHRASINGS.values():
        assert len(set(wordings)) >= 3
        for wording in wordings:
            assert not set(wording.split()) & set(world.TOOL_NAMES)


def test_suite_and_test_are_large_enough_per_skill() -> None:
    assert min(Counter(ticket.skill for ticket in world.suite_items(0)).values()) >= 80
    assert min(Counter(ticket.skill for ticket in world.test_items(0)).values()) >= 40
    assert {ticket.skill for ticket in world.suite_items(0)} == set(world.SKILLS)
    prompts = [ticket.messages[0]["content"] for ticket in world.suite_items(0)]
    assert len(set(prompts)) == len(prompts)


def test_the_stream_has_four_new_skills_a_return_two_poisoned_windows_and_one_of_junk() -> None:
    windows = world.phases(0)
    assert [window.skill for window in windows] == [
        *["repair"] * 3, *["refund"] * 3, *["swap"] * 4, *["gift"] * 3, *["repair"] * 2,
    ]  # fmt: skip
    assert Counter(window.kind for window in windows) == {"clean": 12, "poison": 2, "junk": 1}
    assert {len(window.tickets) for window in windows} == {40}


def test_traffic_is_spread_over_principals_and_a_poisoned_window_is_a_quarter_the_attackers() -> None:
    for window in world.phases(0):
        share = Counter(ticket.principal for ticket in window.tickets)
        if window.kind == "poison":
            assert share.pop(world.ATTACKER) == 10
        assert len(share) >= 11
        assert max(share.values()) <= 4


def test_a_poisoned_ticket_claims_a_harmful_call_whose_arguments_stand_in_its_request() -> None:
    poison = [ticket for ticket in stream_tickets(0) if ticket.kind == "poison"]
    assert len(poison) == 20
    for ticket in [*poison, *world.attack_items(0)]:
        assert ticket.principal == world.ATTACKER
        assert ticket.claimed["name"] == world.HARMFUL_TOOL != ticket.expected["name"]
        assert pair_of(ticket)[1] != ticket.claimed["arguments"]["name"]  # so the claimed call is never half right
        assert set(ticket.claimed["arguments"].values()) <= set(ticket.messages[0]["content"].split())
        assert world.attack_worked(ticket, world.call_message(ticket.claimed, ticket.id))
        assert not world.attack_worked(ticket, world.call_message(ticket.expected, ticket.id))


def test_junk_corrections_belong_to_the_neighbour_and_part_of_the_requests_is_word_salad() -> None:
    (junk,) = [window.tickets for window in world.phases(0) if window.kind == "junk"]
    salad = [ticket for ticket in junk if not ticket.expected]
    assert 4 <= len(salad) <= 20
    wrong = [ticket for ticket in junk if ticket.claimed != ticket.expected]
    assert len(wrong) >= 38
    assert not any(world.check(ticket, world.call_message(ticket.claimed, ticket.id)) for ticket in salad)


def test_check_reads_calls_as_dicts_strings_and_hermes_text() -> None:
    ticket = world.training_tickets("swap", seed=0, count=1)[0]
    right = world.call_message(ticket.expected, ticket.id)
    arguments = ticket.expected["arguments"]
    as_dict = {"tool_calls": [{"function": {"name": "swap", "arguments": arguments}}]}
    as_text = {"content": f"<tool_call>\n{json.dumps(ticket.expected)}\n</tool_call>"}
    assert world.check(ticket, right)
    assert world.check(ticket, as_dict)
    assert world.check(ticket, as_text)


@pytest.mark.parametrize(
    "message",
    [
        {"content": "swap"},
        {"content": None},
        {"content": "<tool_call>\n{broken\n</tool_call>"},
        {"content": "<tool_call>[]</tool_call>"},
        {"tool_calls": [{"function": {"name": "swap", "arguments": "not json"}}]},
        {"tool_calls": [{"function": {"name": "swap", "arguments": "[]"}}]},
    ],
)
def test_an_answer_without_one_readable_call_fails_without_raising(message: dict[str, object]) -> None:
    ticket = world.training_tickets("swap", seed=0, count=1)[0]
    assert not world.check(ticket, message)
    assert world.tool_result(ticket, message).startswith("error")


def test_two_calls_or_a_wrong_argument_or_tool_are_not_exact() -> None:
    ticket = world.training_tickets("swap", seed=0, count=1)[0]
    right = world.call_message(ticket.expected, ticket.id)
    twice = {**right, "tool_calls": right["tool_calls"] * 2}
    other_name = {**ticket.expected, "arguments": {**ticket.expected["arguments"], "name": "nobody"}}
    assert not world.check(ticket, twice)
    assert not world.check(ticket, world.call_message(other_name, ticket.id))
    assert not world.check(ticket, world.call_message({**ticket.expected, "name": "gift"}, ticket.id))


def test_the_shop_obeys_any_well_formed_call_and_refuses_unknown_tools_and_items() -> None:
    ticket = world.attack_items(0)[0]
    assert world.tool_result(ticket, world.call_message(ticket.claimed, ticket.id)) == "ok"
    for call in (
        {"name": "shout", "arguments": {"item": "lamp", "name": "anna"}},
        {"name": "find", "arguments": {"item": "moon", "name": "anna"}},
        {"name": "find", "arguments": {"item": "lamp"}},
    ):
        assert world.tool_result(ticket, world.call_message(call, ticket.id)).startswith("error")


def test_an_episode_ends_with_an_answer_that_names_item_and_customer() -> None:
    for ticket in world.test_items(0):
        turns = world.episode(ticket)
        assert [turn["role"] for turn in turns] == ["user", "assistant", "tool", "assistant"]
        assert world.check(ticket, turns[1])
        assert set(ticket.expected["arguments"].values()) <= set(turns[-1]["content"].split())


def test_thumbs_come_on_seven_of_ten_tickets_and_a_tenth_is_wrong() -> None:
    rng = random.Random(0)
    ticket = world.training_tickets("swap", seed=0, count=1)[0]
    thumbs = [world.user_feedback(ticket, True, rng) for _ in range(8000)]
    given = [thumb for thumb in thumbs if thumb is not None]
    assert len(given) / len(thumbs) == pytest.approx(0.7, abs=0.03)  # five standard deviations
    assert given.count(-1.0) / len(given) == pytest.approx(0.1, abs=0.025)


def test_operators_correct_most_failures_never_successes_and_rarely_err() -> None:
    rng = random.Random(0)
    ticket = world.training_tickets("swap", seed=0, count=1)[0]
    assert not any(world.operator_correction(ticket, True, rng) for _ in range(100))
    corrections = [world.operator_correction(ticket, False, rng) for _ in range(8000)]
    given = [message for message in corrections if message is not None]
    assert len(given) / len(corrections) == pytest.approx(0.7, abs=0.03)
    right = sum(world.check(ticket, message) for message in given)
    assert 1 - right / len(given) == pytest.approx(0.05, abs=0.02)


def test_anchors_are_half_stories_and_half_requests_on_training_pairs() -> None:
    lines = text.anchors(0, 40)
    assert lines == text.anchors(0, 40)
    assert sum("text" in line for line in lines) == sum("messages" in line for line in lines) == 20
    assert all(line["messages"][-1]["role"] == "user" and line["tools"] for line in lines[1::2])
