"""Checks what clients send and turns it into our nouns; every refusal names the field, the value and what is right."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cltrain.config_tenants import shared_of
from cltrain.errors import DataError
from cltrain.experience.examples import OURS, SOURCE_RANK, score_of_reward
from cltrain.experience.rows import BRANCH, TOLD
from cltrain.experience.strict_json import is_unicode, loads
from cltrain.experience.verify import tool_fault
from cltrain.gateway.episodes import producer_of
from cltrain.gateway.errors import Refusal
from cltrain.gateway.keys import Key
from cltrain.records import Feedback, Message, Trajectory

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
TRUSTED = ("verifier", "operator")  # sources that are believed first
UNSAFE = (
    "prompt_embeds", "chat_template", "mm_processor_kwargs", "media_io_kwargs", "kv_transfer_params",
    # SGLang: another adapter, another prompt, code, another process
    "lora_path", "input_ids", "custom_logit_processor", "session_params", "rid", "bootstrap_host", "bootstrap_port",
    "bootstrap_room", "routed_dp_rank", "data_parallel_rank",
)  # fmt: skip
MAX_NAME = 256
TRUE = frozenset({"1", "true", "yes"})


def parse(raw: bytes, what: str = "the body") -> dict[str, Any]:
    """A JSON object. Raises DataError saying where it stops being one."""
    try:
        value = loads(raw)
    except ValueError as error:
        raise DataError(f"{what} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{what} must be a JSON object; got {type(value).__name__}")
    return value


def name_of(value: Any, what: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME:
        raise DataError(f"{what} must be a string of 1 to {MAX_NAME} characters; got {_shown(value)}")
    if not is_unicode(value) or "\0" in value:
        raise DataError(f"{what} is not valid Unicode or holds a NUL: {_shown(value)}")
    return value


def principal_of(headers: Mapping[str, str], body: dict[str, Any], key: Key | None) -> str:
    """The key's; without keys header X-Cltrain-Principal, else the `user` field, else anonymous. Raises Refusal 403."""
    named = headers.get("x-cltrain-principal")
    if key is not None:
        return _own(key, named)
    return name_of(named or body.get("user") or "anonymous", "the principal")


def _own(key: Key, named: Any) -> str:
    if named not in (None, key.principal):
        message = f"this key speaks for {key.principal!r}, not for {_shown(named)}"
        raise Refusal(403, message, code="wrong_principal", param="principal")
    return key.principal


def _check_source(key: Key | None, source: str, guarded: tuple[str, ...] = TRUSTED) -> None:
    if key is not None and source in guarded and "admin" not in key.scopes:
        message = f"feedback from source {source!r} is believed before others': its key needs the scope 'admin'"
        raise Refusal(403, message, code="insufficient_scope", param="source")


def judges_only(key: Key | None) -> str | None:
    """Whose records the key may judge: its own principal's. None, everybody's: with scope admin, or without keys."""
    return None if key is None or "admin" in key.scopes else key.principal


def session_of(headers: Mapping[str, str]) -> str | None:
    given = headers.get("x-session-id")
    return None if given is None else name_of(given, "X-Session-Id")


def is_done(headers: Mapping[str, str]) -> bool:
    return headers.get("x-session-done", "").strip().lower() in TRUE


def chat_messages(body: dict[str, Any]) -> tuple[Message, ...]:
    """The messages of a chat request, shape checked. Raises DataError."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError(f"messages must be a non-empty list; got {_shown(messages)}")
    for position, message in enumerate(messages):
        where = f"messages[{position}]"
        if not isinstance(message, dict):
            raise DataError(f"{where} must be an object; got {_shown(message)}")
        if message.get("role") not in ROLES:
            raise DataError(f"{where}.role must be one of {', '.join(ROLES)}; got {_shown(message.get('role'))}")
        if not isinstance(message.get("content"), str | list | None):
            raise DataError(f"{where}.content must be a string, a list of parts or null")
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list) or not all(isinstance(c, dict) and _function(c) is not None for c in calls):
            raise DataError(f"{where}.tool_calls must be a list of {{id, type, function: {{name, arguments}}}}")
    return tuple(messages)


def check_options(body: dict[str, Any]) -> None:
    """Raise DataError for an option that we read ourselves and that is not what it must be, and for one by which a
    client would hand tensors, templates or addresses to the server (vLLM CVE-2025-62164 is the first)."""
    if unsafe := [name for name in UNSAFE if body.get(name) is not None]:
        raise DataError(f"{unsafe[0]} is not taken here: it reaches into the inference server")
    kwargs = body.get("chat_template_kwargs")
    if kwargs is not None and (not isinstance(kwargs, dict) or "chat_template" in kwargs):
        raise DataError(f"chat_template_kwargs must be an object without chat_template; got {_shown(kwargs)}")
    for name, least in {"n": 1, "max_tokens": 0, "max_completion_tokens": 0}.items():
        value = body.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise DataError(f"{name} must be a whole number of at least {least}; got {_shown(value)}")
    if not isinstance(body.get("stream_options"), dict | None):
        raise DataError(f"stream_options must be an object; got {_shown(body['stream_options'])}")


def tools_of(body: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """Function definitions, and tools of other types: the server knows whether it has those. Raises DataError."""
    tools = body.get("tools") or []
    if not isinstance(tools, list):
        raise DataError(f"tools must be a list of objects; got {_shown(tools)}")
    for position, tool in enumerate(tools):
        kind = tool.get("type") if isinstance(tool, dict) and "function" not in tool else None
        is_built_in = isinstance(kind, str) and kind not in ("", "function")
        if not is_built_in and (fault := tool_fault(tool)):
            raise DataError(f"tools[{position}] {fault}; got {_shown(tool)}")
    return tuple(tools)


def unrecordable(route: str, body: dict[str, Any]) -> str | None:
    """Why this request's answer cannot be one turn of an episode, or None."""
    if body.get("n") not in (None, 1):
        return "several choices"
    if route == "completion" and (body.get("echo") or body.get("best_of") not in (None, 1)):
        return "echo or best_of"
    if route == "completion" and isinstance(body.get("prompt"), list) and not _are_ids(body["prompt"]):
        return "several prompts"
    return None


def completion_messages(body: dict[str, Any]) -> tuple[Message, ...]:
    """A raw prompt as one user message; its text is None where the client sent token ids."""
    prompt = body.get("prompt")
    if not isinstance(prompt, str | list) or not prompt:
        raise DataError(f"prompt must be a non-empty string or list; got {_shown(prompt)}")
    return ({"role": "user", "content": prompt if isinstance(prompt, str) else None},)


def feedback_of(
    body: dict[str, Any],
    headers: Mapping[str, str],
    fresh_id: str,
    now: float,
    key: Key | None,
    learn_from: Sequence[str] = (),
) -> Feedback:
    """Raises DataError for anything that is not feedback or never counts (scores of those who may not judge, words of
    those who are not in `learn_from` either), Refusal 403 for what the key may not say."""
    known = {"target", "id", "score", "text", "correction", "source", "principal"}
    if unknown := sorted(set(body) - known):
        raise DataError(f"feedback has no field {unknown[0]!r}; it has {', '.join(sorted(known))}")
    score = None if body.get("score") is None else score_of(body["score"], "score")
    text = body.get("text")
    if text is not None and not (isinstance(text, str) and is_unicode(text)):
        raise DataError(f"text must be a string of valid Unicode; got {_shown(text)}")
    correction = None if body.get("correction") is None else correction_of(body["correction"])
    if score is None and text is None and correction is None:
        raise DataError("feedback needs a score, a text or a correction")
    principal = body.get("principal") or headers.get("x-cltrain-principal")
    if key is not None:
        principal = _own(key, principal)
    given = name_of(body.get("id") or fresh_id, "id")
    if given.endswith(tuple(f":{name}" for name in TOLD)):
        raise DataError(f"id {_shown(given)} is of the form that feedback has which comes with an episode: use another")
    has_words = text is not None or correction is not None
    source = source_of(body, "user", [name for name in learn_from if has_words and name not in OURS])
    _check_source(key, source, (*TRUSTED, "import"))  # what is imported brings its own; here it would overrule users
    return Feedback(
        id=given,
        target=name_of(body.get("target"), "target"),
        score=score,
        text=text,
        correction=correction,
        source=source,
        principal=None if principal is None else name_of(principal, "principal"),
        created_at=now,
    )


def source_of(body: dict[str, Any], default: str, also: Sequence[str] = ()) -> str:
    """Who says so. Raises DataError for whom nobody would believe."""
    source = name_of(body.get("source") or default, "source")
    counting = (*SOURCE_RANK, *also)
    if source not in counting:
        raise DataError(f"source {_shown(source)} never counts; these do: {', '.join(counting)}")
    return source


def score_of(value: Any, what: str, least: int = -1) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{what} must be a number in [{least}, 1]; got {_shown(value)}")
    if not least <= value <= 1:  # false for NaN as well
        raise DataError(f"{what} must be a finite number in [{least}, 1]; got {_shown(value)}")
    return float(value)


def correction_of(value: Any) -> Message:
    """A corrected answer (text, or an assistant message) as one assistant message. Raises DataError."""
    if isinstance(value, str):
        value = {"content": value}
    if not isinstance(value, dict):
        raise DataError(f"correction must be a string or an assistant message; got {_shown(value)}")
    if value.get("role", "assistant") != "assistant":
        raise DataError(f"correction.role must be 'assistant'; got {_shown(value['role'])}")
    content, calls = value.get("content"), value.get("tool_calls") or []
    if content is not None and not (isinstance(content, str) and is_unicode(content)):
        raise DataError(f"correction.content must be a string of valid Unicode or null; got {_shown(content)}")
    if not isinstance(calls, list):
        raise DataError(f"correction.tool_calls must be a list; got {_shown(calls)}")
    if not (content or "").strip() and not calls:
        raise DataError("correction is empty: it needs content or tool_calls")
    message: Message = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = [call_of(call, i, "correction") for i, call in enumerate(calls)]
    return message


def call_of(call: Any, position: int, where: str) -> dict[str, Any]:
    """One tool call in OpenAI's form, its arguments a JSON object as a string. Raises DataError."""
    what = f"{where}.tool_calls[{position}]"
    function = _function(call) if isinstance(call, dict) else None
    if function is None:
        raise DataError(f"{what} must be {{function: {{name, arguments}}}}; got {_shown(call)}")
    arguments = function.get("arguments")
    try:
        parsed = loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError as error:
        raise DataError(
            f"{what}: the arguments of {function['name']!r} are no JSON ({error}): {_shown(arguments)}"
        ) from None
    if not isinstance(parsed, dict):
        raise DataError(f"{what}: the arguments of {function['name']!r} must be a JSON object; got {_shown(arguments)}")
    text = arguments if isinstance(arguments, str) else json.dumps(parsed)
    call_id = call.get("id") if isinstance(call.get("id"), str) else f"call_{position}"
    if not is_unicode([call_id, function["name"], parsed]):
        raise DataError(f"{what} is not valid Unicode: {_shown(call)}")
    return {"id": call_id, "type": "function", "function": {"name": function["name"], "arguments": text}}


def trajectory_of(body: dict[str, Any], agent: str, now: float, key: Key | None) -> Trajectory:
    """An episode that happened elsewhere. Its assistant turns have the body's `model` as producer, else nobody known.

    Raises DataError: no id, malformed messages, no answer, arguments that are no JSON, a `reward` out of [0, 1] or a
    `score` out of [-1, 1]; Refusal 403 for what the key may not say.
    """
    if not is_unicode(body):
        raise DataError("the episode is not valid Unicode: a string in it holds half a surrogate pair")
    given = name_of(body.get("id"), "id")
    if BRANCH.match(given):
        raise DataError(f"id {_shown(given)} is of the form that a branch of a recorded episode has: use another")
    if body.get("agent", agent) not in (agent, shared_of(agent)):
        raise DataError(f"agent {_shown(body['agent'])} is not served here; this gateway records {agent!r}")
    model = None if body.get("model") is None else name_of(body["model"], "model")
    if model in OURS:
        raise DataError(f"model {model!r} is a producer that only this deployment itself may be")
    messages = []
    for position, message in enumerate(chat_messages(body)):
        calls = message.get("tool_calls") or []
        checked = [call_of(call, i, f"messages[{position}]") for i, call in enumerate(calls)]
        messages.append({**message, "tool_calls": checked} if checked else message)
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError("messages hold no answer of the assistant: there is nothing to learn from")
    said: tuple[Feedback, ...] = ()
    named = body.get("principal")
    principal = name_of(named or "anonymous", "principal") if key is None else _own(key, named)
    what = "reward" if body.get("reward") is not None else "score"
    if body.get(what) is not None:
        source = source_of(body, "import")
        _check_source(key, source)
        score = score_of(body[what], what, least=0 if what == "reward" else -1)
        score = score_of_reward(score) if what == "reward" else score
        said = (Feedback(f"{given}:reward", given, score, source=source, principal=principal, created_at=now),)
    return Trajectory(
        id=given,
        agent=agent,
        session=name_of(body.get("session") or given, "session"),
        principal=principal,
        messages=tuple(messages),
        producers=tuple(model if m["role"] == "assistant" else producer_of(m) for m in messages),
        tools=tools_of(body),
        feedback=said,
        created_at=now,
    )


def lines_of(raw: bytes) -> list[tuple[int, bytes]]:
    """(line number from 1, line) of every line that holds something."""
    return [(i, line) for i, line in enumerate(raw.split(b"\n"), start=1) if line.strip()]


def _function(call: dict[str, Any]) -> dict[str, Any] | None:
    function = call.get("function", call)
    return (
        function if isinstance(function, dict) and isinstance(function.get("name"), str) and function["name"] else None
    )


def _are_ids(prompt: list[Any]) -> bool:
    return all(isinstance(i, int) for i in prompt)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
