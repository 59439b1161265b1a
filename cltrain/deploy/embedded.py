"""The embedded server's HTTP face: OpenAI's chat and completions, vLLM's adapter routes, nothing else.

The event loop renders prompts and writes answers; the engine's thread does everything that touches the model. There is
no authentication: bind it to loopback or a private network, as one would vLLM.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from cltrain.deploy.answers import Answer, Words, prompt_logprobs
from cltrain.deploy.choices import chat_choice, chat_events, completion_choice, completion_events, usage
from cltrain.deploy.engine import Engine
from cltrain.deploy.flight import Flight
from cltrain.deploy.lora import Adapter
from cltrain.deploy.protocol import ApiError, ChatBody, CompletionBody, Generate, LoadBody, UnloadBody, parse
from cltrain.deploy.sampling import Sampling
from cltrain.errors import ConflictError, DataError
from cltrain.models.chat import render_prompt

CLIENT_GONE = 499
ResultT = TypeVar("ResultT")


def create_app(engine: Engine, *, clock: Callable[[], float] = time.time) -> FastAPI:
    """The routes over one engine. Errors have OpenAI's body: 400 for what the client can fix, 404 for unknown names."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    words = Words(engine.base.tokenizer)
    started_at = int(clock())

    @app.exception_handler(ApiError)
    async def explain(_request: Request, error: ApiError) -> Response:
        return JSONResponse(error.body, error.status)

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if engine.is_alive else 503)

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": _cards(engine, started_at)})

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = parse(ChatBody, await request.body())
        adapter = _resolve(engine, body.model)
        tools = body.tools or []
        try:
            ids = render_prompt(engine.base.tokenizer, body.messages, tools)
        except DataError as error:
            raise ApiError(400, str(error), param="messages") from None
        max_tokens = body.max_completion_tokens or body.max_tokens or _room(engine, len(ids))
        num_top = (body.top_logprobs or 0) if body.logprobs else 0
        head: dict[str, Any] = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(clock()), "model": body.model}
        rows = [
            (
                ids,
                _sampling(body, max_tokens, num_top, copy),
                Answer(
                    words,
                    stops=body.stops,
                    has_tools=bool(tools) and body.tool_choice != "none",
                    call_prefix=f"call_{head['id'][-12:]}{copy or ''}",
                ),
            )
            for copy in range(body.n)
        ]
        flight = Flight(engine, adapter, rows, is_streamed=body.stream or bool(body.stops))
        if body.stream:
            return EventStream(flight, chat_events(flight, words, body, ids, head))
        answers = await _unless_gone(request, flight.land())
        if answers is None:
            return Response(status_code=CLIENT_GONE)
        answer: dict[str, Any] = {
            **head,
            "object": "chat.completion",
            "choices": [chat_choice(words, body, index, one) for index, one in enumerate(answers)],
            "usage": usage(len(ids), answers),
        }
        if body.prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs(words, answers[0].prompt)
        if body.return_token_ids:
            answer["prompt_token_ids"] = ids
        return JSONResponse(answer)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = parse(CompletionBody, await request.body())
        adapter = _resolve(engine, body.model)
        prompts = [
            one if isinstance(one, list) else [int(i) for i in engine.base.tokenizer(one)["input_ids"]]
            for one in body.prompts
        ]
        if not prompts:
            raise ApiError(400, "prompt: nothing to complete", param="prompt")
        rows = [
            (
                ids,
                _sampling(body, body.max_tokens or _room(engine, len(ids)), body.logprobs or 0, copy),
                Answer(words, stops=body.stops),
            )
            for ids in prompts
            for copy in range(body.n)
        ]
        head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "created": int(clock()),
            "model": body.model,
            "object": "text_completion",
        }
        flight = Flight(engine, adapter, rows, is_streamed=body.stream or bool(body.stops))
        row_prompts = [ids for ids, _, _ in rows]
        if body.stream:
            return EventStream(flight, completion_events(flight, words, body, row_prompts, head))
        answers = await _unless_gone(request, flight.land())
        if answers is None:
            return Response(status_code=CLIENT_GONE)
        choices = [completion_choice(words, body, i, a, row_prompts[i]) for i, a in enumerate(answers)]
        return JSONResponse({**head, "choices": choices, "usage": usage(sum(map(len, prompts)), answers)})

    @app.post("/v1/load_lora_adapter")
    async def load(request: Request) -> Response:
        body = parse(LoadBody, await request.body())
        if not Path(body.lora_path).is_absolute():
            raise ApiError(400, f"lora_path must be absolute; got {body.lora_path}", param="lora_path")
        try:
            await asyncio.to_thread(engine.adapters.load, body.lora_name, Path(body.lora_path))
        except FileNotFoundError as error:
            raise ApiError(404, f"Loading lora {body.lora_name} failed: {error}", "NotFoundError") from None
        except ConflictError as error:
            raise ApiError(400, str(error), "InvalidUserInput") from None
        except DataError as error:
            raise ApiError(400, f"Loading lora {body.lora_name} failed: {error}") from None
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    async def unload(request: Request) -> Response:
        body = parse(UnloadBody, await request.body())
        try:
            engine.adapters.unload(body.lora_name)
        except KeyError:
            raise ApiError(404, f"The lora adapter '{body.lora_name}' cannot be found.", "NotFoundError") from None
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return app


def _cards(engine: Engine, started_at: int) -> list[dict[str, Any]]:
    base = engine.adapters.base_name
    roots: list[tuple[str, str, str | None]] = [(base, str(engine.base.path), None)]
    roots += [(name, root, base) for name, root in engine.adapters.loaded().items()]
    return [
        {
            "id": name,
            "object": "model",
            "created": started_at,
            "owned_by": "cltrain",
            "root": root,
            "parent": parent,
            "max_model_len": engine.base.context,
        }
        for name, root, parent in roots
    ]


def _resolve(engine: Engine, model: str) -> Adapter | None:
    try:
        return engine.adapters.resolve(model)
    except KeyError:
        raise ApiError(404, f"The model `{model}` does not exist.", "NotFoundError", "model") from None


def _room(engine: Engine, num_prompt: int) -> int:
    """Without max_tokens: until the context is full. A prompt that fills it is refused by the engine."""
    return max(1, engine.base.context - num_prompt)


def _sampling(body: Generate, max_tokens: int, num_top: int, copy: int) -> Sampling:
    return Sampling(
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=body.top_p or 1.0,
        top_k=max(0, body.top_k or 0),
        seed=None if body.seed is None else body.seed + copy,
        ignore_eos=body.ignore_eos,
        num_top=num_top,
        num_prompt_top=body.prompt_logprobs,
    )


class EventStream(StreamingResponse):
    """Server-sent events; whatever ends the response, also a client that left, ends its rows."""

    def __init__(self, flight: Flight, events: AsyncIterator[dict[str, Any]]) -> None:
        super().__init__(_lines(events), media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._flight = flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._flight.cancel()


async def _lines(events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    async for event in events:
        yield b"data: " + json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
    yield b"data: [DONE]\n\n"


async def _unless_gone(request: Request, work: Coroutine[Any, Any, ResultT]) -> ResultT | None:
    """The work's result; None, with the work cancelled, when the client disconnects first."""

    async def until_gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(until_gone())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
