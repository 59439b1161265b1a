"""How items choose their scorer: what each counts as right, and which rules are refused when they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cltrain.errors import DataError
from cltrain.gate.scorers import score_item
from cltrain.gate.suites import item_key, load_suite
from cltrain.records import Message, SuiteItem

USER = [{"role": "user", "content": "please help"}]


def one(tmp_path: Path, **fields: Any) -> SuiteItem:
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"messages": USER, **fields}) + "\n")
    (item,) = load_suite(path)
    return item


def says(text: str) -> Message:
    return {"role": "assistant", "content": text}


def calls(*named: tuple[str, Any]) -> Message:
    made = [{"function": {"name": name, "arguments": json.dumps(arguments)}} for name, arguments in named]
    return {"role": "assistant", "content": None, "tool_calls": made}


def test_a_pattern_is_searched_in_the_text(tmp_path: Path) -> None:
    item = one(tmp_path, scorer="regex", pattern=r"(?i)\border A\d+\b", forbidden=["sorry"])
    assert item.kind == "gain"
    assert score_item(item, says("Your ORDER a17 is on its way")) == 1.0
    assert score_item(item, says("Your order B17")) == 0.0
    assert score_item(item, says("Sorry, order A17 is lost")) == 0.0
    assert score_item(item, calls(("find", {"order": "order A17"}))) == 0.0


def test_a_pattern_that_does_not_come_to_an_end_is_an_error_and_no_zero(tmp_path: Path) -> None:
    item = one(tmp_path, scorer="regex", pattern=r"^(?:a|aa)+$")
    with pytest.raises(DataError, match="took more than 1 s"):
        score_item(item, says("a" * 60 + "!"))


def test_a_schema_is_obeyed_by_text_or_by_every_call(tmp_path: Path) -> None:
    schema = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer", "minimum": 0}}}
    item = one(tmp_path, scorer="json_schema", schema=schema)
    assert score_item(item, says(' {"n": 3} ')) == 1.0
    assert score_item(item, says('{"n": -3}')) == 0.0
    assert score_item(item, says("n is 3")) == 0.0
    assert score_item(item, calls(("any", {"n": 3}))) == 1.0
    assert score_item(item, calls(("any", {"n": 3}), ("any", {}))) == 0.0
    bound = one(tmp_path, scorer="json_schema", schema=schema, tool="count")
    assert score_item(bound, calls(("count", {"n": 3}))) == 1.0
    assert score_item(bound, calls(("any", {"n": 3}))) == 0.0
    assert score_item(bound, calls(("count", {"n": 3}), ("any", {"n": 3}))) == 0.0
    assert score_item(bound, says('{"n": 3}')) == 0.0


def test_a_tool_call_needs_its_name_and_at_least_its_arguments_and_no_other_call(tmp_path: Path) -> None:
    item = one(tmp_path, scorer="tool_call", expected={"name": "refund", "arguments": {"order": 7}})
    assert item.stratum == "refund"
    assert score_item(item, calls(("refund", {"order": 7.0, "note": "late"}))) == 1.0
    assert score_item(item, calls(("refund", {"note": "late"}))) == 0.0
    assert score_item(item, calls(("find", {"order": 7}))) == 0.0
    assert score_item(item, calls(("refund", {"order": 7}), ("wipe", {}))) == 0.0  # no credit for trying everything
    assert score_item(item, says("refund order 7")) == 0.0
    exact = one(tmp_path, expected={"name": "refund", "arguments": {"order": 7}})
    assert score_item(exact, calls(("refund", {"order": 7, "note": "late"}))) == 0.0
    assert item_key(item) != item_key(exact)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"scorer": "vibes", "expected": "x"}, "scorer is 'vibes'; it must be one of exact"),
        ({"scorer": "regex"}, "scorer regex needs pattern"),
        ({"pattern": "x", "expected": "x"}, "pattern means nothing to scorer exact"),
        ({"scorer": "regex", "pattern": "("}, "is no regular expression"),
        ({"scorer": "regex", "pattern": "a*"}, "everything would pass"),
        ({"scorer": "regex", "pattern": "yes", "expected": "no"}, "does not pass its own regex"),
        ({"scorer": "json_schema", "schema": {}}, "schema must be a JSON Schema"),
        ({"scorer": "json_schema", "schema": {"type": "objekt"}}, "schema is no JSON Schema"),
        ({"scorer": "json_schema", "schema": {"$ref": "http://x.example/y"}}, "nothing is fetched"),
        ({"scorer": "json_schema", "schema": {"type": "array"}, "expected": "{}"}, "does not pass its own json_schema"),
        ({"scorer": "tool_call", "expected": "x"}, "exactly one call"),
        ({"scorer": "tool_call"}, "needs expected"),
        ({"scorer": "judge"}, "scorer judge needs rubric"),
        ({"scorer": "judge", "rubric": "  "}, "rubric must be a text that is not blank"),
    ],
)
def test_a_rule_that_cannot_work_is_refused_when_it_is_read(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match="1 bad lines") as caught:
        one(tmp_path, **fields)
    assert said in str(caught.value)


def test_a_key_changes_with_the_rule_but_not_for_items_of_before(tmp_path: Path) -> None:
    first = one(tmp_path, id="a", scorer="judge", rubric="thanks the customer")
    second = one(tmp_path, id="a", scorer="judge", rubric="thanks the customer by name")
    assert item_key(first) != item_key(second)
    before = SuiteItem("q", "own", "text", "gain", ({"role": "user", "content": "hi"},), (), says("hello"))
    assert item_key(before) == "q~b05640140420"
