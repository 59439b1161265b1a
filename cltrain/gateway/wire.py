"""What reaches no route: bytes that are no HTTP, headers that are too long or never end. They too are answered in the
API's own shape, and counted.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cltrain.gateway.errors import Refusal, error_response

MAX_HEAD_BYTES = 2**16  # of the request's address and headers
TOO_LONG = Refusal(431, f"the headers are longer than {MAX_HEAD_BYTES} bytes", code="headers_too_long")
TOO_LATE = Refusal(408, "the headers did not end in time", code="headers_too_late")


class Http(HttpToolsProtocol):
    """uvicorn's protocol, for an app of `create_gateway`."""

    head_timeout_s = 30.0  # from the first byte of a request, or the connection's beginning, to the end of its headers
    _num_head_bytes: int | None = None  # None: no headers are awaited
    _is_too_long = False
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before = self._num_head_bytes
        super().data_received(data)
        if before is None or self._num_head_bytes is None or self.transport.is_closing():
            return
        self._num_head_bytes = before + len(data)
        if self._num_head_bytes > MAX_HEAD_BYTES:
            self._refuse(TOO_LONG)

    def on_message_begin(self) -> None:
        self._num_head_bytes = 0
        super().on_message_begin()
        self._wait_for_head()

    def on_headers_complete(self) -> None:
        self._num_head_bytes = None
        self._stop_waiting()
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > MAX_HEAD_BYTES:
            self._is_too_long = True
            raise ValueError("too long")  # the parser stops, and `send_400_response` is called
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(TOO_LONG if self._is_too_long else Refusal(400, msg, code="no_http"))

    def _wait_for_head(self) -> None:
        self._stop_waiting()
        self._late = self.loop.call_later(self.head_timeout_s, self._is_late)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _is_late(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._wait_for_head()  # the request before is still being answered
        elif self._num_head_bytes is None:
            self.transport.close()  # nobody asked for anything
        else:
            self._refuse(TOO_LATE)

    def _refuse(self, error: Refusal) -> None:
        self.config.app.state.door.metrics.errors.labels(error.code).inc()  # type: ignore[union-attr]
        answer = error_response(error, path="")
        headers = [name + b": " + value for name, value in (*answer.raw_headers, (b"connection", b"close"))]
        status = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}".encode()
        self.transport.write(b"\r\n".join([status, *headers, b"", bytes(answer.body)]))
        self.transport.close()
