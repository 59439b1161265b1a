"""Server-sent events through the gateway: chunks leave at once, the finishing ones when the answer is committed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import httpx
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from cltrain.gateway.errors import Refusal, UpstreamFailure
from cltrain.gateway.tokens import Collected, Wanted, strip

UNREAD_S = 120.0  # that a client may leave what was sent to it unread; then it counts as gone

DONE = b"data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """Stops as soon as the client is gone; `on_end` runs exactly once, however the stream ended."""

    def __init__(
        self, events: AsyncGenerator[bytes, None], headers: dict[str, str], on_end: Callable[[], Awaitable[None]]
    ) -> None:
        super().__init__(events, headers={"cache-control": "no-cache", **headers}, media_type="text/event-stream")
        self._events = events
        self._on_end = on_end

    def translated(self, translate: Callable[[AsyncIterator[bytes]], AsyncGenerator[bytes, None]]) -> EventStream:
        """The same stream in other words; it ends as this one would have."""

        async def events() -> AsyncGenerator[bytes, None]:
            async with aclosing(self._events) as source, aclosing(translate(source)) as said:
                async for block in said:
                    yield block

        return EventStream(events(), dict(self.headers), self._on_end)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(UNREAD_S):
                await send(message)

        sending = asyncio.ensure_future(self.stream_response(send_in_time))
        leaving = asyncio.ensure_future(self.listen_for_disconnect(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
            await self._events.aclose()
            await self._on_end()


async def check_is_stream(response: httpx.Response) -> None:
    """Raise UpstreamFailure, the response closed, when the server answered with something else than events."""
    kind = response.headers.get("content-type", "")
    if not kind.startswith("text/event-stream"):
        await response.aclose()
        raise UpstreamFailure(502, f"the inference server was asked for a stream and answered {kind or 'nothing'!r}")


async def relay(
    chunks: AsyncIterator[bytes],
    collected: Collected,
    wanted: Wanted,
    release: str,
    num_choices: int,
    commit: Callable[[], Awaitable[dict[str, Any]]],
) -> AsyncGenerator[bytes, None]:
    """Pass events on; the last chunk before [DONE] carries {"cltrain": what `commit` gave} and leaves after it.

    Raises UpstreamFailure when the stream breaks off before every choice finished.
    """
    held: list[dict[str, Any]] = []
    last: dict[str, Any] = {}
    async for block in event_blocks(chunks):
        data = data_of(block)
        if data is None:
            if block.startswith(b":"):  # a comment that keeps the connection alive
                yield block + b"\n\n"
            continue
        if data == b"[DONE]":
            break
        chunk = _chunk(data)
        collected.add(chunk)
        strip(chunk, wanted)
        if not wanted.usage and "usage" in chunk:
            chunk.pop("usage")
        if not any(chunk.get(part) for part in ("choices", "usage", "sglext")):  # nothing that the client asked for
            continue
        chunk["model"] = release
        last = chunk
        if len(collected.finished) >= num_choices:
            held.append(chunk)
        else:
            yield event(chunk)
    if len(collected.finished) < num_choices:
        raise UpstreamFailure(502, "the inference server's stream broke off before the answer was finished")
    if not held:
        held.append({**last, "choices": []})
    held[-1]["cltrain"] = await commit()
    for chunk in held:
        yield event(chunk)
    yield DONE


def event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


def error_event(error: Refusal) -> bytes:
    return event(error.body)


async def event_blocks(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Blocks between blank lines. Splits on line feeds only: JSON text may hold other line separators."""
    buffer = b""
    async for chunk in chunks:
        buffer = (buffer + chunk).replace(b"\r\n", b"\n")
        *blocks, buffer = buffer.split(b"\n\n")
        for block in blocks:
            if block.strip():
                yield block.lstrip(b"\n")
    if buffer.strip():
        yield buffer.strip(b"\n")


def data_of(block: bytes) -> bytes | None:
    """The data of one event; None for a comment."""
    lines = [line[5:].removeprefix(b" ") for line in block.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None


def _chunk(data: bytes) -> dict[str, Any]:
    try:
        chunk = json.loads(data)
    except ValueError:
        chunk = None
    if not isinstance(chunk, dict):
        raise UpstreamFailure(502, f"the inference server streamed no JSON object: {data[:200]!r}")
    if "error" in chunk:
        raise UpstreamFailure(502, f"the inference server failed midway: {str(chunk['error'])[:300]}")
    return chunk
