"""Which replica answers: one that is ready for exactly the release, where the episode was before if that is one of them
(its prefix is cached there), else the least busy. Where there is one server, it answers everything but a release that
failed its proof there.

What the worker wrote about readiness is read at most once a second; a replica that was seen here to be gone, or not to
have the release, is left alone for a moment. Another is asked only if nothing of an answer came.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import httpx
from sqlalchemy.exc import SQLAlchemyError

from cltrain.deploy import readiness
from cltrain.errors import DataError
from cltrain.gateway.episodes import Lease
from cltrain.gateway.errors import NotAnswered, NotSent, Refusal, UpstreamFailure
from cltrain.gateway.streaming import check_is_stream
from cltrain.gateway.tokens import check_model
from cltrain.gateway.upstream import Kind, Upstream
from cltrain.store.database import Store

T = TypeVar("T")
READ_S = 1.0  # between two reads of the store
HURRY_S = 0.1  # the same, when nobody seems to be ready
STORE_S = 5.0
MAX_ASIDE_S = 8.0
MAX_RESENT = 1  # replicas more that a request is sent to after one went away over it: it may be what ends them
MAX_EPISODES = 10_000  # whose place is remembered

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Aside:
    """Not to be asked until then, unless the worker says something new of it first."""

    until: float  # monotonic
    pause_s: float
    row: Any  # what the worker had said


@dataclass(eq=False)
class Place:
    """One replica as this gateway sees it. `aside`: by release; under ITSELF for whatever it is asked."""

    upstream: Upstream
    num_in_flight: int = 0
    turn: int = 0  # the last request that it was chosen for
    aside: dict[str, Aside] = field(default_factory=dict)


class Opened(NamedTuple):
    """A stream that has begun: whose it is, and as which model it must go on."""

    place: Place
    model: str
    response: httpx.Response


class Upstreams:
    """Every replica behind the gateway."""

    def __init__(self, store: Store, upstreams: Sequence[Upstream]) -> None:
        self.places = tuple(Place(upstream) for upstream in upstreams)
        self._store = store
        self._rows: dict[str, dict[str, Any]] = {}
        self._next_read = 0.0
        self._turn = 0
        self._lock = asyncio.Lock()
        self._episodes: OrderedDict[str, Place] = OrderedDict()

    @property
    def gives_token_ids(self) -> bool:
        return self.places[0].upstream.gives_token_ids

    @property
    def kind(self) -> Kind:
        return self.places[0].upstream.kind

    async def models(self) -> list[dict[str, Any]]:
        """What any replica lists that answers. Raises UpstreamFailure when none does."""
        found = await asyncio.gather(*(p.upstream.models() for p in self.places), return_exceptions=True)
        listed = [models for models in found if not isinstance(models, BaseException)]
        if not listed and isinstance(found[0], BaseException):
            raise found[0]
        return [model for models in listed for model in models]

    async def post(
        self, lease: Lease, path: str, body: dict[str, Any], headers: dict[str, str]
    ) -> tuple[Place, dict[str, Any]]:
        """One whole answer, and whose it is. Raises as `Upstream.post`, 503 where no replica is ready, and 502 for an
        answer by another model."""
        place, model, answer = await self._ask(lease, body, lambda upstream, sent: upstream.post(path, sent, headers))
        self.done(place)
        if self.gives_token_ids:
            check_model(answer, model)
        return place, answer

    async def stream(self, lease: Lease, path: str, body: dict[str, Any], headers: dict[str, str]) -> Opened:
        """An open event stream; give its place back with `done` when it ends. Raises as `post`."""
        opened = Opened(*await self._ask(lease, body, lambda upstream, sent: upstream.stream(path, sent, headers)))
        try:
            await check_is_stream(opened.response)
        except BaseException:
            self.done(opened.place)
            raise
        return opened

    def done(self, place: Place) -> None:
        place.num_in_flight -= 1

    async def close(self) -> None:
        for place in self.places:
            await place.upstream.close()

    # ------------------------------------------------------------ inside

    async def _ask(
        self, lease: Lease, body: dict[str, Any], send: Callable[[Upstream, dict[str, Any]], Awaitable[T]]
    ) -> tuple[Place, str, T]:
        """Who answered, as which model, and what."""
        tried: list[Place] = []
        num_sent = 0
        while True:
            place = await self._choose(lease, tried)
            place.num_in_flight += 1
            try:
                model = await place.upstream.name_of(None if lease.is_base else lease.release)
                answer = await self._unless_out(place, send(place.upstream, {**body, "model": model}))
            except BaseException as error:
                self.done(place)
                tried.append(place)
                num_sent += isinstance(error, NotAnswered) and not isinstance(error, NotSent)
                if num_sent > MAX_RESENT or not await self._another_may(lease, place, tried, error):
                    raise
                log.warning("%s is asked of another replica: %s", lease.release, error)
                continue
            place.aside.pop(readiness.ITSELF, None)
            place.aside.pop(lease.release, None)
            return place, model, answer

    async def _choose(self, lease: Lease, tried: Collection[Place]) -> Place:
        await self._read(READ_S)
        if not (ready := self._ready(lease, tried)):
            await asyncio.sleep(HURRY_S)  # what was promoted a moment ago is not known here yet
            await self._read(HURRY_S)
            ready = self._ready(lease, tried)
        if not ready:
            raise self._nobody(lease)
        before = self._episodes.pop(lease.episode, None)
        least = min(ready, key=lambda place: (place.num_in_flight, place.turn))
        chosen = self._episodes[lease.episode] = before if before in ready else least
        self._turn += 1
        chosen.turn = self._turn
        if len(self._episodes) > MAX_EPISODES:
            self._episodes.popitem(last=False)
        return chosen

    def _ready(self, lease: Lease, tried: Collection[Place]) -> list[Place]:
        return [place for place in self.places if place not in tried and self._is_ready(place, lease)]

    def _is_ready(self, place: Place, lease: Lease) -> bool:
        if len(self.places) == 1:
            row = None if lease.is_base else self._row(place, lease.release)
            return row is None or row.state != "failed"
        if self._is_out(place) or self._is_aside(place, readiness.ITSELF):
            return False
        if lease.is_base:
            return True
        rows = self._rows.get(place.upstream.url, {})
        return readiness.is_ready(rows, lease.release) and not self._is_aside(place, lease.release)

    def _is_out(self, place: Place) -> bool:
        row = self._row(place, readiness.ITSELF)
        return row is not None and row.state == "out"

    def _is_aside(self, place: Place, what: str) -> bool:
        aside = place.aside.get(what)
        return aside is not None and time.monotonic() < aside.until and aside.row == self._row(place, what)

    def _row(self, place: Place, what: str) -> Any:
        return self._rows.get(place.upstream.url, {}).get(what)

    async def _another_may(self, lease: Lease, place: Place, tried: Collection[Place], error: BaseException) -> bool:
        """Whether another replica may be asked after this error, and is there; `place` is left alone meanwhile."""
        if len(self.places) == 1:
            return False
        if isinstance(error, NotAnswered):
            what = readiness.ITSELF
        elif isinstance(error, Refusal) and error.status == 404 and not lease.is_base:
            what = lease.release
        else:
            return False
        before = place.aside.get(what)
        pause_s = READ_S if before is None else min(2 * before.pause_s, MAX_ASIDE_S)
        place.aside[what] = Aside(time.monotonic() + pause_s, pause_s, self._row(place, what))
        await self._read(HURRY_S)
        return bool(self._ready(lease, tried))

    async def _unless_out(self, place: Place, work: Awaitable[T]) -> T:
        """Await the replica, but no longer than the worker finds that it answers."""
        if len(self.places) == 1:
            return await work
        working = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait({working}, timeout=READ_S))[0]:
                await self._read(READ_S)
                if self._is_out(place) and not working.done():
                    raise NotAnswered(502, f"the inference server at {place.upstream.url} went away")
            return working.result()
        except BaseException:
            working.cancel()
            (left,) = await asyncio.gather(working, return_exceptions=True)
            if isinstance(left, httpx.Response):  # it came as we were leaving: nobody else would close it
                await left.aclose()
            raise

    async def _read(self, pause_s: float) -> None:
        """What the worker knows, if that was last read longer ago than this. What cannot be read stays as it was."""
        if time.monotonic() < self._next_read - READ_S + pause_s:
            return
        async with self._lock:
            if time.monotonic() < self._next_read - READ_S + pause_s:
                return
            try:
                self._rows = await asyncio.wait_for(asyncio.to_thread(self._places), STORE_S)
            except (DataError, SQLAlchemyError, OSError) as error:  # a TimeoutError is an OSError
                log.warning("which replica is ready cannot be read: %s", error)
            self._next_read = time.monotonic() + READ_S

    def _places(self) -> dict[str, dict[str, Any]]:
        with self._store.read() as connection:
            return readiness.places(connection, [place.upstream.url for place in self.places])

    def _nobody(self, lease: Lease) -> Refusal:
        if not lease.is_alias and not any(self._row(place, lease.release) for place in self.places):
            message = f"The model `{lease.release}` is not loaded on any replica"
            return Refusal(404, message, code="model_not_found", param="model")
        message = f"no replica is ready for {lease.release}: try again"
        return UpstreamFailure(503, message, end="away", code="no_ready_replica")
