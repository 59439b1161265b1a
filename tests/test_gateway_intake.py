"""Feedback and posted trajectories: checked, acknowledged after the commit, stored once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from cltrain.experience.recording import read_trajectories
from cltrain.gateway.chat import MAX_BODY_BYTES
from cltrain.store.schema import set_aside
from tests.gateway_parts import Gateway, running

TOOL = {"type": "function", "function": {"name": "find"}}
CALL = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"item": "lamp"}'}}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with running(tmp_path_factory.mktemp("state")) as gateway:
        yield gateway


def fix(name: str, arguments: Any) -> dict[str, Any]:
    return {"tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


def episode(name: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    return {"id": name, "messages": messages, "model": "other-llm", "reward": 1, "principal": "anna", **fields}


def test_feedback_reaches_the_generation_and_the_episode_late_and_once(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        answer = gateway.chat("one", headers={"X-Session-Id": "s", "X-Session-Done": "1"})
        record, trajectory = answer.headers["x-cltrain-record"], answer.headers["x-cltrain-trajectory"]
        gateway.now += 1e6
        given = [
            {"target": record, "id": "f1", "score": -0.5, "principal": "anna"},
            {"target": trajectory, "id": "f2", "text": "fine", "source": "operator"},
            {"target": record, "id": "f3", "correction": "do this", "source": "operator"},
        ]
        first = [gateway.http.post("/v1/feedback", json=g) for g in given]
        second = [gateway.http.post("/v1/feedback", json=g) for g in given]
        (kept,) = read_trajectories(gateway.store, "support")
    assert [a.json()["duplicate"] for a in first + second] == [False] * 3 + [True] * 3
    assert {f.id: (f.target, f.score, f.text, f.source) for f in kept.feedback} == {
        "f1": (record, -0.5, None, "user"),
        "f2": (trajectory, None, "fine", "operator"),
        "f3": (record, None, None, "operator"),
    }
    assert kept.feedback[2].correction == {"role": "assistant", "content": "do this"}
    assert kept.feedback[0].created_at == 1000.0 + 1e6


def test_a_corrected_tool_call_becomes_an_assistant_message(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        record = gateway.chat("one").headers["x-cltrain-record"]
        for correction in (
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"tool_calls": [{"id": "c1", "name": "find", "arguments": {"item": "lamp"}}]},
        ):
            answer = gateway.http.post("/v1/feedback", json={"target": record, "correction": correction})
            assert answer.status_code == 200, answer.text
        (kept,) = read_trajectories(gateway.store, "support")
    expected = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert [f.correction for f in kept.feedback] == [expected, expected]


@pytest.mark.parametrize(
    ("fields", "status", "said"),
    [
        ({"score": True}, 400, "must be a number"),
        ({"score": "1"}, 400, "must be a number"),
        ({"score": 1.01}, 400, "[-1, 1]"),
        ({"score": float("nan")}, 400, "NaN is no finite number"),
        ({"score": float("-inf")}, 400, "no finite number"),
        ({"score": 10**400}, 400, "[-1, 1]"),
        ({}, 400, "needs a score, a text or a correction"),
        ({"score": 1, "target": "nowhere"}, 404, "nowhere"),
        ({"score": 1, "target": None}, 400, "target must be a string"),
        ({"score": 1, "target": 3}, 400, "target must be a string"),
        ({"score": 1, "id": ["x"]}, 400, "id must be a string"),
        ({"scor": 1}, 400, "no field 'scor'"),
        ({"text": 5}, 400, "text must be a string"),
        ({"text": "\ud800"}, 400, "valid Unicode"),
        ({"correction": {}}, 400, "correction is empty"),
        ({"correction": 3}, 400, "correction must be"),
        ({"correction": {"role": "user", "content": "x"}}, 400, "must be 'assistant'"),
        ({"correction": {"tool_calls": [{"function": {"name": "f", "arguments": "{item"}}]}}, 400, "are no JSON"),
        (
            {"correction": {"tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}},
            400,
            "must be a JSON object",
        ),
        ({"correction": {"tool_calls": [{"arguments": "{}"}]}}, 400, "tool_calls[0] must be"),
        ({"correction": "  \n"}, 400, "correction is empty"),
        ({"correction": "half \ud800"}, 400, "valid Unicode"),
        ({"correction": fix("find", '{"item": "\\ud800"}')}, 400, "valid Unicode"),
        ({"correction": fix("\ud800", "{}")}, 400, "valid Unicode"),
        ({"correction": fix("find", '{"item": NaN}')}, 400, "no finite number"),
        ({"correction": fix("find", {"item": float("inf")})}, 400, "no finite number"),
        ({"correction": fix("find", "[" * 100_000)}, 400, "levels deep"),
        ({"score": 1, "id": "a\0b"}, 400, "NUL"),
        ({"score": 1, "source": "user\0"}, 400, "NUL"),
        ({"score": 1, "source": "boss"}, 400, "never counts; these do: verifier, operator, import, user"),
        ({"correction": "no", "source": "agent"}, 400, "never counts"),
        ({"score": 1, "id": "v9:reward"}, 400, "comes with an episode"),
        ({"text": "no", "id": "v9:chosen"}, 400, "comes with an episode"),
    ],
)
def test_bad_feedback_is_refused_with_the_reason(shared: Gateway, fields: Any, status: int, said: str) -> None:
    record = shared.chat("one").headers["x-cltrain-record"]
    answer = shared.http.post("/v1/feedback", content=json.dumps({"target": record, **fields}))
    kept = next(t for t in read_trajectories(shared.store, "support") if t.generations[0].id == record)
    assert answer.status_code == status
    assert said in answer.json()["error"]["message"]
    assert kept.feedback == ()


@pytest.mark.parametrize(
    "other", [{"score": -1}, {"correction": "no"}, {"text": "but"}, {"principal": "eve"}, {"source": "operator"}]
)
def test_one_feedback_id_for_two_contents_is_a_conflict_and_the_first_stands(
    shared: Gateway, other: dict[str, Any]
) -> None:
    records = [shared.chat(t).headers["x-cltrain-record"] for t in ("one", "two")]
    first = {"target": records[0], "id": f"f-{records[0]}", "score": 1}
    given = [first, first, {**first, **other}, {**first, "target": records[1]}]
    answers = [shared.http.post("/v1/feedback", json=one) for one in given]
    assert [a.status_code for a in answers] == [200, 200, 409, 409]
    assert "says something else: use a new id" in answers[2].json()["error"]["message"]
    kept = next(t for t in read_trajectories(shared.store, "support") if t.generations[0].id == records[0])
    assert [f.score for f in kept.feedback] == [1.0]


def test_who_is_only_learned_from_may_correct_and_not_judge(tmp_path: Path) -> None:
    with running(tmp_path, agent={"name": "support", "learn_from": ("agent", "teacher")}) as gateway:
        record = gateway.chat("one").headers["x-cltrain-record"]
        for said, status in (({"correction": "so"}, 200), ({"text": "why"}, 200), ({"score": 1}, 400)):
            given = {"target": record, "source": "teacher", **said}
            assert gateway.http.post("/v1/feedback", json=given).status_code == status, said


@pytest.mark.parametrize(
    "other", [{"reward": 0}, {"reward": None}, {"model": "third"}, {"principal": "eve"}, {"tools": [TOOL]},
              {"messages": [{"role": "assistant", "content": "other"}]}],
)  # fmt: skip
def test_one_trajectory_id_for_two_episodes_is_a_conflict_and_the_first_stands(
    shared: Gateway, other: dict[str, Any]
) -> None:
    name = f"twice-{next(iter(other))}-{next(iter(other.values()))!s:.8}"
    given = [episode(name), episode(name), episode(name, **other)]
    answers = [shared.http.post("/v1/trajectories", json=one) for one in given]
    assert [(a.status_code, a.json().get("duplicate")) for a in answers] == [(200, False), (200, True), (409, None)]
    assert "another episode: use a new id" in answers[2].json()["error"]["message"]
    lines = "\n".join(json.dumps(one) for one in given)
    counts = shared.http.post("/v1/trajectories", content=lines).json()
    assert (counts["num_added"], counts["num_duplicates"], counts["num_set_aside"]) == (0, 2, 1)


def test_a_body_beyond_the_limit_is_refused_on_every_route(shared: Gateway) -> None:
    for path in ("chat/completions", "completions", "feedback", "trajectories"):
        answer = shared.http.post(f"/v1/{path}", content=b" " * (MAX_BODY_BYTES + 1))
        assert (answer.status_code, "longer than" in answer.json()["error"]["message"]) == (413, True)


def test_a_posted_trajectory_is_stored_once_and_its_author_is_not_ours(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        answers = [gateway.http.post("/v1/trajectories", json=episode("t1")) for _ in range(3)]
        (kept,) = read_trajectories(gateway.store, "support")
    assert [a.json() for a in answers] == [{"id": "t1", "duplicate": d} for d in (False, True, True)]
    assert kept.producers == ("user", "other-llm")
    assert [(f.score, f.source, f.principal) for f in kept.feedback] == [(1.0, "import", "anna")]
    assert (kept.release, kept.end, kept.session) == (None, "ok", "t1")


@pytest.mark.parametrize(
    ("said", "score"), [({"reward": 0.25}, -0.5), ({"reward": None, "score": 0.25}, 0.25), ({"reward": 0}, -1.0)]
)
def test_a_reward_means_the_same_as_in_an_import(shared: Gateway, said: dict[str, Any], score: float) -> None:
    name = f"reward-{score}"
    assert shared.http.post("/v1/trajectories", json=episode(name, **said)).status_code == 200
    kept = next(t for t in read_trajectories(shared.store, "support") if t.id == name)
    assert [f.score for f in kept.feedback] == [score]


def test_bad_lines_are_kept_aside_with_the_reason_and_good_ones_stored(tmp_path: Path) -> None:
    broken_call = {**CALL, "function": {"name": "find", "arguments": "{item"}}
    broken = episode("t2", messages=[{"role": "assistant", "content": None, "tool_calls": [broken_call]}])
    lines = [
        json.dumps(episode("t1")),
        "{oops",
        json.dumps(broken),
        "",
        json.dumps(episode("t1")),
        json.dumps(episode("t3")),
    ]
    raw = "\n".join(lines).encode()
    with running(tmp_path) as gateway:
        answers = [gateway.http.post("/v1/trajectories", content=raw).json() for _ in range(2)]
        kept = read_trajectories(gateway.store, "support")
        with gateway.store.read() as connection:
            aside = connection.execute(select(set_aside.c.line, set_aside.c.reason, set_aside.c.raw)).all()
    counts = [[a[k] for k in ("num_lines", "num_added", "num_duplicates", "num_set_aside")] for a in answers]
    assert counts == [[5, 2, 1, 2], [5, 0, 3, 2]]
    assert [t.id for t in kept] == ["t1", "t3"]
    assert [(row.line, row.raw) for row in aside] == [(2, b"{oops"), (3, json.dumps(broken).encode())]
    assert "not JSON" in aside[0].reason
    assert "are no JSON" in aside[1].reason


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"id": None}, "id must be a string"),
        ({"messages": []}, "non-empty list"),
        ({"model": "agent"}, "only this deployment itself"),
        ({"reward": 2}, "reward must be a finite number in [0, 1]"),
        ({"reward": -0.5}, "[0, 1]"),
        ({"reward": None, "score": -2}, "score must be a finite number in [-1, 1]"),
        ({"reward": False}, "must be a number"),
        ({"agent": "sales"}, "is not served here"),
        ({"tools": {"a": 1}}, "tools must be a list"),
        ({"tools": [{}]}, "tools[0] is no function definition"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "no answer of the assistant"),
        ({"messages": [{"role": "assistant", "content": "\ud800"}]}, "valid Unicode"),
        ({"messages": [{"role": "assistant", **fix("find", "[" * 100_000)}]}, "levels deep"),
        ({"source": "a\0"}, "NUL"),
        ({"source": "boss"}, "never counts; these do: verifier, operator, import, user"),
        ({"id": f"traj-{'0' * 32}~ab"}, "a branch of a recorded episode"),
    ],
)
def test_a_bad_trajectory_is_refused_with_the_reason(shared: Gateway, fields: Any, said: str) -> None:
    answer = shared.http.post("/v1/trajectories", content=json.dumps(episode("bad", **fields)))
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]
    assert "bad" not in {t.id for t in read_trajectories(shared.store, "support")}
