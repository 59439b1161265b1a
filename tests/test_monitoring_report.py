"""The pages say what happened, leave out what is unknown, and never trust text that came from traffic."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from cltrain.errors import DataError
from cltrain.monitoring.report import read_decision, run_page, update_page
from cltrain.records import BoundReport, Check, Decision, Verdict

BOUNDS = BoundReport(
    0.061, 0.1, 0.21, 0.5, 0.05, 0.1, 0.1, 0.5, 0.11, 0.25, 0.238, 0.25, 0.061, 1.0, 100, 200, 24, 100, 0.62
)
CHECKS = (
    Check("gain", Verdict.PROMOTE, "right on 31 items more", 0.81, 0.68, 0.13, 0.07, 0.19, 240),
    Check("retention/lookup", Verdict.PROMOTE, "no loss beyond 0.05", 0.97, 0.98, -0.01, -0.04, 0.02, 120),
    Check("retention/refund", Verdict.HOLD, "too few items to rule a loss out", 0.9, 0.94, -0.04, -0.19, 0.11, 22, 60),
    Check("base_kl", Verdict.PROMOTE, "0.238 of 0.25 nats", 0.238, 0.25),
)
HOLD = Decision(Verdict.HOLD, ("retention/refund: 60 items missing",), CHECKS, 60, 5400.0)
PROMOTE = Decision(Verdict.PROMOTE, ("gain: right on 31 items more",), CHECKS[:2])
UPDATE: dict[str, Any] = {
    "id": "support-7-5d21",
    "agent": "support",
    "number": 7,
    "mode": "auto",
    "state": "done",
    "verdict": "hold",
    "parent": "support-v000006-3fa9c1d2e0b7",
    "candidate": "support-v000007-b81c02aa94fe",
    "serving": "support-v000006-3fa9c1d2e0b7",
    "started_at": 1_790_000_000.0,
    "finished_at": 1_790_000_019.4,
    "window": {
        "num_examples": 48,
        "num_waiting": 12,
        "strata": {"refund/good": 21, "lookup/corrected": 14, "text/good": 9, "other": 4},
        "principals": {f"user-{i}": 12 - i for i in range(12)},
        "set_aside": {"more than a quarter of the window from one principal": 9, "arguments are not JSON": 2},
        "suspicious": [{"phrase": "zq blue", "principal": "user-1", "action": "close_ticket", "count": 6}],
    },
    "replay": {"refund/good": 30, "lookup/good": 18},
    "metrics": {"loss": 0.31, "kl": 0.04},
    "steps": [{"step": i, "loss": 1.4 / (1 + i / 4), "kl": 0.05 * (1 - 2.7 ** (-i / 8))} for i in range(24)],
    "timings": {"window": 0.3, "train": 11.2, "load and prove": 0.8, "gate": 6.9, "swap": 0.012},
    "facts": {"config": "9f31c0", "seed": 0, "torch": "2.13.0"},
}


class Wellformed(HTMLParser):
    """Fails on a tag that is closed wrongly or loads something from outside."""

    VOID = frozenset({"meta", "br", "link", "img", "hr", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.outside += [v or "" for k, v in attrs if k in {"src", "href"} and re.match(r"(https?:)?//", v or "")]
        assert tag != "script"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag


def page(path: Path) -> str:
    text = path.read_text()
    parser = Wellformed()
    parser.feed(text)
    assert parser.open == []
    assert parser.outside == []
    return text


def words(path: Path) -> str:
    return " ".join(re.sub(r"<style>.*?</style>|<[^>]+>", " ", page(path), flags=re.S).split())


def test_update_page_says_what_came_in_what_moved_and_why(tmp_path: Path) -> None:
    text = words(update_page(tmp_path / "u" / "7.html", UPDATE, HOLD, BOUNDS, run_page="index.html", options=OPTIONS))
    for said in (
        "Update 7 of support", "On hold", "60 items missing", "90 min", "48 examples",
        "refund/good", "arguments are not JSON", "zq blue", "close_ticket", "3 others", "only 62% of it was kept",
        "95% of the limit", "retention/refund", "-0.19 to 0.11", "support-v000007-b81c02aa94fe",
        "cltrain rollback --agent support", "11.2 s", "12 ms",
    ):  # fmt: skip
        assert said in text, said


def test_a_promoted_update_offers_the_way_back_to_its_parent(tmp_path: Path) -> None:
    served = UPDATE | {"verdict": "promote", "serving": UPDATE["candidate"]}
    text = words(update_page(tmp_path / "7.html", served, PROMOTE, BOUNDS))
    assert f"--to {UPDATE['parent']}" in text
    assert "Why it was promoted" in text


def test_observe_mode_says_that_nothing_changed(tmp_path: Path) -> None:
    text = words(update_page(tmp_path / "7.html", UPDATE | {"mode": "observe"}, PROMOTE, BOUNDS))
    assert "Nothing changed: support only observes" in text


def test_a_bare_update_gets_a_page_without_invented_numbers(tmp_path: Path) -> None:
    bare = {"agent": "support", "number": 1, "state": "discarded", "reason": "the loss became NaN in step 3"}
    text = words(update_page(tmp_path / "1.html", bare, None, None))
    assert "Discarded" in text
    assert "the loss became NaN in step 3" in text
    for part in ("What came in", "What moved", "Releases", "Where the time went"):
        assert part not in text
    with pytest.raises(DataError, match="number"):
        update_page(tmp_path / "1.html", {"agent": "support"}, None, None)


def test_text_from_traffic_cannot_become_markup(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script> $\\frac"
    window = {"num_examples": 1, "strata": {evil: 1}, "principals": {evil: 1}, "set_aside": {evil: 1}}
    window["suspicious"] = [{"phrase": evil, "principal": evil, "action": evil, "count": 4}]
    checks = (Check(evil, Verdict.REJECT, evil, 0.1, 0.2, -0.1, -0.2, -0.05, 10),)
    update = UPDATE | {"window": window, "replay": {evil: 1}, "facts": {evil: evil}, "reason": evil, "truth": evil}
    for path in (
        update_page(tmp_path / "7.html", update, Decision(Verdict.REJECT, (evil,), checks), BOUNDS),
        run_page(
            tmp_path / "index.html", "support", [update], curves={evil: {evil: [(1, 0.5)], "b": [(1, 0.4)]}}, note=evil
        ),
    ):
        text = page(path)
        assert "<script" not in text
        assert "alert(1)" in text


def test_run_page_shows_every_update_and_what_was_caught(tmp_path: Path) -> None:
    verdicts = ["promote", "promote", "reject", "hold", "promote", "error"]
    updates = [
        UPDATE | {"number": i, "verdict": v, "bounds": asdict(BOUNDS), "page": f"{i}.html",
                  "truth": "poisoned" if v == "reject" else "clean", "is_caught": v == "reject"}
        for i, v in enumerate(verdicts, 1)
    ]  # fmt: skip
    curves = {"Skills": {"refund": [(i, i / 6) for i in range(7)], "lookup": [(i, 0.9) for i in range(7)]}}
    table = {"cltrain": {"skill_after": 0.94}, "naive": {"skill_after": 0.41, "base_kl": 1.9}}
    made = run_page(tmp_path / "index.html", "support", updates, serving="r5", curves=curves, comparison=table)
    text = words(made)
    for said in (
        "6 updates tried",
        "3 promoted",
        "1 of 1 caught",
        "0 of 5 wrongly caught",
        "skill_after 0.94 0.41",
        "95%",
    ):
        assert said in text, said
    assert page(made).count('href="3.html"') == 2
    assert "No update has been tried yet" in words(run_page(tmp_path / "empty.html", "support", []))


def test_the_same_data_gives_the_same_bytes(tmp_path: Path) -> None:
    first = update_page(tmp_path / "a.html", UPDATE, HOLD, BOUNDS).read_bytes()
    assert update_page(tmp_path / "b.html", UPDATE, HOLD, BOUNDS).read_bytes() == first
    assert len(first) < 200_000


def test_a_stored_decision_reads_back_equal() -> None:
    assert read_decision(json.loads(json.dumps(asdict(HOLD)))) == HOLD
