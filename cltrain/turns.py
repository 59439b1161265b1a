"""The tenants of a running worker, one after the other: each has its own lease, window, budgets and gate, and borrows
base, anchors and servers from the shared agent's worker. One update a turn, so that nobody keeps the others waiting.
"""

from __future__ import annotations

import logging
import time
from collections import deque

from sqlalchemy import exists, select

from cltrain import audit
from cltrain.deploy.readiness import is_ready_somewhere
from cltrain.errors import ConflictError, DataError
from cltrain.gateway.tenants import entitled
from cltrain.records import LearningMode
from cltrain.registry import aliases, releases
from cltrain.registry.lease import LeaseKeeper
from cltrain.rooms import under
from cltrain.store.families import of_tenants
from cltrain.store.schema import requests, updates
from cltrain.worker import RETRY_S, TEND_S, Worker

log = logging.getLogger(__name__)


class TenantWorker(Worker):
    """The learner of one tenant for as long as its turn lasts; takes its lease (ConflictError while another has it)."""

    def __init__(self, lender: Worker, agent: str) -> None:
        super().__init__(lender.config.of_agent(agent), lender.store, on_progress=lender.on_progress)
        self._lender = lender

    def __enter__(self) -> TenantWorker:
        rooms, agent = self._lender.rooms, self.config.agent.name
        releases.ensure_base_release(self.store, agent, rooms.base.digest, now=time.time())
        keeper = self._keeper = LeaseKeeper(self.store, agent, settings=self.config.shaping())
        try:
            self.rooms = under(rooms, self.config, fence=keeper.fence)
        except BaseException:
            keeper.close()
            raise
        self._stack.callback(keeper.close)
        self.pump = self._lender.pump
        return self

    def has_work(self) -> bool:
        """Whether a turn would do anything; looked at without the lease."""
        agent = self.config.agent
        is_open = requests.c.agent == agent.name, requests.c.outcome.is_(None)
        is_running = updates.c.agent == agent.name, updates.c.state.in_(("training", "judging"))
        with self.store.read() as connection:
            is_asked = connection.scalar(select(exists().where(*is_open)))
            is_cut_off = connection.scalar(select(exists().where(*is_running)))
        is_frozen = aliases.frozen_reason(self.store, agent.name) is not None
        may_learn = not is_frozen and agent.mode is not LearningMode.OFF and agent.updates == "when_ready"
        return bool(
            is_asked or (is_cut_off and not is_frozen) or self._is_audit_due() or (may_learn and self._has_news())
        )

    def take_turn(self) -> None:
        """What was cut off, then one thing that was asked for, else an audit and an update that are due."""
        self._finish_what_is_open()
        if not self._answer_request():
            self.audit_when_due()
            self._learn_by_itself()

    def audit_when_due(self) -> None:
        """Of a release of its own: what all are served is the shared agent's to audit."""
        if self._is_audit_due():
            super().audit_when_due()

    def _is_audit_due(self) -> bool:
        if audit.due(self.store, self.config, time.time()) is None:
            return False
        serving = aliases.read_alias(self.store, self.config.agent.name).release
        with self.store.read() as connection:  # not there: when it is asked for again
            return is_ready_somewhere(connection, serving, self.config.server.replicas)


class Turns:
    """Whose turn it is among the tenants of one worker."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._queue: deque[str] = deque()
        self._next_look = 0.0
        self._not_before: dict[str, float] = {}  # monotonic; of those whose last turn failed

    def take(self) -> str | None:
        """Give the next tenant that has something to do its turn; returns who had it. What a turn dies of is logged,
        and nobody else waits for it."""
        if time.monotonic() < self._next_look:
            return None
        try:
            self._queue = deque(self._in_order(self._candidates()))
        except DataError as error:  # the keys: the shared agent learns all the same
            log.warning("no tenant has a turn: %s", error)
            self._next_look = time.monotonic() + RETRY_S
            return None
        for _ in range(len(self._queue)):
            agent = self._queue.popleft()
            self._queue.append(agent)
            if time.monotonic() >= self._not_before.get(agent, 0.0) and self._had_turn(agent):
                return agent
        self._next_look = time.monotonic() + TEND_S
        return None

    def _candidates(self) -> list[str]:
        """Who may have an adapter, and whoever else somebody waits for: one whose key was revoked, say."""
        config = self._worker.config
        is_asked = of_tenants(requests.c.agent, config.agent.name) & requests.c.outcome.is_(None)
        with self._worker.store.read() as connection:
            asked = connection.scalars(select(requests.c.agent).where(is_asked).distinct()).all()
        return list(dict.fromkeys([*entitled(config), *asked]))

    def _in_order(self, names: list[str]) -> list[str]:
        """Those in the queue as they stand there, then the new ones."""
        known = [name for name in self._queue if name in names]
        return [*known, *(name for name in names if name not in known)]

    def _had_turn(self, agent: str) -> bool:
        try:
            learner = TenantWorker(self._worker, agent)
            if not learner.has_work():
                return False
            with learner:
                learner.take_turn()
        except ConflictError as error:  # somebody else works on it, or took it over
            log.info("%s had no turn: %s", agent, error)
            self._not_before[agent] = time.monotonic() + TEND_S
        except Exception:  # its own broken release, or the store: looked at again later
            log.warning("the turn of %s failed; the next comes in %g s", agent, RETRY_S, exc_info=True)
            self._not_before[agent] = time.monotonic() + RETRY_S
        return True
