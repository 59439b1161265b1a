"""Streaming text: whatever the pieces, what went out adds up to the whole message."""

import random

import pytest

from cltrain.deploy.answers import Answer, Words
from cltrain.deploy.engine import Delta
from cltrain.deploy.sampling import Token
from cltrain.models.toolcalls import parse_answer
from tests.tiny import make_tokenizer

TEXTS = [
    "",
    "plain words, and no more",
    '<tool_call>\n{"name": "refund", "arguments": {"order": "A17"}}\n</tool_call>',
    '  Sorry for that. \n<tool_call>\n{"name": "refund", "arguments": {}}\n</tool_call>\n'
    '<tool_call>{"name": "track"}</tool_call> bye ',
    "<tool_call>\n{broken json\n</tool_call> then words",
    "a < b and <tool and <tool_cal of it",
    '<tool_call>{"name": "track", "arguments": {"order": "B04"}}',
    "déjà vu: 漢字 and 🙂🙃 at the end 🙂",
]


@pytest.fixture(scope="module")
def words():
    return Words(make_tokenizer())


def ids_of(words, text):
    return words._tokenizer(text, add_special_tokens=False)["input_ids"] + [words._tokenizer.eos_token_id]


def deltas(ids, seed):
    draw, start = random.Random(seed), 0
    while start < len(ids):
        size = draw.randint(1, 3)
        part, start = ids[start : start + size], start + size
        yield Delta(tuple(Token(i, -1.0) for i in part), "stop" if start >= len(ids) else None)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("seed", range(3))
def test_streamed_pieces_add_up_to_the_message(words, text, seed):
    for has_tools in (True, False):
        answer, sent = Answer(words, has_tools=has_tools), ""
        for delta in deltas(ids_of(words, text), seed):
            answer.push(delta)
            sent += answer.take()
        expected = parse_answer(text) if has_tools else {"role": "assistant", "content": text}
        assert answer.message() == expected
        assert sent == (expected["content"] or "")


def test_nothing_of_a_stop_string_goes_out(words):
    text = "one two three four"
    for seed in range(5):
        answer, sent = Answer(words, stops=("three", "tho")), ""
        for delta in deltas(ids_of(words, text), seed):
            answer.push(delta)
            sent += answer.take()
            if answer.is_done:
                break
        assert (sent, answer.finish) == ("one two ", "stop")
