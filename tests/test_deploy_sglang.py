"""The client and the gateway against a stand-in for SGLang (tests/sglang_server.py); no real SGLang has been asked."""

import json
import threading
import time
from contextlib import closing, contextmanager

import httpx
import pytest
import torch

from cltrain.config import from_dict
from cltrain.deploy.client import clients_of
from cltrain.deploy.engine import Engine
from cltrain.deploy.proof import prove
from cltrain.deploy.sglang import SglangClient
from cltrain.errors import ConfigError, NotHeldError, ServerError
from cltrain.exposure import look
from cltrain.gateway.app import create_gateway
from cltrain.gateway.upstream import Upstream
from cltrain.models.adapter import attach, read_adapter
from cltrain.models.base import load_base
from cltrain.store.database import open_store
from cltrain.store.schema import generations
from tests.gateway_parts import BASE, R1, R2, add_release, config_in, point_alias, served
from tests.serving import TARGETS, random_adapter
from tests.sglang_server import create_app
from tests.tiny import make_tiny_base

ASK = [{"role": "user", "content": "please refund the order A17"}]
PROBES = [((5, 6, 7), (8, 9, 10, 11)), ((300,), (12, 13))]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_base(make_tiny_base(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapters")
    return [random_adapter(base, directory / str(seed), seed) for seed in range(3)]


@contextmanager
def running(base, **options):
    """(client, url, the stand-in's registry)"""
    with closing(Engine(load_base(base.path), max_adapters=16)) as engine:
        app = create_app(engine, **options)
        with served(app) as url, SglangClient(url, "base", 30, options.get("api_key")) as client:
            yield client, url, app.state.registry


@pytest.fixture
def server(base):
    with running(base) as (client, _, _):
        yield client


def truth(base, path, pairs):
    model = base.model if path is None else attach(base, read_adapter(path))
    found = []
    for prompt, completion in pairs:
        with torch.no_grad():
            logprobs = torch.log_softmax(model(torch.tensor([[*prompt, *completion]])).logits[0], -1)
        found.append([float(logprobs[len(prompt) - 1 + k, token]) for k, token in enumerate(completion)])
    return found


def test_a_bare_adapter_name_is_answered_by_the_base_there_and_so_never_sent(server, adapters):
    server.load("a", adapters[0])
    with httpx.Client(base_url=server.url) as http:
        bare = http.post(
            "/v1/chat/completions", json={"model": "a", "messages": ASK, "max_tokens": 8, "temperature": 0}
        )
    of_base = server.generate("base", ASK, max_tokens=8)
    of_adapter = server.generate("a", ASK, max_tokens=8)
    assert bare.json()["model"] == "a"  # the trap: it says so, and the base answered
    assert bare.json()["choices"][0]["message"]["content"] == of_base.message["content"]
    assert of_adapter.completion_ids != of_base.completion_ids
    assert of_adapter.model == "a"
    assert server.name_of("a") == "base:a"


def test_scores_are_the_adapters_log_probs_and_prove_it(server, base, adapters):
    last = base.model.config.vocab_size - 1  # shown as token 0
    pairs = [*PROBES, ((5, last), (last, 7))]
    server.load("new", adapters[0])
    server.load("old", adapters[1])
    for name, path in (("base", None), ("new", adapters[0])):
        for seen, expected in zip(server.score_many(name, pairs), truth(base, path, pairs), strict=True):
            assert seen == pytest.approx(expected, abs=1e-4)
    new, old = truth(base, adapters[0], PROBES), truth(base, adapters[1], PROBES)
    assert prove(server, "new", "old", PROBES, new, old, 1e-3).verdict == "proved"
    with pytest.raises(ServerError, match="neither"):
        prove(server, "new", "base", PROBES, old, truth(base, None, PROBES), 1e-3)


def test_what_it_forgot_is_loaded_again_by_itself_and_so_never_asked_for(base, adapters):
    with running(base) as (client, url, registry):
        client.load("a", adapters[0])
        client.unload("a")
        client.unload("a")
        assert client.list() == {}
        for ask in (lambda: client.generate("a", ASK, max_tokens=1), lambda: client.score_many("a", PROBES)):
            with pytest.raises(NotHeldError, match="does not list a") as found:
                ask()
            assert found.value.model == "a"
        assert list(registry.listed) == []
        body = {"model": "base:a", "messages": ASK, "max_tokens": 1}
        assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 200
        assert list(registry.listed) == ["a"]  # the trap
        unknown = httpx.post(f"{url}/v1/chat/completions", json={**body, "model": "base:b"})
        assert (unknown.status_code, unknown.json()["object"]) == (400, "error")


def test_nothing_is_forgotten_for_one_adapter_too_many(base, adapters):
    with running(base, max_loaded=2) as (client, url, _):
        client.load("a", adapters[0])
        client.load("b", adapters[1])
        with pytest.raises(ServerError, match="holds 2 adapters, its --max-loaded-loras"):
            client.load("c", adapters[2])
        client.load("b", adapters[1])  # a retry is no load
        assert set(client.list()) == {"a", "b"}
        body = {"lora_name": "c", "lora_path": str(adapters[2])}
        assert httpx.post(f"{url}/load_lora_adapter", json=body).status_code == 200
        assert set(client.list()) == {"b", "c"}  # the trap: who loads without looking loses one


def test_loading_twice_is_once_and_another_directory_is_an_error(server, adapters):
    server.load("a", adapters[0])
    server.load("a", adapters[0])
    with pytest.raises(ServerError, match="never reused"):
        server.load("a", adapters[1])
    with pytest.raises(ServerError, match="absolute"):
        server.load("b", adapters[0].relative_to("/"))
    with pytest.raises(ServerError, match="did not load b"):
        server.load("b", adapters[0] / "nowhere")
    assert server.list() == {"a": str(adapters[0])}


def test_an_unload_that_waits_for_a_request_is_no_outage(base, adapters):
    """It answers when the request has ended, or takes longer than we wait; in either case nobody new gets in."""
    with running(base) as (client, url, registry), SglangClient(url, "base", 0.3) as hasty:
        client.load("a", adapters[0])
        registry.in_use["a"] = 1
        hasty.unload("a")  # 0.3 s, then the list says that it goes
        assert client.list() == {}
        with pytest.raises(ServerError, match="did not answer within"):
            hasty.load("a", adapters[0])  # behind the same lock
        freed = threading.Timer(0.3, lambda: registry.in_use.update(a=0))
        freed.start()
        deadline = time.monotonic() + 20
        while "a" in registry.unloading and time.monotonic() < deadline:
            time.sleep(0.02)
        client.load("a", adapters[0])
        assert list(client.list()) == ["a"]
        assert client.generate("a", ASK, max_tokens=2).completion_ids


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"enable_lora": False}, "--enable-lora --max-lora-rank 8"),
        ({"dp_size": 2}, "runs data parallel"),
        ({"enable_dp_attention": True}, "runs data parallel"),
        ({"max_lora_rank": 4}, "up to rank 4, and adapter.rank is 8"),
        ({"lora_target_modules": ["q_proj", "k_proj"]}, "no LoRA on v_proj, o_proj"),
        ({"max_loaded": 3}, "keeps 3 adapters"),
    ],
)
def test_a_server_too_small_is_refused_when_it_is_attached(base, options, said):
    with running(base, **options) as (client, _, _), pytest.raises(ConfigError, match=said):
        client.check_takes(8, TARGETS, 6)


def test_a_server_that_is_large_enough_is_taken_with_its_key(base, adapters):
    with running(base, api_key="k", max_loaded=6, max_lora_rank=8) as (client, url, _):
        client.check_takes(8, TARGETS, 6)
        client.load("a", adapters[0])
        assert client.health()
        with SglangClient(url, "base", 5) as stranger, pytest.raises(ServerError, match="401"):
            stranger.list()


def test_data_parallel_replicas_are_no_success(base, adapters):
    with running(base, dp_size=2) as (client, _, _), pytest.raises(ServerError, match="did not load a"):
        client.load("a", adapters[0])


def test_the_configuration_chooses_it():
    config = from_dict({"server": {"kind": "sglang", "url": "http://127.0.0.1:9", "model": "m", "max_rank": 8}})
    (client,) = clients_of(config.server)
    assert isinstance(client, SglangClient)
    assert config.server.health_path == "/ready"
    with pytest.raises(ConfigError, match=r"adapter\.rank \(16\) is above server\.max_rank \(8\)"):
        from_dict({"adapter": {"rank": 16}, "server": {"max_rank": 8}})


def test_the_doctor_asks_sglangs_own_doors_and_changes_nothing(base, adapters):
    with running(base) as (client, url, registry):
        client.load("a", adapters[0])
        (inside,) = look(url, "sglang", own=())
        assert (inside.state, "/load_lora_adapter" in inside.detail) == ("note", True)
        assert "/v1/load_lora_adapter" not in inside.detail
        assert list(registry.listed) == ["a"]
    with running(base, api_key="k") as (_, url, _):
        assert look(url, "sglang", own=()) == []


# ------------------------------------------------------------ through the gateway


@contextmanager
def gateway(base, tmp_path, adapters):
    with running(base) as (client, url, registry):
        config = config_in(tmp_path / "home", server={"kind": "sglang", "url": url})
        store = open_store(tmp_path / "home")
        for name in (R1, R2):
            add_release(store, name)
        client.load(R1, adapters[0])
        point_alias(store, R1)
        app = create_gateway(store, config, Upstream(url, kind="sglang", timeout_s=30), base_release=BASE)
        with served(app) as door, httpx.Client(base_url=door, timeout=30) as http:
            yield http, client, store, registry
        store.close()


def chat(http, **body):
    return http.post("/v1/chat/completions", json={"model": "support", "messages": ASK, "max_tokens": 8, **body})


def stored(store):
    with store.read() as connection:
        return connection.execute(generations.select().order_by(generations.c.turn)).all()


def test_the_gateway_asks_for_the_release_by_sglangs_name_and_records_its_tokens(base, tmp_path, adapters):
    with gateway(base, tmp_path, adapters) as (http, client, store, _):
        expected = client.generate(R1, ASK, max_tokens=8)
        answer = chat(http, temperature=0)
        assert answer.status_code == 200, answer.text
        said = answer.json()
        assert said["model"] == answer.headers["x-cltrain-adapter"] == R1
        assert said["choices"][0]["message"]["content"] == expected.message["content"]
        assert "sglext" not in said
        assert said["choices"][0]["logprobs"] is None
        (row,) = stored(store)
        assert (tuple(row.prompt_ids), tuple(row.completion_ids)) == (expected.prompt_ids, expected.completion_ids)
        assert row.logprobs == pytest.approx(expected.logprobs, abs=1e-5)


def test_a_stream_is_recorded_with_its_tokens_and_shows_no_empty_chunk(base, tmp_path, adapters):
    with gateway(base, tmp_path, adapters) as (http, client, store, _):
        expected = client.generate(R1, ASK, max_tokens=8)
        answer = chat(http, temperature=0, stream=True)
        chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        assert all(chunk["choices"] and chunk["model"] == R1 and "sglext" not in chunk for chunk in chunks)
        text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
        assert text == expected.message["content"]
        assert chunks[-1]["cltrain"]["recorded"] == 1
        (row,) = stored(store)
        assert (tuple(row.prompt_ids), tuple(row.completion_ids)) == (expected.prompt_ids, expected.completion_ids)


def test_a_release_that_it_never_loaded_is_try_again_and_not_the_base(base, tmp_path, adapters):
    with gateway(base, tmp_path, adapters) as (http, _, store, _):
        point_alias(store, R2)
        answer = chat(http)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "release_not_loaded")
        named = chat(http, model=R2)
        assert named.status_code == 404
        assert "never been loaded" in named.json()["error"]["message"]


@pytest.mark.parametrize("smuggled", [{"lora_path": R2}, {"input_ids": [1, 2]}, {"custom_logit_processor": "x"}])
def test_no_client_reaches_past_the_gateway_by_sglangs_own_fields(base, tmp_path, adapters, smuggled):
    with gateway(base, tmp_path, adapters) as (http, _, _, _):
        answer = chat(http, **smuggled)
        assert answer.status_code == 400
        assert "is not taken here" in answer.json()["error"]["message"]
