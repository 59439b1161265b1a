"""Copies of requests for a candidate that is tried in the shadow of the incumbent. What it says is compared in form and
thrown away: nobody gets it, nothing is learned from it, and no answer waits for it.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from cltrain.config_rollout import RolloutConfig
from cltrain.errors import DataError
from cltrain.experience.faults import CUT, fault_of
from cltrain.experience.recording import Recorder
from cltrain.gateway import bodies
from cltrain.gateway.episodes import Lease
from cltrain.gateway.errors import Refusal
from cltrain.gateway.metrics import Metrics
from cltrain.gateway.split import Tried, takes
from cltrain.gateway.tokens import read_answer
from cltrain.gateway.upstreams import Upstreams
from cltrain.records import Message
from cltrain.registry.rollouts import UnitOutcome, add_outcomes_in

NOT_COPIED = ("stream", "stream_options")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Copied:
    """A chat request that was answered: `said` is the conversation with the answer, which `record` names."""

    record: str
    path: str
    body: dict[str, Any]
    said: tuple[Message, ...]
    headers: dict[str, str]

    def is_broken(self, answer: Message) -> bool:
        """Whether this, as the answer, is broken in form."""
        said = (*self.said[:-1], answer)
        return fault_of(said, [len(said) - 1], bodies.tools_of(self.body)) is not None


class Shadow:
    """Copies in flight: no more than `rollout.shadow_in_flight`, none longer than `rollout.shadow_timeout_s`."""

    def __init__(
        self, upstreams: Upstreams, recorder: Recorder, metrics: Metrics, secret: bytes, config: RolloutConfig
    ) -> None:
        self._upstreams = upstreams
        self._recorder = recorder
        self._count = metrics.shadowed
        self._secret = secret
        self._config = config
        self._tasks: set[asyncio.Task[None]] = set()

    def mirror(self, lease: Lease, copied: Copied) -> None:
        """Ask the candidate too, if one is tried in the shadow and this request is of its share. Returns at once."""
        tried = lease.tried
        if tried is None or tried.kind != "shadow" or not tried.is_ready:
            return
        if not takes(tried, self._secret, copied.record):
            return
        if len(self._tasks) >= self._config.shadow_in_flight:
            self._count.labels("dropped").inc()
            return
        asked = replace(lease, release=tried.release, is_base=False, episode=f"{lease.episode}/shadow")
        task = asyncio.ensure_future(self._compare(tried, asked, copied))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _compare(self, tried: Tried, lease: Lease, copied: Copied) -> None:
        ours = await self._is_broken(lease, copied)
        if ours is None:
            self._count.labels("missing").inc()
            return
        theirs = copied.is_broken(copied.said[-1])
        pair: list[UnitOutcome] = [(copied.record, "incumbent", theirs, None), (copied.record, "candidate", ours, None)]
        try:
            note = self._recorder.write(lambda connection: add_outcomes_in(connection, tried.rollout, pair))
            await asyncio.wrap_future(note)
        except (DataError, SQLAlchemyError) as error:
            self._count.labels("missing").inc()
            log.warning("what %s said in the shadow is not kept: %s", tried.release, error)
            return
        self._count.labels("fault" if ours else "compared").inc()

    async def _is_broken(self, lease: Lease, copied: Copied) -> bool | None:
        """Whether the candidate's answer is broken; None where none came or it was cut short: the incumbent, of which
        only whole answers are copied, is not charged with that either."""
        body = {key: value for key, value in copied.body.items() if key not in NOT_COPIED}
        try:
            async with asyncio.timeout(self._config.shadow_timeout_s):
                _, raw = await self._upstreams.post(lease, copied.path, body, copied.headers)
            answer = read_answer("chat", raw)
            return None if answer.finish_reason == CUT else copied.is_broken(answer.message)
        except (TimeoutError, Refusal):
            return None
