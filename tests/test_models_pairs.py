"""Rows with a partner: the rejected answer of a pair, and the same answer behind the prompt that holds a hint."""

from dataclasses import replace

import pytest

from cltrain.errors import DataError
from cltrain.models.chat import HINT, UnfitPartner, render_prompt, render_rows
from cltrain.models.forward import predicted
from cltrain.records import Example
from tests.tiny import CHAT_TEMPLATE, TOOLS, make_tokenizer, ticket, tool_call

RIGHT, WRONG = tool_call("refund", order="A17"), tool_call("track", order="A17")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def example(messages, targets=(1,), **more):
    return Example("r1", "anna", "track/bad", tuple(messages), tuple(targets), tools=TOOLS, **more)


def answers(row):
    return [row.ids[t] for t in predicted(row)]


def prompt(row):
    return list(row.ids[: next(t for t, weight in enumerate(row.weights) if weight)])


def test_both_answers_of_a_pair_stand_behind_the_same_prompt(tokenizer):
    messages = (ticket("A17")[0], RIGHT)
    (row,) = render_rows(tokenizer, 512, example(messages, objective="dpo", rejected=WRONG))
    assert row.objective == "dpo"
    assert prompt(row) == prompt(row.partner) == render_prompt(tokenizer, messages[:1], TOOLS)
    assert '"name": "refund"' in tokenizer.decode(answers(row))
    assert '"name": "track"' in tokenizer.decode(answers(row.partner))
    assert row.partner.partner is None


def test_teacher_and_student_speak_of_the_same_tokens(tokenizer):
    hinted = example(ticket("A17")[:2], objective="hindsight", hint=" the parcel is late ")
    (row,) = render_rows(tokenizer, 512, hinted)
    assert answers(row) == answers(row.partner)
    assert [row.weights[t] for t in predicted(row)] == [row.partner.weights[t] for t in predicted(row.partner)]
    assert prompt(row) == render_prompt(tokenizer, hinted.messages[:1], TOOLS), "the student never sees the hint"
    asked = hinted.messages[0]["content"] + HINT.format(hint="the parcel is late")
    assert prompt(row.partner) == render_prompt(tokenizer, [{"role": "user", "content": asked}], TOOLS)


def test_recorded_ids_of_the_answer_are_what_both_are_asked_for(tokenizer):
    recorded = example(ticket("A17")[:2], objective="hindsight", hint="late", prompt_ids=(5, 6), completion_ids=(7, 8))
    (row,) = render_rows(tokenizer, 512, recorded)
    assert (row.ids, answers(row.partner)) == ((5, 6, 7, 8), [7, 8])
    assert len(row.partner.ids) > len(row.ids)


def test_the_hint_ends_the_users_last_message_before_the_answer(tokenizer):
    (early, late) = render_rows(
        tokenizer, 512, example(ticket("A17"), (1, 3), objective="hindsight", hint="say sorry")
    )  # fmt: skip
    assert "say sorry" in tokenizer.decode(early.partner.ids)
    text = tokenizer.decode(late.partner.ids)
    assert text.index("say sorry") < text.index("tool_response>\nok"), "before the tool's result, in the user's words"
    assert {early.weights[t] for t in predicted(early)} == {0.5}, "two answers count as one episode"
    parts = [{"role": "user", "content": [{"type": "text", "text": "please track A17"}]}, WRONG]
    (row,) = render_rows(tokenizer, 512, example(parts, objective="hindsight", hint="no"))
    assert "please track A17\n\n(A reviewer" in tokenizer.decode(row.partner.ids)
    alone = [{"role": "system", "content": "you help"}, {"role": "assistant", "content": "hello"}]
    (row,) = render_rows(tokenizer, 512, replace(example(alone, objective="hindsight", hint="no"), tools=()))
    assert "user\n(A reviewer" in tokenizer.decode(row.partner.ids)


def test_a_template_that_wants_turns_to_alternate_takes_a_hint():
    tokenizer = make_tokenizer()
    strict = (
        "{%- for m in messages %}{%- if not loop.first and m.role == messages[loop.index0 - 1].role %}"
        "{{- raise_exception('turns must alternate') }}{%- endif %}{%- endfor %}"
    )
    tokenizer.chat_template = strict + CHAT_TEMPLATE
    (row,) = render_rows(tokenizer, 512, example(ticket("A17")[:2], objective="hindsight", hint="no"))
    assert "A reviewer" in tokenizer.decode(row.partner.ids)


def test_a_hint_that_does_not_fit_the_base_is_an_error_with_both_numbers(tokenizer):
    hinted = example(ticket("A17")[:2], objective="hindsight", hint="late " * 600)
    with pytest.raises(UnfitPartner, match=r"with its hint; the base takes 512"):
        render_rows(tokenizer, 512, hinted)


def test_only_a_partner_that_cannot_be_rendered_is_an_unfit_one(tokenizer):
    broken = {**WRONG, "tool_calls": [{**WRONG["tool_calls"][0], "function": {"name": "x", "arguments": "{order: A"}}]}
    asked = ticket("A17")[0]
    with pytest.raises(UnfitPartner, match=r"rejected answer does not fit: .*no JSON"):
        render_rows(tokenizer, 512, example((asked, RIGHT), objective="dpo", rejected=broken))
    with pytest.raises(DataError, match=r"^a tool call's arguments"):
        render_rows(tokenizer, 512, example((asked, broken), objective="dpo", rejected=WRONG))


def test_value_and_behaviour_reach_the_row(tokenizer):
    scored = example(
        ticket("A17")[:2], objective="policy", value=-0.4, behaviour=(-1.0, -2.0), prompt_ids=(5,),
        completion_ids=(7, 8),
    )  # fmt: skip
    (row,) = render_rows(tokenizer, 512, scored)
    assert (row.objective, row.value, row.behaviour, row.partner) == ("policy", -0.4, (-1.0, -2.0), None)
