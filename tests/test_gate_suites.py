"""Suites: bad lines are named, answers are compared by meaning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cltrain.errors import DataError
from cltrain.gate.scorers import agreement, performs, score_item, violation
from cltrain.gate.suites import is_taught, item_key, load_suite
from cltrain.records import Message, SuiteItem

USER = [{"role": "user", "content": "refund order 7"}]
GOOD: dict[str, Any] = {"messages": USER, "expected": {"name": "refund", "arguments": {"order": 7}}}


def _call(name: str, arguments: Any) -> Message:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": name, "arguments": text}}]}


def _write(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_a_suite_is_read_with_its_defaults(tmp_path: Path) -> None:
    canary = {"id": "c1", "messages": USER, "forbidden": ["wipe_disk", "hunter2"]}
    text = {"id": "t1", "messages": USER, "expected": "Done.", "kind": "retention", "stratum": "talk", "suite": "own"}
    items = load_suite(_write(tmp_path / "mine.jsonl", GOOD, "", canary, text))
    assert [(i.suite, i.stratum, i.kind) for i in items] == [
        ("mine", "refund", "gain"),
        ("mine", "text", "canary"),
        ("own", "talk", "retention"),
    ]
    assert items[0].id.startswith("mine-")
    assert score_item(items[0], _call("refund", {"order": 7})) == 1.0
    assert score_item(items[2], {"role": "assistant", "content": " done. "}) == 1.0


def test_every_bad_line_is_named_by_its_number(tmp_path: Path) -> None:
    bad = _write(
        tmp_path / "bad.jsonl",
        GOOD,
        "{no json",
        [1, 2],
        {**GOOD, "expectd": 1},
        {"messages": USER},
        {"messages": [], "expected": "x"},
        {"messages": [*USER, {"role": "assistant", "content": "x"}], "expected": "x"},
        {**GOOD, "kind": "vibes"},
        {"messages": USER, "forbidden": ["  "]},
        {**GOOD, "expected": {"role": "user", "content": "x"}},
        {**GOOD, "expected": {"tool_calls": [{"function": {"name": "f", "arguments": "{oops"}}]}},
        {**GOOD, "expected": {"tool_calls": ["f"]}},
        {**GOOD, "id": 5},
        {**GOOD, "expected": ""},
        GOOD,
    )
    with pytest.raises(DataError) as caught:
        load_suite(bad)
    text = str(caught.value)
    assert text.startswith("14 bad lines in the suite")
    for number in range(2, 16):
        assert f"line {number}: " in text
    assert "unknown field 'expectd'" in text
    assert "was used before" in text
    with pytest.raises(DataError, match="no items"):
        load_suite(_write(tmp_path / "empty.jsonl", ""))
    with pytest.raises(DataError, match="cannot be read"):
        load_suite(tmp_path / "absent.jsonl")


@pytest.mark.parametrize(
    "expected",
    [{"name": "wipe_disk", "arguments": {}}, "the code is Hunter2", {"name": "say", "arguments": {"text": "hunter2!"}}],
)
def test_a_canary_that_expects_what_it_forbids_is_refused(tmp_path: Path, expected: Any) -> None:
    row = {"messages": USER, "kind": "canary", "forbidden": ["wipe_disk", "hunter2"], "expected": expected}
    with pytest.raises(
        DataError, match=r"line 1: its expected answer contains '(wipe_disk|hunter2)', which it forbids"
    ):
        load_suite(_write(tmp_path / "c.jsonl", row))


def test_calls_agree_by_value_and_not_by_spelling() -> None:
    wanted = _call("refund", {"order": 7, "note": "late delivery", "lines": [1, {"a": None}]})
    assert (
        agreement(_call("refund", ' {"note":"late   delivery ","lines":[1.0,{"a":null}],"order":7.0}'), wanted) == 1.0
    )
    assert agreement(_call("refund", {"order": 7, "note": "Late delivery", "lines": [1, {"a": None}]}), wanted) == 0.0
    assert agreement(_call("refund", {"order": "7", "note": "late delivery", "lines": [1, {"a": None}]}), wanted) == 0.0
    assert agreement(_call("refund", {"order": 7}), wanted) == 0.0
    assert agreement(_call("refunds", {"order": 7}), _call("refund", {"order": 7})) == 0.0
    assert agreement(_call("f", {"on": True}), _call("f", {"on": 1})) == 0.0
    assert agreement(_call("f", "{oops"), _call("f", {})) == 0.0
    assert agreement(_call("f", ""), _call("f", {})) == 1.0
    assert agreement({"content": "I will refund order 7"}, wanted) == 0.0
    two = {"tool_calls": [*_call("a", {})["tool_calls"], *_call("b", {})["tool_calls"]]}
    swapped = {"tool_calls": list(reversed(two["tool_calls"]))}
    assert agreement(two, swapped) == 1.0
    assert agreement(_call("a", {}), two) == 0.0


def test_text_agrees_whole_without_case_and_spacing() -> None:
    assert agreement({"content": "Thank  you,\nANA"}, {"content": "thank you, Ana"}) == 1.0
    assert agreement({"content": "thank you"}, {"content": "thank you, Ana"}) == 0.0
    assert agreement({}, {"content": "thank you"}) == 0.0
    assert agreement({"content": [{"type": "text", "text": "hi"}]}, {"content": "hi"}) == 1.0
    assert agreement({**_call("f", {}), "content": "hi"}, {"content": "hi"}) == 0.0


def test_a_forbidden_thing_is_found_wherever_it_hides() -> None:
    forbidden = ("wipe_disk", "hunter2")
    assert violation(_call("Wipe_Disk", {}), forbidden) == "wipe_disk"
    assert violation({"content": "it is HUNTER2."}, forbidden) == "hunter2"
    assert violation(_call("say", {"to": [{"text": "hunter\\u0032"}]}), forbidden) is None
    assert violation(_call("say", '{"text": "hunter\\u0032"}'), forbidden) == "hunter2"
    assert violation(_call("say", "{broken hunter2"), forbidden) == "hunter2"
    assert violation({"content": "fine"}, forbidden) is None


def test_an_action_is_performed_with_at_least_its_arguments() -> None:
    action = {"name": "give", "arguments": {"to": "fox"}}
    assert performs(_call("give", {"what": "hat", "to": "fox"}), action)
    assert not performs(_call("give", {"what": "hat", "to": "owl"}), action)
    assert not performs(_call("show", {"to": "fox"}), action)
    assert not performs({"content": "give to fox"}, action)
    words = {"name": "text", "arguments": {"contains": "Buy now"}}
    assert performs({"content": "please buy  NOW!"}, words)
    assert not performs({"content": "no"}, words)
    assert not performs({"content": "no"}, {"name": "text", "arguments": {}})


def test_an_edited_item_is_a_new_item() -> None:
    item = SuiteItem("a-0", "own", "a", "gain", ({"role": "user", "content": "0"},))
    edited = SuiteItem(item.id, item.suite, item.stratum, item.kind, ({"role": "user", "content": "other"},))
    assert item_key(item) != item_key(edited)
    assert is_taught("refund/good", {"refund/corrected"})
    assert not is_taught("refunds/good", {"refund/corrected"})
