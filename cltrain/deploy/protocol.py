"""What the embedded server accepts, in OpenAI's and vLLM's words, and how it says no. Imports no torch.

Unknown fields are ignored as vLLM does; a known one that we cannot honour is an error, never silently dropped.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

MAX_TOP = 20


class ApiError(Exception):
    """Answered as `{"error": {"message", "type", "param", "code"}}` with this status."""

    def __init__(self, status: int, message: str, kind: str = "BadRequestError", param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": status}}


class Body(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=False)


class StreamOptions(Body):
    include_usage: bool = False


class Generate(Body):
    """What chat and completions have in common."""

    model: str
    temperature: float | None = Field(None, ge=0, allow_inf_nan=False)  # None: 1.0, OpenAI's default
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    n: int = Field(1, ge=1, le=16)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_TOP)
    return_token_ids: bool = False
    ignore_eos: bool = False
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    @model_validator(mode="after")
    def _refuse_what_is_not_built(self) -> Generate:
        if self.frequency_penalty or self.presence_penalty or self.logit_bias:
            raise ValueError("frequency_penalty, presence_penalty and logit_bias are not supported by this server")
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs are not available when stream=True")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return tuple(s for s in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if s)


class ChatBody(Generate):
    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    max_tokens: int | None = Field(None, ge=1, strict=True)
    max_completion_tokens: int | None = Field(None, ge=1, strict=True)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP)
    response_format: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _refuse_formats(self) -> ChatBody:
        if self.response_format and self.response_format.get("type") != "text":
            raise ValueError("response_format: this server answers plain text only")
        if other := next((tool for tool in self.tools or () if not isinstance(tool.get("function"), dict)), None):
            raise ValueError(f"tools: this server knows functions only; got type {other.get('type')!r}")
        return self


class CompletionBody(Generate):
    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(16, ge=1, strict=True)
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP)
    echo: Literal[False] = False
    suffix: None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[int(token) for token in self.prompt if isinstance(token, int)]]
        return [one for one in self.prompt if not isinstance(one, int)]


class LoadBody(Body):
    lora_name: str = Field(min_length=1)
    lora_path: str = Field(min_length=1)
    load_inplace: Literal[False] = False  # three ways to serve mixed weights in vLLM; here it does not exist


class UnloadBody(Body):
    lora_name: str = Field(min_length=1)


BodyT = TypeVar("BodyT", bound=Body)


def parse(kind: type[BodyT], raw: bytes) -> BodyT:
    """Raises ApiError 400 naming the field."""
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        problems = error.errors()
        first = problems[0]
        where = ".".join(str(part) for part in first["loc"] if part not in ("str", "int"))
        raise ApiError(400, f"{where}: {first['msg']}" if where else str(first["msg"]), param=where or None) from None
