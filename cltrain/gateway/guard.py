"""What stands before every route: the list of what may be asked at all, whose key allows it, and how much at once.

The inference server's own routes are reachable only through what is listed here; none of them is forwarded by path.
"""

from __future__ import annotations

import ipaddress
import socket
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from cltrain.errors import ConfigError
from cltrain.gateway import keys
from cltrain.gateway.errors import ANTHROPIC_PATH, Refusal, error_response
from cltrain.gateway.metrics import Metrics


class Rule(NamedTuple):
    method: str
    scope: keys.Scope | None  # None: open to everybody


ROUTES = {
    "/v1/chat/completions": Rule("POST", "infer"),
    "/v1/completions": Rule("POST", "infer"),
    ANTHROPIC_PATH: Rule("POST", "infer"),
    "/v1/models": Rule("GET", "infer"),
    "/v1/feedback": Rule("POST", "feedback"),
    "/v1/trajectories": Rule("POST", "feedback"),
    "/metrics": Rule("GET", "admin"),
    "/health": Rule("GET", None),
}


class Guard:
    """ASGI middleware. A request that gets past it has `request.state.key`: its key, or None where none is needed.

    `max_in_flight` counts posts that are being answered, streams to their end: generation and intake each by itself,
    so that long streams keep no feedback out.
    """

    def __init__(self, app: ASGIApp, ring: keys.KeyRing, metrics: Metrics, max_in_flight: int) -> None:
        self._app = app
        self._ring = ring
        self._metrics = metrics
        self._max_in_flight = max_in_flight
        self._in_flight: Counter[keys.Scope | None] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path: str = scope["path"]
        try:
            rule = _rule(path, scope["method"])
            scope.setdefault("state", {})["key"] = self._admitted(rule, Headers(scope=scope))
            if rule.method == "POST" and self._in_flight[rule.scope] >= self._max_in_flight:
                message = f"{self._max_in_flight} requests are being answered (gateway.max_in_flight): try again"
                raise Refusal(429, message, kind="rate_limit_error", code="rate_limit_exceeded")
        except Refusal as error:
            self._metrics.errors.labels(error.code).inc()
            await error_response(error, path)(scope, receive, send)
            return
        if rule.method != "POST":
            await self._app(scope, receive, send)
            return
        self._in_flight[rule.scope] += 1
        self._metrics.in_flight.inc()
        try:
            await self._app(scope, receive, send)
        finally:
            self._in_flight[rule.scope] -= 1
            self._metrics.in_flight.dec()

    def _admitted(self, rule: Rule, headers: Headers) -> keys.Key | None:
        if rule.scope is None:
            return None
        key = self._ring.find(_presented(headers))
        if key is None and (origin := headers.get("origin")) and not _is_local(origin):
            message = f"without keys no page of {origin[:100]} may ask: a browser would send what any site wants"
            raise Refusal(403, message, code="foreign_origin")
        if key is not None and rule.scope not in key.scopes:
            message = f"this key has no scope {rule.scope!r} (it has {', '.join(key.scopes)})"
            raise Refusal(403, message, code="insufficient_scope")
        return key


def _rule(path: str, method: str) -> Rule:
    rule = ROUTES.get(path)
    if rule is None:
        raise Refusal(404, f"there is no {path[:200]} here: {', '.join(ROUTES)}", code="unknown_route")
    if rule.method != method:
        raise Refusal(405, f"{path} takes {rule.method} only", code="method_not_allowed")
    return rule


def _presented(headers: Headers) -> str | None:
    """OpenAI's clients send `Authorization: Bearer`, Anthropic's `x-api-key`."""
    kind, _, value = headers.get("authorization", "").partition(" ")
    return value.strip() if kind.lower() == "bearer" else headers.get("x-api-key")


def _is_local(origin: str) -> bool:
    try:
        return urlsplit(origin).hostname in ("localhost", "127.0.0.1", "::1")
    except ValueError:
        return False


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on `host`. False also for a name that cannot be resolved."""
    try:
        found = socket.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        return False
    return all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)


def check_may_listen(host: str, state_dir: Path) -> None:
    """Raise ConfigError where others would reach a gateway on `host` and no key is valid."""
    if not is_loopback(host) and not any(key.revoked_at is None for key in keys.read_keys(state_dir)):
        raise ConfigError(
            f"gateway.host = {host!r} is reachable from other machines and there is no API key: make one with "
            "`cltrain keys add --principal NAME --scope infer`, or listen on 127.0.0.1"
        )
