"""Generated text in the Hermes tool-call format to an OpenAI message and back. Imports no torch."""

from __future__ import annotations

import json
import re
from typing import Any

from cltrain.records import Message

_BLOCK = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


def parse_answer(text: str, *, id_prefix: str = "call") -> Message:
    """An assistant message from generated text: each `<tool_call>{"name", "arguments"}</tool_call>` becomes a call.

    Calls are numbered `<id_prefix>_0`, ...; `arguments` is a JSON string. A block that is no JSON object with a name
    and an object of arguments stays in the content as it was. A last block that lacks only its closing tag counts.
    """
    calls: list[dict[str, Any]] = []
    kept: list[str] = []
    end = 0
    for block in _BLOCK.finditer(text):
        kept.append(text[end : block.start()])
        end = block.end()
        function = _parse_call(block.group(1))
        if function is None:
            kept.append(block.group(0))
        else:
            calls.append({"id": f"{id_prefix}_{len(calls)}", "type": "function", "function": function})
    content = "".join([*kept, text[end:]]).strip()
    if not calls:
        return {"role": "assistant", "content": content}
    return {"role": "assistant", "content": content or None, "tool_calls": calls}


def _parse_call(text: str) -> dict[str, str] | None:
    try:
        call = json.loads(text)
    except ValueError:
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        return None
    return {"name": call["name"], "arguments": json.dumps(arguments, ensure_ascii=False)}
