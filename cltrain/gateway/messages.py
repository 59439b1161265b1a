"""Anthropic's Messages API in front of the chat path: a request becomes a chat, its answer a message, recorded alike.

Text, tools and tool results only. What is not served (images, documents, thinking, tools that Anthropic would run) is
refused, never dropped; `cache_control` is a hint and ignored.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cltrain.errors import DataError
from cltrain.gateway import bodies
from cltrain.gateway.chat import Door, read_body
from cltrain.gateway.errors import Refusal, anthropic_body
from cltrain.gateway.streaming import EventStream, data_of, event_blocks
from cltrain.records import Message

SAME = ("model", "max_tokens", "temperature", "top_p", "top_k", "stream")  # called the same in both APIs
KNOWN = {
    *SAME, "messages", "system", "tools", "tool_choice", "stop_sequences", "metadata", "thinking", "service_tier",
}  # fmt: skip
CHOICES = {"auto": "auto", "any": "required", "none": "none"}
STOPS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}


async def take_message(door: Door, request: Request) -> Response:
    """Answer one POST /v1/messages. Raises DataError for what is not served, Refusal as a chat does."""
    body = bodies.parse(await read_body(request))
    response = await door.answer("chat", chat_of(body), request)
    if isinstance(response, EventStream):
        return response.translated(events_of)
    headers = {name: value for name, value in response.headers.items() if name.startswith("x-cltrain-")}
    return JSONResponse(message_of(json.loads(bytes(response.body))), headers=headers)


# ------------------------------------------------------------ the request


def chat_of(body: dict[str, Any]) -> dict[str, Any]:
    """The body of a chat request that says the same. Raises DataError naming what cannot be said."""
    if unknown := sorted(set(body) - KNOWN):
        raise DataError(f"{unknown[0]}: is not served here; known are {', '.join(sorted(KNOWN))}")
    if body.get("max_tokens") is None:
        raise DataError("max_tokens: is required")
    thinking = body.get("thinking")
    if thinking is not None and (not isinstance(thinking, dict) or thinking.get("type") != "disabled"):
        raise DataError("thinking: is not served here")
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        raise DataError("messages: must be a non-empty list")
    messages: list[Message] = []
    if body.get("system"):
        messages.append({"role": "system", "content": _text(body["system"], "system")})
    for position, message in enumerate(given):
        messages += _messages(message, f"messages.{position}")
    chat = {name: body[name] for name in SAME if body.get(name) is not None}
    chat["messages"] = messages
    if body.get("stream"):
        chat["stream_options"] = {"include_usage": True}
    stops = body.get("stop_sequences") or []
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise DataError("stop_sequences: must be a list of strings")
    if stops:
        chat["stop"] = stops
    if body.get("tools"):
        chat["tools"] = _tools(body["tools"])
    if body.get("tool_choice") is not None:
        chat |= _choice(body["tool_choice"])
    metadata = body.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise DataError("metadata: must be an object")
    return {**chat, "user": metadata["user_id"]} if metadata.get("user_id") is not None else chat


def _messages(message: Any, where: str) -> list[Message]:
    """One message as those of a chat: every tool result is one of its own, before what the user says beside it."""
    if not isinstance(message, dict) or message.get("role") not in ("user", "assistant"):
        raise DataError(f"{where}: must be an object whose role is user or assistant")
    content = message.get("content")
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        raise DataError(f"{where}.content: must be a string or a list of blocks")
    texts: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    results: list[Message] = []
    for position, block in enumerate(blocks):
        at, kind = f"{where}.content.{position}", block.get("type")
        if kind == "text":
            texts.append(_text_block(block, at))
        elif kind == "tool_use" and message["role"] == "assistant":
            calls.append(_call(block, at))
        elif kind == "tool_result" and message["role"] == "user":
            results.append(_result(block, at))
        else:
            raise DataError(f"{at}: a block of type {str(kind)[:40]!r} is not served here (role {message['role']})")
    if calls:
        return [{"role": "assistant", "content": _joined(texts) if texts else None, "tool_calls": calls}]
    said: list[Message] = [{"role": message["role"], "content": _joined(texts)}] if texts or not results else []
    return [*results, *said]


def _joined(texts: list[dict[str, Any]]) -> Any:
    """One text as a string, as most clients of a chat send it; several stay apart."""
    return texts[0]["text"] if len(texts) == 1 else (texts or "")


def _text_block(block: Any, where: str) -> dict[str, Any]:
    if not isinstance(block, dict) or block.get("type") != "text" or not isinstance(block.get("text"), str):
        raise DataError(f"{where}: must be a block {{type: text, text: ...}}")
    return {"type": "text", "text": block["text"]}


def _text(value: Any, where: str) -> Any:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise DataError(f"{where}: must be a string or a list of text blocks")
    return _joined([_text_block(block, f"{where}.{i}") for i, block in enumerate(value)])


def _call(block: dict[str, Any], where: str) -> dict[str, Any]:
    name, call_id, given = block.get("name"), block.get("id"), block.get("input")
    if not isinstance(name, str) or not name or not isinstance(call_id, str) or not isinstance(given, dict):
        raise DataError(f"{where}: tool_use needs an id, a name and an input object")
    is_unparsed = given.keys() == {"unparsed"} and isinstance(given["unparsed"], str)  # as `_input` had shown it
    arguments = given["unparsed"] if is_unparsed else json.dumps(given)
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _result(block: dict[str, Any], where: str) -> Message:
    if not isinstance(block.get("tool_use_id"), str):
        raise DataError(f"{where}.tool_use_id: must be a string")
    content = block.get("content")
    text = "" if content is None else _text(content, f"{where}.content")
    if not text and block.get("is_error"):
        text = "error"
    return {"role": "tool", "tool_call_id": block["tool_use_id"], "content": text}


def _tools(tools: Any) -> list[dict[str, Any]]:
    if not isinstance(tools, list):
        raise DataError("tools: must be a list")
    found = []
    for position, tool in enumerate(tools):
        if not isinstance(tool, dict) or tool.get("type") not in (None, "custom"):
            raise DataError(f"tools.{position}: only tools that the client runs are served here")
        if not isinstance(tool.get("input_schema"), dict):
            raise DataError(f"tools.{position}.input_schema: must be a JSON schema")
        function = {"name": tool.get("name"), "parameters": tool["input_schema"]}
        if tool.get("description") is not None:
            function["description"] = tool["description"]
        found.append({"type": "function", "function": function})
    return found


def _choice(choice: Any) -> dict[str, Any]:
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind == "tool" and isinstance(choice.get("name"), str):
        chosen: dict[str, Any] = {"tool_choice": {"type": "function", "function": {"name": choice["name"]}}}
    elif kind in CHOICES:
        chosen = {"tool_choice": CHOICES[kind]}
    else:
        raise DataError("tool_choice: must be {type: auto, any or none} or {type: tool, name: ...}")
    return {**chosen, "parallel_tool_calls": False} if choice.get("disable_parallel_tool_use") else chosen


# ------------------------------------------------------------ the answer


def message_of(answer: dict[str, Any]) -> dict[str, Any]:
    """A whole chat answer as a message."""
    choice = answer["choices"][0]
    said = choice["message"]
    text = said.get("content")
    content: list[dict[str, Any]] = [{"type": "text", "text": text}] if isinstance(text, str) and text else []
    for call in said.get("tool_calls") or []:
        function = call.get("function") or {}
        given = _input(function.get("arguments") or "{}")
        content.append({"type": "tool_use", "id": call.get("id"), "name": function.get("name"), "input": given})
    stop = _stop(choice, bool(said.get("tool_calls")))
    return {**_head(answer["model"]), "content": content, **stop, "usage": _usage(answer.get("usage"))}


def _head(model: str) -> dict[str, Any]:
    return {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "model": model}


def _input(arguments: str) -> dict[str, Any]:
    """What the model gave a tool. What is no JSON object is shown as it is: the tool refuses it, and the agent sees."""
    try:
        given = json.loads(arguments)
    except ValueError:
        given = None
    return given if isinstance(given, dict) else {"unparsed": arguments}


def _stop(choice: dict[str, Any], is_call: bool) -> dict[str, Any]:
    """`is_call`: the answer calls a tool; a server says "stop" after a call that was asked for by name."""
    reason, matched = STOPS.get(choice.get("finish_reason") or "stop", "end_turn"), choice.get("stop_reason")
    if reason == "end_turn" and is_call:
        return {"stop_reason": "tool_use", "stop_sequence": None}
    if reason == "end_turn" and isinstance(matched, str):  # vLLM names the stop sequence that it met
        return {"stop_reason": "stop_sequence", "stop_sequence": matched}
    return {"stop_reason": reason, "stop_sequence": None}


def _usage(usage: Any) -> dict[str, int]:
    counted = usage if isinstance(usage, dict) else {}
    return {"input_tokens": counted.get("prompt_tokens") or 0, "output_tokens": counted.get("completion_tokens") or 0}


async def events_of(chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """Anthropic's events for those of a chat. The last but one carries {"cltrain": ...} as a chat's last chunk does."""
    blocks = _Blocks()
    stop: dict[str, Any] = {"stop_reason": None, "stop_sequence": None}
    usage: Any = None
    recorded: dict[str, Any] = {}
    is_begun = False
    async for block in event_blocks(chunks):
        data = data_of(block)
        if data is None or data == b"[DONE]":
            continue
        chunk = json.loads(data)
        if "error" in chunk:
            status = 504 if chunk["error"].get("code") == "upstream_timeout" else 502
            yield _event("error", anthropic_body(Refusal(status, chunk["error"]["message"])))
            return
        if not is_begun:
            is_begun = True
            opening = {**_head(chunk["model"]), "content": [], **stop, "usage": _usage(None)}
            yield _event("message_start", {"message": opening})
        usage = chunk.get("usage") or usage
        if "cltrain" in chunk:
            recorded = {"cltrain": chunk["cltrain"]}
        for choice in chunk.get("choices") or []:
            for event in blocks.add(choice.get("delta") or {}):
                yield event
            if choice.get("finish_reason") is not None:
                stop = _stop(choice, blocks.has_call)
    for event in blocks.close():
        yield event
    yield _event("message_delta", {"delta": stop, "usage": _usage(usage), **recorded})
    yield _event("message_stop", {})


class _Blocks:
    """The content blocks of a stream: one is open at a time, each call of a tool has its own."""

    def __init__(self) -> None:
        self.has_call = False
        self._num_closed = 0
        self._open: str | None = None  # "text", or "call" and its index

    def add(self, delta: dict[str, Any]) -> list[bytes]:
        events: list[bytes] = []
        if delta.get("content"):
            events += self._enter("text", {"type": "text", "text": ""})
            events.append(self._delta({"type": "text_delta", "text": delta["content"]}))
        for position, call in enumerate(delta.get("tool_calls") or []):
            self.has_call = True
            function = call.get("function") or {}
            block = {"type": "tool_use", "id": call.get("id"), "name": function.get("name"), "input": {}}
            events += self._enter(f"call {call.get('index', position)}", block)
            if function.get("arguments"):
                events.append(self._delta({"type": "input_json_delta", "partial_json": function["arguments"]}))
        return events

    def close(self) -> list[bytes]:
        if self._open is None:
            return []
        self._open, closed = None, self._num_closed
        self._num_closed += 1
        return [_event("content_block_stop", {"index": closed})]

    def _enter(self, name: str, block: dict[str, Any]) -> list[bytes]:
        if self._open == name:
            return []
        events = self.close()
        self._open = name
        return [*events, _event("content_block_start", {"index": self._num_closed, "content_block": block})]

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", {"index": self._num_closed, "delta": delta})


def _event(kind: str, data: dict[str, Any]) -> bytes:
    text = json.dumps({"type": kind, **data}, separators=(",", ":"))
    return f"event: {kind}\ndata: {text}\n\n".encode()
