"""The client against a real embedded server: loading is idempotent, scores are the model's, failures have names."""

import socket
from contextlib import closing

import pytest
import torch

from cltrain.deploy.client import ServerClient
from cltrain.deploy.engine import Engine
from cltrain.deploy.proof import prove
from cltrain.deploy.serve import running_server
from cltrain.errors import NotHeldError, ServerError, UnavailableError
from cltrain.models.adapter import attach, read_adapter
from cltrain.models.base import load_base
from tests.serving import random_adapter
from tests.tiny import TOOLS, make_tiny_base

ASK = [{"role": "user", "content": "please refund the order A17"}]
PROBES = [((5, 6, 7), (8, 9, 10, 11)), ((300,), (12, 13))]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_base(make_tiny_base(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapters")
    return [random_adapter(base, directory / str(seed), seed) for seed in range(2)]


@pytest.fixture
def server(base):
    own = load_base(base.path)  # the engine hooks its model: what is compared with it runs on another copy
    with closing(Engine(own)) as engine, running_server(engine) as url, ServerClient(url, "base", 30) as client:
        yield client


def truth(base, path):
    model = base.model if path is None else attach(base, read_adapter(path))
    found = []
    for prompt, completion in PROBES:
        with torch.no_grad():
            logprobs = torch.log_softmax(model(torch.tensor([[*prompt, *completion]])).logits[0], -1)
        found.append([float(logprobs[len(prompt) - 1 + k, token]) for k, token in enumerate(completion)])
    return found


def test_loading_twice_is_once_and_another_directory_is_an_error(server, adapters):
    assert server.health()
    server.load("a", adapters[0])
    server.load("a", adapters[0])
    assert server.list() == {"a": str(adapters[0])}
    with pytest.raises(ServerError, match="never reused"):
        server.load("a", adapters[1])
    with pytest.raises(ServerError, match="absolute"):
        server.load("b", adapters[0].relative_to("/"))
    with pytest.raises(ServerError, match="No adapter found"):
        server.load("b", adapters[0] / "nowhere")
    server.unload("a")
    server.unload("a")
    assert server.list() == {}


def test_scores_are_the_adapters_log_probs(server, base, adapters):
    server.load("a", adapters[0])
    for name, path in (("base", None), ("a", adapters[0])):
        for seen, expected in zip(server.score_many(name, PROBES), truth(base, path), strict=True):
            assert seen == pytest.approx(expected, abs=1e-4)
    assert len(server.score_many("a", PROBES * 20)) == 40


def test_generated_tokens_score_as_they_were_reported(server):
    answer = server.generate("base", ASK, TOOLS, max_tokens=12, temperature=1.0, seed=4)
    assert answer == server.generate("base", ASK, TOOLS, max_tokens=12, temperature=1.0, seed=4)
    assert answer.model == "base"
    assert answer.message["role"] == "assistant"
    assert len(answer.completion_ids) == len(answer.logprobs)
    (scored,) = server.score_many("base", [(answer.prompt_ids, answer.completion_ids)])
    assert scored == pytest.approx(list(answer.logprobs), abs=1e-4)


def test_many_answers_keep_their_order(server):
    prompts = [([{"role": "user", "content": f"order {k}"}], ()) for k in range(20)]
    answers = server.generate_many("base", prompts, 6, concurrency=8)
    for prompt, answer in zip(prompts, answers, strict=True):
        alone = server.generate("base", *prompt, max_tokens=6)
        assert (answer.prompt_ids, answer.message) == (alone.prompt_ids, alone.message)
        assert answer.logprobs == pytest.approx(alone.logprobs, abs=1e-4)
    with pytest.raises(ServerError, match="does not exist"):
        server.generate_many("nobody", prompts, 6)


def test_an_absent_server_is_a_server_error(base):
    with ServerClient("http://127.0.0.1:9", "base", 2) as client:
        assert not client.health()
        for call in (client.list, lambda: client.score_many("base", [([1], [2])]), lambda: client.unload("a")):
            with pytest.raises(ServerError, match="cannot be reached"):
                call()


def test_a_server_that_does_not_hold_the_model_is_not_away(server):
    with pytest.raises(NotHeldError, match="answered 404") as found:
        server.score_many("nobody", PROBES)
    assert found.value.model == "nobody"
    with pytest.raises(NotHeldError):
        server.generate("nobody", ASK, max_tokens=1)


def test_who_does_not_answer_in_time_is_told_the_limit_that_was_meant(base):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with ServerClient(f"http://127.0.0.1:{port}", "base", timeout_s=0.2) as client:
            with pytest.raises(UnavailableError, match=r"did not answer within 0\.2 s \(server\.timeout_s\)"):
                client.score_many("base", PROBES)
            with pytest.raises(UnavailableError, match=r"/v1/models did not answer within 5 s$"):
                client.list()


def test_the_proof_tells_the_adapters_apart(server, base, adapters):
    server.load("new", adapters[0])
    server.load("old", adapters[1])
    new, old = truth(base, adapters[0]), truth(base, adapters[1])
    proof = prove(server, "new", "old", PROBES, new, old, 1e-3)
    assert proof.verdict == "proved"
    assert proof.max_error < 1e-3 < proof.separation
    assert prove(server, "new", "new", PROBES, new, new, 1e-3).verdict == "indistinguishable"
    with pytest.raises(ServerError, match="it is new that answers"):
        prove(server, "new", "new", PROBES, old, new, 1e-3)
    with pytest.raises(ServerError, match="neither"):
        prove(server, "old", "base", PROBES, new, truth(base, None), 1e-3)
    nan = [[float("nan")] * len(row) for row in new]
    with pytest.raises(ServerError, match="not proved"):
        prove(server, "new", "old", PROBES, nan, old, 1e-3)
