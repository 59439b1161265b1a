"""A request and its answer, as a client logs them that asked the inference server itself, in the importer's form.

{"request": {"model", "messages", "tools"?}, "response": what the chat API answered, "session"?, "principal"?,
"reward"?}
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Told:
    """What the answer says of itself beside its message. Ids and log-probs are None where they are not whole."""

    model: str
    prompt_ids: tuple[int, ...] | None
    completion_ids: tuple[int, ...] | None
    logprobs: tuple[float, ...] | None
    finish_reason: str | None


def unfold(line: dict[str, Any]) -> tuple[dict[str, Any], Told]:
    """The line in the importer's usual form, and what the answer told. Raises ValueError saying what is wrong.

    Without `session` all requests of one conversation share one: that of its messages up to the first of a user.
    """
    asked, answer = line["request"], line.get("response")
    if not isinstance(asked, dict) or not isinstance(answer, dict):
        raise ValueError("`request` and `response` are not both objects")
    choices, messages = answer.get("choices"), asked.get("messages")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise ValueError("`response` does not have exactly one choice")
    if not isinstance(choices[0].get("message"), dict) or not isinstance(messages, list) or not messages:
        raise ValueError("`request` has no messages, or `response` no message")
    if not isinstance(answer.get("model"), str) or answer["model"] != asked.get("model"):
        raise ValueError(f"asked {asked.get('model')!r} and was answered by {answer.get('model')!r}")
    said: dict[str, Any] = {
        k: v
        for k, v in choices[0]["message"].items()
        if k in ("role", "content", "tool_calls") and (v or k != "tool_calls")
    }
    rest: dict[str, Any] = {k: line[k] for k in ("principal", "reward", "score") if k in line}
    unfolded: dict[str, Any] = {
        **rest,
        "id": line.get("id", answer.get("id")),
        "session": line.get("session") or _conversation(messages),
        "messages": [*messages, said],
        "tools": asked.get("tools"),
        "model": answer["model"],
    }
    if "created_at" in line or isinstance(answer.get("created"), int):
        unfolded["created_at"] = line.get("created_at", answer.get("created"))
    return unfolded, _told(answer, choices[0])


def _conversation(messages: list[Any]) -> str:
    first = next((i for i, m in enumerate(messages) if isinstance(m, dict) and m.get("role") == "user"), 0)
    text = json.dumps(messages[: first + 1], sort_keys=True)
    return f"import-{hashlib.sha256(text.encode()).hexdigest()[:24]}"


def _told(answer: dict[str, Any], choice: dict[str, Any]) -> Told:
    ids = _ids(choice.get("token_ids"))
    content = choice["logprobs"].get("content") if isinstance(choice.get("logprobs"), dict) else None
    entries = content if isinstance(content, list) else []
    scores: list[Any] = [entry.get("logprob") if isinstance(entry, dict) else None for entry in entries]
    are_whole = ids is not None and len(scores) == len(ids)
    if not are_whole or not all(isinstance(s, int | float) and abs(s) <= sys.float_info.max for s in scores):
        scores = []
    reason = choice.get("finish_reason")
    return Told(
        model=answer["model"],
        prompt_ids=None if ids is None else _ids(answer.get("prompt_token_ids")),
        completion_ids=ids,
        logprobs=tuple(float(score) for score in scores) or None,
        finish_reason=reason if isinstance(reason, str) else None,
    )


def _ids(value: Any) -> tuple[int, ...] | None:
    are_ids = isinstance(value, list) and bool(value) and all(type(i) is int and i >= 0 for i in value)
    return tuple(value) if are_ids else None
