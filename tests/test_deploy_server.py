"""The embedded server over real HTTP, mostly through the official client."""

import json
import socket
import time
from contextlib import closing

import httpx
import openai
import pytest

from cltrain.deploy.engine import Engine
from cltrain.deploy.serve import bind, run_server, running_server
from cltrain.errors import ConfigError
from cltrain.models.base import load_base
from cltrain.models.chat import render_prompt
from scripts.bench_swap import train_answer
from tests.serving import random_adapter
from tests.tiny import TOOLS, make_tiny_base

ASK = [{"role": "user", "content": "please refund the order A17"}]
CALL = 'Sorry.\n<tool_call>\n{"name": "refund", "arguments": {"order": "A17"}}\n</tool_call>'


def called(arguments):
    call = {"id": "c", "type": "function", "function": {"name": "refund", "arguments": arguments}}
    return [*ASK, {"role": "assistant", "content": None, "tool_calls": [call]}, *ASK]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_base(make_tiny_base(tmp_path_factory.mktemp("base"), hidden=128))


@pytest.fixture(scope="module")
def engine(base, tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapters")
    with closing(Engine(base, max_adapters=4)) as engine:
        answer = base.tokenizer(CALL, add_special_tokens=False)["input_ids"] + [base.tokenizer.eos_token_id]
        prompt = render_prompt(base.tokenizer, ASK, TOOLS)
        engine.adapters.load("caller", train_answer(base, directory / "caller", [prompt], answer, 0))
        yield engine


@pytest.fixture(scope="module")
def url(engine):
    with running_server(engine) as url:
        yield url


@pytest.fixture
def http(url):
    with httpx.Client(base_url=url, timeout=30, trust_env=False) as http:
        yield http


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_official_client_gets_tool_calls(client, base):
    answer = client.chat.completions.create(model="caller", messages=ASK, tools=TOOLS, temperature=0, logprobs=True)
    choice = answer.choices[0]
    assert answer.model == "caller"
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Sorry."
    assert [call.function.name for call in choice.message.tool_calls] == ["refund"]
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"order": "A17"}
    assert answer.usage.prompt_tokens == len(render_prompt(base.tokenizer, ASK, TOOLS))
    assert answer.usage.completion_tokens == len(choice.logprobs.content)
    assert "".join(entry.token for entry in choice.logprobs.content) == CALL + "<|im_end|>"


def test_official_client_streams_the_same_answer(client):
    whole = client.chat.completions.create(model="caller", messages=ASK, tools=TOOLS, temperature=0)
    chunks = list(
        client.chat.completions.create(
            model="caller",
            messages=ASK,
            tools=TOOLS,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == "Sorry."
    calls = [call for delta in deltas for call in delta.tool_calls or []]
    assert [(call.index, call.function.name) for call in calls] == [(0, "refund")]
    assert calls[0].function.arguments == whole.choices[0].message.tool_calls[0].function.arguments
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "tool_calls"
    assert chunks[-1].usage == whole.usage
    assert {chunk.model for chunk in chunks} == {"caller"}
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_clients_own_stream_helper_reads_it(client):
    with client.chat.completions.stream(model="caller", messages=ASK, tools=TOOLS, temperature=0) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls[0].function.name == "refund"


def test_without_tools_in_the_request_the_text_stays_text(client):
    choice = client.chat.completions.create(
        model="caller", messages=ASK, temperature=0, tools=TOOLS, tool_choice="none"
    ).choices[0]
    assert choice.message.content == CALL
    assert choice.message.tool_calls is None
    assert choice.finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_token_truth_is_on_the_answer(http, base, stream):
    body = {"model": "caller", "messages": ASK, "tools": list(TOOLS), "temperature": 0, "return_token_ids": True}
    prompt = render_prompt(base.tokenizer, ASK, TOOLS)
    completion = base.tokenizer(CALL, add_special_tokens=False)["input_ids"] + [base.tokenizer.eos_token_id]
    if stream:
        lines = http.post("/v1/chat/completions", json={**body, "stream": True, "logprobs": True}).text.splitlines()
        assert lines[-2] == "data: [DONE]"
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert chunks[0]["prompt_token_ids"] == prompt
        assert [i for chunk in chunks for i in chunk["choices"][0].get("token_ids", [])] == completion
        entries = [e for chunk in chunks for e in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
        assert len(entries) == len(completion)
    else:
        answer = http.post("/v1/chat/completions", json=body).json()
        assert answer["prompt_token_ids"] == prompt
        assert answer["choices"][0]["token_ids"] == completion


def test_completions_score_prompts_like_vllm(http):
    rows = [[5, 6, 7, 8], [9, 10]]
    body = {"model": "base", "prompt": rows, "max_tokens": 1, "prompt_logprobs": 0, "return_token_ids": True}
    choices = http.post("/v1/completions", json=body).json()["choices"]
    assert [choice["prompt_token_ids"] for choice in choices] == rows
    for ids, choice in zip(rows, choices, strict=True):
        first, *scores = choice["prompt_logprobs"]
        assert first is None
        assert [list(score) for score in scores] == [[str(token)] for token in ids[1:]]
        assert all(
            set(score[str(i)]) == {"logprob", "rank", "decoded_token"} for i, score in zip(ids[1:], scores, strict=True)
        )


def test_text_completion_streams_and_stops_at_a_string(client):
    greedy = {"model": "base", "prompt": "where is my order?", "temperature": 0, "max_tokens": 30}
    text = client.completions.create(**greedy, extra_body={"ignore_eos": True}).choices[0].text
    stop = text[10:13]
    cut = text[: text.index(stop)]
    stopped = client.completions.create(**greedy, stop=[stop], extra_body={"ignore_eos": True}).choices[0]
    assert (stopped.text, stopped.finish_reason) == (cut, "stop")
    chunks = list(client.completions.create(**greedy, stop=stop, stream=True, extra_body={"ignore_eos": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks) == cut
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_several_choices_come_from_following_seeds(client):
    ask = {"model": "base", "messages": ASK, "max_tokens": 8, "temperature": 1.0}
    three = client.chat.completions.create(**ask, n=3, seed=5).choices
    single = [client.chat.completions.create(**ask, seed=5 + k).choices[0] for k in range(3)]
    assert [choice.message.content for choice in three] == [choice.message.content for choice in single]
    assert [choice.index for choice in three] == [0, 1, 2]


@pytest.mark.parametrize(
    ("path", "change", "status", "words"),
    [
        ("/v1/chat/completions", {"model": "nobody"}, 404, "does not exist"),
        ("/v1/chat/completions", {"model": None}, 400, "model"),
        ("/v1/chat/completions", {"messages": []}, 400, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "order " * 600}]}, 400, "maximum context"),
        ("/v1/chat/completions", {"max_tokens": 512}, 400, "maximum context length is 512"),
        ("/v1/chat/completions", {"temperature": -1}, 400, "temperature"),
        ("/v1/chat/completions", {"tool_choice": "required"}, 400, "tool_choice"),
        ("/v1/chat/completions", {"response_format": {"type": "json_object"}}, 400, "response_format"),
        ("/v1/chat/completions", {"frequency_penalty": 0.5}, 400, "frequency_penalty"),
        ("/v1/chat/completions", {"tools": [{"type": "web_search"}]}, 400, "functions only; got type 'web_search'"),
        ("/v1/chat/completions", {"max_tokens": True}, 400, "max_tokens"),
        ("/v1/chat/completions", {"max_completion_tokens": "8"}, 400, "max_completion_tokens"),
        ("/v1/chat/completions", {"messages": called("[" * 100_000)}, 400, "no JSON"),
        ("/v1/chat/completions", {"messages": called("[" * 900 + "]" * 900)}, 400, "refuses these messages"),
        ("/v1/chat/completions", {"messages": called('{"order": "\\ud800"}')}, 400, "tokenizer refuses"),
        ("/v1/chat/completions", {"messages": [{"role": "assistant", "tool_calls": 5}]}, 400, "refuses these messages"),
        ("/v1/completions", {"prompt": [1, 448]}, 400, "vocabulary"),
        ("/v1/completions", {"prompt": []}, 400, "prompt"),
        ("/v1/completions", {"prompt": "hi", "echo": True}, 400, "echo"),
    ],
)
def test_bad_requests_are_explained(http, path, change, status, words):
    body = {"model": "base", "messages": ASK, **change}
    response = http.post(path, json={key: value for key, value in body.items() if value is not None})
    assert response.status_code == status
    assert words in response.json()["error"]["message"]
    assert response.json()["error"]["code"] == status


@pytest.mark.parametrize("raw", [b"{", b"", b"[]", b"\xff\xfe", b'{"model": "base"}'])
def test_bad_json_is_a_400(http, raw):
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        assert http.post(path, content=raw).status_code == 400


def test_adapter_routes_answer_like_vllm(http, base, tmp_path):
    path = str(random_adapter(base, tmp_path / "a", 1))
    load = {"lora_name": "one", "lora_path": path}
    ok = http.post("/v1/load_lora_adapter", json=load)
    assert (ok.status_code, ok.text) == (200, "Success: LoRA adapter 'one' added successfully.")
    cards = {card["id"]: card for card in http.get("/v1/models").json()["data"]}
    assert (cards["one"]["root"], cards["one"]["parent"]) == (path, "base")
    assert cards["base"]["parent"] is None
    again = http.post("/v1/load_lora_adapter", json=load)
    assert again.status_code == 400
    assert "'one' has already been loaded" in again.json()["error"]["message"]
    assert again.json()["error"]["type"] == "InvalidUserInput"
    gone = http.post("/v1/unload_lora_adapter", json={"lora_name": "one"})
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'one' removed successfully.")
    twice = http.post("/v1/unload_lora_adapter", json={"lora_name": "one"})
    assert (twice.status_code, twice.json()["error"]["type"]) == (404, "NotFoundError")


def test_adapters_that_cannot_serve_are_refused(http, base, tmp_path):
    other = load_base(make_tiny_base(tmp_path / "other", seed=1, hidden=128))
    foreign = random_adapter(other, tmp_path / "foreign", 1)
    pickle = random_adapter(base, tmp_path / "pickle", 1)
    (pickle / "adapter_model.bin").write_bytes(b"x")
    torn = random_adapter(base, tmp_path / "torn", 1)
    weights = torn / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    good = str(random_adapter(base, tmp_path / "good", 1))
    for body, status, words in (
        ({"lora_name": "x", "lora_path": str(tmp_path / "nowhere")}, 404, "No adapter found"),
        ({"lora_name": "x", "lora_path": "relative/path"}, 400, "absolute"),
        ({"lora_name": "x", "lora_path": str(foreign)}, 400, "another base"),
        ({"lora_name": "x", "lora_path": str(pickle)}, 400, "pickle"),
        ({"lora_name": "x", "lora_path": str(torn)}, 400, "safetensors"),
        ({"lora_name": "base", "lora_path": good}, 400, "conflicts with a served base model"),
        ({"lora_name": "x", "lora_path": good, "load_inplace": True}, 400, "load_inplace"),
    ):
        response = http.post("/v1/load_lora_adapter", json=body)
        assert response.status_code == status, response.text
        assert words in response.json()["error"]["message"]
    assert "x" not in {card["id"] for card in http.get("/v1/models").json()["data"]}


def test_a_full_server_says_so(http, base, tmp_path):
    path = str(random_adapter(base, tmp_path / "a", 1))
    bodies = [{"lora_name": f"n{k}", "lora_path": path} for k in range(4)]  # `caller` is the first of four
    assert [http.post("/v1/load_lora_adapter", json=body).status_code for body in bodies] == [200, 200, 200, 400]
    assert "max_adapters" in http.post("/v1/load_lora_adapter", json=bodies[3]).json()["error"]["message"]
    for body in bodies[:3]:
        http.post("/v1/unload_lora_adapter", json=body)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_its_row(url, engine, stream):
    body = {"model": "base", "messages": ASK, "max_tokens": 400, "ignore_eos": True, "stream": stream}
    with pytest.raises(httpx.ReadTimeout) if not stream else closing(httpx.Client()):
        if stream:
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, trust_env=False) as response:
                next(response.iter_lines())
        else:
            httpx.post(f"{url}/v1/chat/completions", json=body, timeout=0.15, trust_env=False)
    before = engine.num_steps
    deadline = time.monotonic() + 10
    while engine.num_running and time.monotonic() < deadline:
        time.sleep(0.005)
    assert engine.num_running == 0
    assert engine.num_steps - before < 300


def test_health_and_unknown_routes(http):
    assert http.get("/health").status_code == 200
    assert http.get("/docs").status_code == 404
    assert http.post("/adapters", json={}).status_code == 404


def test_busy_port_is_a_clear_error(base):
    with closing(bind("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is in use"):
            run_server(base.path, "127.0.0.1", port)
    with pytest.raises(ConfigError, match="cannot listen"):
        bind("203.0.113.7", 0)
    with closing(socket.create_server(("127.0.0.1", 0))) as other, pytest.raises(ConfigError):
        bind("127.0.0.1", other.getsockname()[1])
