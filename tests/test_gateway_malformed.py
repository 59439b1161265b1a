"""What is no request at all, on every route that takes a body: the API's own error, counted, never forwarded."""

from __future__ import annotations

import gzip
import json
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import httpx
import pytest

from cltrain.gateway.wire import MAX_HEAD_BYTES, Http
from tests.gateway_parts import Gateway, running
from tests.test_gateway_faults import CHAT, MESSAGES, check_shape

ROUTES = (CHAT, "/v1/completions", MESSAGES, "/v1/feedback", "/v1/trajectories")
ASKED = {"model": "support", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
BODIES: dict[str, bytes] = {
    "nothing": b"",
    "half an object": json.dumps(ASKED).encode()[:-9],
    "a list": b"[1, 2]",
    "a number": b"7",
    "no Unicode": b'{"model": "\xff\xfe"}',
    "half a surrogate pair": b'{"model": "\\ud800", "id": "\\ud800", "target": "\\ud800", "max_tokens": 9}',
    "a NUL": b'{"model": "a\\u0000", "id": "a\\u0000", "target": "a\\u0000", "max_tokens": 9}',
    "a hundred thousand levels": b'{"messages": ' + b"[" * 100_000,
    "a number of five thousand digits": b'{"max_tokens": ' + b"9" * 5000 + b"}",
    "not a number": b'{"max_tokens": NaN, "score": Infinity}',
    "a compressed body": gzip.compress(json.dumps(ASKED).encode()),
    "a form": b"model=support&messages=hi",
    "an array of objects": json.dumps([ASKED, ASKED]).encode(),
    "nulls": b'{"model": null, "messages": null, "id": null, "target": null, "max_tokens": null}',
    "an object for every field": json.dumps({k: {} for k in ("model", "messages", "prompt", "target", "id")}).encode(),
}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with running(tmp_path_factory.mktemp("state")) as gateway:
        yield gateway


def num_errors(gateway: Gateway) -> float:
    families = gateway.app.state.door.metrics.registry.collect()
    samples = [sample for family in families if family.name == "cltrain_errors" for sample in family.samples]
    return sum(sample.value for sample in samples if sample.name.endswith("_total"))


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_what_is_no_request_is_the_apis_own_400_counted_and_never_forwarded(
    gateway: Gateway, body: bytes, path: str
) -> None:
    before, num_seen = num_errors(gateway), len(gateway.fake.bodies)
    answer = gateway.http.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    check_shape(answer.json(), path)
    assert num_errors(gateway) == before + 1
    assert len(gateway.fake.bodies) == num_seen


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
@pytest.mark.parametrize(
    "headers",
    [
        {"X-Session-Id": "x" * 300},
        {"X-Session-Id": ""},
        {"X-Cltrain-Principal": "p" * 300},
    ],
    ids=["a long session", "an empty session", "a long principal"],
)
def test_names_in_headers_are_checked_too(gateway: Gateway, headers: dict[str, str], path: str) -> None:
    before = num_errors(gateway)
    answer = gateway.http.post(path, json=ASKED, headers=headers)
    assert answer.status_code == 400, answer.text
    check_shape(answer.json(), path)
    assert num_errors(gateway) == before + 1


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        ([b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"], 400, "no_http"),  # TLS on a port without it
        ([b"hello\r\n\r\n"], 400, "no_http"),
        ([b"POST /v1/messages HTTP/1.1\r\nhost: a\r\ncontent-length: x\r\n\r\n"], 400, "no_http"),
        ([b"GET /health HTTP/1.1\r\nx: " + b"a" * MAX_HEAD_BYTES + b"\r\n\r\n"], 431, "headers_too_long"),
        ([b"GET /health HTTP/1.1\r\nx: ", *[b"a" * 1000] * (MAX_HEAD_BYTES // 1000 + 2)], 431, "headers_too_long"),
    ],
    ids=["TLS", "a word", "a broken header", "a long header", "a header without end"],
)
def test_what_reaches_no_route_is_answered_in_the_apis_shape_and_counted(
    gateway: Gateway, sent: list[bytes], status: int, code: str
) -> None:
    before = gateway.errors(code)
    with closing(HTTPConnection(gateway.url.removeprefix("http://"), timeout=10)) as client:
        client.connect()
        for part in sent:
            client.sock.sendall(part)
            time.sleep(0.002)  # each a packet of its own
        answer = HTTPResponse(client.sock)
        answer.begin()
        assert (answer.status, answer.headers["content-type"]) == (status, "application/json")
        check_shape(json.loads(answer.read()), CHAT, code)
        assert client.sock.recv(1) == b"", "the connection is closed"
    assert gateway.errors(code) == before + 1


def test_long_headers_that_end_and_long_bodies_are_taken(gateway: Gateway) -> None:
    assert gateway.chat("x" * 4 * MAX_HEAD_BYTES, "hi", headers={"x-long": "a" * 20_000}).status_code == 200


class Impatient(Http):
    head_timeout_s = 0.5


def whole_answer(client: socket.socket) -> bytes:
    """Head and JSON body, which may come in several pieces."""
    said = b""
    while not said.endswith(b"}"):
        piece = client.recv(10_000)
        assert piece, said
        said += piece
    return said


def test_a_connection_whose_headers_do_not_end_is_closed_and_one_that_asks_is_kept(tmp_path: Path) -> None:
    asks = b"GET /health HTTP/1.1\r\nhost: a\r\n"
    with running(tmp_path, http=Impatient) as hasty, closing(socket.socket()) as silent:
        where = ("127.0.0.1", httpx.URL(hasty.url).port or 0)
        silent.connect(where)
        with closing(socket.create_connection(where, timeout=10)) as client:
            for _ in range(2):  # kept alive
                client.sendall(asks)
                time.sleep(0.1)
                client.sendall(b"\r\n")
                assert b"200 OK" in whole_answer(client)
                time.sleep(0.6)  # idle between two requests: not its headers
            client.sendall(asks)
            assert b"408" in whole_answer(client)
            assert client.recv(1) == b""
        assert hasty.chat("wait 1").status_code == 200
        silent.settimeout(10)
        assert silent.recv(1) == b"", "nobody asked for anything"
        assert hasty.errors("headers_too_late") == 1


def test_feedback_sent_again_is_counted_and_stored_once(gateway: Gateway) -> None:
    target = gateway.chat("hi").headers["x-cltrain-record"]
    given: dict[str, Any] = {"id": "again", "target": target, "score": 1}
    answers = [gateway.http.post("/v1/feedback", json=given).json()["duplicate"] for _ in range(3)]
    assert answers == [False, True, True]
    registry = gateway.app.state.door.metrics.registry
    assert registry.get_sample_value("cltrain_feedback_total", {"outcome": "duplicate"}) == 2
    forged = gateway.http.post("/v1/feedback", json={**given, "score": -1})
    assert forged.status_code == 409
    check_shape(forged.json(), "/v1/feedback")
    assert gateway.errors("conflict") == 1
