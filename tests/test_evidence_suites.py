"""The owner's suites over a real server: programs ask it themselves, cut answers are seen, bad ones stop the start."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cltrain.config import Config, from_dict
from cltrain.deploy.client import ServerClient
from cltrain.errors import DataError
from cltrain.evidence import Evidence
from cltrain.gate.commands import content_of
from cltrain.gate.suites import item_key
from cltrain.models.base import Base, load_base
from cltrain.records import Code, Decision, Release, Verdict
from cltrain.registry import releases
from cltrain.store.database import Store, open_store
from tests.deployments import base_server

PROGRAM = """
import json, sys, urllib.request
request = json.load(sys.stdin)
for number in range(3) if request.get("list") else request["ids"]:
    if request.get("list"):
        print(json.dumps({"id": str(number)}))
        continue
    body = {"model": request["model"], "messages": [{"role": "user", "content": f"say {number}"}], "max_tokens": 5}
    ask = urllib.request.Request(request["base_url"] + "/chat/completions", json.dumps(body).encode())
    ask.add_header("content-type", "application/json")
    assert request["api_key"] == "of the server"
    answer = json.load(urllib.request.urlopen(ask))
    print(json.dumps({"id": number, "score": float(answer["usage"]["completion_tokens"] <= 5)}))
"""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with base_server() as url:
        yield url


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(None)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DESK_KEY", "of the server")


def deployed(tmp_path: Path, base: Base, **gate: Any) -> tuple[Config, Store, Release]:
    path = tmp_path / "prog.py"
    path.write_text(PROGRAM)
    rows = [{"messages": [{"role": "user", "content": f"tell me {i}"}], "expected": "no"} for i in range(4)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = {"name": "prog", "kind": "command", "command": [sys.executable, str(path)]}
    values = {"suites": [{"name": "own", "path": str(tmp_path / "own.jsonl")}, command], **gate}
    config = from_dict({"home": str(tmp_path / "state"), "gate": values, "server": {"api_key_env": "DESK_KEY"}})
    store = open_store(config.state_dir)
    return config, store, releases.ensure_base_release(store, config.agent.name, base.digest, now=0.0)


def test_a_served_release_is_scored_by_answers_and_by_a_program_that_asks_it(
    tmp_path: Path, server: str, base: Base
) -> None:
    config, store, release = deployed(tmp_path, base, max_answer_tokens=2)
    with ServerClient(server, "base") as client:
        evidence = Evidence(config, store, base, client, print)
        assert [item.scorer for item in evidence.suite] == ["exact"] * 4 + ["program"] * 3
        scores = evidence.scoring.score_items(release.name, evidence.suite)
        assert scores[4:] == [1.0] * 3
        assert set(scores[:4]) <= {0.0, 1.0}
        (check,) = evidence.scoring.cut_check(release.name, release.name, evidence.suite)
        assert (check.num_items, check.candidate) == (4, 1.0)  # two tokens are too few for any of its answers
        assert "raise it" in check.reason
    assert evidence.scoring.score_items(release.name, evidence.suite) == scores  # nobody has to be asked again


def test_a_bad_suite_is_said_before_anything_is_trained(tmp_path: Path, server: str, base: Base) -> None:
    config, store, _ = deployed(tmp_path, base)
    (tmp_path / "own.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "2+2? Answer 4."}], "expected": "4"}\n'
    )
    with ServerClient(server, "base") as client, pytest.raises(DataError, match="dictates the answer"):
        Evidence(config, store, base, client, print)


def judged(evidence: Evidence, release: Release) -> Decision:
    return evidence.judge(release.name, release.name, taught=(), base_kl=0.0, seed=1)


def test_a_program_that_was_edited_meanwhile_scores_both_sides_anew(tmp_path: Path, server: str, base: Base) -> None:
    config, store, release = deployed(tmp_path, base)
    with ServerClient(server, "base") as client:
        evidence = Evidence(config, store, base, client, print)
        assert judged(evidence, release).verdict is Verdict.HOLD
        before = evidence.suite
        (tmp_path / "prog.py").write_text(PROGRAM.replace("<= 5", "> 5"))
        decision = judged(evidence, release)
        retention = next(check for check in decision.checks if check.name == "retention against incumbent")
        assert (retention.candidate, retention.reference) == (0.0, 0.0)
        assert [item.id for item in evidence.suite] == [item.id for item in before]
        assert not {item_key(item) for item in evidence.suite[4:]} & {item_key(item) for item in before}


def test_a_pinned_program_that_was_edited_meanwhile_is_an_error_that_names_it(
    tmp_path: Path, server: str, base: Base
) -> None:
    (tmp_path / "prog.py").write_text(PROGRAM)
    path = str(tmp_path / "prog.py")
    pinned = {"name": "prog", "kind": "command", "command": [sys.executable, path], "path": path,
              "sha256": content_of(tmp_path / "prog.py")}  # fmt: skip
    config, store, release = deployed(tmp_path, base, suites=[pinned])
    with ServerClient(server, "base") as client:
        evidence = Evidence(config, store, base, client, print)
        assert judged(evidence, release).verdict is Verdict.HOLD
        (tmp_path / "prog.py").write_text(PROGRAM + "\n")
        decision = judged(evidence, release)
        assert (decision.verdict, decision.codes) == (Verdict.ERROR, (Code.SUITE,))
        assert "suite prog: " in decision.reasons[0]
        assert "is pinned" in decision.reasons[0]
