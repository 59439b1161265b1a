"""What reaches no route: bytes that are no HTTP, and headers without end. They too are answered in the API's own shape,
and counted.
"""

from __future__ import annotations

from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cltrain.gateway.errors import Refusal, error_response

MAX_HEAD_BYTES = 2**16  # of headers that are still coming; what comes at once is read as it is


class Http(HttpToolsProtocol):
    """uvicorn's protocol, for an app of `create_gateway`."""

    _num_head_bytes: int | None = None  # None: no headers are awaited

    def data_received(self, data: bytes) -> None:
        before = self._num_head_bytes
        super().data_received(data)
        if before is None or self._num_head_bytes is None or self.transport.is_closing():
            return
        self._num_head_bytes = before + len(data)
        if self._num_head_bytes > MAX_HEAD_BYTES:
            self._refuse(Refusal(431, f"the headers are longer than {MAX_HEAD_BYTES} bytes", code="headers_too_long"))

    def on_message_begin(self) -> None:
        self._num_head_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._num_head_bytes = None
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(Refusal(400, msg, code="no_http"))

    def _refuse(self, error: Refusal) -> None:
        self.config.app.state.door.metrics.errors.labels(error.code).inc()  # type: ignore[union-attr]
        answer = error_response(error, path="")
        headers = [name + b": " + value for name, value in (*answer.raw_headers, (b"connection", b"close"))]
        status = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}".encode()
        self.transport.write(b"\r\n".join([status, *headers, b"", bytes(answer.body)]))
        self.transport.close()
