"""Whatever goes wrong before or behind the gateway is an error in the shape of the API asked, counted, and no trace."""

from __future__ import annotations

import json
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from cltrain.experience.recording import read_trajectories
from cltrain.gateway.app import create_gateway
from cltrain.gateway.upstream import Upstream
from cltrain.store.database import open_store
from tests.gateway_parts import BASE, Gateway, config_in, running, served

CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"
HANG_S = 3.0


def whole(**fields: Any) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}
    return json.dumps({"id": "x", "model": "base", "choices": [choice], **fields}).encode()


def choice(**fields: Any) -> bytes:
    return whole(choices=[{"index": 0, "message": {"content": "hi"}, "finish_reason": "stop", **fields}])


def said(body: bytes, status: str = "200 OK", kind: str = "application/json", more: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n{more}\r\n".encode() + body


def chunk(model: str = "base", finish: str | None = None, **fields: Any) -> bytes:
    one = {"index": 0, "delta": {"content": "a"}, "finish_reason": finish}
    return b"data: " + json.dumps({"model": model, "choices": [one], **fields}).encode() + b"\n\n"


def streamed(*events: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n" + b"".join(events)


HTML = b"<html><body>502 from a proxy: Traceback (most recent call last)</body></html>"
TRACED = {"error": {"message": "no memory Traceback (most recent call last):\n  File engine.py", "type": "x"}}
ERROR = {"error": {"message": "no memory", "type": "x", "code": None}}


@dataclass(frozen=True)
class Fault:
    """What the inference server sends before it closes or, with `hangs`, says nothing more."""

    name: str
    sends: bytes
    status: int = 502
    code: str = "upstream_error"
    hangs: bool = False


WHOLE = (
    Fault("nothing", b""),
    Fault("no HTTP", b"220 smtp ready\r\n"),
    Fault("silence", b"", 504, "upstream_timeout", hangs=True),
    Fault("half a body", said(whole())[:-10]),
    Fault("a body that never ends", said(whole())[:-10], 504, "upstream_timeout", hangs=True),
    Fault("HTML", said(HTML, kind="text/html")),
    Fault("HTML and 500", said(HTML, "500 Oops", "text/html")),
    Fault("HTML that says it is JSON", said(HTML)),
    Fault("a redirect to its admin routes", said(b"", "307 Go", more="location: /adapters\r\n")),
    Fault("an empty body", said(b"")),
    Fault("a list", said(b"[1]")),
    Fault("no choices", said(whole(choices=[]))),
    Fault("choices that are no list", said(whole(choices=5))),
    Fault("choices of text", said(whole(choices="abc"))),
    Fault("a choice without a message", said(choice(message=None))),
    Fault("a message that is text", said(choice(message="hi"))),
    Fault("calls that are no list", said(choice(message={"content": None, "tool_calls": 5}))),
    Fault("a call that is text", said(choice(message={"content": None, "tool_calls": ["x"]}))),
    Fault("a call of a number", said(choice(message={"content": None, "tool_calls": [{"function": {"name": 5}}]}))),
    Fault("token ids that are a number", said(choice(token_ids=5))),
    Fault("log-probs of text", said(choice(logprobs={"content": ["x"]}))),
    Fault("a finish reason for a list", said(choice(index=[1]))),
    Fault("another adapter", said(whole(model="support-v000009-999999999999")), code="upstream_wrong_model"),
    Fault("an adapter beside the base", said(whole(model="base,support-v000009")), code="upstream_wrong_model"),
    Fault("no model at all", said(whole(model=None)), code="upstream_wrong_model"),
    Fault("500 with a trace", said(json.dumps(TRACED).encode(), "500 Oops")),
    Fault("400 with a trace", said(json.dumps(TRACED).encode(), "400 No"), 400, "upstream_refused"),
    Fault("400 with an error that is text", said(b'{"error": "no memory"}', "400 No"), 400, "upstream_refused"),
    Fault(
        "400 in SGLang's flat form",
        said(b'{"object": "error", "message": "no memory"}', "400 No"),
        400,
        "upstream_refused",
    ),
    Fault("401 to our key", said(json.dumps(ERROR).encode(), "401 No"), 401, "upstream_refused"),
)
STREAMS = (
    Fault("a whole answer", said(whole())),
    Fault("HTML", said(HTML, kind="text/html")),
    Fault("HTML as events", streamed(HTML, b"\n\n"), 200),
    Fault("no events", streamed(), 200),
    Fault("events that are no JSON", streamed(b"data: {oops\n\n"), 200),
    Fault("an event that is a list", streamed(b"data: [1]\n\n"), 200),
    Fault("an error midway", streamed(chunk(), b"data: " + json.dumps(ERROR).encode() + b"\n\n"), 200),
    Fault("an error with a trace midway", streamed(chunk(), b"data: " + json.dumps(TRACED).encode() + b"\n\n"), 200),
    Fault("an end before the end", streamed(chunk(), b"data: [DONE]\n\n"), 200),
    Fault("half an event", streamed(chunk(), chunk()[:-20]), 200),
    Fault("silence midway", streamed(chunk()), 200, "upstream_timeout", hangs=True),
    Fault("choices of text", streamed(chunk(choices="abc")), 200),
    Fault("another adapter", streamed(chunk("support-v000009")), 200, "upstream_wrong_model"),
    Fault(
        "another adapter midway", streamed(chunk(), chunk("other"), chunk(finish="stop")), 200, "upstream_wrong_model"
    ),
)


class Liar(socketserver.ThreadingTCPServer):
    """Sends what `fault` says to whoever posts."""

    allow_reuse_address = True
    daemon_threads = True
    fault: Fault


class Answering(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        length = 0
        while (line := self.rfile.readline().strip().lower()) != b"":
            if line.startswith(b"content-length:"):
                length = int(line.partition(b":")[2])
        self.rfile.read(length)
        assert isinstance(self.server, Liar)
        self.wfile.write(self.server.fault.sends)
        if self.server.fault.hangs:
            self.connection.settimeout(HANG_S)
            with suppress(OSError):
                self.connection.recv(1)


@contextmanager
def lied_to(directory: Path) -> Iterator[tuple[Gateway, Liar]]:
    with Liar(("127.0.0.1", 0), Answering) as liar:
        threading.Thread(target=liar.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{liar.server_address[1]}"
        store = open_store(directory)
        upstream = Upstream(url, kind="vllm", base_model="base", timeout_s=1.5)
        config = config_in(directory, server={"kind": "vllm", "url": url})
        app = create_gateway(store, config, upstream, base_release=BASE)
        with served(app) as gateway_url:
            gateway = Gateway(directory, gateway_url, None, store, app)  # type: ignore[arg-type]
            yield gateway, liar
            gateway.http.close()
        liar.shutdown()
        store.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, Liar]]:
    with lied_to(tmp_path_factory.mktemp("state")) as parts:
        yield parts


def check_shape(body: dict[str, Any], path: str, code: str | None = None) -> None:
    error = body["error"]
    assert isinstance(error["message"], str)
    if path == MESSAGES:
        assert (set(body), set(error)) == ({"type", "error"}, {"type", "message"})
        assert body["type"] == "error"
    else:
        assert (set(body), set(error)) == ({"error"}, {"message", "type", "param", "code"})
        assert code is None or error["code"] == code


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
@pytest.mark.parametrize(
    ("fault", "is_streamed"),
    [*((fault, False) for fault in WHOLE), *((fault, True) for fault in STREAMS)],
    ids=lambda value: value.name if isinstance(value, Fault) else ("whole", "stream")[value],
)
def test_a_server_that_misbehaves_is_an_error_of_the_api_and_counted(
    shared: tuple[Gateway, Liar], fault: Fault, is_streamed: bool, path: str
) -> None:
    gateway, liar = shared
    liar.fault = fault
    before = gateway.errors(fault.code)
    asked = {"model": "support", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
    answer = gateway.http.post(path, json={**asked, "stream": is_streamed})
    assert answer.status_code == fault.status
    assert "engine.py" not in answer.text
    if fault.status == 200:
        last = answer.text.strip().split("\n\n")[-1].split("\n")[-1]
        check_shape(json.loads(last.removeprefix("data: ")), path, fault.code)
        assert "<html>" not in answer.text.removesuffix(last)
    elif fault.code != "upstream_refused":
        check_shape(answer.json(), path, fault.code)
        assert answer.headers["x-cltrain-recorded"] == "0"
    else:
        check_shape(answer.json(), path)
        assert answer.json()["error"]["message"].startswith("no memory")
    assert gateway.errors(fault.code) == before + 1
    assert gateway.app.state.door.episodes.busy == frozenset()
    assert all(kept.generations == () for kept in read_trajectories(gateway.store, "support"))


def test_another_vendors_dated_model_name_is_no_lie(tmp_path: Path) -> None:
    with running(tmp_path, kind="openai") as gateway:
        assert gateway.chat("dated").status_code == 200
    with running(tmp_path, kind="vllm") as gateway:
        assert gateway.chat("dated").status_code == 502


# ---------------------------------------------------------------- what is not ours


@pytest.mark.parametrize(
    "path",
    ["/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters", "/adapters/x", "/pause", "/resume", "/sleep",
     "/collective_rpc", "/update_weights", "/reset_prefix_cache", "/invocations", "/tokenize", "/v1/embeddings",
     "/server_info", "/", "/docs", "/openapi.json", "/v1/messages/count_tokens", "/v1/messages/batches", "//health",
     "/v1/../adapters", "/v1/%2e%2e/adapters", "/v1/chat/completions/", "/v1/chat/completions/../../pause"],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS"])
def test_nothing_but_our_own_routes_answers_and_nothing_reaches_the_server(
    quiet: Gateway, path: str, method: str
) -> None:
    before = quiet.errors("unknown_route")
    num_seen = len(quiet.fake.paths)
    host, port = quiet.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 5) as raw:  # as it stands: a client would tidy the path up
        raw.sendall(
            f"{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{{}}".encode()
        )
        text = b"".join(iter(lambda: raw.recv(65536), b"")).decode()
    assert text.startswith("HTTP/1.1 404"), text[:80]
    check_shape(
        json.loads(text.partition("\r\n\r\n")[2]), MESSAGES if path.startswith(MESSAGES) else CHAT, "unknown_route"
    )
    assert quiet.errors("unknown_route") == before + 1
    assert len(quiet.fake.paths) == num_seen


def test_a_long_body_behind_a_long_head_is_taken(quiet: Gateway) -> None:
    answer = quiet.http.post("/v1/feedback", content=b" " * 500_000 + b"{}", headers={"x-long": "a" * 60_000})
    assert answer.json()["error"]["code"] not in ("no_http", "headers_too_long")


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with running(tmp_path_factory.mktemp("quiet"), gateway={"max_in_flight": 2}) as gateway:
        yield gateway


def test_another_method_is_a_405(quiet: Gateway) -> None:
    for method, path in (("GET", CHAT), ("DELETE", "/v1/models"), ("POST", "/health"), ("GET", MESSAGES)):
        answer = quiet.http.request(method, path)
        assert answer.status_code == 405
        check_shape(answer.json(), path, "method_not_allowed")


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
@pytest.mark.parametrize(
    "model",
    ["../x", "/etc", "..", "support:latest", "support@1", "a,b", "support/../x", "Support", "support ", "s\u0000",
     "%2e%2e/x", "support-v000001-\u0661\u0661", "gpt-4o"],
)  # fmt: skip
def test_a_model_name_is_ours_or_unknown_and_never_reaches_the_server(quiet: Gateway, model: str, path: str) -> None:
    num_seen = len(quiet.fake.bodies)
    asked = {"model": model, "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
    answer = quiet.http.post(path, json=asked)
    assert answer.status_code == (400 if "\0" in model else 404)
    check_shape(answer.json(), path, None if "\0" in model else "model_not_found")
    assert len(quiet.fake.bodies) == num_seen


# ---------------------------------------------------------------- too much, and clients that leave


def until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def test_beyond_the_limit_it_is_a_429_until_a_stream_has_ended(quiet: Gateway) -> None:
    body = {
        "model": "support",
        "max_tokens": 9,
        "stream": True,
        "messages": [{"role": "user", "content": "drip" + "." * 90}],
    }
    before = quiet.errors("rate_limit_exceeded")
    registry = quiet.app.state.door.metrics.registry
    with httpx.Client(base_url=quiet.url, trust_env=False) as other:
        with quiet.http.stream("POST", CHAT, json=body) as one, other.stream("POST", CHAT, json=body) as two:
            reading = [one.iter_raw(), two.iter_raw()]  # held: an iterator that is collected closes its stream
            assert all(next(bytes_) for bytes_ in reading)
            assert registry.get_sample_value("cltrain_in_flight") == 2
            for path in (CHAT, MESSAGES):
                refused = quiet.http.post(path, json={**body, "stream": False})
                assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
                check_shape(refused.json(), path, "rate_limit_exceeded")
            assert quiet.http.get("/v1/models").status_code == 200
            assert quiet.http.post("/v1/feedback", json={}).status_code == 400, "streams keep no feedback out"
    until(lambda: registry.get_sample_value("cltrain_in_flight") == 0, "the streams are still counted")
    assert quiet.errors("rate_limit_exceeded") == before + 2
    assert quiet.chat("hi").status_code == 200


def test_a_client_that_leaves_is_counted(quiet: Gateway) -> None:
    for is_streamed in (False, True):
        before = quiet.errors("client_left")
        body = {"model": "support", "stream": is_streamed, "messages": [{"role": "user", "content": "wait 4"}]}
        with pytest.raises(httpx.ReadTimeout):
            quiet.http.post(CHAT, json=body, timeout=0.3)
        until(lambda before=before: quiet.errors("client_left") == before + 1, "it is not counted")  # type: ignore[misc]


@pytest.mark.parametrize("path", [CHAT, MESSAGES, "/v1/feedback", "/v1/trajectories"])
def test_a_client_that_leaves_amid_its_body_is_counted_and_forgotten(
    quiet: Gateway, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = quiet.errors("client_left")
    host, port = quiet.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 5) as raw:
        raw.sendall(f'POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 900\r\n\r\n{{"model": '.encode())
        time.sleep(0.1)
    until(lambda: quiet.errors("client_left") == before + 1, "it is not counted")
    assert "Traceback" not in caplog.text


class Broken(Upstream):
    async def post(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> dict[str, Any]:
        raise ZeroDivisionError("a fault of ours")


def test_what_nobody_foresaw_is_a_500_without_a_trace(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    app = create_gateway(store, config_in(tmp_path), Broken("http://127.0.0.1:9", base_model="base"), base_release=BASE)
    with served(app) as url, httpx.Client(base_url=url, trust_env=False) as http:
        for path in (CHAT, MESSAGES):
            asked = {"model": "support", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
            answer = http.post(path, json=asked)
            assert answer.status_code == 500
            check_shape(answer.json(), path, "internal")
            assert "fault of ours" not in answer.text
        assert 'cltrain_errors_total{code="internal"} 2.0' in http.get("/metrics").text
    store.close()
