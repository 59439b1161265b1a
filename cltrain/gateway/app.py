"""The door as an ASGI app that speaks OpenAI's API and Anthropic's, and the process that serves it.

Sole writer of records and feedback.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NoReturn

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST
from starlette import routing
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cltrain.config import Config
from cltrain.errors import ConfigError, DataError
from cltrain.experience.recording import Recorder, load_secret
from cltrain.gateway.chat import Door
from cltrain.gateway.episodes import Episodes
from cltrain.gateway.errors import ANTHROPIC_PATH
from cltrain.gateway.guard import ROUTES, Guard, check_may_listen, is_loopback
from cltrain.gateway.intake import answered, list_served, take_feedback, take_trajectories
from cltrain.gateway.keys import KeyRing
from cltrain.gateway.messages import take_message
from cltrain.gateway.metrics import Metrics, ReplicaCollector
from cltrain.gateway.shadow import Shadow
from cltrain.gateway.tokens import Route
from cltrain.gateway.upstream import Upstream
from cltrain.gateway.upstreams import Upstreams
from cltrain.gateway.wire import Http
from cltrain.models.digest import base_digest, base_path
from cltrain.monitoring.prometheus import StoreCollector
from cltrain.store.database import Store, open_store

log = logging.getLogger(__name__)

MAX_SWEEP_PAUSE_S = 30.0
KEEPALIVE_S = 75  # longer than clients keep idle connections, so that none is closed under a request
GRACE_S = 10
SWITCH_S = 0.0005  # the writing thread asks for the interpreter after every statement; 5 ms each is a group's second


def create_gateway(
    store: Store,
    config: Config,
    upstream: Upstream | Sequence[Upstream],
    clock: Callable[[], float] = time.time,
    *,
    base_release: str | None = None,
) -> Starlette:
    """The app, over one server or its replicas. `base_release` names the bare base before any release; None: from the
    digest of `base.path`."""
    agent = config.agent.name
    if base_release is None:
        base_release = f"{agent}-v000000-{base_digest(base_path(config.base.path))[:12]}"
    secret = load_secret(config.state_dir)
    recorder = Recorder(store, secret, config.experience.eval_share, capacity=config.gateway.queue)
    timeout_s = config.gateway.record_timeout_s
    replicas = [upstream] if isinstance(upstream, Upstream) else list(upstream)
    upstreams = Upstreams(store, replicas)
    urls = [replica.url for replica in replicas]
    episodes = Episodes(store, agent, base_release, timeout_s, secret, urls)
    metrics = Metrics(StoreCollector(store, agent, clock), ReplicaCollector(store, agent, urls))
    shadow = Shadow(upstreams, recorder, metrics, secret, config.rollout)
    door = Door(agent, episodes, upstreams, recorder, shadow, metrics, timeout_s, clock, config, config.server.api_key)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        sweeping = asyncio.create_task(_sweep(door, config.experience.idle_end_s))
        try:
            yield
        finally:
            sweeping.cancel()
            await asyncio.gather(sweeping, return_exceptions=True)
            await shadow.close()
            await asyncio.to_thread(recorder.close)
            await upstreams.close()

    async def generate(route: Route, request: Request) -> Response:
        response = await answered(door, request, door.generate(route, request))
        metrics.requests.labels(route, response.status_code).inc()
        return response

    async def chat_completions(request: Request) -> Response:
        return await generate("chat", request)

    async def completions(request: Request) -> Response:
        return await generate("completion", request)

    async def messages(request: Request) -> Response:
        response = await answered(door, request, take_message(door, request))
        metrics.requests.labels("message", response.status_code).inc()
        return response

    async def post_feedback(request: Request) -> Response:
        return await answered(door, request, take_feedback(door, request))

    async def post_trajectories(request: Request) -> Response:
        return await answered(door, request, take_trajectories(door, request))

    async def list_models(request: Request) -> Response:
        return await answered(door, request, list_served(door, store, request))

    async def health(_: Request) -> Response:
        if not episodes.watch.is_down:
            try:
                async with asyncio.timeout(timeout_s):
                    await asyncio.to_thread(store.require_there)
            except (DataError, OSError) as error:  # a TimeoutError is an OSError
                episodes.watch.failed(error or type(error).__name__)
        is_down = episodes.watch.is_down
        return JSONResponse({"status": "ok", "agent": agent, "store": "down" if is_down else "ok"})

    async def show_metrics(_: Request) -> Response:
        metrics.waiting.set(recorder.num_waiting)
        return Response(await asyncio.to_thread(metrics.page), media_type=CONTENT_TYPE_LATEST)

    answers = {
        "/v1/chat/completions": chat_completions,
        "/v1/completions": completions,
        ANTHROPIC_PATH: messages,
        "/v1/feedback": post_feedback,
        "/v1/trajectories": post_trajectories,
        "/v1/models": list_models,
        "/health": health,
        "/metrics": show_metrics,
    }
    routes = [routing.Route(path, answers[path], methods=[rule.method]) for path, rule in ROUTES.items()]
    app = Starlette(routes=routes, lifespan=lifespan)
    app.state.door = door
    ring = KeyRing(config.state_dir, is_needed=not is_loopback(config.gateway.host))
    app.add_middleware(Guard, ring=ring, metrics=metrics, max_in_flight=config.gateway.max_in_flight)
    return app


def run_gateway(config: Config) -> None:
    """Serve until SIGTERM or SIGINT, then commit what waits. Raises ConfigError when the port is taken, or open to
    others without a key."""
    sys.setswitchinterval(SWITCH_S)
    host, port = config.gateway.host, config.gateway.port
    check_may_listen(host, config.state_dir)
    listener = _listen(host, port)
    with listener:
        store = open_store(config.state_dir)
        try:
            app = create_gateway(store, config, Upstream.of(config))
            options = uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                http=Http,
                timeout_keep_alive=KEEPALIVE_S,
                timeout_graceful_shutdown=GRACE_S,
            )
            print(f"gateway on http://{host}:{listener.getsockname()[1]}/v1, model = {config.agent.name}", flush=True)
            uvicorn.Server(options).run(sockets=[listener])
        finally:
            store.close()


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket. Its protocol is named, else asyncio leaves Nagle on and every answer waits 40 ms."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol or socket.IPPROTO_TCP)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(2048)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"gateway.port = {port} cannot be used on {host} ({error.strerror}): stop what listens there or choose "
            "another with --set gateway.port=PORT"
        ) from None
    return listener


async def _sweep(door: Door, idle_s: float) -> NoReturn:
    """End the episodes that went quiet. One round is added to `idle_s`: in it every gateway notes what it answers."""
    pause_s = min(MAX_SWEEP_PAUSE_S, idle_s / 4)
    while True:
        try:
            now, busy = door.clock(), door.episodes.busy
            await asyncio.wrap_future(door.recorder.sweep_idle(door.agent, idle_s=idle_s + pause_s, now=now, busy=busy))
        except Exception as error:  # the next round tries again; answering goes on meanwhile
            log.warning("idle episodes were not ended: %s", error)
        await asyncio.sleep(pause_s)
