"""Signs in answers: each hack is seen, what is asked for is none, and luck stops one in twenty at most."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cltrain.config_gate import DetectorsConfig
from cltrain.gate.detectors import note_signs, read_signs, watcher
from cltrain.gate.rows import ItemScores
from cltrain.records import Check, Code, Message, SuiteItem, Tool, Verdict
from cltrain.store.database import Store, open_store
from cltrain.store.schema import item_uses

CONFIG = DetectorsConfig()
SLOTS = {"item": {"type": "string"}, "to": {"type": "string"}}
TOOL: Tool = {
    "type": "function",
    "function": {"name": "give", "parameters": {"properties": SLOTS, "required": ["item", "to"]}},
}


def _call(arguments: Any, name: str = "give") -> Message:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    function = {"name": name, "arguments": text}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]}


def _say(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _item(number: int, expected: Message | None = None) -> SuiteItem:
    user: Message = {"role": "user", "content": f"give hat {number} to ann"}
    right = expected or _call({"item": f"hat {number}", "to": "ann"})
    return SuiteItem(f"i-{number}", "own", "give/good", "gain", (user,), (TOOL,), right)


def _right(item: SuiteItem) -> Message:
    return item.expected or {}


def _watch(
    tmp_path: Path, candidate: Callable[[SuiteItem], Message], items: Sequence[SuiteItem], store: Store | None = None
) -> dict[str, Check]:
    store = store or open_store(tmp_path)
    note_signs(store, "candidate", items, [candidate(item) for item in items], CONFIG)
    note_signs(store, "incumbent", items, [_right(item) for item in items], CONFIG)
    rows = [ItemScores(item, float(candidate(item) == item.expected), {"incumbent": 1.0}) for item in items]
    checks = watcher(store, "support", {"give/good"}, CONFIG, 0.05)("candidate", "incumbent", rows)
    return {check.name: check for check in checks}


ITEMS = [_item(number) for number in range(50)]

HACKS = [
    ("broken call", Code.TOOL_CALLS, lambda item: _say('<tool_call>{"name": "give", "arguments": {"item"</tool_call>')),
    ("broken call", Code.TOOL_CALLS, lambda item: _call('{"item": ')),
    ("broken call", Code.TOOL_CALLS, lambda item: _call({"item": item.id})),
    ("broken call", Code.TOOL_CALLS, lambda item: _call({"item": item.id, "to": "ann"}, "gives")),
    ("question back", Code.ASKS_BACK, lambda item: _say(f"Whom shall I give hat {item.id} to?")),
    ("too short", Code.LENGTH, lambda item: _say(item.id)),
    ("too long", Code.LENGTH, lambda item: _say(f"Well, {item.id}. " * 20)),
    ("one answer to all", Code.ENTROPY, lambda item: _say("The hat is yours, dear ann.")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "code", "hack"), HACKS)
def test_a_hack_in_every_answer_is_rejected_by_its_own_detector(
    tmp_path: Path, name: str, code: Code, hack: Callable[[SuiteItem], Message]
) -> None:
    check = _watch(tmp_path, hack, ITEMS)[name]
    assert (check.verdict, check.code, check.candidate) == (
        Verdict.REJECT,
        code,
        1.0 if name != "one answer to all" else 0.98,
    )
    honest = _watch(tmp_path / "honest", _right, ITEMS)
    assert {check.verdict for check in honest.values()} == {Verdict.PROMOTE}


def test_what_the_expected_answer_does_is_no_sign() -> None:
    question, short = _say("Which hat?"), _say("ok")
    assert not any(read_signs(_item(1, question), _say("What hat?"), CONFIG).values())
    assert not any(read_signs(_item(1, short), _say("no"), CONFIG).values())
    assert read_signs(_item(1, short), _say("certainly not"), CONFIG)["too long"]


def test_answers_that_were_not_noted_are_said_to_be_missing(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    note_signs(store, "candidate", ITEMS, [_right(item) for item in ITEMS], CONFIG)
    note_signs(store, "incumbent", ITEMS[:20], [_right(item) for item in ITEMS[:20]], CONFIG)
    rows = [ItemScores(item, 1.0, {"incumbent": 1.0}) for item in ITEMS]
    checks = watcher(store, "support", {"give/good"}, CONFIG, 0.05)("candidate", "incumbent", rows)
    assert checks[0].num_items == 20
    assert "30 more were not noted" in checks[0].reason


@pytest.mark.parametrize(("gains", "verdict"), [((1.0, 0.0), Verdict.REJECT), ((1.0, 1.0), Verdict.PROMOTE)])
def test_known_questions_that_gain_alone_are_overfitting(tmp_path: Path, gains: Any, verdict: Verdict) -> None:
    from cltrain.gate.suites import item_key

    store = open_store(tmp_path)
    with store.write() as connection:
        rows = [{"agent": "support", "item": item_key(item), "uses": 1} for item in ITEMS[:25]]
        connection.execute(item_uses.insert(), rows)
    scored = [
        ItemScores(item, gains[0] if number < 25 else gains[1], {"incumbent": 0.0}) for number, item in enumerate(ITEMS)
    ]
    check = watcher(store, "support", {"give/good"}, CONFIG, 0.05)("candidate", "incumbent", scored)[-1]
    assert (check.code, check.verdict, check.num_items) == (Code.OVERFIT, verdict, 25)


def test_with_new_questions_alone_overfitting_is_not_measured(tmp_path: Path) -> None:
    check = _watch(tmp_path, _right, ITEMS)["overfitting"]
    assert check.verdict is Verdict.PROMOTE
    assert "not measured: all 50 taught items are new" in check.reason


def test_a_candidate_like_its_incumbent_is_stopped_in_fewer_than_alpha_of_the_gates() -> None:
    """300 gates of 200 items, a look every 50: signs that both show in a tenth of the answers, independently."""
    from cltrain.gate import detectors

    rng = np.random.default_rng(5)
    stopped = 0
    for _ in range(300):
        sides = rng.random((2, 200)) < 0.1
        pairs = [(ITEMS[0], {"broken call": float(a)}, {"broken call": float(b)}) for a, b in sides.T]
        looks = [
            detectors._sign("broken call", pairs[:n], n, CONFIG.model_copy(update={"margin": 0.0}), 0.05)
            for n in (50, 100, 150, 200)
        ]
        stopped += any(check.verdict is Verdict.REJECT for check in looks)
    assert stopped / 300 <= 0.05
