"""What goes wrong between a client and its answer: the HTTP status, and the body in the shape of the API asked."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from cltrain.errors import CltrainError

ANTHROPIC_PATH = "/v1/messages"
ANTHROPIC_KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 504: "timeout_error",
}  # fmt: skip
CODES = {400: "invalid_request", 409: "conflict", 413: "body_too_large", 499: "client_left", 503: "unavailable"}
RETRY_AFTER_S = {429: "1", 503: "1"}


TRACE = "Traceback (most recent call last)"


class Refusal(CltrainError):
    """A request that gets an error answer. `body` replaces the usual OpenAI error object when given. A trace that the
    inference server sent is cut off: where it failed is for its own log to say."""

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
        said, trace, _ = message.partition(TRACE)
        message = f"{said}(its log says where)" if trace else message
        super().__init__(message)
        self.status = status
        self.body = body or {"error": {"message": message, "type": kind, "param": param, "code": code}}
        # what it is counted as
        self.code = (
            CODES[499] if status == 499 else code or ("upstream_refused" if body else CODES.get(status, "other"))
        )


class UpstreamFailure(Refusal):
    """Nothing usable came from the inference server. `end` is what the episode's turn becomes: never a reward."""

    def __init__(self, status: int, message: str, *, end: str = "aborted", code: str = "upstream_error") -> None:
        super().__init__(status, message, kind="api_error", code=code)
        self.end = end


class ClientLeft(UpstreamFailure):
    """The client hung up first: missing data, and no fault of whoever was answering."""

    def __init__(self, message: str) -> None:
        super().__init__(499, message, end="left")


class NotAnswered(UpstreamFailure):
    """The connection failed before a byte of an answer came: asking another replica is safe."""


class NotSent(NotAnswered):
    """Not even the request was sent."""


def unknown_model(name: str, agent: str, why: str = "does not exist") -> Refusal:
    message = f"The model `{name}` {why}: use `{agent}` or a release that GET /v1/models lists"
    return Refusal(404, message, code="model_not_found", param="model")


def anthropic_body(error: Refusal) -> dict[str, Any]:
    """The same as Anthropic's API says it."""
    kind = ANTHROPIC_KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": str(error)}}


def error_response(error: Refusal, path: str) -> JSONResponse:
    """The answer in the shape of the API that `path` belongs to."""
    is_anthropic = path == ANTHROPIC_PATH or path.startswith(f"{ANTHROPIC_PATH}/")
    headers = {"x-cltrain-recorded": "0"}
    if error.status in RETRY_AFTER_S:
        headers["retry-after"] = RETRY_AFTER_S[error.status]
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(anthropic_body(error) if is_anthropic else error.body, error.status, headers=headers)
