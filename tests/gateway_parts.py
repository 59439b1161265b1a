"""A small inference server that speaks vLLM's dialect, and ways to run it and a gateway on loopback ports."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send

from cltrain.config import Config, from_dict
from cltrain.gateway.app import create_gateway
from cltrain.gateway.upstream import Upstream
from cltrain.gateway.wire import Http
from cltrain.store.database import Store, open_store
from cltrain.store.schema import aliases, releases

BASE = "support-v000000-aaaaaaaaaaaa"
R1 = "support-v000001-111111111111"
R2 = "support-v000002-222222222222"


class Noting:
    def __init__(self, app: ASGIApp, paths: list[str]) -> None:
        self.app, self.paths = app, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.paths.append(scope.get("path", ""))
        await self.app(scope, receive, send)


class FakeServer:
    """Answers what the last user message says: `say X`, `call TOOL`, `wait S`, `hold`, `fail CODE`, `break`, ..."""

    def __init__(self, adapters: tuple[str, ...] = (R1, R2)) -> None:
        self.adapters = list(adapters)
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.num_cancelled = 0
        self.lets_go = threading.Event()  # of whoever said `hold`
        self.paths: list[str] = []  # of every request, known here or not
        self.app = FastAPI()
        self.app.add_middleware(Noting, paths=self.paths)
        self.app.get("/v1/models")(self.models)
        self.app.post("/v1/chat/completions")(self.chat)
        self.app.post("/v1/completions")(self.completions)

    async def models(self) -> dict[str, Any]:
        base = {"id": "base", "object": "model", "root": "/m", "parent": None}
        loaded = [{"id": a, "object": "model", "root": f"/{a}", "parent": "base"} for a in self.adapters]
        return {"object": "list", "data": [base, *loaded]}

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        order = next(m["content"] for m in reversed(body["messages"]) if m["role"] in ("user", "tool")) or ""
        message: dict[str, Any] = {"role": "assistant", "content": f"{body['model']} heard {order}"}
        if order.startswith("call "):
            function = {"name": order[5:], "arguments": '{"item": "lamp"}'}
            message = {"role": "assistant", "content": None}
            message["tool_calls"] = [{"id": "call_1", "type": "function", "function": function}]
        return await self._answer(request, body, order, message, "chat")

    async def completions(self, request: Request) -> Response:
        body = await request.json()
        order = body["prompt"] if isinstance(body["prompt"], str) else "ids"
        return await self._answer(request, body, order, {"content": f"then {order}"}, "text")

    async def _answer(
        self, request: Request, body: dict[str, Any], order: str, message: dict[str, Any], kind: str
    ) -> Response:
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        if body["model"] not in ("base", *self.adapters):
            error = {"message": f"The model `{body['model']}` does not exist.", "type": "NotFoundError", "code": 404}
            return JSONResponse({"error": error}, 404)
        if order.startswith("fail "):
            return JSONResponse({"error": {"message": "as you said", "type": "x"}}, int(order[5:]))
        if order == "nonsense":
            return Response("<html>not me</html>")
        while order == "hold" and not self.lets_go.is_set():
            await asyncio.sleep(0.01)
        if order.startswith("wait "):
            try:
                await asyncio.wait_for(_left(request), float(order[5:]))
                self.num_cancelled += 1
            except TimeoutError:
                pass
        text = message["content"] or json.dumps(message.get("tool_calls"))
        ids = [] if order == "no ids" else [ord(c) % 50 for c in text]
        if order == "lose one":  # as a tool parser that swallows a token does
            ids = ids[:-1]
        if body.get("stream"):
            return StreamingResponse(self._stream(body, order, message, ids, kind), media_type="text/event-stream")
        choices = []
        for i in range(body.get("n") or 1):
            said = {"message": message} if kind == "chat" else {"text": message["content"]}
            choices.append({"index": i, **said, "finish_reason": _reason(body, message), **_truth(body, ids, kind)})
        usage = {"prompt_tokens": 3, "completion_tokens": len(text), "total_tokens": 3 + len(text)}
        name = f"{body['model']}-2024-08-06" if order == "dated" else body["model"]
        answer = {"id": "x", "object": "chat.completion", "created": 1, "model": name, "choices": choices}
        if ids and body.get("return_token_ids"):
            answer["prompt_token_ids"] = [7, 8, 9]
        return JSONResponse({**answer, "usage": usage})

    async def _stream(
        self, body: dict[str, Any], order: str, message: dict[str, Any], ids: list[int], kind: str
    ) -> AsyncIterator[str]:
        text = message["content"] or ""
        parts: list[tuple[dict[str, Any], list[int]]] = [({"role": "assistant", "content": ""}, [])]
        parts += [({"content": c}, ids[i : i + 1]) for i, c in enumerate(text)]
        for call in message.get("tool_calls") or []:
            whole, arguments = {**call, "index": 0}, call["function"]["arguments"]
            whole["function"] = {"name": call["function"]["name"], "arguments": ""}
            parts.append(({"tool_calls": [whole]}, ids[:3]))
            for half, part_ids in ((arguments[:5], ids[3:9]), (arguments[5:], ids[9:])):
                parts.append(({"tool_calls": [{"index": 0, "function": {"arguments": half}}]}, part_ids))
        head = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}
        yield ": hello\n\n"
        for number, (delta, some) in enumerate(parts):
            said = {"delta": delta} if kind == "chat" else {"text": delta.get("content") or ""}
            choice = {"index": 0, **said, "finish_reason": None, **_truth(body, some, kind)}
            chunk: dict[str, Any] = {**head, "choices": [choice], "usage": None}
            if number == 0 and ids and body.get("return_token_ids"):
                chunk["prompt_token_ids"] = [7, 8, 9]
            yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
            if order == "break" and number == 3:
                return
            if order.startswith("drip"):
                try:
                    await asyncio.sleep(0.2)
                except asyncio.CancelledError:  # starlette cancels a stream whose reader left
                    self.num_cancelled += 1
                    raise
        reason = _reason(body, message)
        end = {"delta": {}} if kind == "chat" else {"text": ""}
        yield f"data: {json.dumps({**head, 'choices': [{'index': 0, **end, 'finish_reason': reason}]})}\n\n"
        if (body.get("stream_options") or {}).get("include_usage"):
            usage = {"prompt_tokens": 3, "completion_tokens": len(ids), "total_tokens": 3 + len(ids)}
            yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage})}\n\n"
        yield "data: [DONE]\n\n"


def _reason(body: dict[str, Any], message: dict[str, Any]) -> str:
    """As vLLM: a call that was asked for by name ends with stop."""
    if body.get("max_tokens") == 1:
        return "length"
    is_named = isinstance(body.get("tool_choice"), dict)
    return "tool_calls" if message.get("tool_calls") and not is_named else "stop"


async def _left(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.01)


def _truth(body: dict[str, Any], ids: list[int], kind: str) -> dict[str, Any]:
    given: dict[str, Any] = {}
    if body.get("return_token_ids") and ids:
        given["token_ids"] = ids
    if body.get("logprobs") not in (None, False):
        chosen = [-0.5] * len(ids)
        content = {"content": [{"token": "t", "logprob": p, "top_logprobs": []} for p in chosen]}
        given["logprobs"] = content if kind == "chat" else {"token_logprobs": chosen, "tokens": ["t"] * len(ids)}
    return given


@contextmanager
def served(app: FastAPI | Starlette, **given: Any) -> Iterator[str]:
    """The app's address; it listens on a free loopback port until the block ends."""
    options = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", timeout_graceful_shutdown=2, **given)
    server = uvicorn.Server(options)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started:
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


def config_in(directory: Path, **sections: dict[str, Any]) -> Config:
    return from_dict({"home": str(directory), "agent": {"name": "support"}, **sections})


class Gateway:
    """A gateway over a fake server, both on real ports; `clock` is moved by hand."""

    urls: list[str]  # of the servers behind it

    def __init__(self, directory: Path, url: str, fake: FakeServer, store: Store, app: Starlette) -> None:
        self.directory = directory
        self.url = url
        self.fake = fake
        self.store = store
        self.app = app
        self.now = 1000.0
        self.http = httpx.Client(base_url=url, timeout=30.0, trust_env=False)

    def errors(self, code: str) -> float:
        """How many requests ended in that error."""
        value = self.app.state.door.metrics.registry.get_sample_value("cltrain_errors_total", {"code": code})
        return value or 0.0

    def chat(
        self, *messages: str | dict[str, Any], headers: dict[str, str] | None = None, **body: Any
    ) -> httpx.Response:
        said = [m if isinstance(m, dict) else {"role": "user", "content": m} for m in messages]
        given = {"model": "support", "messages": said, **body}
        return self.http.post("/v1/chat/completions", json=given, headers=headers or {})


@contextmanager
def running(
    directory: Path,
    *,
    kind: str = "embedded",
    fake: FakeServer | None = None,
    timeout_s: float = 5.0,
    api_key_env: str | None = None,
    http: type[Http] = Http,
    **sections: Any,
) -> Iterator[Gateway]:
    fake = fake or FakeServer()
    with served(fake.app) as upstream_url:
        config = config_in(
            directory, server={"kind": kind, "url": upstream_url, "api_key_env": api_key_env}, **sections
        )
        store = open_store(directory)
        holder: list[Gateway] = []
        upstream = Upstream(upstream_url, kind=kind, base_model="base", timeout_s=timeout_s)  # type: ignore[arg-type]
        app = create_gateway(store, config, upstream, lambda: holder[0].now if holder else 1000.0, base_release=BASE)
        with served(app, http=http) as url:
            gateway = Gateway(directory, url, fake, store, app)
            gateway.urls = [upstream.url]
            holder.append(gateway)
            try:
                yield gateway
            finally:
                gateway.http.close()
        store.close()


def add_release(store: Store, name: str, status: str = "released") -> None:
    number = int(name.split("-v")[1][:6])
    with store.write() as connection:
        connection.execute(
            releases.insert().values(
                name=name,
                agent="support",
                number=number,
                digest=name[-12:],
                parent=None,
                manifest={},
                path=None if number == 0 else f"releases/support/{name}",
                status=status,
                created_at=float(number),
            )
        )


def set_release(store: Store, name: str, status: str) -> None:
    with store.write() as connection:
        connection.execute(releases.update().where(releases.c.name == name).values(status=status))


def point_alias(store: Store, name: str) -> None:
    with store.write() as connection:
        connection.execute(aliases.delete())
        connection.execute(
            aliases.insert().values(
                agent="support",
                release=name,
                previous=None,
                anchor=BASE,
                high_water=BASE,
                version=1,
                fence=0,
                changed_at=0.0,
            )
        )
