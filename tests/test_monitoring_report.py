"""The pages say what happened, leave out what is unknown, and never trust text that came from traffic."""

from __future__ import annotations

import html
import json
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from cltrain.errors import DataError
from cltrain.monitoring.report import read_decision, run_page, update_page
from cltrain.records import BoundReport, Check, Code, Decision, Verdict

BOUNDS = BoundReport(
    0.061, 0.1, 0.21, 0.5, 0.05, 0.1, 0.1, 0.5, 0.11, 0.25, 0.238, 0.25, 0.061, 1.0, 100, 200, 24, 100, 0.62
)
CHECKS = (
    Check(
        "gain in agreement",
        Code.GAIN,
        Verdict.PROMOTE,
        "+0.130, within [+0.070, +0.190]",
        None,
        None,
        0.13,
        0.07,
        0.19,
        240,
    ),
    Check("stratum lookup/good", Code.STRATUM, Verdict.PROMOTE, "0.980 to 0.970", 0.97, 0.98, -0.01, None, None, 100),
    Check(
        "stratum swap/corrected",
        Code.STRATUM,
        Verdict.HOLD,
        "0.500 below the incumbent",
        0.5,
        1.0,
        -0.5,
        None,
        None,
        6,
        60,
    ),
    Check(
        "retention against anchor",
        Code.RETENTION,
        Verdict.PROMOTE,
        "between -0.04 and 0.02",
        0.9,
        0.94,
        -0.04,
        -0.045,
        0.11,
        50,
    ),
    Check("base KL", Code.BASE_KL, Verdict.PROMOTE, "0.238 of 0.25 nats", 0.238, 0.25),
)
HOLD = Decision(Verdict.HOLD, ("stratum swap/corrected: 0.500 below the incumbent",), CHECKS, 60, 5400.0)
PROMOTE = Decision(Verdict.PROMOTE, ("gain in agreement: +0.130, within [+0.070, +0.190]",), CHECKS[:2])
OPTIONS = "--config '/etc/my desk.toml' --home /var/desk --agent support"
SETTINGS = {
    "trainer.method": "bounded_replay", "trainer.remember": "kl, replay", "trainer.lr": 0.002, "trainer.num_steps": 24,
    "trainer.batch_size": 16, "adapter.rank": 8, "gate.margin": 0.05, "gate.stratum_margin": 0.12,
}  # fmt: skip
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
        "principals_left": {"mallory": 30, "user-0": 2},
        "set_aside": {"arguments are not JSON": 2} | {f"duplicate of traj-{i}": 1 for i in range(18)},
        "suspicious": [{"phrase": "zq blue", "principal": "user-1", "action": "close_ticket", "count": 6}],
    },
    "replay": {"refund/good": 30, "lookup/good": 18},
    "metrics": {"loss": 0.31, "kl": 0.04},
    "steps": [{"step": i, "loss": 1.4 / (1 + i / 4), "kl": 0.05 * (1 - 2.7 ** (-i / 8))} for i in range(24)],
    "timings": {"window": 0.3, "train": 11.2, "load and prove": 0.8, "gate": 6.9, "swap": 0.012},
    "facts": {"config": "9f31c0", "seed": 0, "torch": "2.13.0"},
    "settings": SETTINGS,
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
        "Update 7 of support", "On hold", "Items still missing for an answer: 60", "90 min", "48 examples",
        "refund/good", "arguments are not JSON", "zq blue", "close_ticket", "4 others", "only 62% of it was kept",
        "95% of the limit", "retention against anchor", "-0.045 to 0.11", "support-v000007-b81c02aa94fe",
        "11.2 s", "12 ms", "duplicate of another record 18", "24 steps of 16 rows, learning rate 0.002",
        "bounded_replay (remembers: kl, replay)", "gate.stratum_margin 0.12", "high-water mark the best release",
    ):  # fmt: skip
        assert said in text, said
    why = "It answered 3 of 6 on swap/corrected, where before it answered 6 of 6; it may lose 12% of them"
    assert text.index(why) < text.index("What came in") < text.index("0.500 below the incumbent")
    assert text.index("user-0 12 + 2") < text.index("user-8 4") < text.index("4 others")
    assert "mallory" not in text  # what was set aside ranks last, and is pooled there


def test_the_page_says_how_many_items_were_not_asked_and_what_that_saved(tmp_path):
    early = replace(PROMOTE, num_planned=240, num_asked=80)
    text = words(update_page(tmp_path / "7.html", UPDATE, early, BOUNDS, options=OPTIONS))
    assert "It asked 80 of the 240 items drawn: the answer was clear before" in text
    assert "would have taken about 13.8 s more" in text  # 6.9 s for 80
    whole = replace(early, num_asked=240)
    text = words(update_page(tmp_path / "7.html", UPDATE, whole, BOUNDS, options=OPTIONS))
    assert "It asked 240 of the 240 items drawn." in text


def test_every_command_on_a_page_names_the_deployment_from_any_directory(tmp_path: Path) -> None:
    waiting = UPDATE | {"mode": "approve", "verdict": "promote"}
    made = [
        update_page(tmp_path / "7.html", waiting, PROMOTE, BOUNDS, options=OPTIONS),
        run_page(tmp_path / "index.html", "support", [waiting], options=OPTIONS),
    ]
    for path in made:
        commands = html.unescape("\n".join(re.findall(r"<pre>(.*?)</pre>", path.read_text(), re.DOTALL)))
        shown = [line for line in commands.splitlines() if line and not line.startswith("#")]
        assert {line.split()[1] for line in shown} >= {"promote", "rollback", "freeze", "status"}
        assert all(OPTIONS in line for line in shown), shown
        assert any(line.startswith(f"cltrain promote {UPDATE['candidate']} ") for line in shown)


def test_a_gain_is_said_in_words_and_every_other_check_is_counted(tmp_path: Path) -> None:
    served = UPDATE | {"verdict": "promote", "serving": UPDATE["candidate"], "reason": PROMOTE.reasons[0] + " (trial)"}
    text = words(update_page(tmp_path / "7.html", served, PROMOTE, BOUNDS, options=OPTIONS))
    gain = "Of 240 questions about what it was taught (agreement) it answered 31.2 more than before"
    assert f"{gain}: more than luck explains. None of the other 1 checks found a loss." in text
    assert text.count("+0.130, within") == 1


@pytest.mark.parametrize(
    ("standing", "headline", "tone"),
    [
        ("serves", "Promoted", "promote"),
        ("waits", "Waits for your yes", "waits"),
        ("outdated", "Passed, never served", "outdated"),
        ("rolled_back", "Rolled back", "rolled_back"),
    ],
)
def test_what_became_of_a_promotion_is_the_headline(tmp_path: Path, standing: str, headline: str, tone: str) -> None:
    rolled_back = {
        "from": UPDATE["candidate"], "to": UPDATE["parent"], "undone": [UPDATE["candidate"]], "num_quarantined": 24,
        "reason": "<b>curt</b>", "freeze": True,
    }  # fmt: skip
    history = [{"kind": "promote", "at": 1_790_000_100.0, "payload": {"to": UPDATE["candidate"], "is_human": True}}]
    history += [{"kind": "rollback", "at": 1_790_000_200.0, "payload": rolled_back}] * (standing == "rolled_back")
    update = UPDATE | {"mode": "approve", "verdict": "promote", "standing": standing, "history": history}
    page_of_one = update_page(tmp_path / "7.html", update, PROMOTE, BOUNDS, options=OPTIONS)
    page_of_all = run_page(tmp_path / "index.html", "support", [update], options=OPTIONS)
    for path in (page_of_one, page_of_all):
        assert headline in words(path)
        assert f'class="cell {tone}"' in page(path) or f'<body class="{tone}">' in page(path)
    assert ("cltrain promote" in page(page_of_one)) is (standing == "waits")
    assert f"{int(standing == 'serves')} promoted" in words(page_of_all)
    assert "A person said yes" in words(page_of_one)
    told = "(&lt;b&gt;curt&lt;/b&gt;): 24 records that were learned since are set aside, and learning was frozen"
    assert (told in page(page_of_one)) is (standing == "rolled_back")


def test_a_decision_that_was_stored_before_checks_had_codes_is_still_read() -> None:
    old = json.loads(json.dumps(asdict(HOLD)))
    del old["codes"]
    for check in old["checks"]:
        del check["code"]
    found = read_decision(old)
    assert [check.code for check in found.checks] == [check.code for check in HOLD.checks]
    assert found.reasons == HOLD.reasons


def test_a_phrase_that_steers_is_said_in_odds(tmp_path: Path) -> None:
    probe = Check(
        "trigger probe 1",
        Code.TRIGGER,
        Verdict.REJECT,
        "flips 0 of 16, lift +2.30 nats",
        None,
        None,
        2.303,
        None,
        None,
        16,
    )
    rejected = Decision(Verdict.REJECT, ("trigger probe 1: flips 0 of 16, lift +2.30 nats",), (probe,))
    text = words(update_page(tmp_path / "7.html", UPDATE, rejected, BOUNDS, options=OPTIONS))
    assert "steers it to one action, which it makes 10 times likelier" in text


def test_a_promoted_update_offers_the_way_back_to_its_parent(tmp_path: Path) -> None:
    served = UPDATE | {"verdict": "promote", "serving": UPDATE["candidate"]}
    text = words(update_page(tmp_path / "7.html", served, PROMOTE, BOUNDS, options=OPTIONS))
    assert f"--to {UPDATE['parent']}" in text
    assert "Why the gate said yes" in text


def test_observe_mode_says_that_nothing_moved(tmp_path: Path) -> None:
    observed = UPDATE | {"mode": "observe"}
    text = words(update_page(tmp_path / "7.html", observed, PROMOTE, BOUNDS, options=OPTIONS))
    assert "Would be promoted The gate would let the candidate serve. Nothing moved." in text
    assert "all the same (support only observes)" in text


def test_a_bare_update_gets_a_page_without_invented_numbers(tmp_path: Path) -> None:
    bare = {"agent": "support", "number": 1, "state": "discarded", "reason": "the loss became NaN in step 3"}
    text = words(update_page(tmp_path / "1.html", bare, None, None, options=OPTIONS))
    assert "Discarded" in text
    assert "the loss became NaN in step 3" in text
    for part in ("What came in", "What moved", "Releases", "Where the time went"):
        assert part not in text
    with pytest.raises(DataError, match="number"):
        update_page(tmp_path / "1.html", {"agent": "support"}, None, None, options=OPTIONS)


def test_text_from_traffic_cannot_become_markup(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script> $\\frac"
    window = {"num_examples": 1, "strata": {evil: 1}, "principals": {evil: 1}, "set_aside": {evil: 1}}
    window["suspicious"] = [{"phrase": evil, "principal": evil, "action": evil, "count": 4}]
    checks = (Check(evil, Code.CANARY, Verdict.REJECT, evil, 0.1, 0.2, -0.1, -0.2, -0.05, 10),)
    lesson = {"record": evil, "principal": evil, "by": evil, "asked": evil, "said": evil, "learned": evil}
    taught = {"num_learned": 3, "num_gone": 2, "shown": [lesson], "judges": {evil: evil}}
    update = UPDATE | {"window": window, "replay": {evil: 1}, "facts": {evil: evil}, "reason": evil, "truth": evil}
    update |= {"taught": taught, "settings": SETTINGS | {evil: evil}, "frozen": evil}
    for path in (
        update_page(tmp_path / "7.html", update, Decision(Verdict.REJECT, (evil,), checks), BOUNDS, options=OPTIONS),
        run_page(
            tmp_path / "index.html",
            "support",
            [update],
            options=OPTIONS,
            frozen=evil,
            curves={evil: {evil: [(1, 0.5)], "b": [(1, 0.4)]}},
            note=evil,
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
    made = run_page(
        tmp_path / "index.html", "support", updates, options=OPTIONS, serving="r5", curves=curves, comparison=table
    )
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
    assert "No update has been tried yet" in words(run_page(tmp_path / "empty.html", "support", [], options=OPTIONS))


def test_the_same_data_gives_the_same_bytes(tmp_path: Path) -> None:
    first = update_page(tmp_path / "a.html", UPDATE, HOLD, BOUNDS, options=OPTIONS).read_bytes()
    assert update_page(tmp_path / "b.html", UPDATE, HOLD, BOUNDS, options=OPTIONS).read_bytes() == first
    assert len(first) < 200_000


def test_a_stored_decision_reads_back_equal() -> None:
    assert read_decision(json.loads(json.dumps(asdict(HOLD)))) == HOLD
