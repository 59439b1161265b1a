"""HTTP as uvicorn reads it; but what is no HTTP, or has a head without end, gets the API's error and is counted."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from cltrain.gateway.errors import Refusal, error_response
from cltrain.gateway.metrics import Metrics

MAX_HEAD_BYTES = 64 * 2**10  # of a request before its body: as much as uvicorn's other parser takes


def protocol(metrics: Metrics) -> type[HttpToolsProtocol]:
    """What `uvicorn.Config` takes as `http`."""

    class Protocol(HttpToolsProtocol):
        is_in_head = True
        num_head_bytes = 0

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self.is_in_head, self.num_head_bytes = True, 0

        def on_headers_complete(self) -> None:
            super().on_headers_complete()
            self.is_in_head = False

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.num_head_bytes += len(data) if self.is_in_head else 0
            if self.num_head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response(f"The request's headers are longer than {MAX_HEAD_BYTES} bytes.")

        def send_400_response(self, msg: str) -> None:
            refusal = Refusal(400, msg, code="no_http")
            metrics.errors.labels(refusal.code).inc()
            answer = error_response(refusal, "")  # nobody knows which API was meant
            head = [name + b": " + value + b"\r\n" for name, value in answer.raw_headers]
            self.transport.write(b"".join([STATUS_LINE[400], *head, b"connection: close\r\n\r\n", bytes(answer.body)]))
            self.transport.close()

    return Protocol
