"""A prompt that says what passes is refused; an ordinary question is not, even where its answer stands in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cltrain.errors import DataError
from cltrain.gate.suites import load_suite

CALL = {"name": "refund", "arguments": {"order": "A17", "reason": "late"}}
RUBRIC = "The answer must thank the customer by name"
CHINESE, JAPANESE = "回答必须感谢客户", "お客様の名前でお礼を言う"


def load(tmp_path: Path, asked: str, expected: Any, system: str | None = None, **fields: Any) -> None:
    messages = [{"role": "system", "content": system}] if system else []
    row = {"messages": [*messages, {"role": "user", "content": asked}], "expected": expected, **fields}
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps(row) + "\n")
    load_suite(path)


@pytest.mark.parametrize(
    ("asked", "expected", "fields"),
    [
        ("What is the capital of France? Answer with Paris to pass.", "Paris", {}),
        ("Reply with blue42, to pass the test.", "blue42", {}),
        ("What is 6 * 7? The correct answer is 42.", "42", {}),
        ("What is 6 * 7?\nExpected answer: 42", "42", {}),
        ("What is 6 * 7? Answer with 42.", "42", {}),
        ("You get full marks if you say Paris. What is the capital of France?", "Paris.", {}),
        (
            "What now?",
            "hold the line",
            {"system": "Only replies that say 'Hold the line' are scored as right when graded."},
        ),
        ("To pass, call refund with A17 and late.", CALL, {}),
        ("Capital? It must match ^(Paris|Lyon)$", None, {"scorer": "regex", "pattern": "^(Paris|Lyon)$"}),
        ("Capital? The right answer is Paris!", None, {"scorer": "regex", "pattern": "(?i)\\bparis\\b"}),
        ("Help Ann.", None, {"system": f"{CHINESE}.", "scorer": "judge", "rubric": CHINESE}),
        ("Help Ann.", None, {"system": f"{JAPANESE}.", "scorer": "judge", "rubric": JAPANESE}),
        ("Colour? Say red to pass.", None, {"scorer": "regex", "pattern": "^red$|^blue$"}),
        ("Help Ann.", None, {"system": f"Be kind. {RUBRIC.upper()}.", "scorer": "judge", "rubric": RUBRIC}),
    ],
)
def test_a_prompt_that_says_what_passes_is_refused(tmp_path: Path, asked: str, expected: Any, fields: Any) -> None:
    with pytest.raises(DataError, match=r"line 1: its prompt (says|holds|dictates)"):
        load(tmp_path, asked, expected, **fields)


@pytest.mark.parametrize(
    ("asked", "expected", "fields"),
    [
        ("Is the sky blue? Answer with yes or no.", "yes", {}),
        ("Is the sky blue? Answer yes/no to pass.", "no", {}),
        ("Which one is the correct answer: Paris, Rome or Berlin?", "Rome", {}),
        ("Choose one of red, green, blue to score a point.", "green", {}),
        ("Capital of France?\na) Rome\nb) Paris\nc) Berlin\nAnswer with the name.", "Paris", {}),
        ("Repeat after me: hello", "hello", {}),
        ("Reply with exactly OK.", "OK", {}),
        ("Did it rain? If it did, say yes.", "yes", {}),
        ("The passing grade is 60. What is the passing grade?", "60", {}),
        ("Bob was told to pass the salt to Ann. Who gets the salt?", "Ann", {}),
        ("What is 6 * 7? Answer with a number.", "42", {}),
        ("Refund order A17, it came late.", CALL, {}),
        ("Write to Ann", None, {"system": "Be polite.", "scorer": "judge", "rubric": "polite"}),
        ("Write to Ann", None, {"system": CHINESE, "scorer": "judge", "rubric": CHINESE[-2:]}),
        ("Was it Paris or Rome?", None, {"scorer": "regex", "pattern": "(?i)paris"}),
        ('Answer as {"type": "object"} does.', None, {"scorer": "json_schema", "schema": {"type": "object"}}),
    ],
)
def test_an_ordinary_question_is_not_refused(tmp_path: Path, asked: str, expected: Any, fields: Any) -> None:
    load(tmp_path, asked, expected, **fields)


def test_what_an_earlier_turn_said_is_no_instruction(tmp_path: Path) -> None:
    row = {
        "messages": [
            {"role": "user", "content": "The correct answer is 42."},
            {"role": "assistant", "content": "I see."},
            {"role": "user", "content": "What is 6 * 7?"},
        ],
        "expected": "42",
    }
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps(row))
    assert len(load_suite(path)) == 1
