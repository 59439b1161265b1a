"""mistral.rs's engine behind the part of vLLM's dialect that ServerClient speaks, for tests.

python -m tests.mistralrs_server BASE PORT. The engine takes text and gives no log-probs of a prompt. So prompt ids are
decoded and must tokenise back to themselves, and a prompt is scored by asking for the whole distribution of every next
token. Requests that do not stream run one at a time, because the engine's Python object allows one call at a time;
no tools, no choices, no stop strings.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mistralrs
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from transformers import AutoTokenizer

from cltrain.deploy.protocol import ApiError, ChatBody, CompletionBody, Generate, LoadBody, UnloadBody, parse
from cltrain.models.chat import render_prompt

BASE_NAME = "base"
MAX_ADAPTERS = 6


class Mistral:
    """One runner and its lock; a stream's iterator needs neither."""

    def __init__(self, base: Path, template: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
        self.vocabulary = int(json.loads((base / "config.json").read_text())["vocab_size"])
        which = mistralrs.Which.Lora(
            model_id=str(base), dtype=mistralrs.ModelDType.F32, max_adapters=MAX_ADAPTERS, max_rank=512
        )
        self._runner = mistralrs.Runner(which=which, token_source="none", jinja_explicit=str(template))
        self._lock = threading.Lock()

    def adapters(self) -> dict[str, str]:
        """Name -> root."""
        with self._lock:
            return {info.alias: info.source for info in self._runner.list_lora_adapters()}

    def load(self, name: str, root: str) -> None:
        with self._lock:
            self._runner.load_lora_adapter(name, root)

    def unload(self, name: str) -> None:
        with self._lock:
            self._runner.unload_lora_adapter(name)

    def ask(
        self, ids: Sequence[int], body: Generate, max_tokens: int, num_top: int = 1, *, is_stream: bool = False
    ) -> Any:
        """The engine's answer to exactly these ids, or an iterator over its chunks. Raises ApiError."""
        text = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        request = mistralrs.ChatCompletionRequest(
            messages=[{"role": "user", "content": text}],  # the template hands it through
            model="default",
            adapter=None if body.model == BASE_NAME else body.model,
            max_tokens=max_tokens,
            temperature=body.temperature,
            ignore_eos=body.ignore_eos,
            logprobs=True,
            top_logprobs=num_top,
            stream=is_stream,
        )
        try:
            with self._lock:
                if self._runner.tokenize_text(text, False, None) != list(ids):
                    raise ApiError(400, "prompt: these ids are not what this engine makes of their text")
                return self._runner.send_chat_completion_request(request)
        except ValueError as error:
            if "is not registered" in str(error):
                raise ApiError(404, f"The model `{body.model}` does not exist.", "NotFoundError", "model") from None
            raise ApiError(500, str(error).splitlines()[0], "InternalServerError") from None

    def prompt_logprobs(self, ids: Sequence[int], body: Generate) -> list[dict[str, dict[str, float]] | None]:
        """Per token what the model gave it; None for the first."""
        found: list[dict[str, dict[str, float]] | None] = [None]
        for end in range(1, len(ids)):
            answer = self.ask(ids[:end], body, 1, self.vocabulary)
            every = {top.token: top.logprob for top in answer.choices[0].logprobs.content[0].top_logprobs}
            found.append({str(ids[end]): {"logprob": every[ids[end]]}})
        return found


def create_app(engine: Mistral) -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(ApiError)
    async def explain(_request: Request, error: ApiError) -> Response:
        return JSONResponse(error.body, error.status)

    @app.get("/health")
    async def health() -> Response:
        return Response()

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        cards: list[dict[str, Any]] = [{"id": BASE_NAME, "root": "", "parent": None}]
        cards += [{"id": name, "root": root, "parent": BASE_NAME} for name, root in engine.adapters().items()]
        return {"object": "list", "data": cards}

    @app.post("/v1/load_lora_adapter")
    async def load(request: Request) -> Response:
        body = parse(LoadBody, await request.body())
        try:
            await asyncio.to_thread(engine.load, body.lora_name, body.lora_path)
        except mistralrs.LoraAdapterError as error:
            status = 404 if error.code == "adapter_file_not_found" else 400
            raise ApiError(status, str(error).splitlines()[0], error.code) from None
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    async def unload(request: Request) -> Response:
        body = parse(UnloadBody, await request.body())
        try:
            await asyncio.to_thread(engine.unload, body.lora_name)
        except mistralrs.LoraAdapterError as error:
            raise ApiError(404, str(error), "NotFoundError") from None
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = parse(ChatBody, await request.body())
        ids = render_prompt(engine.tokenizer, body.messages, body.tools or [])
        answer = await asyncio.to_thread(engine.ask, ids, body, body.max_tokens or 16, is_stream=body.stream)
        if body.stream:
            return StreamingResponse(_events(answer, body), media_type="text/event-stream")
        choice = answer.choices[0]
        content = choice.logprobs.content
        made = {
            "index": 0,
            "message": {"role": "assistant", "content": choice.message.content},
            "logprobs": {"content": [{"token": entry.token, "logprob": entry.logprob} for entry in content]},
            "finish_reason": choice.finish_reason,
            "token_ids": [entry.top_logprobs[0].token for entry in content],  # greedy: the first is the chosen one
        }
        return JSONResponse(
            {"object": "chat.completion", "model": body.model, "choices": [made], "prompt_token_ids": ids}
        )

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = parse(CompletionBody, await request.body())
        choices = []
        for index, ids in enumerate(prompt for prompt in body.prompts if not isinstance(prompt, str)):
            scores = await asyncio.to_thread(engine.prompt_logprobs, ids, body)
            choices.append({"index": index, "text": "", "prompt_logprobs": scores})
        return JSONResponse({"object": "text_completion", "model": body.model, "choices": choices})

    return app


def _events(chunks: Iterator[Any], body: Generate) -> Iterator[str]:
    try:
        for chunk in chunks:
            choice = chunk.choices[0]
            entry = choice.logprobs
            event = {
                "index": 0,
                "delta": {"content": choice.delta.content},
                "logprobs": entry and {"content": [{"token": entry.token, "logprob": entry.logprob}]},
                "finish_reason": choice.finish_reason,
            }
            yield _line({"object": "chat.completion.chunk", "model": body.model, "choices": [event]})
    except (ValueError, RuntimeError) as error:  # what the engine raises when an answer fails half-way
        yield _line(ApiError(500, str(error).splitlines()[0], "InternalServerError").body)
    yield "data: [DONE]\n\n"


def _line(event: dict[str, Any]) -> str:
    return f"data: {json.dumps(event)}\n\n"


def main(base: Path, port: int) -> None:
    os.environ["MISTRALRS_CPU_KV_F32"] = "1"  # its default, float16, is further from the trainer than proofs allow
    os.environ.setdefault("RAYON_NUM_THREADS", "1")
    os.environ.setdefault("RUST_LOG", "error")
    with tempfile.TemporaryDirectory() as scratch:
        template = Path(scratch) / "through.jinja"
        template.write_text("{{ messages[0]['content'] }}")
        engine = Mistral(base, template)
        uvicorn.run(create_app(engine), host="127.0.0.1", port=port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
