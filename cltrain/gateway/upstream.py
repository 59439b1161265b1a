"""The one HTTP client of the inference server: sends a body, gives JSON or a byte stream, explains every failure.

A request whose kept-alive connection the server had just closed is sent once more; nothing else is retried.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import httpx

from cltrain.config import Config
from cltrain.deploy.sglang import is_unknown
from cltrain.gateway.errors import TRACE, NotAnswered, NotSent, Refusal, UpstreamFailure

Kind = Literal["embedded", "vllm", "sglang", "openai"]
MAX_CONNECT_S = 10.0
KEEPALIVE_S = 4.0  # below uvicorn's 5, so that we rarely meet a connection that is being closed


class Upstream:
    """An OpenAI-compatible server. `base_model` is the base's name there; None: the first model without a parent."""

    def __init__(
        self,
        url: str,
        *,
        kind: Kind = "embedded",
        base_model: str | None = None,
        timeout_s: float = 120.0,
        transport: httpx.AsyncBaseTransport | None = None,
        api_key: str | None = None,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.kind = kind
        self.timeout_s = timeout_s
        self._base_model = base_model
        self._own = {"authorization": f"Bearer {api_key}"} if api_key else {}  # for what the gateway itself asks
        timeout = httpx.Timeout(timeout_s, connect=min(MAX_CONNECT_S, timeout_s), pool=None)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=KEEPALIVE_S)
        is_ours = kind != "openai"  # and so never behind the proxy of the environment
        if transport is None and is_ours:
            transport = httpx.AsyncHTTPTransport(limits=limits, trust_env=False)
        self._client = httpx.AsyncClient(
            base_url=self.url, timeout=timeout, limits=limits, transport=transport, trust_env=not is_ours
        )
        self._transport = transport
        self._timeouts = timeout.as_dict()
        self._urls: dict[str, httpx.URL] = {}

    @staticmethod
    def of(config: Config) -> list[Upstream]:
        """One for every replica."""
        server = config.server
        name = server.model or ("base" if server.kind == "embedded" else None)
        return [
            Upstream(url, kind=server.kind, base_model=name, timeout_s=server.timeout_s, api_key=server.api_key)
            for url in server.replicas
        ]

    @property
    def gives_token_ids(self) -> bool:
        return self.kind != "openai"

    async def base_model(self) -> str:
        """The base's name on the server. Raises UpstreamFailure when it must be asked and cannot be."""
        if self._base_model is None:
            bases = [str(m["id"]) for m in await self.models() if not m.get("parent")]
            if not bases:
                raise UpstreamFailure(502, f"the server at {self.url} lists no base model: set server.model")
            self._base_model = bases[0]
        return self._base_model

    async def name_of(self, release: str | None) -> str:
        """What the server calls the release; None: the bare base."""
        if release is not None and self.kind != "sglang":
            return release
        base = await self.base_model()
        return base if release is None else f"{base}:{release}"

    async def models(self) -> list[dict[str, Any]]:
        """What GET /v1/models of the server lists; empty when it has no such route."""
        with self._explained(NotAnswered):
            response = await self._client.get("/v1/models", headers=self._own)
        if response.status_code != 200:
            return []
        listed = _json(response.content, self.url).get("data")
        return [m for m in listed if isinstance(m, dict) and "id" in m] if isinstance(listed, list) else []

    async def post(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> dict[str, Any]:
        """One whole answer. Raises UpstreamFailure (502, 504), NotAnswered, or Refusal with the server's own 4xx."""
        with self._explained():
            async with asyncio.timeout(self.timeout_s):
                response = await self._send(path, body, headers)
                try:
                    content = await response.aread()
                finally:
                    await response.aclose()
        if response.status_code != 200:
            raise self._refused(response.status_code, content)
        return _json(content, self.url)

    async def stream(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> httpx.Response:
        """An open event stream; iterate it with `chunks` and close it. Raises as `post`."""
        with self._explained():
            response = await self._send(path, body, headers)
            if response.status_code != 200:
                try:
                    content = await response.aread()
                finally:
                    await response.aclose()
                raise self._refused(response.status_code, content)
        return response

    async def chunks(self, response: httpx.Response) -> AsyncIterator[bytes]:
        with self._explained():
            async for chunk in response.aiter_bytes():
                yield chunk

    async def close(self) -> None:
        await self._client.aclose()

    async def _send(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> httpx.Response:
        """The head of the answer, its body still to come."""
        content = json.dumps(body).encode()
        sent = {"content-type": "application/json", "accept": "*/*", "user-agent": "cltrain", **headers}
        is_new = False

        async def note(event: str, _: Any) -> None:
            nonlocal is_new
            is_new = is_new or event == "connection.connect_tcp.started"

        url = self._urls.setdefault(path, httpx.URL(self.url + path))
        extensions = {"timeout": self._timeouts, "trace": note}
        request = httpx.Request("POST", url, content=content, headers=sent, extensions=extensions)
        with self._explained(NotAnswered):
            try:
                return await self._open(request)
            except httpx.RemoteProtocolError:
                if is_new:  # it was read, and the server went away over it
                    raise
                return await self._open(request)

    async def _open(self, request: httpx.Request) -> httpx.Response:
        """Without the client's cookies, redirects and log, which cost a third of a millisecond, where no proxy is to be
        found by it."""
        if self._transport is None:
            return await self._client.send(request, stream=True)
        response = await self._transport.handle_async_request(request)
        response.request = request
        return response

    @contextmanager
    def _explained(self, kind: type[UpstreamFailure] = UpstreamFailure) -> Iterator[None]:
        try:
            yield
        except (httpx.TimeoutException, TimeoutError) as error:
            message = f"the inference server at {self.url} did not answer within {self.timeout_s:g} s"
            is_unsent = isinstance(error, httpx.ConnectTimeout) and kind is NotAnswered
            failure = NotSent if is_unsent else UpstreamFailure
            raise failure(504, message, end="timeout", code="upstream_timeout") from None
        except httpx.ConnectError as error:
            failure = NotSent if kind is NotAnswered else kind
            raise failure(502, f"no answer from the inference server at {self.url}: {error}") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            what = str(error) or type(error).__name__
            raise kind(502, f"no answer from the inference server at {self.url}: {what}") from None

    def _refused(self, status: int, content: bytes) -> Refusal:
        try:
            body = json.loads(content)
        except ValueError:
            body = None
        said = _said(body) or content[:300].decode(errors="replace")
        if status < 400 or status >= 500:
            return UpstreamFailure(502, f"the inference server at {self.url} answered {status}: {said}")
        if self.kind == "sglang" and is_unknown(status, said):
            status = 404
        error = body.get("error") if isinstance(body, dict) else None
        shown = None
        if isinstance(error, dict) and TRACE not in said:  # as OpenAI's clients know it
            shown = {"error": {"message": said, **{name: error.get(name) for name in ("type", "param", "code")}}}
        return Refusal(status, said, code="upstream_refused", body=shown)


def _said(body: Any) -> str | None:
    if not isinstance(body, dict):
        return None
    error = body.get("error", body)
    said = error.get("message", error.get("detail")) if isinstance(error, dict) else error
    return None if said is None else str(said)


def _json(content: bytes, url: str) -> dict[str, Any]:
    try:
        answer = json.loads(content)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise UpstreamFailure(502, f"the inference server at {url} answered no JSON object: {content[:200]!r}")
    return answer
