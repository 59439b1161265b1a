"""One generation, from request to committed answer: resolve, forward, record, then let the answer go."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy.exc import SQLAlchemyError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cltrain.config import Config
from cltrain.errors import ConflictError, DataError
from cltrain.experience.faults import CUT, fault_of
from cltrain.experience.recording import Recorder, RecorderFull, Turn, UnknownTarget
from cltrain.gateway import bodies
from cltrain.gateway.episodes import Episodes, Lease, next_hash
from cltrain.gateway.errors import ClientLeft, Refusal, UpstreamFailure, unknown_model
from cltrain.gateway.keys import PREFIX as KEY_PREFIX
from cltrain.gateway.metrics import Metrics
from cltrain.gateway.shadow import Copied, Shadow
from cltrain.gateway.streaming import EventStream, error_event, relay
from cltrain.gateway.tenants import agent_for
from cltrain.gateway.tokens import Answer, Collected, Route, Wanted, ask, read_answer, strip
from cltrain.gateway.upstreams import Opened, Place, Upstreams
from cltrain.records import Generation, Message, Tool

T = TypeVar("T")
BODY_S = 60.0  # to send it whole
MAX_BODY_BYTES = 16 * 2**20  # as long as a line of an import may be
log = logging.getLogger(__name__)

MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9-]*(@[a-z0-9-]+)?")  # of agents and releases: never a path or a list
PATHS: dict[Route, str] = {"chat": "/v1/chat/completions", "completion": "/v1/completions"}


@dataclass(frozen=True, slots=True)
class Asked:
    """A checked request."""

    route: Route
    body: dict[str, Any]
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]
    principal: str
    session: str | None
    is_done: bool
    why_unrecordable: str | None
    record: str  # x-cltrain-record of the answer to come


@dataclass(frozen=True)
class Door:
    """What every request needs; one per gateway."""

    agent: str
    episodes: Episodes
    upstream: Upstreams
    recorder: Recorder
    shadow: Shadow
    metrics: Metrics
    record_timeout_s: float
    clock: Callable[[], float]
    config: Config
    upstream_key: str | None = None  # what the inference server asks for

    def agent_of(self, request: Request) -> str:
        """Whose records the request makes."""
        return agent_for(self.config, request.state.key)

    async def generate(self, route: Route, request: Request) -> Response:
        """Answer one generation request. Raises Refusal."""
        return await self.answer(route, bodies.parse(await read_body(request)), request)

    async def answer(self, route: Route, body: dict[str, Any], request: Request) -> Response:
        """The same for a body in OpenAI's form; `request` has the headers, the key and whether the client is there."""
        start = time.perf_counter()
        asked = _asked(route, body, request)
        if not MODEL_NAME.fullmatch(asked.body["model"]):
            raise unknown_model(asked.body["model"], self.agent)
        lease = await self.episodes.begin(
            asked.body["model"], asked.session, asked.principal, asked.messages, is_chat=route == "chat",
            agent=self.agent_of(request),
        )  # fmt: skip
        try:
            return await self._generate(asked, lease, request, start)
        except Refusal as error:
            await self._failed(asked, lease, error)
            raise
        except BaseException as error:  # cancelled, or broken: the episode must not stay taken
            is_broken = isinstance(error, Exception)
            await self._failed(asked, lease, UpstreamFailure(500, "broken") if is_broken else ClientLeft("cancelled"))
            raise

    async def _generate(self, asked: Asked, lease: Lease, request: Request, start: float) -> Response:
        path = PATHS[asked.route]
        body = (
            ask(asked.route, asked.body, self.upstream.kind == "sglang")
            if self.upstream.gives_token_ids
            else asked.body
        )
        passed_on = self._passed_on(request)
        wanted = Wanted.by(asked.body)
        if asked.body.get("stream"):
            opened = await _unless_gone(request, self.upstream.stream(lease, path, body, passed_on), lease)
            return self._event_stream(asked, lease, opened, wanted, start, passed_on)
        place, raw = await _unless_gone(request, self.upstream.post(lease, path, body, passed_on), lease)
        answer = read_answer(asked.route, raw)
        reason = await self._commit(asked, lease, answer)
        self._mirror(asked, lease, answer, passed_on)
        strip(raw, wanted)
        raw["model"] = lease.release
        self.metrics.seconds.labels(asked.route).observe(time.perf_counter() - start)
        return JSONResponse(raw, headers={**_headers(lease, asked.record, place), **_recorded_headers(reason)})

    async def settle(self, future: Future[T]) -> T:
        """Wait for a commit. Raises Refusal 503 when the store does not make it in time."""
        try:
            async with asyncio.timeout(self.record_timeout_s):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            self.episodes.watch.failed(f"no commit within {self.record_timeout_s:g} s")
            raise Refusal(503, "the store is busy: nothing was acknowledged, send it again", kind="api_error") from None
        except (UnknownTarget, ConflictError, RecorderFull):
            raise
        except (DataError, SQLAlchemyError, OSError) as error:
            self.episodes.watch.failed(error)
            raise Refusal(503, f"not stored, nothing was acknowledged: {error}", kind="api_error") from error
        except (ValueError, OverflowError, TypeError) as error:  # a value that no column takes
            raise Refusal(400, f"cannot be stored: {error}") from error

    def _passed_on(self, request: Request) -> dict[str, str]:
        """The server's own key where it has one, else what the client sent for it: never a key of ours."""
        if self.upstream_key is not None:
            return {"authorization": f"Bearer {self.upstream_key}"}
        given = request.headers.get("authorization")
        is_ours = request.state.key is not None or (given is not None and KEY_PREFIX in given)
        return {} if given is None or is_ours else {"authorization": given}

    def _mirror(self, asked: Asked, lease: Lease, answer: Answer, passed_on: dict[str, str]) -> None:
        if asked.route == "chat" and asked.why_unrecordable is None and answer.finish_reason != CUT:
            said = (*asked.messages, answer.message)
            self.shadow.mirror(lease, Copied(asked.record, PATHS["chat"], asked.body, said, passed_on))

    def _event_stream(
        self,
        asked: Asked,
        lease: Lease,
        opened: Opened,
        wanted: Wanted,
        start: float,
        passed_on: dict[str, str],
    ) -> EventStream:
        place, model, response = opened
        collected = Collected(asked.route, model if self.upstream.gives_token_ids else None)
        is_over = False

        async def commit() -> dict[str, Any]:
            nonlocal is_over
            answer = collected.answer()
            is_over = True  # `_commit` gives the lease back, whatever comes of it
            reason = await self._commit(asked, lease, answer)
            self._mirror(asked, lease, answer, passed_on)
            said = {"recorded": int(reason is None), "trajectory": lease.episode, "record": asked.record}
            return said if reason is None else {**said, "reason": reason}

        async def events() -> AsyncGenerator[bytes, None]:
            nonlocal is_over
            chunks, num_choices = place.upstream.chunks(response), asked.body.get("n") or 1
            try:
                async for block in relay(chunks, collected, wanted, lease.release, num_choices, commit):
                    yield block
            except Refusal as error:
                is_over = True
                self.metrics.errors.labels(error.code).inc()
                await self._failed(asked, lease, error)
                yield error_event(error)

        async def on_end() -> None:
            if not is_over:
                self.metrics.errors.labels("client_left").inc()
                await self._failed(asked, lease, ClientLeft("the client left midway"))
            self.upstream.done(place)
            await response.aclose()
            self.metrics.seconds.labels(asked.route).observe(time.perf_counter() - start)

        headers = {**_headers(lease, asked.record, place), "x-cltrain-recorded": "pending"}
        return EventStream(events(), headers, on_end)

    async def _commit(self, asked: Asked, lease: Lease, answer: Answer) -> str | None:
        """Record the answer; None when it is on disk, else the reason why it is not."""
        messages = (*asked.messages, answer.message)
        prefix = next_hash(lease.prefix, answer.message)
        try:
            reason = await self._record(asked, lease, answer, messages, prefix)
        finally:
            await self.episodes.finish(lease, prefix, is_done=asked.is_done)
        if reason is None:
            self.metrics.recorded.inc()
            if self.upstream.gives_token_ids and answer.completion_ids is None:
                self.metrics.without_ids.inc()
        else:
            self.metrics.unrecorded.labels(reason).inc()
        return reason

    async def _record(
        self, asked: Asked, lease: Lease, answer: Answer, messages: tuple[Message, ...], prefix: str
    ) -> str | None:
        if asked.why_unrecordable is not None:
            return asked.why_unrecordable
        if not lease.is_recordable or self.episodes.watch.is_down:
            return "store unreachable"
        generation = Generation(
            id=asked.record,
            record=lease.record,
            turn=len(messages) - 1,
            release=lease.release,
            prompt_ids=answer.prompt_ids,
            completion_ids=answer.completion_ids,
            logprobs=answer.logprobs,
            finish_reason=answer.finish_reason,
        )
        author = "agent" if asked.route == "chat" else None  # a raw completion has no messages to check it against
        is_cut = answer.finish_reason == CUT
        fault = None if is_cut else fault_of(messages, [len(messages) - 1], asked.tools)
        turn = self._turn(asked, lease, messages, (*lease.producers, author), prefix, generation, fault=fault)
        try:
            await self.settle(self.recorder.record_turn(turn, now=self.clock()))
        except RecorderFull:
            return "queue full"
        except (Refusal, DataError, ConflictError) as error:
            log.warning("answer %s went out unrecorded: %s", asked.record, error)
            return "store unreachable"
        return None

    async def _failed(self, asked: Asked, lease: Lease, error: Refusal) -> None:
        """Nothing came: note it on the episode, without waiting for the commit. A client's own mistake is not noted."""
        await self.episodes.finish(lease)
        if not isinstance(error, UpstreamFailure) or not lease.is_recordable or asked.why_unrecordable:
            return
        turn = self._turn(asked, lease, asked.messages, lease.producers, lease.prefix, None, error.end)
        try:
            self.recorder.record_turn(turn, now=self.clock()).add_done_callback(_log_failure)
        except DataError as problem:
            log.warning("a failed turn of %s is not noted: %s", lease.episode, problem)

    def _turn(
        self,
        asked: Asked,
        lease: Lease,
        messages: tuple[Message, ...],
        producers: tuple[str | None, ...],
        prefix: str,
        generation: Generation | None,
        end: str = "ok",
        fault: str | None = None,
    ) -> Turn:
        return Turn(
            record=lease.record,
            agent=lease.agent,
            session=lease.session,
            principal=lease.principal,
            release=lease.release,
            messages=messages,
            producers=producers,
            tools=asked.tools,
            prefix=prefix,
            after=lease.after,
            generation=generation,
            end=end,
            fault=fault,
            tools_before=lease.tools_before,
            is_mixed=lease.is_mixed,
            is_done=asked.is_done and generation is not None,
            is_named=not lease.is_alias,
        )


async def read_body(request: Request) -> bytes:
    """Raises Refusal 413 as soon as the body is longer than MAX_BODY_BYTES; the rest is not kept. 408 for one that does
    not come: it holds a place of `gateway.max_in_flight`."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY_BYTES:
                    raise Refusal(413, f"the body is longer than {MAX_BODY_BYTES} bytes: send less at once")
    except TimeoutError:
        raise Refusal(408, f"the body did not come within {BODY_S:g} s", code="body_timeout") from None
    return bytes(body)


def _asked(route: Route, body: dict[str, Any], request: Request) -> Asked:
    bodies.name_of(body.get("model"), "model")
    messages = bodies.chat_messages(body) if route == "chat" else bodies.completion_messages(body)
    tools = bodies.tools_of(body)
    bodies.check_options(body)
    return Asked(
        route=route,
        body=body,
        messages=messages,
        tools=tools,
        principal=bodies.principal_of(request.headers, body, request.state.key),
        session=bodies.session_of(request.headers),
        is_done=bodies.is_done(request.headers),
        why_unrecordable=bodies.unrecordable(route, body),
        record=f"gen-{uuid.uuid4().hex}",
    )


def _headers(lease: Lease, record: str, place: Place) -> dict[str, str]:
    return {
        "x-cltrain-replica": place.upstream.url,
        "x-cltrain-adapter": lease.release,
        "x-cltrain-trajectory": lease.episode,
        "x-cltrain-record": record,
    }


def _recorded_headers(reason: str | None) -> dict[str, str]:
    if reason is None:
        return {"x-cltrain-recorded": "1"}
    return {"x-cltrain-recorded": "0", "x-cltrain-unrecorded": reason}


async def _unless_gone(request: Request, work: Awaitable[T], lease: Lease) -> T:
    """Await the server, but let go of it at once when the client leaves."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeft("the client left before the answer came")
        return working.result()
    except Refusal as error:
        if error.status in (401, 403) and request.state.key is not None:  # the client's own key was good
            message = f"the inference server refuses this gateway ({error}): see server.api_key_env"
            raise UpstreamFailure(502, message, code="upstream_refused") from None
        if error.status != 404 or not lease.is_alias:
            raise
        message = f"{lease.release} is not loaded on the inference server yet ({error}): try again"
        raise UpstreamFailure(503, message, end="away", code="release_not_loaded") from None
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _log_failure(future: Future[str]) -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        log.warning("a failed turn is not noted: %s", error)
