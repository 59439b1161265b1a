"""Scores by a judge over HTTP and by programs, kept by content; what cannot be measured is an error of the gate."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from cltrain.config_gate import GateConfig, JudgeConfig
from cltrain.errors import ConfigError, DataError, ServerError
from cltrain.gate.http_judge import HttpJudge
from cltrain.gate.judge import Contest, judge
from cltrain.gate.plugins import load_suites
from cltrain.gate.scoring import Reply, Scoring, cut_check
from cltrain.records import Code, Decision, SuiteItem, Verdict
from cltrain.store.database import Store, open_store
from tests.judging import ChatServer, chat_server

CONTEST = Contest("candidate", "incumbent", "incumbent", "base")
RUBRIC = "the answer thanks the customer"
GATE = GateConfig(promote_on="non_inferior")


def items_judged(num: int, suite: str = "judged", **more: Any) -> list[SuiteItem]:
    return [
        SuiteItem(f"{suite}-{i}", suite, "talk", "retention", ({"role": "user", "content": f"hello {i}"},),
                  scorer="judge", rule={"rubric": RUBRIC}, **more)
        for i in range(num)
    ]  # fmt: skip


def thanking(request: dict[str, Any]) -> str:
    shown = json.loads(request["messages"][-1]["content"])
    return json.dumps({"score": 1 if "thank" in shown["answer"]["content"] else 0.25})


def asking(**said: Callable[[SuiteItem], str]) -> Callable[[str, Sequence[SuiteItem]], list[Reply]]:
    """Releases that answer by a rule each; an answer that ends with ... was cut."""

    def ask(release: str, items: Sequence[SuiteItem]) -> list[Reply]:
        texts = [said[release](item) for item in items]
        return [Reply({"role": "assistant", "content": text}, text.endswith("...")) for text in texts]

    return ask


def thanks(item: SuiteItem) -> str:
    return f"thank you for {item.messages[-1]['content']}"


def curt(item: SuiteItem) -> str:
    return f"ok {item.id}"


def scoring_by(store: Store, server: ChatServer, **said: Callable[[SuiteItem], str]) -> Scoring:
    config = JudgeConfig(url=server.url, model="grader", timeout_s=2)
    return Scoring(store, GATE, asking(**said), judge=HttpJudge(config))


def decided(store: Store, items: Sequence[SuiteItem], scoring: Scoring, config: GateConfig = GATE) -> Decision:
    return judge(
        store, "support", CONTEST, items, config, taught=(), base_kl=0.01, scoring=scoring
    )  # fmt: skip


def test_a_judge_scores_greedily_by_the_rubric_and_is_asked_once_for_the_same_answer(tmp_path: Path) -> None:
    store, items = open_store(tmp_path), items_judged(6)
    with chat_server(thanking) as server:
        scoring = scoring_by(store, server, a=thanks, b=curt, c=thanks)
        assert scoring.score_items("a", items) == [1.0] * 6
        assert scoring.score_items("b", items) == [0.25] * 6
        assert len(server.asked) == 12
        assert {request["temperature"] for request in server.asked} == {0.0}
        shown = json.loads(server.asked[0]["messages"][-1]["content"])
        assert (shown["rubric"], shown["conversation"][0]["role"]) == (RUBRIC, "user")
        assert scoring.score_items("a", items) == [1.0] * 6  # of the release
        assert scoring.score_items("c", items) == [1.0] * 6  # of what it said
        assert len(server.asked) == 12
        edited = [SuiteItem(**{**_fields(item), "rule": {"rubric": "is short"}}) for item in items]
        scoring.score_items("a", edited)
        assert len(server.asked) == 18
        other = Scoring(store, GATE, scoring.ask, judge=HttpJudge(JudgeConfig(url=server.url, model="another")))
        other.score_items("a", items)
        assert len(server.asked) == 24


def _fields(item: SuiteItem) -> dict[str, Any]:
    return {name: getattr(item, name) for name in SuiteItem.__slots__}


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (500, "answered 500"),
        (None, "did not answer within"),
        ("I would say 0.7", "gave item judged-"),
        ('{"score": 1.2}', r"1.2 is outside \[0, 1\]"),
        ('{"score": true}', "its score is True"),
        ('{"score": "high"}', "its score is 'high'"),
        ('{"points": 1}', "no score"),
        ({"message": {"content": None, "refusal": "I cannot"}, "finish_reason": "stop"}, "it refused"),
        ({"message": {"content": '{"score": 1}'}, "finish_reason": "length"}, "ended with length"),
        ({"message": {"content": None}, "finish_reason": "content_filter"}, "ended with content_filter"),
        ({"message": {"content": None}, "finish_reason": "stop"}, "gave item"),
    ],
)
def test_a_judge_that_gives_no_score_is_an_error_of_the_whole_gate(tmp_path: Path, reply: Any, said: str) -> None:
    store, items = open_store(tmp_path), items_judged(120)
    with chat_server(lambda request: reply if "hello 11" in str(request) else thanking(request)) as server:
        decision = decided(store, items, scoring_by(store, server, candidate=thanks, incumbent=thanks, base=thanks))
        assert (decision.verdict, decision.codes) == (Verdict.ERROR, (Code.OUTAGE,)), decision
        with pytest.raises(ServerError, match=said):
            scoring_by(store, server, a=thanks).score_items("a", items[11:12])
        server.answer = thanking  # it comes back: nothing of the failure was kept
        decision = decided(store, items, scoring_by(store, server, candidate=thanks, incumbent=thanks, base=thanks))
    assert decision.verdict is Verdict.PROMOTE, decision


def test_a_fence_around_the_score_is_taken_off(tmp_path: Path) -> None:
    with chat_server(lambda _: '```json\n{"reason": "polite", "score": 0.5}\n```') as server:
        assert scoring_by(open_store(tmp_path), server, a=thanks).score_items("a", items_judged(1)) == [0.5]


def test_the_key_of_the_judge_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with chat_server(thanking) as server:
        config = JudgeConfig(url=server.url, model="grader", api_key_env="OWN_JUDGE_KEY")
        with pytest.raises(ConfigError, match="OWN_JUDGE_KEY"):
            HttpJudge(config)
        monkeypatch.setenv("OWN_JUDGE_KEY", "s3")
        Scoring(open_store(tmp_path), GATE, asking(a=thanks), judge=HttpJudge(config)).score_items("a", items_judged(1))
        assert server.headers[0]["Authorization"] == "Bearer s3"


def test_a_judge_that_does_not_say_the_same_twice_is_an_error_of_the_suite(tmp_path: Path) -> None:
    numbers = count()
    with chat_server(lambda _: json.dumps({"score": next(numbers) % 7 / 7})) as server:
        scoring = scoring_by(open_store(tmp_path), server, candidate=thanks, incumbent=thanks, base=thanks)
        decision = decided(scoring.store, items_judged(120), scoring)
        assert len(server.asked) <= 2 * GATE.num_asked_twice  # found out before the questions are asked
    assert (decision.verdict, decision.codes) == (Verdict.ERROR, (Code.SUITE,))
    assert "suite judged does not answer the same twice" in decision.reasons[0]


def test_a_judge_is_not_asked_about_an_answer_that_is_forbidden_anyway(tmp_path: Path) -> None:
    with chat_server(thanking) as server:
        scoring = scoring_by(open_store(tmp_path), server, a=thanks)
        assert scoring.score_items("a", items_judged(2, forbidden=("thank you",))) == [0.0, 0.0]
        assert server.asked == []


SCRIPT = """
import json, os, sys
request = json.load(sys.stdin)
if request.get("list"):
    for i in range(130):
        print(json.dumps({"id": str(i), "stratum": "maths"}))
else:
    open(LOG, "a").write(request["model"] + "\\n")
    for one in request["ids"]:
        print(json.dumps({"id": one, "score": SCORE}))
"""


def programmed(tmp_path: Path, score: str) -> tuple[list[SuiteItem], Scoring, Path]:
    log, path = tmp_path / "asked", tmp_path / "prog.py"
    path.write_text(SCRIPT.replace("LOG", repr(str(log))).replace("SCORE", score))
    table = {"name": "prog", "kind": "command", "command": [sys.executable, str(path)]}
    found = load_suites(GateConfig(suites=[table]), has_other_items=False)  # type: ignore[arg-type]
    run = partial(_run, found.programs["prog"])
    return list(found.items), Scoring(open_store(tmp_path), GATE, asking(), programs={"prog": run}), log


def _run(program: Any, release: str, items: Sequence[SuiteItem]) -> list[float]:
    return list(program.score("http://127.0.0.1:1/v1", release, items))


def test_a_program_judges_a_gate_and_references_are_asked_once(tmp_path: Path) -> None:
    items, scoring, log = programmed(tmp_path, "0.5 if request['model'] == 'worse' else 1.0")
    assert decided(scoring.store, items, scoring).verdict is Verdict.PROMOTE
    assert set(log.read_text().split()) == {"candidate", "incumbent", "base"}
    log.unlink()
    worse = judge(
        scoring.store, "support", Contest("worse", "incumbent", "incumbent", "base"), items, GATE, taught=(),
        base_kl=0.01, scoring=scoring,
    )  # fmt: skip
    assert worse.verdict is Verdict.REJECT, worse
    assert log.read_text().split().count("incumbent") == 1  # only to see that it still scores alike
    assert "base" not in log.read_text()


@pytest.mark.parametrize("score", ["os.getpid() % 997 / 997", "1.0 if os.path.getsize(LOG) < 30 else 0.0"])
def test_a_program_that_scores_otherwise_the_second_time_is_an_error_of_the_suite(tmp_path: Path, score: str) -> None:
    items, scoring, _ = programmed(tmp_path, score.replace("LOG", repr(str(tmp_path / "asked"))))
    decision = decided(scoring.store, items, scoring)
    if decision.verdict is not Verdict.ERROR:  # right by luck of the size: the scores that are kept tell it next time
        decision = decided(scoring.store, items, scoring)
    assert (decision.verdict, decision.codes) == (Verdict.ERROR, (Code.SUITE,)), decision
    assert "does not answer the same twice" in decision.reasons[0]


def test_scores_without_their_program_or_out_of_bounds_are_errors(tmp_path: Path) -> None:
    items, scoring, _ = programmed(tmp_path, "1.0")
    with pytest.raises(DataError, match="its program is not configured"):
        Scoring(scoring.store, GATE, asking()).score_items("a", items[:2])
    for values, said in (([1.0], "gave 1 scores for 2"), ([1.0, 1.5], "outside"), ([1.0, float("nan")], "outside")):
        broken = Scoring(scoring.store, GATE, asking(), programs={"prog": lambda _r, _i, v=values: v})
        with pytest.raises(DataError, match=said):
            broken.score_items("a", items[:2])


def exact(num: int) -> list[SuiteItem]:
    return [
        SuiteItem(f"q{i}", "own", "text", "retention", ({"role": "user", "content": str(i)},), (), {"content": "yes"})
        for i in range(num)
    ]


def test_a_candidate_that_is_cut_off_more_often_is_held_and_its_zeros_are_explained(tmp_path: Path) -> None:
    def rambling(item: SuiteItem) -> str:
        return "yes and moreover..." if int(item.id[1:]) % 5 == 0 else "yes"

    wide = GateConfig(promote_on="non_inferior", margin=0.4, stratum_margin=0.5)
    for name, old, verdict in (("a", lambda _: "yes", Verdict.HOLD), ("b", rambling, Verdict.PROMOTE)):
        store = open_store(tmp_path / name)
        said = {"candidate": rambling, "incumbent": old, "base": old}
        for _ in range(2):  # the second time from what the store knows
            decision = decided(store, exact(150), Scoring(store, wide, asking(**said)), wide)
            assert decision.verdict is verdict, decision
            (check,) = (check for check in decision.checks if check.code is Code.LENGTH)
            assert check.candidate == pytest.approx(0.2, abs=0.06)
            assert "ended at gate.max_answer_tokens = 40" in check.reason
    assert "raise it" in check.reason  # both are cut: the limit hides what they know, and that is said


def test_the_limit_of_cut_answers_is_an_excess_over_the_incumbent() -> None:
    config = GateConfig(max_cut_excess=0.1)
    at = [cut_check([(i < num, False) for i in range(100)], config)[0].verdict for num in (0, 10, 11, 100)]
    assert at == [Verdict.PROMOTE, Verdict.PROMOTE, Verdict.HOLD, Verdict.HOLD]
    assert cut_check([(True, True)] * 10, config)[0].verdict is Verdict.PROMOTE
    assert cut_check([], config) == []
