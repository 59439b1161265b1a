"""Rendering: which tokens carry loss, that nothing is cut, and that generated tool calls come back as messages."""

import json

import pytest

from cltrain.errors import DataError
from cltrain.models.chat import render_example, render_prompt, render_rows
from cltrain.models.toolcalls import parse_answer
from cltrain.records import Example
from tests.tiny import TOOLS, make_tokenizer, ticket, tool_call


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def example(messages, targets, **more):
    return Example("r1", "anna", "refund/good", tuple(messages), tuple(targets), tools=TOOLS, **more)


def learned_text(tokenizer, row):
    return tokenizer.decode([token for token, weight in zip(row.ids, row.weights, strict=True) if weight])


def test_only_the_target_turn_and_its_end_token_carry_loss(tokenizer):
    row = render_example(tokenizer, 512, example(ticket("A17"), [1]))
    expected = '<tool_call>\n{"name": "refund", "arguments": {"order": "A17"}}\n</tool_call><|im_end|>'
    assert learned_text(tokenizer, row) == expected
    assert row.weights[-1] > 0, "a row ends with the last token that is learned"


def test_every_target_turn_carries_loss_and_nothing_of_users_and_tools(tokenizer):
    row = render_example(tokenizer, 512, example(ticket("A17"), [1, 3], weight=0.5))
    assert learned_text(tokenizer, row).endswith("</tool_call><|im_end|>I have done it.<|im_end|>")
    assert set(row.weights) == {0.0, 0.5}
    assert "tool_response" not in learned_text(tokenizer, row)


def test_the_row_begins_with_exactly_the_prompt_that_the_server_saw(tokenizer):
    messages = ticket("B04")
    prompt = render_prompt(tokenizer, messages[:3], TOOLS)
    row = render_example(tokenizer, 512, example(messages, [3]))
    assert list(row.ids[: len(prompt)]) == prompt
    assert not any(row.weights[: len(prompt)])
    assert all(row.weights[len(prompt) :])


def test_an_answer_that_would_merge_with_the_prompt_keeps_the_border(tokenizer):
    trained = make_tokenizer(vocabulary=448)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "\n\n  I have"}]
    prompt = render_prompt(trained, messages[:1])
    row = render_example(trained, 512, Example("r", "p", "s", tuple(messages), (1,)))
    assert list(row.ids[: len(prompt)]) == prompt
    assert learned_text(trained, row) == "\n\n  I have<|im_end|>"


def test_recorded_ids_are_used_as_they_are(tokenizer):
    row = render_example(tokenizer, 512, example(ticket("A"), [1], prompt_ids=(5, 6, 7), completion_ids=(8, 9)))
    assert row.ids == (5, 6, 7, 8, 9)
    assert row.weights == (0.0, 0.0, 0.0, 1.0, 1.0)


def test_a_row_longer_than_the_context_is_refused_with_both_numbers(tokenizer):
    num_tokens = len(render_example(tokenizer, 512, example(ticket("A17"), [3])).ids)
    with pytest.raises(DataError, match=rf"{num_tokens} tokens; the base takes 64"):
        render_example(tokenizer, 64, example(ticket("A17"), [3]))


def test_a_base_without_template_is_refused_naming_the_option():
    bare = make_tokenizer()
    bare.chat_template = None
    with pytest.raises(DataError, match=r"base\.chat_template"):
        render_prompt(bare, ticket("A17")[:1])


def test_tool_arguments_that_are_no_json_are_refused(tokenizer):
    broken = tool_call("refund", order="A")
    broken["tool_calls"][0]["function"]["arguments"] = "{order: A"
    with pytest.raises(DataError, match="no JSON"):
        render_example(tokenizer, 512, example([{"role": "user", "content": "x"}, broken], [1]))


def test_a_target_that_is_no_assistant_turn_is_refused(tokenizer):
    with pytest.raises(DataError, match="not an assistant turn"):
        render_example(tokenizer, 512, example(ticket("A17"), [2]))


def test_a_template_that_rewrites_old_turns_gives_one_row_per_target():
    rewriting = make_tokenizer()
    rewriting.chat_template = rewriting.chat_template.replace(
        "{%- if message.content %}", "{%- if loop.last %}{{- 'ok ' }}{%- endif %}{%- if message.content %}"
    )
    both = example(ticket("A17"), [1, 3])
    with pytest.raises(DataError, match="renders the turns before"):
        render_example(rewriting, 512, both)
    rows = render_rows(rewriting, 512, both)
    assert [learned_text(rewriting, row)[:3] for row in rows] == ["ok ", "ok "]
    assert {weight for row in rows for weight in row.weights} == {0.0, 0.5}


def test_generated_calls_become_openai_tool_calls():
    text = 'Sure.\n<tool_call>\n{"name": "refund", "arguments": {"order": "A17"}}\n</tool_call>'
    message = parse_answer(text, id_prefix="x")
    assert message["content"] == "Sure."
    (call,) = message["tool_calls"]
    assert call["id"] == "x_0"
    assert call["function"]["name"] == "refund"
    assert json.loads(call["function"]["arguments"]) == {"order": "A17"}


@pytest.mark.parametrize("inside", ["{order}", '["a"]', '{"name": 3}', '{"name": "a", "arguments": "b"}', ""])
def test_a_call_that_is_not_valid_stays_in_the_text(inside):
    text = f"<tool_call>{inside}</tool_call>"
    assert parse_answer(text) == {"role": "assistant", "content": text}


def test_rendering_a_parsed_answer_gives_the_generated_tokens_back(tokenizer):
    text = '<tool_call>\n{"name": "track", "arguments": {"order": "Ä1"}}\n</tool_call>'
    messages = [{"role": "user", "content": "hi"}, parse_answer(text)]
    row = render_example(tokenizer, 512, example(messages, [1]))
    assert learned_text(tokenizer, row) == text + "<|im_end|>"
