"""What goes wrong between a client and its answer, each with the HTTP status and the OpenAI-style body it becomes."""

from __future__ import annotations

from typing import Any

from cltrain.errors import CltrainError


class Refusal(CltrainError):
    """A request that gets an error answer. `body` replaces the usual OpenAI error object when given."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        body: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = body or {"error": {"message": message, "type": kind, "param": param, "code": code}}


class UpstreamFailure(Refusal):
    """Nothing usable came from the inference server. `end` is what the episode's turn becomes: never a reward."""

    def __init__(self, status: int, message: str, *, end: str = "aborted", code: str = "upstream_error") -> None:
        super().__init__(status, message, kind="api_error", code=code)
        self.end = end


class NotAnswered(UpstreamFailure):
    """The connection failed before a byte of an answer came: asking another replica is safe."""


def unknown_model(name: str, agent: str, why: str = "does not exist") -> Refusal:
    message = f"The model `{name}` {why}: use `{agent}` or a release that GET /v1/models lists"
    return Refusal(404, message, code="model_not_found", param="model")
