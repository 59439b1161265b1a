"""The official client over real HTTP: answers, streams and tool calls come through and are recorded with tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from cltrain.config import ExperienceConfig
from cltrain.experience.recording import read_trajectories
from cltrain.experience.window import next_window
from tests.gateway_parts import BASE, R1, FakeServer, Gateway, add_release, point_alias, running

TOOLS: Any = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with running(tmp_path_factory.mktemp("state")) as gateway:
        yield gateway


def official(gateway: Gateway) -> OpenAI:
    return OpenAI(base_url=f"{gateway.url}/v1", api_key="unused", max_retries=0)


def events(text: str) -> list[dict[str, Any]]:
    lines = [line[6:] for line in text.split("\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_chat_by_the_official_client_is_answered_stamped_and_recorded(tmp_path: Path) -> None:
    with running(tmp_path) as gateway, official(gateway) as client:
        raw = client.chat.completions.with_raw_response.create(
            model="support", messages=[{"role": "user", "content": "hi"}], user="anna"
        )
        answer = raw.parse()
        assert answer.choices[0].message.content == "base heard hi"
        assert answer.model == BASE == raw.headers["x-cltrain-adapter"]
        assert raw.headers["x-cltrain-recorded"] == "1"
        (kept,) = read_trajectories(gateway.store, "support")
    assert kept.id == raw.headers["x-cltrain-trajectory"]
    assert (kept.principal, kept.release, kept.producers) == ("anna", BASE, ("user", "agent"))
    (generation,) = kept.generations
    assert generation.id == raw.headers["x-cltrain-record"]
    assert generation.turn == 1
    assert generation.prompt_ids == (7, 8, 9)
    assert generation.completion_ids == tuple(ord(c) % 50 for c in "base heard hi")
    assert generation.logprobs == (-0.5,) * len("base heard hi")


def test_the_client_sees_tokens_and_logprobs_only_when_it_asked(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        plain = gateway.chat("hi").json()
        assert "prompt_token_ids" not in plain
        assert "token_ids" not in plain["choices"][0]
        assert plain["choices"][0]["logprobs"] is None
        asked = gateway.chat("hi", logprobs=True, top_logprobs=0, return_token_ids=True).json()
        assert asked["prompt_token_ids"] == [7, 8, 9]
        assert len(asked["choices"][0]["token_ids"]) == len(asked["choices"][0]["logprobs"]["content"]) == 13
        assert gateway.fake.bodies[-1]["top_logprobs"] == 0


def test_a_streamed_tool_call_by_the_official_client_is_recorded_whole(tmp_path: Path) -> None:
    with running(tmp_path) as gateway, official(gateway) as client:
        stream = client.chat.completions.create(
            model="support", messages=[{"role": "user", "content": "call find"}], tools=TOOLS, stream=True
        )
        arguments = ""
        for chunk in stream:
            assert chunk.model == BASE
            for choice in chunk.choices:
                for call in choice.delta.tool_calls or []:
                    arguments += (call.function and call.function.arguments) or ""
        assert json.loads(arguments) == {"item": "lamp"}
        (kept,) = read_trajectories(gateway.store, "support")
    call = {"id": "call_1", "type": "function", "function": {"name": "find", "arguments": '{"item": "lamp"}'}}
    assert kept.messages[1] == {"role": "assistant", "content": None, "tool_calls": [call]}
    assert kept.tools == tuple(TOOLS)
    assert kept.generations[0].finish_reason == "tool_calls"
    assert kept.generations[0].completion_ids is not None


def test_a_tool_conversation_continues_one_episode_without_a_session(tmp_path: Path) -> None:
    with running(tmp_path) as gateway, official(gateway) as client:
        messages: list[Any] = [{"role": "user", "content": "call find"}]
        first = client.chat.completions.with_raw_response.create(model="support", messages=messages, tools=TOOLS)
        messages.append(first.parse().choices[0].message)  # as the client's own object, with its extra null fields
        messages.append({"role": "tool", "tool_call_id": "call_1", "content": "on the shelf"})
        second = client.chat.completions.with_raw_response.create(model="support", messages=messages, tools=TOOLS)
        assert second.headers["x-cltrain-trajectory"] == first.headers["x-cltrain-trajectory"]
        (kept,) = read_trajectories(gateway.store, "support")
    assert kept.producers == ("user", "agent", "tool", "agent")
    assert [g.turn for g in kept.generations] == [1, 3]


def test_a_stream_says_that_it_is_recorded_in_its_last_chunk_after_the_commit(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        with gateway.http.stream(
            "POST",
            "/v1/chat/completions",
            json={"model": "support", "messages": [{"role": "user", "content": "say \u2028 here"}], "stream": True},
        ) as response:
            assert response.headers["x-cltrain-recorded"] == "pending"
            buffer = ""
            for text in response.iter_text():
                buffer += text
                if '"cltrain"' in buffer:  # it has arrived: then it must be on disk already
                    assert len(read_trajectories(gateway.store, "support")) == 1
        chunks = events(buffer)
        assert [i for i, c in enumerate(chunks) if "cltrain" in c] == [len(chunks) - 1]
        assert chunks[-1]["cltrain"]["recorded"] == 1
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        assert not any("usage" in c or "prompt_token_ids" in c or "token_ids" in c["choices"][0] for c in chunks)
        (kept,) = read_trajectories(gateway.store, "support")
    said = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)
    assert said == kept.messages[1]["content"] == "base heard say \u2028 here"
    assert kept.generations[0].id == chunks[-1]["cltrain"]["record"] == response.headers["x-cltrain-record"]
    assert kept.generations[0].completion_ids == tuple(ord(c) % 50 for c in said)


def test_usage_is_streamed_when_the_client_asked_for_it(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        chunks = events(gateway.chat("hi", stream=True, stream_options={"include_usage": True}).text)
    assert chunks[-1]["usage"]["prompt_tokens"] == 3
    assert chunks[-1]["cltrain"]["recorded"] == 1


@pytest.mark.parametrize(("order", "is_streamed"), [("no ids", False), ("no ids", True), ("lose one", False)])
def test_without_whole_ids_nothing_is_guessed(tmp_path: Path, order: str, is_streamed: bool) -> None:
    with running(tmp_path) as gateway:
        gateway.chat(order, stream=is_streamed)
        (kept,) = read_trajectories(gateway.store, "support")
        page = gateway.http.get("/metrics").text
    (generation,) = kept.generations
    assert generation.prompt_ids is generation.completion_ids is generation.logprobs is None
    assert "cltrain_without_token_ids_total 1.0" in page


def test_another_vendors_server_is_not_asked_for_what_it_does_not_know(tmp_path: Path) -> None:
    with running(tmp_path, kind="openai") as gateway:
        assert gateway.chat("hi").headers["x-cltrain-recorded"] == "1"
        body = gateway.fake.bodies[-1]
        (kept,) = read_trajectories(gateway.store, "support")
    assert "return_token_ids" not in body
    assert "logprobs" not in body
    assert kept.generations[0].completion_ids is None


def test_raw_completions_are_recorded_but_have_no_learnable_author(tmp_path: Path) -> None:
    with running(tmp_path) as gateway, official(gateway) as client:
        answer = client.completions.create(model="support", prompt="once")
        assert answer.choices[0].text == "then once"
        streamed = client.completions.create(model="support", prompt="twice", stream=True)
        assert "".join(c.choices[0].text for c in streamed) == "then twice"
        one, two = read_trajectories(gateway.store, "support")
    assert one.messages == ({"role": "user", "content": "once"}, {"role": "assistant", "content": "then once"})
    assert two.messages[1]["content"] == "then twice"
    assert one.producers == ("user", None)
    assert one.generations[0].completion_ids == tuple(ord(c) % 50 for c in "then once")


def test_several_choices_pass_through_unrecorded_and_say_so(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        answer = gateway.chat("hi", n=2)
        assert len(answer.json()["choices"]) == 2
        assert answer.headers["x-cltrain-recorded"] == "0"
        assert answer.headers["x-cltrain-unrecorded"] == "several choices"
        assert read_trajectories(gateway.store, "support") == []
        assert 'cltrain_unrecorded_total{reason="several choices"} 1.0' in gateway.http.get("/metrics").text


def test_models_lists_the_alias_and_the_served_releases_but_no_candidate(tmp_path: Path) -> None:
    candidate, unloaded = "support-v000003-333333333333", "support-v000004-444444444444"
    with running(tmp_path, fake=FakeServer((R1, candidate))) as gateway, official(gateway) as client:
        for name, status in ((BASE, "released"), (R1, "released"), (candidate, "candidate"), (unloaded, "released")):
            add_release(gateway.store, name, status)
        point_alias(gateway.store, R1)
        assert [m.id for m in client.models.list()] == ["support", BASE, R1]
        assert gateway.http.get("/v1/models").json()["data"][0]["root"] == R1


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "not JSON"),
        (b"[1]", "must be a JSON object"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "model must be a string"),
        (b'{"model": "support"}', "messages must be a non-empty list"),
        (b'{"model": "support", "messages": []}', "messages must be a non-empty list"),
        (b'{"model": "support", "messages": ["x"]}', r"messages[0] must be an object"),
        (b'{"model": "support", "messages": [{"role": "boss", "content": "x"}]}', "messages[0].role"),
        (b'{"model": "support", "messages": [{"role": "user", "content": 3}]}', "messages[0].content"),
        (b'{"model": "support", "messages": [{"role": "user", "content": "x"}], "n": true}', "whole number"),
        (b'{"model": "support", "messages": [{"role": "user", "content": "x"}], "user": "\\ud800"}', "valid Unicode"),
    ],
)
def test_a_malformed_request_is_refused_with_the_reason(shared: Gateway, body: bytes, said: str) -> None:
    answer = shared.http.post("/v1/chat/completions", content=body)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]
    assert shared.fake.bodies == []


def test_an_unknown_model_is_an_openai_style_404(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        add_release(gateway.store, R1, "candidate")
        for model, said in (("gpt-x", "does not exist"), (R1, "may not serve (it is candidate)"), ("base", "support")):
            answer = gateway.chat("hi", model=model)
            assert answer.status_code == 404
            assert answer.json()["error"]["code"] == "model_not_found"
            assert said in answer.json()["error"]["message"]


def test_authorization_is_passed_on_and_nothing_else(tmp_path: Path) -> None:
    seen: list[httpx.Headers] = []
    fake = FakeServer()

    @fake.app.middleware("http")
    async def note(request: Any, call_next: Any) -> Any:
        seen.append(httpx.Headers(dict(request.headers)))
        return await call_next(request)

    with running(tmp_path, fake=fake) as gateway:
        gateway.chat("hi", headers={"Authorization": "Bearer k", "X-Session-Id": "s", "Cookie": "c=1"})
    assert seen[-1]["authorization"] == "Bearer k"
    assert "x-session-id" not in seen[-1]
    assert "cookie" not in seen[-1]


def test_a_tool_that_only_the_server_knows_is_served_recorded_and_not_learned_from(tmp_path: Path) -> None:
    with running(tmp_path, experience={"eval_share": 0.0}) as gateway:
        answer = gateway.chat("hi", tools=[{"type": "web_search"}, *TOOLS], headers={"X-Session-Done": "1"})
        assert (answer.status_code, answer.headers["x-cltrain-recorded"]) == (200, "1")
        thumb = {"target": answer.headers["x-cltrain-record"], "score": 1}
        assert gateway.http.post("/v1/feedback", json=thumb).status_code == 200
        rules: dict[str, Any] = {"learn_from": ("agent",), "tools_allowed": None, "now": 1e6}
        read = next_window(gateway.store, "support", ExperienceConfig(), **rules)
    ((_, reason),) = read.unusable
    assert "its type is 'web_search'" in reason


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tools": [{}]}, "tools[0] is no function definition"),
        ({"tools": [5]}, "tools[0] is no function definition"),
        ({"tools": [{"type": "function"}]}, "tools[0] is no function definition"),
        ({"tools": [*TOOLS, {"type": "function", "function": {"name": ["find"]}}]}, "tools[1] is a function without"),
        ({"tools": [{"type": "function", "function": {"name": "find", "parameters": 5}}]}, "no JSON schema"),
        ({"tools": [{"function": {"name": "find", "parameters": {"required": 5}}}]}, "no JSON schema"),
        ({"tools": [{"function": {"name": "find", "parameters": {"required": [["a"]]}}}]}, "no JSON schema"),
        ({"stream": True, "stream_options": "x"}, "stream_options must be an object"),
        ({"stream": True, "stream_options": 5}, "stream_options must be an object"),
        ({"stream": True, "stream_options": [1]}, "stream_options must be an object"),
        ({"max_tokens": True}, "max_tokens must be a whole number"),
        ({"max_completion_tokens": "8"}, "max_completion_tokens must be a whole number"),
        ({"temperature": float("inf")}, "Infinity is no finite number"),
        ({"user": "a\0"}, "NUL"),
    ],
)
def test_a_malformed_request_is_explained_and_never_forwarded(
    shared: Gateway, fields: dict[str, Any], said: str
) -> None:
    num_before = len(shared.fake.bodies)
    body = {"model": "support", "messages": [{"role": "user", "content": "hi"}], **fields}
    answer = shared.http.post("/v1/chat/completions", content=json.dumps(body))
    assert (answer.status_code, said in answer.json()["error"]["message"]) == (400, True), answer.text
    assert len(shared.fake.bodies) == num_before
