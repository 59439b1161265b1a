"""The rows of one HTTP request on their way through the engine, seen from the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence

from cltrain.deploy.answers import Answer
from cltrain.deploy.engine import Delta, Engine, Row
from cltrain.deploy.lora import Adapter
from cltrain.deploy.protocol import ApiError
from cltrain.deploy.sampling import Sampling
from cltrain.errors import DataError, ServerError


class Flight:
    """Submits one row per answer; whoever leaves early must `cancel`."""

    def __init__(
        self,
        engine: Engine,
        adapter: Adapter | None,
        rows: Sequence[tuple[Sequence[int], Sampling, Answer]],
        *,
        is_streamed: bool,
    ) -> None:
        self._engine = engine
        self._events: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
        self.answers = [answer for _, _, answer in rows]
        loop = asyncio.get_running_loop()
        self._rows = [
            Row(tuple(ids), sampling, adapter, self._emitter(loop, index), is_streamed=is_streamed)
            for index, (ids, sampling, _) in enumerate(rows)
        ]
        try:
            for row in self._rows:
                engine.submit(row)
        except DataError as error:
            self.cancel()
            raise ApiError(400, str(error)) from None
        except ServerError as error:
            raise ApiError(503, str(error), "ServiceUnavailableError") from None

    async def steps(self) -> AsyncIterator[tuple[int, Delta]]:
        """Every step of every row, already pushed into its answer, until all are done; cancels what is left behind."""
        try:
            while not all(answer.is_done for answer in self.answers):
                index, delta = await self._events.get()
                answer = self.answers[index]
                if answer.is_done:
                    continue  # a step that was under way when a stop string ended the answer
                answer.push(delta)
                if answer.is_done and not delta.is_last:
                    self._engine.cancel(self._rows[index])
                yield index, delta
        finally:
            self.cancel()

    async def land(self) -> list[Answer]:
        """All answers, complete. Raises ApiError 500 when a row failed."""
        async for _ in self.steps():
            pass
        for answer in self.answers:
            if answer.error is not None:
                raise ApiError(500, answer.error, "InternalServerError")
        return self.answers

    def cancel(self) -> None:
        for row, answer in zip(self._rows, self.answers, strict=True):
            if not answer.is_done:
                self._engine.cancel(row)

    def _emitter(self, loop: asyncio.AbstractEventLoop, index: int) -> Callable[[Delta], None]:
        def emit(delta: Delta) -> None:
            with contextlib.suppress(RuntimeError):  # the loop closed: nobody is listening any more
                loop.call_soon_threadsafe(self._events.put_nowait, (index, delta))

        return emit
