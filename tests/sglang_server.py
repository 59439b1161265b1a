"""A stand-in for SGLang: its HTTP face, made from the source of sglang 0.5.23 (the wheel on PyPI; http_server.py,
entrypoints/openai/*, tokenizer_control_mixin.py, lora_registry.py), over our own engine. No line of it is theirs, and
nothing here proves that a real SGLang answers like that.

python -m tests.sglang_server BASE PORT [MAX_LOADED_LORAS]. What it takes over, traps among it:

- any model name without a colon is the base, and every answer repeats the name that was asked; an adapter is
  `base:adapter`, or `lora_path` beside the base's name; an unknown one is 400 in a flat error body, not 404;
- a load of a name that is there is 400 `already loaded`; one more than --max-loaded-loras forgets the least recently
  used adapter, and waits for whoever runs on what must go;
- an unload of an unknown name is 400; one of a name in use takes it from the list at once and answers when the last
  request on it has ended, and every other load and unload waits behind it;
- what was loaded once and is not listed any more is loaded again, from its old path, by a request that names it;
- a chat's ids come under `sglext` when asked for, in a stream at its end; `return_token_ids` of a streamed chat is 400;
- log-probs of a prompt come from /generate alone, the first is null, and the last id of the vocabulary is shown as 0;
- --dp-size above 1 makes every adapter route a 500; /health takes a second, /ready does not; only GET /ready, /health
  answer without the key.

Left out: what a real engine refuses in an adapter's file (it takes wrong prefixes unless --lora-strict-loading).
"""

from __future__ import annotations

import asyncio
import json
import sys
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from cltrain.deploy.answers import Answer, Words
from cltrain.deploy.choices import chat_choice, chat_events, completion_choice, usage
from cltrain.deploy.engine import Engine
from cltrain.deploy.flight import Flight
from cltrain.deploy.lora import Adapter
from cltrain.deploy.protocol import ApiError, ChatBody, CompletionBody, Generate, parse
from cltrain.deploy.sampling import Sampling
from cltrain.errors import DataError
from cltrain.models.base import load_base
from cltrain.models.chat import render_prompt

BASE_NAME = "base"


class Refused(Exception):
    """A ValueError of theirs: 400."""


class Registry:
    """Names to loaded adapters in the order of use; what was ever loaded; how many requests run on each."""

    def __init__(self, engine: Engine, max_loaded: int | None) -> None:
        self.engine, self.max_loaded = engine, max_loaded
        self.listed: OrderedDict[str, str] = OrderedDict()  # name -> path
        self.remembered: dict[str, str] = {}
        self.unloading: set[str] = set()
        self.in_use: dict[str, int] = {}
        self._update = asyncio.Lock()

    async def load(self, name: str, path: str) -> None:
        async with self._update:
            if name in self.listed:
                raise Refused(f"Failed to load LoRA adapter {name} because it is already loaded")
            try:
                await asyncio.to_thread(self.engine.adapters.load, name, Path(path))
            except (DataError, OSError) as error:
                raise Refused(str(error)) from None
            self.listed[name] = self.remembered[name] = path
            while self.max_loaded is not None and len(self.listed) > self.max_loaded:
                await self._unload(next(iter(self.listed)))

    async def unload(self, name: str) -> None:
        async with self._update:
            await self._unload(name)

    async def _unload(self, name: str) -> None:
        if name not in self.unloading:
            if name not in self.listed:
                raise Refused(f"LoRA with name {name} does not exist. Loaded LoRAs: {list(self.listed)}")
            del self.listed[name]
            self.unloading.add(name)
        while self.in_use.get(name):
            await asyncio.sleep(0.01)
        self.engine.adapters.unload(name)
        self.unloading.discard(name)

    async def acquire(self, model: str, lora_path: str | None = None) -> tuple[str | None, Adapter | None]:
        """Who answers. Give a name back with `release`."""
        name = model.partition(":")[2].strip() or lora_path
        if not name:
            return None, None
        if name not in self.listed:
            if name not in self.remembered:
                raise Refused(f"Got LoRA adapter that has never been loaded: {name}")
            try:
                await self.load(name, self.remembered[name])
            except Refused as error:
                raise Refused(f"Failed to implicitly load LoRA adapter {name}: {error}") from None
        self.listed.move_to_end(name)
        self.in_use[name] = self.in_use.get(name, 0) + 1
        return name, self.engine.adapters.resolve(name)

    def release(self, name: str | None) -> None:
        if name is not None:
            self.in_use[name] -= 1


def create_app(
    engine: Engine, *, max_loaded: int | None = None, dp_size: int = 1, api_key: str | None = None, **flags: Any
) -> FastAPI:
    """The routes over one engine; `flags` replace what /server_info says."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    words = Words(engine.base.tokenizer)
    registry = Registry(engine, max_loaded)
    app.state.registry = registry

    @app.middleware("http")
    async def guard(request: Request, call_next: Any) -> Response:
        is_free = api_key is None or request.url.path.startswith(("/health", "/ready"))
        if not is_free and request.headers.get("authorization") != f"Bearer {api_key}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        return await call_next(request)

    @app.exception_handler(Refused)
    async def explain(request: Request, error: Refused) -> Response:
        if request.url.path == "/generate":
            return JSONResponse({"error": {"message": str(error)}}, 400)
        return _flat(400, str(error), "BadRequest")

    @app.exception_handler(ApiError)
    async def explain_ours(_: Request, error: ApiError) -> Response:
        return _flat(error.status, str(error), "BadRequest")

    @app.exception_handler(404)
    async def unknown_route(_: Request, __: Any) -> Response:
        return _flat(404, "Not Found", "404")

    @app.get("/ready")
    async def ready() -> Response:
        return Response()

    @app.get("/health")
    async def health() -> Response:
        await asyncio.sleep(1)
        return Response()

    @app.get("/server_info")
    async def server_info() -> dict[str, Any]:
        told = {
            "enable_lora": True, "max_lora_rank": 64, "max_loaded_loras": max_loaded, "max_loras_per_batch": 8,
            "lora_target_modules": ["all"], "dp_size": dp_size, "version": "0.5.23",
        }  # fmt: skip
        return {**told, **flags}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        cards: list[dict[str, Any]] = [{"id": BASE_NAME, "root": BASE_NAME, "parent": None}]
        cards += [{"id": name, "root": path, "parent": BASE_NAME} for name, path in registry.listed.items()]
        return {"object": "list", "data": cards}

    async def updated(work: Any) -> Response:
        if dp_size > 1:  # their assert is caught nowhere
            work.close()
            return Response("Internal Server Error", 500)
        try:
            await work
        except Refused as error:
            return _said(error=str(error), loaded=registry.listed)
        return _said(error=None, loaded=registry.listed)

    @app.post("/load_lora_adapter")
    async def load(request: Request) -> Response:
        body = await request.json()
        return await updated(registry.load(body["lora_name"], body["lora_path"]))

    @app.post("/unload_lora_adapter")
    async def unload(request: Request) -> Response:
        return await updated(registry.unload((await request.json())["lora_name"]))

    @app.post("/generate")
    async def generate(request: Request) -> Response:
        body = await request.json()
        name, adapter = await registry.acquire("", body.get("lora_path"))
        try:
            sampling = Sampling(body["sampling_params"]["max_new_tokens"], num_prompt_top=0)
            rows = [(ids, sampling, Answer(words)) for ids in body["input_ids"]]
            answers = await Flight(engine, adapter, rows, is_streamed=False).land()
        finally:
            registry.release(name)
        last = engine.base.model.config.vocab_size - 1
        found = []
        for ids, answer in zip(body["input_ids"], answers, strict=True):
            assert answer.prompt is not None
            scores = [None, *(token.logprob for token in answer.prompt if token is not None)]
            shown = [0 if token >= last else token for token in ids]
            entries = [[score, token, None] for score, token in zip(scores, shown, strict=True)]
            found.append({"text": answer.text, "meta_info": {"input_token_logprobs": entries}})
        return JSONResponse(found)

    def chat_rows(body: ChatBody) -> tuple[list[int], Any]:
        try:
            ids = render_prompt(engine.base.tokenizer, body.messages, body.tools or [])
        except DataError as error:
            raise Refused(str(error)) from None
        wanted = body.max_completion_tokens or body.max_tokens or 64
        num_top = (body.top_logprobs or 0) if body.logprobs else 0
        return ids, [(ids, _sampling(body, wanted, num_top), Answer(words, has_tools=bool(body.tools)))]

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        raw = await request.json()
        body = parse(ChatBody, json.dumps(raw).encode())
        if body.stream and body.return_token_ids:
            raise Refused("return_token_ids is not supported with streaming on /v1/chat/completions.")
        wants_ids = bool(raw.get("return_input_ids_in_sglext") and raw.get("return_output_ids_in_sglext"))
        ids, rows = chat_rows(body)
        name, adapter = await registry.acquire(body.model, raw.get("lora_path"))
        head = {"id": uuid.uuid4().hex, "object": "chat.completion", "created": 1, "model": body.model}
        flight = Flight(engine, adapter, rows, is_streamed=body.stream)
        if body.stream:
            events = chat_events(flight, words, body, ids, head)
            lines = _chat_lines(events, flight, ids, head, wants_ids)
            return StreamingResponse(_released(lines, flight, registry, name), media_type="text/event-stream")
        try:
            (answer,) = await flight.land()
        finally:
            registry.release(name)
        choice = chat_choice(words, body, 0, answer)
        choice["message"]["content"] = choice["message"].get("content") or ""
        choice.pop("token_ids", None)
        output_ids = [token.id for token in answer.tokens]
        if body.return_token_ids:
            choice |= {"prompt_token_ids": ids, "response_token_ids": output_ids}
        answered = {**head, "choices": [choice], "usage": usage(len(ids), [answer])}
        return JSONResponse({**answered, **(_sglext(ids, output_ids) if wants_ids else {})})

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        raw = await request.json()
        body = parse(CompletionBody, json.dumps(raw).encode())
        tokenizer = engine.base.tokenizer
        prompts = [one if isinstance(one, list) else list(tokenizer(one)["input_ids"]) for one in body.prompts]
        name, adapter = await registry.acquire(body.model, raw.get("lora_path"))
        sampling = _sampling(body, body.max_tokens or 16, body.logprobs or 0)
        try:
            rows = [(ids, sampling, Answer(words)) for ids in prompts]
            answers = await Flight(engine, adapter, rows, is_streamed=False).land()
        finally:
            registry.release(name)
        body.prompt_logprobs = None  # not theirs
        choices = [completion_choice(words, body, i, one, prompts[i]) for i, one in enumerate(answers)]
        head = {"id": uuid.uuid4().hex, "object": "text_completion", "created": 1, "model": body.model}
        return JSONResponse({**head, "choices": choices, "usage": usage(sum(map(len, prompts)), answers)})

    return app


def _sampling(body: Generate, max_tokens: int, num_top: int) -> Sampling:
    temperature = 1.0 if body.temperature is None else body.temperature
    return Sampling(max_tokens, temperature, seed=body.seed, ignore_eos=body.ignore_eos, num_top=num_top)


def _said(*, error: str | None, loaded: dict[str, str]) -> Response:
    body = {"success": error is None, "error_message": error, "loaded_adapters": dict(loaded)}
    return JSONResponse(body, 200 if error is None else 400)


def _flat(status: int, message: str, kind: str) -> Response:
    return JSONResponse({"object": "error", "message": message, "type": kind, "param": None, "code": status}, status)


def _sglext(prompt_ids: list[int], output_ids: list[int]) -> dict[str, Any]:
    return {"sglext": {"input_ids": prompt_ids, "output_ids": [output_ids]}}


async def _chat_lines(
    events: AsyncIterator[dict[str, Any]], flight: Flight, ids: list[int], head: dict[str, Any], wants_ids: bool
) -> AsyncIterator[bytes]:
    """Ids after the last choice and before the usage."""
    told = {**head, "object": "chat.completion.chunk", "choices": []}
    held: list[dict[str, Any]] = []
    async for event in events:
        if event.get("choices"):
            yield _line(event)
        else:
            held.append(event)
    if wants_ids:
        yield _line({**told, **_sglext(ids, [token.id for token in flight.answers[0].tokens])})
    for event in held:
        yield _line(event)
    yield b"data: [DONE]\n\n"


async def _released(
    lines: AsyncIterator[bytes], flight: Flight, registry: Registry, name: str | None
) -> AsyncIterator[bytes]:
    try:
        async for line in lines:
            yield line
    finally:
        flight.cancel()
        registry.release(name)


def _line(event: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(event).encode() + b"\n\n"


def main(base: Path, port: int, max_loaded: int | None = None) -> None:
    with closing(Engine(load_base(base), base_name=BASE_NAME, max_adapters=64)) as engine:
        app = create_app(engine, max_loaded=max_loaded)
        uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *map(int, sys.argv[3:]))
