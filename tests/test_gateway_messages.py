"""Anthropic's Messages API by its official client over real HTTP: answered, streamed, refused, recorded as a chat."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest

from cltrain.experience.recording import read_trajectories
from tests.gateway_parts import BASE, Gateway, running

TOOL: Any = {"name": "find", "description": "Find it.", "input_schema": {"type": "object", "properties": {}}}
ASKED: Any = {"model": "support", "max_tokens": 64}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with running(tmp_path_factory.mktemp("state")) as gateway:
        yield gateway


def official(gateway: Gateway) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=gateway.url, api_key="unused", max_retries=0)


def user(text: Any) -> Any:
    return {"role": "user", "content": text}


def kept_of(gateway: Gateway, headers: httpx.Headers) -> Any:
    return next(t for t in read_trajectories(gateway.store, "support") if t.id == headers["x-cltrain-trajectory"])


def test_a_message_by_the_official_client_is_answered_stamped_and_recorded(shared: Gateway) -> None:
    with official(shared) as client:
        raw = client.messages.with_raw_response.create(
            **ASKED, system="be brief", messages=[user("hi")], stop_sequences=["END"], extra_body={"temperature": 0.5},
            metadata={"user_id": "anna"},
        )  # fmt: skip
    answer = raw.parse()
    assert (answer.type, answer.role, answer.model) == ("message", "assistant", BASE)
    assert [(block.type, block.text) for block in answer.content] == [("text", "base heard hi")]
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (3, 13)
    assert raw.headers["x-cltrain-recorded"] == "1"
    body = shared.fake.bodies[-1]
    assert (body["max_tokens"], body["stop"], body["temperature"]) == (64, ["END"], 0.5)
    kept = kept_of(shared, raw.headers)
    assert kept.principal == "anna"
    assert kept.producers == ("system", "user", "agent")
    assert kept.messages[0] == {"role": "system", "content": "be brief"}
    assert kept.generations[0].completion_ids == tuple(ord(c) % 50 for c in "base heard hi")
    assert kept.generations[0].id == raw.headers["x-cltrain-record"]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_conversation_with_a_tool_is_one_episode(shared: Gateway, is_streamed: bool) -> None:
    messages: list[Any] = [user([{"type": "text", "text": "call find", "cache_control": {"type": "ephemeral"}}])]
    with official(shared) as client:

        def ask() -> tuple[Any, httpx.Headers]:
            given: Any = {**ASKED, "messages": messages, "tools": [TOOL], "metadata": {"user_id": f"t{is_streamed}"}}
            if not is_streamed:
                raw = client.messages.with_raw_response.create(**given, tool_choice={"type": "auto"})
                return raw.parse(), raw.headers
            with client.messages.stream(**given, tool_choice={"type": "auto"}) as stream:
                return stream.get_final_message(), stream.response.headers

        first, headers = ask()
        (call,) = first.content
        assert (call.type, call.id, call.name, call.input) == ("tool_use", "call_1", "find", {"item": "lamp"})
        assert first.stop_reason == "tool_use"
        messages.append({"role": "assistant", "content": first.content})
        result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "on the shelf"}]}
        messages.append(user([result]))
        second, later = ask()
    assert second.content[0].text == "base heard on the shelf"
    assert second.stop_reason == "end_turn"
    assert later["x-cltrain-trajectory"] == headers["x-cltrain-trajectory"]
    kept = kept_of(shared, headers)
    assert kept.producers == ("user", "agent", "tool", "agent")
    assert kept.messages[2] == {"role": "tool", "tool_call_id": "call_1", "content": "on the shelf"}
    function = {"name": "find", "parameters": TOOL["input_schema"], "description": "Find it."}
    assert kept.tools == ({"type": "function", "function": function},)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_call_that_was_asked_for_by_name_ends_as_a_tools_use(shared: Gateway, is_streamed: bool) -> None:
    given: Any = {**ASKED, "messages": [user("call find")], "tools": [TOOL]}
    given["tool_choice"] = {"type": "tool", "name": "find"}
    with official(shared) as client:
        if is_streamed:
            with client.messages.stream(**given) as stream:
                answer = stream.get_final_message()
        else:
            answer = client.messages.create(**given)
    assert [block.type for block in answer.content] == ["tool_use"]
    assert answer.stop_reason == "tool_use"


def test_a_call_spaced_otherwise_is_still_the_same_turn(shared: Gateway) -> None:
    """A client that holds the arguments as an object writes them anew: the episode must go on."""
    call = {"id": "call_1", "type": "function", "function": {"name": "find", "arguments": '{\n"item" :"lamp"}'}}
    first = shared.chat("call find", headers={"X-Cltrain-Principal": "ben"})
    back = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    back.append({"role": "tool", "tool_call_id": "call_1", "content": "there"})
    second = shared.chat("call find", *back, headers={"X-Cltrain-Principal": "ben"})
    assert second.headers["x-cltrain-trajectory"] == first.headers["x-cltrain-trajectory"]
    assert kept_of(shared, first.headers).producers == ("user", "agent", "tool", "agent")


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for block in text.strip().split("\n\n"):
        first, second = block.split("\n")
        found.append((first.removeprefix("event: "), json.loads(second.removeprefix("data: "))))
    assert all(kind == data["type"] for kind, data in found)
    return found


def test_a_stream_is_anthropics_sequence_and_says_at_its_end_that_it_is_recorded(shared: Gateway) -> None:
    body = {**ASKED, "messages": [user("hi")], "stream": True}
    answer = shared.http.post("/v1/messages", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = events(answer.text)
    kinds = [kind for kind, _ in found]
    assert kinds[:3] == ["message_start", "content_block_start", "content_block_delta"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    opening = found[0][1]["message"]
    assert (opening["content"], opening["model"], opening["stop_reason"]) == ([], BASE, None)
    assert "".join(data["delta"]["text"] for kind, data in found if kind == "content_block_delta") == "base heard hi"
    last = found[-2][1]
    assert last["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert last["usage"] == {"input_tokens": 3, "output_tokens": 13}
    assert (last["cltrain"]["recorded"], last["cltrain"]["record"]) == (1, answer.headers["x-cltrain-record"])
    assert kept_of(shared, answer.headers).generations[0].completion_ids is not None
    with official(shared) as client, client.messages.stream(**ASKED, messages=[user("hi")]) as stream:
        assert "".join(stream.text_stream) == "base heard hi"
        assert stream.get_final_message().usage.output_tokens == 13


def test_a_streamed_call_is_a_block_of_its_own(shared: Gateway) -> None:
    body = {**ASKED, "messages": [user("call find")], "tools": [TOOL], "stream": True}
    found = events(shared.http.post("/v1/messages", json=body).text)
    (start,) = [data for kind, data in found if kind == "content_block_start"]
    assert start["index"] == 0
    assert start["content_block"] == {"type": "tool_use", "id": "call_1", "name": "find", "input": {}}
    parts = [data["delta"]["partial_json"] for kind, data in found if kind == "content_block_delta"]
    assert json.loads("".join(parts)) == {"item": "lamp"}
    assert found[-2][1]["delta"]["stop_reason"] == "tool_use"


IMAGE = {"type": "image", "source": {"type": "url", "url": "http://169.254.169.254/"}}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"messages": [user([IMAGE])]}, "type 'image' is not served"),
        ({"messages": [user([{"type": "document", "source": {}}])]}, "type 'document' is not served"),
        ({"messages": [user([{"type": "tool_result", "tool_use_id": "c", "content": [IMAGE]}])]}, "content.0"),
        ({"messages": [user([{"type": "tool_result", "content": "x"}])]}, "tool_use_id"),
        ({"messages": [user([{"type": "tool_use", "id": "c", "name": "f", "input": {}}])]}, "role user"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f"}]}]}, "input"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages.0"),
        ({"messages": [user(5)]}, "messages.0.content"),
        ({"messages": [user([5])]}, "messages.0.content"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"model": None}, "model must be a string"),
        ({"system": [IMAGE]}, "system.0"),
        ({"system": 5}, "system"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0"),
        ({"tools": [{"name": "f"}]}, "input_schema"),
        ({"tools": "f"}, "tools"),
        ({"tool_choice": {"type": "boss"}}, "tool_choice"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"stop_sequences": "END"}, "stop_sequences"),
        ({"metadata": 5}, "metadata"),
        ({"metadata": {"user_id": 5}}, "principal"),
        ({"mcp_servers": []}, "mcp_servers"),
        ({"prompt_embeds": "x"}, "prompt_embeds"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template"),
    ],
)
def test_what_is_not_served_is_a_400_in_anthropics_shape(shared: Gateway, fields: dict[str, Any], said: str) -> None:
    num_before = len(shared.fake.bodies)
    answer = shared.http.post("/v1/messages", json={**ASKED, "messages": [user("hi")], **fields})
    body = answer.json()
    assert (answer.status_code, body["type"], body["error"]["type"]) == (400, "error", "invalid_request_error")
    assert said in body["error"]["message"]
    assert len(shared.fake.bodies) == num_before


@pytest.mark.parametrize(
    ("order", "status", "kind"),
    [("fail 500", 502, "api_error"), ("fail 400", 400, "invalid_request_error"), ("fail 429", 429, "rate_limit_error"),
     ("nonsense", 502, "api_error"), ("wait 9", 504, "timeout_error")],
)  # fmt: skip
def test_a_failing_server_is_an_error_that_the_official_client_knows(
    tmp_path: Path, order: str, status: int, kind: str
) -> None:
    with running(tmp_path, timeout_s=0.5) as gateway, official(gateway) as client:
        with pytest.raises(anthropic.APIStatusError) as failed:
            client.messages.create(**ASKED, messages=[user(order)])
        assert (failed.value.status_code, failed.value.body["error"]["type"]) == (status, kind)  # type: ignore[index]
        with pytest.raises(anthropic.NotFoundError) as unknown:
            client.messages.create(max_tokens=5, model="../support", messages=[user("hi")])
        assert "does not exist" in str(unknown.value)


def test_a_stream_that_breaks_off_ends_with_anthropics_error_event(shared: Gateway) -> None:
    before = shared.errors("upstream_error")
    answer = shared.http.post("/v1/messages", json={**ASKED, "messages": [user("break")], "stream": True})
    kind, data = events(answer.text)[-1]
    assert (kind, data["error"]["type"]) == ("error", "api_error")
    assert "broke off" in data["error"]["message"]
    assert shared.errors("upstream_error") == before + 1
    with official(shared) as client, pytest.raises(anthropic.APIError, match="broke off"):
        with client.messages.stream(**ASKED, messages=[user("break")]) as stream:
            stream.until_done()


def test_the_key_may_come_as_either_client_sends_it(tmp_path: Path) -> None:
    from cltrain.gateway.keys import add_key

    _, key = add_key(tmp_path, "anna", ["infer"], now=1.0)
    with running(tmp_path) as gateway:
        for given in ({"api_key": key}, {"auth_token": key, "api_key": None}):
            with anthropic.Anthropic(base_url=gateway.url, max_retries=0, **given) as client:
                raw = client.messages.with_raw_response.create(**ASKED, messages=[user("hi")])
            assert kept_of(gateway, raw.headers).principal == "anna"
        with anthropic.Anthropic(base_url=gateway.url, api_key="wrong", max_retries=0) as client:
            with pytest.raises(anthropic.AuthenticationError):
                client.messages.create(**ASKED, messages=[user("hi")])
