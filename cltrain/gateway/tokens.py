"""Token truth: ask the server for the ids and log-probs it used, keep them, show the client what it asked for.

Ids or log-probs that are incomplete or do not line up become None: a guess is never stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from cltrain.errors import BAD_CONTENT
from cltrain.gateway.errors import UpstreamFailure
from cltrain.records import Message

Route = Literal["chat", "completion"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said and, where the server told, with which tokens."""

    message: Message
    finish_reason: str | None = None
    prompt_ids: tuple[int, ...] | None = None
    completion_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the client itself asked for; everything else that we asked for is taken out again."""

    token_ids: bool
    logprobs: bool
    usage: bool  # in a stream

    @staticmethod
    def by(body: dict[str, Any]) -> Wanted:
        options = body.get("stream_options")
        is_asked = body.get("logprobs") not in (None, False)
        return Wanted(
            bool(body.get("return_token_ids")),
            is_asked,
            isinstance(options, dict) and bool(options.get("include_usage")),
        )


def ask(route: Route, body: dict[str, Any], is_sglang: bool = False) -> dict[str, Any]:
    """The client's body plus what token truth needs."""
    asked = {**body, "return_token_ids": True}
    if is_sglang and route == "chat":  # it refuses to stream with return_token_ids
        del asked["return_token_ids"]
        asked |= {"return_input_ids_in_sglext": True, "return_output_ids_in_sglext": True}
    if body.get("logprobs") in (None, False):
        asked["logprobs"] = True if route == "chat" else 1
    if body.get("stream"):
        asked["stream_options"] = {**(body.get("stream_options") or {}), "include_usage": True}
    return asked


def check_model(answer: dict[str, Any], asked: str) -> None:
    """Raise UpstreamFailure when an answer or a chunk is not by the model that was asked."""
    if answer.get("model") != asked:
        message = f"the inference server was asked for {asked} and answered as {str(answer.get('model'))[:100]!r}"
        raise UpstreamFailure(502, message, code="upstream_wrong_model")


def strip(answer: dict[str, Any], wanted: Wanted) -> None:
    """Take out of an answer or a chunk, in place, what the client did not ask for."""
    holders = [answer, *(c for c in answer.get("choices") or [] if isinstance(c, dict))]
    for holder in holders:
        if not wanted.token_ids:
            holder.pop("token_ids", None)
            holder.pop("sglext", None)
            holder.pop("prompt_token_ids", None)
        if not wanted.logprobs and "logprobs" in holder:
            holder["logprobs"] = None


def read_answer(route: Route, answer: dict[str, Any]) -> Answer:
    """The first choice of a whole answer. Raises UpstreamFailure when it has none."""
    collected = Collected(route)
    choices = answer.get("choices")
    for position, choice in enumerate(choices if isinstance(choices, list) else ()):
        if isinstance(choice, dict) and position == 0:
            as_delta = {**choice, "delta": choice.get("message")} if route == "chat" else choice
            collected.add({**answer, "choices": [as_delta]})
    if not collected.has_choice:
        raise UpstreamFailure(502, "the inference server's answer has no choices")
    return collected.answer()


@dataclass
class Collected:
    """The first choice of a stream, put together chunk by chunk."""

    route: Route
    model: str | None = None  # that every chunk must name; None: any
    has_choice: bool = False
    finished: set[int] = field(default_factory=set)
    _texts: list[str] = field(default_factory=list)
    _has_text: bool = False
    _calls: dict[int, dict[str, Any]] = field(default_factory=dict)
    _finish_reason: str | None = None
    _prompt_ids: Any = None
    _ids: list[int] = field(default_factory=list)
    _all_ids: Any = None  # what SGLang's chat tells at once, in a stream at its end
    _logprobs: list[Any] = field(default_factory=list)
    _has_gap: bool = False
    _num_counted: int | None = None  # completion tokens by the server's own count

    def add(self, chunk: dict[str, Any]) -> None:
        """Raises UpstreamFailure for a chunk that is none, or another model's."""
        if self.model is not None:
            check_model(chunk, self.model)
        try:
            self._add(chunk)
        except BAD_CONTENT as error:
            raise UpstreamFailure(502, f"the inference server's answer is malformed: {error}") from None

    def _add(self, chunk: dict[str, Any]) -> None:
        usage = chunk.get("usage")
        if isinstance(usage, dict) and isinstance(usage.get("completion_tokens"), int):
            self._num_counted = usage["completion_tokens"]
        if chunk.get("prompt_token_ids"):
            self._prompt_ids = chunk["prompt_token_ids"]
        if (told := chunk.get("sglext")) is not None:
            self._prompt_ids = told.get("input_ids") or self._prompt_ids
            self._all_ids = (told.get("output_ids") or [None])[0]
        choices = chunk.get("choices") or []
        if not isinstance(choices, list) or not all(isinstance(c, dict) for c in choices):
            raise UpstreamFailure(502, f"the inference server's answer has malformed choices: {str(choices)[:200]}")
        for choice in choices:
            if choice.get("finish_reason") is not None:
                self.finished.add(choice.get("index", 0))
            if choice.get("index", 0) == 0:
                self._add_choice(choice)

    def _add_choice(self, choice: dict[str, Any]) -> None:
        self.has_choice = True
        self._finish_reason = choice.get("finish_reason") or self._finish_reason
        if choice.get("prompt_token_ids"):
            self._prompt_ids = choice["prompt_token_ids"]
        text = choice.get("text")
        calls: list[dict[str, Any]] = []
        if self.route == "chat":
            delta = choice.get("delta")
            if not isinstance(delta, dict):
                raise UpstreamFailure(502, "the inference server's answer has a choice without a message")
            text, calls = delta.get("content"), delta.get("tool_calls") or []
        if isinstance(text, str):
            self._has_text = True
            self._texts.append(text)
        for position, call in enumerate(calls):
            self._add_call(position, call)
        ids = choice.get("token_ids")
        if ids is not None:
            self._ids.extend(ids)
        elif text or calls:
            self._has_gap = True
        self._logprobs.extend(_logprobs_of(choice.get("logprobs")))

    def _add_call(self, position: int, call: dict[str, Any]) -> None:
        index = call.get("index")
        kept = self._calls.setdefault(
            index if isinstance(index, int) else position, {"id": "", "name": "", "arguments": ""}
        )
        function = call.get("function") or {}
        kept["id"] = call.get("id") or kept["id"]
        kept["name"] += function.get("name") or ""
        kept["arguments"] += function.get("arguments") or ""

    def answer(self) -> Answer:
        text = "".join(self._texts)
        is_said = self._has_text and (text != "" or not self._calls)  # a stream opens with empty text before its calls
        message: Message = {"role": "assistant", "content": text if is_said else None}
        if self._calls:
            message["tool_calls"] = [
                {"id": c["id"], "type": "function", "function": {"name": c["name"], "arguments": c["arguments"]}}
                for _, c in sorted(self._calls.items())
            ]
        ids = self._whole_ids()
        logprobs = self._logprobs if ids is not None and _line_up(self._logprobs, ids) else None
        prompt = self._prompt_ids if ids is not None and _are_ids(self._prompt_ids) else None
        return Answer(
            message,
            self._finish_reason,
            None if prompt is None else tuple(prompt),
            None if ids is None else tuple(ids),
            None if logprobs is None else tuple(float(p) for p in logprobs),
        )

    def _whole_ids(self) -> list[int] | None:
        ids = self._all_ids if self._all_ids is not None else None if self._has_gap else self._ids
        if not ids or not _are_ids(ids) or self._num_counted not in (None, len(ids)):
            return None
        return list(ids)


def _logprobs_of(given: Any) -> Sequence[Any]:
    if not isinstance(given, dict):
        return ()
    if isinstance(given.get("content"), list):
        return [entry.get("logprob") for entry in given["content"]]
    return given.get("token_logprobs") or ()


def _are_ids(ids: Any) -> bool:
    return isinstance(ids, list) and all(isinstance(i, int) and i >= 0 for i in ids)


def _line_up(logprobs: Sequence[Any], ids: Sequence[int]) -> bool:
    return len(logprobs) == len(ids) and all(isinstance(p, int | float) and math.isfinite(p) for p in logprobs)
