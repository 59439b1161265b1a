"""Who gets in: a key names its principal and what it may do, and is kept nowhere but with its owner."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIStatusError, OpenAI

from cltrain.config import from_dict
from cltrain.deploy.client import clients_of
from cltrain.errors import ConfigError
from cltrain.experience.recording import read_trajectories
from cltrain.gateway.app import run_gateway
from cltrain.gateway.guard import ROUTES, is_loopback
from cltrain.gateway.keys import FILE, KeyRing, add_key, read_keys, revoke_key
from cltrain.gateway.upstream import Upstream
from tests.command import Command, cltrain
from tests.gateway_parts import FakeServer, Gateway, running, served

__all__ = ["cltrain"]  # a fixture
CHAT = {"model": "support", "messages": [{"role": "user", "content": "hi"}]}


@dataclass(frozen=True)
class Guarded:
    gateway: Gateway
    infer: str
    feedback: str
    admin: str


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    home = tmp_path_factory.mktemp("state")
    keys = [add_key(home, f"{scope}-desk", [scope], now=1.0)[1] for scope in ("infer", "feedback", "admin")]
    with running(home) as gateway:
        yield Guarded(gateway, *keys)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def record_of(gateway: Gateway, answer: httpx.Response) -> Any:
    return next(
        t for t in read_trajectories(gateway.store, "support") if t.id == answer.headers["x-cltrain-trajectory"]
    )


# ---------------------------------------------------------------- the file


def test_only_a_salted_hash_is_kept_in_a_file_of_its_owner_alone(cltrain: Command, tmp_path: Path) -> None:
    home = f"--home={tmp_path}"
    made = cltrain("keys", "add", "--principal", "anna", "--scope", "feedback", "--scope", "infer", home, "--json").json
    same = cltrain("keys", "add", "--principal", "anna", "--scope", "infer", home)
    secret = made["key"].split("-", 2)[2]
    kept = (tmp_path / FILE).read_text()
    assert made["key"] not in kept
    assert secret not in kept
    assert same.out.strip().split("-", 2)[2] not in kept
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600
    first, second = read_keys(tmp_path)
    assert (first.principal, first.scopes, len(bytes.fromhex(first.salt))) == ("anna", ("infer", "feedback"), 16)
    assert first.salt != second.salt
    listed = cltrain("keys", "list", home).out
    assert first.id in listed
    assert first.digest not in listed
    assert cltrain("keys", "revoke", first.id, home).code == 0
    assert [key.revoked_at is None for key in read_keys(tmp_path)] == [False, True]
    assert cltrain("keys", "revoke", "nobody", home).code == 3
    assert cltrain("keys", "add", "--principal", "x", "--scope", "root", home).code == 2
    assert cltrain("keys", "add", "--principal", "", "--scope", "infer", home).code == 2
    assert len(read_keys(tmp_path)) == 2
    (tmp_path / "file").write_text("")
    nowhere = cltrain("keys", "add", "--principal", "x", "--scope", "infer", f"--home={tmp_path / 'file'}")
    assert (nowhere.code, "cannot be written" in nowhere.err) == (3, True)


def test_keys_added_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    threads = [
        threading.Thread(target=add_key, args=(tmp_path, f"p{i}", ["infer"]), kwargs={"now": 1.0}) for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(key.principal for key in read_keys(tmp_path)) == [f"p{i}" for i in range(8)]


# ---------------------------------------------------------------- where it may listen


@pytest.mark.parametrize(
    ("host", "is_ours"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("", False),
     ("::", False), ("192.0.2.7", False), ("no.such.host.invalid", False)],
)  # fmt: skip
def test_loopback_is_what_only_this_machine_reaches(host: str, is_ours: bool) -> None:
    assert is_loopback(host) is is_ours


def test_without_a_valid_key_it_listens_on_loopback_only(tmp_path: Path) -> None:
    config = from_dict({"home": str(tmp_path), "gateway": {"host": "0.0.0.0", "port": 0}})
    with pytest.raises(ConfigError, match=r"gateway\.host = '0\.0\.0\.0'.*no API key.*cltrain keys add"):
        run_gateway(config)
    kept, _ = add_key(tmp_path, "anna", ["infer"], now=1.0)
    revoke_key(tmp_path, kept.id, now=2.0)
    with pytest.raises(ConfigError, match="no API key"):
        run_gateway(config)
    add_key(tmp_path, "anna", ["infer"], now=3.0)
    with socket.create_server(("0.0.0.0", 0)) as taken:  # it gets as far as the port
        busy = from_dict({"home": str(tmp_path), "gateway": {"host": "0.0.0.0", "port": taken.getsockname()[1]}})
        with pytest.raises(ConfigError, match=r"gateway\.port"):
            run_gateway(busy)


# ---------------------------------------------------------------- getting in


@pytest.mark.parametrize("path", [path for path, rule in ROUTES.items() if rule.scope is not None])
@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({}, "missing_api_key"),
        ({"Authorization": "Basic YTpi"}, "missing_api_key"),
        ({"Authorization": "Bearer"}, "invalid_api_key"),
        ({"Authorization": "Bearer clt-00000000-wrong"}, "invalid_api_key"),
        ({"Authorization": "Bearer -"}, "invalid_api_key"),
        ({"x-api-key": "sk-ant-\xe9"}, "invalid_api_key"),
        ({"x-api-key": "a" * 5000}, "invalid_api_key"),
    ],
)
def test_a_missing_or_wrong_key_is_a_401_in_the_apis_own_shape_on_every_route(
    guarded: Guarded, path: str, given: dict[str, str], code: str
) -> None:
    before = guarded.gateway.errors(code)
    num_forwarded = len(guarded.gateway.fake.bodies)
    headers = {name: value.encode("latin-1") for name, value in given.items()}
    answer = guarded.gateway.http.request(ROUTES[path].method, path, json=CHAT, headers=headers)
    assert answer.status_code == 401
    if path == "/v1/messages":
        assert answer.json()["error"]["type"] == "authentication_error"
        assert answer.json()["type"] == "error"
    else:
        assert answer.json()["error"]["code"] == code
    assert guarded.gateway.errors(code) == before + 1
    assert len(guarded.gateway.fake.bodies) == num_forwarded


def test_a_right_id_with_anothers_secret_is_refused(guarded: Guarded) -> None:
    mixed = "-".join([*guarded.infer.split("-", 2)[:2], guarded.admin.split("-", 2)[2]])
    assert guarded.gateway.chat("hi", headers=bearer(mixed)).status_code == 401


@pytest.mark.parametrize("path", [path for path, rule in ROUTES.items() if rule.scope is not None])
def test_a_key_opens_what_its_scope_says_and_nothing_else(guarded: Guarded, path: str) -> None:
    for scope in ("infer", "feedback", "admin"):
        headers = {"x-api-key": getattr(guarded, scope)}
        answer = guarded.gateway.http.request(ROUTES[path].method, path, json={}, headers=headers)
        if scope == ROUTES[path].scope:
            assert answer.status_code in (200, 400), (path, scope, answer.text)
        else:
            assert answer.status_code == 403, (path, scope)
            error = answer.json()["error"]
            assert (
                error["type"] == "permission_error" if path == "/v1/messages" else error["code"] == "insufficient_scope"
            )


def test_health_needs_no_key(guarded: Guarded) -> None:
    assert guarded.gateway.http.get("/health").status_code == 200


def test_the_official_client_gets_in_with_its_key_and_is_told_why_without(guarded: Guarded) -> None:
    url = f"{guarded.gateway.url}/v1"
    with OpenAI(base_url=url, api_key=guarded.infer, max_retries=0) as client:
        assert client.chat.completions.create(**CHAT).choices[0].message.content == "base heard hi"
    with OpenAI(base_url=url, api_key="sk-nothing", max_retries=0) as client:
        with pytest.raises(APIStatusError) as refused:
            client.chat.completions.create(**CHAT)
    assert (refused.value.status_code, refused.value.code) == (401, "invalid_api_key")


# ---------------------------------------------------------------- whose it is


def test_the_keys_principal_is_the_records_whatever_the_client_says(guarded: Guarded) -> None:
    gateway = guarded.gateway
    answer = gateway.chat("hi", headers=bearer(guarded.infer), user="eve")
    assert record_of(gateway, answer).principal == "infer-desk"
    for given in ("eve", ""):
        named = gateway.chat("hi", headers={**bearer(guarded.infer), "X-Cltrain-Principal": given})
        assert (named.status_code, named.json()["error"]["code"]) == (403, "wrong_principal")


def test_feedback_and_episodes_come_from_the_keys_principal_and_nobody_else(guarded: Guarded) -> None:
    gateway, key = guarded.gateway, bearer(guarded.feedback)
    answer = gateway.chat("one", headers=bearer(guarded.infer))
    _, own = add_key(gateway.directory, "infer-desk", ["feedback"], now=1.0)
    thumb = {"target": answer.headers["x-cltrain-record"], "id": "thumb", "score": 1}
    sent = [gateway.http.post("/v1/feedback", json=thumb, headers=bearer(own)) for _ in range(3)]
    assert [a.json()["duplicate"] for a in sent] == [False, True, True]
    assert "eve" in gateway.http.post("/v1/feedback", json={**thumb, "principal": "eve"}, headers=key).text
    (given,) = record_of(gateway, answer).feedback
    assert (given.principal, given.score) == ("infer-desk", 1.0)
    registry = gateway.app.state.door.metrics.registry
    metric = {o: registry.get_sample_value("cltrain_feedback_total", {"outcome": o}) for o in ("new", "duplicate")}
    assert metric == {"new": 1.0, "duplicate": 2.0}
    episode = {"id": "elsewhere", "messages": [*CHAT["messages"], {"role": "assistant", "content": "ho"}], "reward": 1}
    assert gateway.http.post("/v1/trajectories", json=episode, headers=key).status_code == 200
    (kept,) = [t for t in read_trajectories(gateway.store, "support") if t.id == "elsewhere"]
    assert (kept.principal, kept.feedback[0].principal) == ("feedback-desk", "feedback-desk")
    other = {**episode, "id": "others", "principal": "eve"}
    assert gateway.http.post("/v1/trajectories", json=other, headers=key).status_code == 403
    lines = "\n".join(json.dumps(one) for one in (episode, other))
    counts = gateway.http.post("/v1/trajectories", content=lines, headers=key).json()
    assert (counts["num_duplicates"], counts["num_set_aside"]) == (1, 1)


def test_a_key_judges_its_own_principals_records_and_one_with_admin_everybodys(guarded: Guarded) -> None:
    gateway = guarded.gateway
    answer = gateway.chat("one", headers=bearer(guarded.infer))
    episode = {"id": "t17", "messages": [*CHAT["messages"], {"role": "assistant", "content": "ho"}], "reward": 0}
    assert gateway.http.post("/v1/trajectories", json=episode, headers=bearer(guarded.feedback)).status_code == 200
    _, other = add_key(gateway.directory, "mallory", ["feedback"], now=1.0)
    for target in (answer.headers["x-cltrain-record"], answer.headers["x-cltrain-trajectory"], "t17"):
        said = gateway.http.post("/v1/feedback", json={"target": target, "score": 1}, headers=bearer(other))
        assert (said.status_code, target in said.text) == (404, True)
    _, chief = add_key(gateway.directory, "chief", ["feedback", "admin"], now=1.0)
    for key, status in ((guarded.feedback, 403), (chief, 200)):
        overrule = {"target": "t17", "score": 1, "source": "import"}
        assert gateway.http.post("/v1/feedback", json=overrule, headers=bearer(key)).status_code == status


@pytest.mark.parametrize("source", ["operator", "verifier"])
def test_who_is_believed_first_needs_the_scope_admin(guarded: Guarded, source: str, tmp_path: Path) -> None:
    gateway = guarded.gateway
    target = gateway.chat("one", headers=bearer(guarded.infer)).headers["x-cltrain-record"]
    thumb = {"target": target, "score": 1, "source": source}
    refused = gateway.http.post("/v1/feedback", json=thumb, headers=bearer(guarded.feedback))
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_scope")
    _, both = add_key(gateway.directory, "boss", ["feedback", "admin"], now=2.0)
    assert gateway.http.post("/v1/feedback", json=thumb, headers=bearer(both)).status_code == 200


@pytest.mark.parametrize(
    ("origin", "status"),
    [("https://evil.example", 403), ("null", 403), ("http://127.0.0.1.evil.example", 403), ("http://[", 403),
     ("http://localhost:3000", 200), ("http://[::1]:8100", 200)],
)  # fmt: skip
def test_without_keys_a_page_of_another_site_cannot_make_a_browser_ask(
    tmp_path: Path, origin: str, status: int
) -> None:
    with running(tmp_path) as gateway:
        answer = gateway.chat("hi", headers={"Origin": origin})
        assert (answer.status_code, gateway.errors("foreign_origin")) == (status, float(status == 403))
        _, key = add_key(tmp_path, "anna", ["infer"], now=1.0)
        assert gateway.chat("hi", headers={"Origin": origin, **bearer(key)}).status_code == 200, "a key is proof enough"


# ---------------------------------------------------------------- where keys go


def test_no_key_reaches_upstream_records_or_logs(
    guarded: Guarded, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    gateway = guarded.gateway
    with caplog.at_level(logging.DEBUG):
        for order in ("hi", "fail 500", "nonsense"):
            gateway.chat(order, headers={**bearer(guarded.infer), "x-api-key": guarded.infer})
            gateway.chat(order, headers={"x-api-key": guarded.infer}, stream=True)
        gateway.chat("hi", headers=bearer(guarded.infer[:-1]))
    assert not {"authorization", "x-api-key"} & set().union(*gateway.fake.headers)
    secret = guarded.infer.split("-", 2)[2][:-1]
    said = caplog.text + "".join(capfd.readouterr())
    assert secret not in said
    kept = b"".join(p.read_bytes() for p in gateway.directory.rglob("*") if p.is_file())
    assert secret.encode() not in kept
    assert secret not in json.dumps(gateway.fake.bodies)


def test_the_servers_own_key_comes_from_the_environment_and_goes_to_the_server_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"server\.api_key_env = 'UPSTREAM_KEY'.*not set"):
        with running(tmp_path, api_key_env="UPSTREAM_KEY"):
            pass
    monkeypatch.setenv("UPSTREAM_KEY", "sk-upstream")
    _, key = add_key(tmp_path, "anna", ["infer"], now=1.0)
    with running(tmp_path, api_key_env="UPSTREAM_KEY") as gateway:
        answer = gateway.chat("hi", headers=bearer(key))
        assert answer.status_code == 200
        assert gateway.fake.headers[-1]["authorization"] == "Bearer sk-upstream"
        assert "sk-upstream" not in answer.text + str(answer.headers)


def test_worker_and_gateway_show_the_servers_own_key_wherever_they_ask_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPSTREAM_KEY", "sk-upstream")
    fake = FakeServer()
    with served(fake.app) as url:
        config = from_dict({"server": {"kind": "vllm", "url": url, "api_key_env": "UPSTREAM_KEY"}})
        (client,) = clients_of(config.server)
        with client:
            client.generate("base", [{"role": "user", "content": "say hi"}], max_tokens=4)
    assert fake.headers[-1]["authorization"] == "Bearer sk-upstream"
    seen: list[str] = []

    def models(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["authorization"])
        return httpx.Response(200, json={"data": [{"id": "llama"}]})

    upstream = Upstream("http://server", kind="vllm", transport=httpx.MockTransport(models), api_key="sk-upstream")
    assert asyncio.run(upstream.base_model()) == "llama"
    assert seen == ["Bearer sk-upstream"]


@pytest.mark.parametrize(("status", "is_streamed"), [(401, False), (403, True)])
def test_a_server_that_refuses_the_gateway_is_not_the_clients_fault(
    guarded: Guarded, status: int, is_streamed: bool
) -> None:
    answer = guarded.gateway.chat(f"fail {status}", headers=bearer(guarded.infer), stream=is_streamed)
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_refused")
    assert "server.api_key_env" in answer.json()["error"]["message"]


def test_without_keys_a_key_of_ours_is_still_not_passed_on(tmp_path: Path) -> None:
    _, key = add_key(tmp_path / "other", "anna", ["infer"], now=1.0)
    with running(tmp_path) as gateway:
        assert gateway.chat("hi", headers=bearer(key)).status_code == 200
        assert "authorization" not in gateway.fake.headers[-1]


# ---------------------------------------------------------------- while it runs


def test_a_key_counts_from_the_next_request_on_and_so_does_its_end(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        assert gateway.chat("hi").status_code == 200
        kept, key = add_key(tmp_path, "anna", ["infer"], now=1.0)
        assert gateway.chat("hi").status_code == 401
        assert gateway.chat("hi", headers=bearer(key)).status_code == 200
        revoke_key(tmp_path, kept.id, now=2.0)
        assert gateway.chat("hi", headers=bearer(key)).status_code == 401
        assert gateway.chat("hi").status_code == 401, "revoking the last key must not open the door"
        os.unlink(tmp_path / FILE)
        assert gateway.chat("hi").status_code == 401, "nor must a file that is gone"


@pytest.mark.parametrize("damage", ["", "{", '{"keys": [{"id": "x"}]}', '{"keys": 5}'])
def test_a_damaged_file_lets_nobody_in(tmp_path: Path, damage: str) -> None:
    _, key = add_key(tmp_path, "anna", ["infer"], now=1.0)
    with running(tmp_path) as gateway:
        (tmp_path / FILE).write_text(damage)
        for _ in range(2):
            answer = gateway.chat("hi", headers=bearer(key))
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "keys_unreadable")
            assert answer.headers["retry-after"] == "1"
        assert gateway.fake.bodies == []


def test_a_ring_asks_for_a_key_from_the_first_one_on(tmp_path: Path) -> None:
    ring = KeyRing(tmp_path)
    assert ring.find(None) is None
    kept, key = add_key(tmp_path, "anna", ["infer"], now=1.0)
    found = ring.find(key)
    assert found is not None
    assert (found.id, found.principal) == (kept.id, "anna")
