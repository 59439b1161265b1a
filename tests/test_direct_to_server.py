"""Past the gateway: a client asks a release by name at the server itself, logs what it asked and got, and the log comes
in later as if the gateway had recorded it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from cltrain.config import ObjectivesConfig
from cltrain.deploy.engine import Engine
from cltrain.deploy.serve import running_server
from cltrain.experience.examples import CUT_SHORT
from cltrain.experience.ingest import ImportReport, import_file
from cltrain.experience.lanes import lane_of
from cltrain.experience.reading import read_trajectories
from cltrain.experience.recording import Recorder, load_secret
from cltrain.models.base import load_base
from cltrain.records import Example, Trajectory
from cltrain.store.database import Store, open_store
from tests.gateway_parts import R1
from tests.serving import random_adapter
from tests.tiny import make_tiny_base


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    base = load_base(make_tiny_base(tmp_path_factory.mktemp("base")))
    with closing(Engine(base)) as engine, running_server(engine) as url:
        engine.adapters.load(R1, random_adapter(base, tmp_path_factory.mktemp("adapter") / "1", 1))
        yield url


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(open_store(tmp_path / "home")) as store:
        yield store


def conversation(url: str) -> list[dict[str, Any]]:
    """Two turns of one conversation with the official client, as README's lines log them."""
    client = OpenAI(base_url=f"{url}/v1", api_key="unused")
    messages: list[dict[str, Any]] = [{"role": "user", "content": "please refund the order A17"}]
    log = []
    for turn in range(2):
        asked: dict[str, Any] = {"model": R1, "messages": messages, "logprobs": True, "max_tokens": 8}
        answer = client.chat.completions.create(**asked, extra_body={"return_token_ids": True})
        log.append({"request": asked, "response": answer.model_dump(), "reward": turn})
        log[-1]["response"]["choices"][0]["finish_reason"] = "stop"  # a random base never ends by itself
        said = answer.choices[0].message.content
        messages = [*messages, {"role": "assistant", "content": said}, {"role": "user", "content": "and the lamp ?"}]
    return log


def imported(
    store: Store, home: Path, log: list[dict[str, Any]], producer: str | None = "agent"
) -> tuple[ImportReport, list[Trajectory]]:
    file = home / "direct.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in log))
    with Recorder(store, load_secret(home), 0.0) as recorder:
        report = import_file(recorder, file, "support", producer=producer, releases=[R1])
    return report, list(read_trajectories(store, "support"))


def test_what_a_client_logged_comes_in_with_its_release_tokens_and_log_probs(
    server: str, store: Store, tmp_path: Path
) -> None:
    log = conversation(server)
    report, kept = imported(store, tmp_path / "home", log)
    assert (report.num_imported, report.num_set_aside, report.num_positive) == (2, 0, 1)
    assert len({t.session for t in kept}) == 1, "one conversation, one split"
    for line, trajectory in zip(log, kept, strict=True):
        choice = line["response"]["choices"][0]
        assert trajectory.release == R1
        assert [m["role"] for m in trajectory.messages][-1] == "assistant"
        assert trajectory.messages[-1]["content"] == choice["message"]["content"]
        assert trajectory.producers[-1] == "agent"
        assert "agent" not in trajectory.producers[:-1], "an answer is learned from its own line alone"
        (generation,) = trajectory.generations
        assert (generation.turn, generation.release) == (len(trajectory.messages) - 1, R1)
        assert generation.prompt_ids == tuple(line["response"]["prompt_token_ids"])
        assert generation.completion_ids == tuple(choice["token_ids"])
        assert generation.logprobs == tuple(entry["logprob"] for entry in choice["logprobs"]["content"])
        assert generation.finish_reason == choice["finish_reason"]
    failed = lane_of(kept[0], ObjectivesConfig(), learn_from=("agent",), tools_allowed=None)
    assert isinstance(failed, Example)  # a bad score, and what is needed to learn on-policy from it
    assert (failed.objective, failed.release) == ("policy", R1)
    assert failed.behaviour == kept[0].generations[0].logprobs
    again, _ = imported(store, tmp_path / "home", log)
    assert (again.num_imported, again.num_duplicates) == (0, 2)


def test_whether_the_agent_wrote_it_is_for_the_owner_to_say(server: str, store: Store, tmp_path: Path) -> None:
    report, kept = imported(store, tmp_path / "home", conversation(server), producer=None)
    assert report.num_imported == 2
    assert {t.producers[-1] for t in kept} == {R1}  # a name that `learn_from` does not list
    assert [t.generations for t in kept] == [(), ()]


def line(**changes: Any) -> dict[str, Any]:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "hello", "tool_calls": None, "refusal": None},
        "finish_reason": "stop",
        "token_ids": [1, 2],
        "logprobs": {"content": [{"logprob": -0.5}, {"logprob": -0.25}]},
    }
    asked = {"model": R1, "messages": [{"role": "user", "content": "hi"}]}
    answer = {"id": "x", "model": R1, "created": 7, "choices": [{**choice, **changes.pop("choice", {})}]}
    answer |= {"prompt_token_ids": [3], **changes.pop("response", {})}
    return {"request": {**asked, **changes.pop("request", {})}, "response": answer, **changes}


@pytest.mark.parametrize(
    ("changes", "ids", "logprobs"),
    [
        ({}, (1, 2), (-0.5, -0.25)),
        ({"choice": {"logprobs": None}}, (1, 2), None),
        ({"choice": {"logprobs": {"content": [{"logprob": -0.5}]}}}, (1, 2), None),
        ({"choice": {"logprobs": {"content": [{"logprob": -0.5}, {}]}}}, (1, 2), None),
        ({"choice": {"logprobs": {"content": [{"logprob": -0.5}, {"logprob": -(10**400)}]}}}, (1, 2), None),
        ({"choice": {"token_ids": None}}, None, None),
        ({"choice": {"token_ids": [1, "2"]}}, None, None),
        ({"choice": {"token_ids": [1, -2]}}, None, None),
    ],
)
def test_tokens_that_are_not_whole_are_absent_and_never_guessed(
    store: Store, tmp_path: Path, changes: dict[str, Any], ids: Any, logprobs: Any
) -> None:
    _, (kept,) = imported(store, tmp_path / "home", [line(**changes)])
    (generation,) = kept.generations
    assert (generation.completion_ids, generation.logprobs) == (ids, logprobs)
    assert generation.prompt_ids == ((3,) if ids else None)
    assert (kept.id, kept.created_at) == ("x", 7.0)
    assert generation.finish_reason not in CUT_SHORT


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"request": 1, "response": {}}, "not both objects"),
        (line(response={"choices": []}), "exactly one choice"),
        (line(response={"choices": [1, 2]}), "exactly one choice"),
        (line(choice={"message": None}), "no message"),
        (line(request={"messages": []}), "no messages"),
        (line(response={"model": "other"}), "answered by 'other'"),
        (line(request={"messages": [{"role": "ghost", "content": "x"}]}), "no known role"),
    ],
)
def test_a_line_that_is_no_exchange_is_set_aside_with_its_reason(
    store: Store, tmp_path: Path, bad: dict[str, Any], said: str
) -> None:
    report, kept = imported(store, tmp_path / "home", [bad, line()])
    assert (report.num_imported, report.num_set_aside, len(kept)) == (1, 1, 1)
    with store.read() as connection:
        reason = connection.exec_driver_sql("SELECT reason FROM set_aside").scalar_one()
    assert said in reason


def test_another_models_answer_is_its_own_and_no_release_s(store: Store, tmp_path: Path) -> None:
    other = line(request={"model": "gpt"}, response={"model": "gpt"})
    _, (kept,) = imported(store, tmp_path / "home", [other], producer=None)
    assert (kept.producers[-1], kept.release, kept.generations) == ("gpt", None, ())
