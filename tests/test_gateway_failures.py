"""When the server fails or is slow or the client leaves: a clear status, a cancelled request, never a reward."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIError, OpenAI
from sqlalchemy import select

from cltrain.config import from_dict
from cltrain.errors import ConfigError
from cltrain.experience.recording import read_trajectories
from cltrain.gateway import chat, streaming
from cltrain.gateway.app import create_gateway, run_gateway
from cltrain.gateway.upstream import Upstream
from cltrain.store.database import open_store
from cltrain.store.schema import records
from tests.gateway_parts import BASE, Gateway, config_in, running, served

S1 = {"X-Session-Id": "s1"}


def until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline, what
        threading.Event().wait(0.02)


@pytest.mark.parametrize(
    ("order", "is_streamed"), [("fail 500", False), ("fail 500", True), ("fail 503", False), ("nonsense", False)]
)
def test_a_failing_server_is_a_502_that_says_who_and_why(tmp_path: Path, order: str, is_streamed: bool) -> None:
    with running(tmp_path) as gateway:
        answer = gateway.chat(order, stream=is_streamed)
        assert answer.status_code == 502
        assert answer.headers["x-cltrain-recorded"] == "0"
        assert "inference server at http://127.0.0.1" in answer.json()["error"]["message"]
        until(lambda: len(read_trajectories(gateway.store, "support")) == 1, "the failed turn is not noted")
        (kept,) = read_trajectories(gateway.store, "support")
    assert (kept.generations, kept.feedback) == ((), ())


def test_the_servers_own_refusal_reaches_the_client_as_it_is(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        answer = gateway.chat("fail 400")
        assert (answer.status_code, answer.json()["error"]["message"]) == (400, "as you said")
        assert gateway.chat("fail 429").status_code == 429
        assert read_trajectories(gateway.store, "support") == []


def test_a_slow_server_is_a_504_and_the_episode_times_out_without_reward(tmp_path: Path) -> None:
    with running(tmp_path, timeout_s=0.3) as gateway:
        first = gateway.chat("one", headers=S1)
        message = first.json()["choices"][0]["message"]
        answer = gateway.chat("one", message, "wait 5", headers=S1)
        assert answer.status_code == 504
        assert "within 0.3 s" in answer.json()["error"]["message"]
        gateway.http.post(
            "/v1/feedback",
            json={"target": first.headers["x-cltrain-record"], "text": "too slow"},
            headers={"X-Session-Done": "1"},
        )
        (kept,) = read_trajectories(gateway.store, "support")
    assert kept.end == "timeout"
    assert [f.score for f in kept.feedback] == [None]
    assert len(kept.messages) == 2


def test_a_retry_after_a_failure_goes_on_in_the_same_episode(tmp_path: Path) -> None:
    with running(tmp_path, timeout_s=0.3) as gateway:
        assert gateway.chat("wait 1", headers=S1).status_code == 504
        until(lambda: len(read_trajectories(gateway.store, "support")) == 1, "the failed turn is not noted")
        (failed,) = read_trajectories(gateway.store, "support")
        answer = gateway.chat("wait 0.0", headers=S1)
        assert answer.headers["x-cltrain-trajectory"] == failed.id
        again = gateway.chat("wait 1", headers=S1)
        assert again.status_code == 504


def test_a_missing_server_is_a_502(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    url = f"http://127.0.0.1:{port}"  # nobody listens there any more
    store = open_store(tmp_path)
    config = config_in(tmp_path, server={"url": url})
    app = create_gateway(store, config, Upstream(url, base_model="base"), base_release=BASE)
    with served(app) as gateway_url, httpx.Client(base_url=gateway_url, trust_env=False) as http:
        body = {"model": "support", "messages": [{"role": "user", "content": "x"}]}
        for streamed in (False, True):
            answer = http.post("/v1/chat/completions", json={**body, "stream": streamed})
            assert answer.status_code == 502
            assert "no answer from the inference server" in answer.json()["error"]["message"]
        assert http.get("/v1/models").status_code == 502
        assert http.get("/health").status_code == 200


def test_a_stream_that_breaks_off_ends_with_an_error_and_is_not_recorded(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        text = gateway.chat("break", stream=True, headers=S1).text
        assert "broke off" in json.loads(text.strip().split("\n")[-1][6:])["error"]["message"]
        assert "[DONE]" not in text
        assert '"cltrain"' not in text
        with OpenAI(base_url=f"{gateway.url}/v1", api_key="x", max_retries=0) as client:
            stream = client.chat.completions.create(
                model="support", messages=[{"role": "user", "content": "break"}], stream=True, user="ben"
            )
            with pytest.raises(APIError, match="broke off"):
                list(stream)
        until(lambda: len(read_trajectories(gateway.store, "support")) == 2, "the failed turn is not noted")
        kept = read_trajectories(gateway.store, "support")
        assert set(ends(gateway)) == {"aborted"}
    assert all(t.generations == () for t in kept)


def ends(gateway: Gateway) -> list[str]:
    with gateway.store.read() as connection:
        return list(connection.scalars(select(records.c.end)))


def test_a_client_that_leaves_cancels_the_server_and_leaves_a_turn_that_is_nobodys_fault(tmp_path: Path) -> None:
    with running(tmp_path, timeout_s=20) as gateway:
        with pytest.raises(httpx.ReadTimeout):
            gateway.http.post(
                "/v1/chat/completions",
                json={"model": "support", "messages": [{"role": "user", "content": "wait 9"}]},
                timeout=0.3,
            )
        until(lambda: gateway.fake.num_cancelled == 1, "the server was not cancelled")
        until(lambda: ends(gateway) == ["left"], "that it left is not noted")
        assert gateway.app.state.door.episodes.busy == frozenset()


def test_a_client_that_leaves_a_stream_cancels_the_server(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        body = {"model": "support", "stream": True, "messages": [{"role": "user", "content": "drip"}]}
        with gateway.http.stream("POST", "/v1/chat/completions", json=body) as response:
            next(response.iter_raw())
        until(lambda: gateway.fake.num_cancelled == 1, "the server was not cancelled")
        until(lambda: ends(gateway) == ["left"], "that it left is not noted")
        (kept,) = read_trajectories(gateway.store, "support")
        assert kept.generations == ()
        assert gateway.app.state.door.episodes.busy == frozenset()


def test_a_busy_port_is_a_clear_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = from_dict({"home": str(tmp_path), "gateway": {"port": port}})
        with pytest.raises(ConfigError, match=rf"gateway\.port = {port}.*--set gateway\.port"):
            run_gateway(config)


# ---------------------------------------------------------------- what holds a place


class Fragile:
    """A server that reads a request whole and goes away over it."""

    def __init__(self) -> None:
        self.num_requests = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, _ = self._listener.accept()
                with connection:
                    connection.recv(1 << 16)
                    self.num_requests += 1

    def close(self) -> None:
        self._listener.close()


def test_a_request_that_ends_servers_does_not_end_all_of_them(tmp_path: Path) -> None:
    servers = [Fragile() for _ in range(4)]
    store = open_store(tmp_path)
    config = config_in(tmp_path, server={"urls": [server.url for server in servers]})
    upstreams = [Upstream(server.url, base_model="base") for server in servers]
    with served(create_gateway(store, config, upstreams, time.time, base_release=BASE)) as url:
        body = {"model": "support", "messages": [{"role": "user", "content": "boom"}]}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30, trust_env=False)
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_error")
    assert sorted(server.num_requests for server in servers) == [0, 0, 1, 1]
    for server in servers:
        server.close()
    store.close()


def test_a_body_that_does_not_come_gives_its_place_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "BODY_S", 0.3)
    with running(tmp_path, gateway={"max_in_flight": 1}) as gateway:
        place = httpx.URL(gateway.url)
        with socket.create_connection((place.host, place.port)) as idle:
            idle.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
            until(lambda: gateway.chat("hi").status_code == 429, "it holds no place")
            until(lambda: gateway.chat("hi").status_code == 200, "its place is not given back")
            assert b"408" in idle.recv(100)


def test_a_stream_that_nobody_reads_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "UNREAD_S", 0.1)
    ended: list[bool] = []

    async def events() -> AsyncGenerator[bytes, None]:
        while True:
            yield b"data: more\n\n"

    async def on_end() -> None:
        ended.append(True)

    async def never(*_: object) -> Any:
        await asyncio.sleep(60)

    asyncio.run(asyncio.wait_for(streaming.EventStream(events(), {}, on_end)({"type": "http"}, never, never), 5))
    assert ended == [True]


@pytest.mark.parametrize("url", ["http://me:secret@host:8000", "http://host:8000?key=secret", "http://host/v1#x"])
def test_an_address_that_clients_are_shown_holds_no_secret(url: str) -> None:
    with pytest.raises(ConfigError, match=r"server\.url"):
        from_dict({"server": {"url": url}})
