"""Who may work on an agent: one holder at a time, with a number that grows at every new lease (a fence).

A holder that slept through its lease is stopped by the number, whatever it still believes: every write that matters
checks the fence in its own transaction.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, Row, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from cltrain.config_tenants import shared_of
from cltrain.errors import ConflictError, DataError
from cltrain.store.database import Store
from cltrain.store.schema import agents, workers

LEASE_S = 15.0
RENEW_S = 2.0

log = logging.getLogger(__name__)


def acquire(
    store: Store,
    agent: str,
    holder: str,
    ttl_s: float,
    now: float,
    is_alive: Callable[[str], bool] = lambda holder: True,
    settings: dict[str, Any] | None = None,
) -> int:
    """Take the lease for `ttl_s` seconds; returns its fence, larger than any before.

    `is_alive` may know that a holder is gone, whose lease then is not waited for; `settings` is what the new holder
    learns with. Raises ConflictError while another holder's lease runs, with who and for how long.
    """
    with store.write() as connection:
        row = agent_row(connection, agent)
        is_taken = row.lease_holder not in (None, holder) and row.lease_until is not None and row.lease_until > now
        if is_taken and is_alive(row.lease_holder):
            left = row.lease_until - now
            raise ConflictError(f"{agent} is being worked on by {row.lease_holder} for another {left:.0f} s")
        fence = int(row.fence) + 1
        _set(connection, agent, fence=fence, lease_holder=holder, lease_until=now + ttl_s)
        connection.execute(delete(workers).where(workers.c.agent == agent))
        if settings is not None:
            connection.execute(insert(workers).values(agent=agent, settings=settings))
        return fence


def renew(store: Store, agent: str, holder: str, fence: int, ttl_s: float, now: float) -> None:
    """Extend one's own lease. An expired one that nobody took is still one's own. Raises ConflictError when lost."""
    with store.write() as connection:
        require_fence(connection, agent, fence)
        if agent_row(connection, agent).lease_holder != holder:
            raise ConflictError(f"{holder} gave the lease of {agent} back: acquire it again")
        _set(connection, agent, lease_until=now + ttl_s)


def lease_until(store: Store, agent: str) -> float:
    """When the newest lease of whoever works on the agent ends, epoch seconds; 0 where nobody has one. A tenant's own
    is held for its turn only: the worker that gives it its turns holds that of the shared agent."""
    ours = agents.c.agent.in_((agent, shared_of(agent)))
    with store.read() as connection:
        return float(connection.scalar(select(func.max(agents.c.lease_until)).where(ours)) or 0.0)


def settings_of(store: Store, agent: str) -> dict[str, Any] | None:
    """What the newest holder of the lease learns with, as it said itself."""
    with store.read() as connection:
        settings: dict[str, Any] | None = connection.scalar(select(workers.c.settings).where(workers.c.agent == agent))
    return settings


def release_lease(store: Store, agent: str, fence: int) -> None:
    """Give one's lease back early; nothing happens when it was lost already."""
    with store.write() as connection:
        if agent_row(connection, agent).fence == fence:
            _set(connection, agent, lease_holder=None, lease_until=None)


def require_fence(connection: Connection, agent: str, fence: int) -> None:
    """Raise ConflictError unless `fence` is the newest lease of the agent, inside the caller's transaction."""
    newest = agent_row(connection, agent).fence
    if newest != fence:
        raise ConflictError(f"lease {fence} of {agent} is not the newest ({newest}): drop this work and start again")


def agent_row(connection: Connection, agent: str) -> Row:
    """The agent's switch and lease, created on first use; the connection must be a write transaction."""
    query = select(agents).where(agents.c.agent == agent)
    row = connection.execute(query).first()
    if row is None:
        try:
            connection.execute(insert(agents).values(agent=agent, is_frozen=False, fence=0))
        except IntegrityError as error:
            raise ConflictError(f"somebody else set {agent} up at the same moment: try again") from error
        row = connection.execute(query).one()
    return row


def _set(connection: Connection, agent: str, **values: object) -> None:
    connection.execute(update(agents).where(agents.c.agent == agent).values(**values))


class LeaseKeeper:
    """Takes an agent's lease and renews it in a thread of its own, until `close`. ConflictError while another has it.

    Neither a training nor a server that hangs can then cost the lease.
    """

    def __init__(
        self,
        store: Store,
        agent: str,
        *,
        settings: dict[str, Any] | None = None,
        lease_s: float = LEASE_S,
        renew_s: float = RENEW_S,
    ) -> None:
        self._store, self._agent = store, agent
        self._lease_s, self._renew_s = lease_s, renew_s
        self._holder = f"{socket.gethostname()}:{os.getpid()}"
        self._stop = threading.Event()
        self._lost: ConflictError | None = None
        self.fence = acquire(store, agent, self._holder, lease_s, time.time(), is_alive, settings)
        self._thread = threading.Thread(target=self._run, name="cltrain-lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise ConflictError when somebody else has the lease by now."""
        if self._lost is not None:
            raise self._lost

    def renew(self) -> None:
        """Renew now, so that `check` is sure."""
        try:
            renew(self._store, self._agent, self._holder, self.fence, self._lease_s, time.time())
        except ConflictError as error:
            self._lost = error
        except Exception as error:  # a full disk or a store held too long passes, and the lease may still be ours
            log.warning("the lease was not renewed: %s", error)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(DataError):  # a store that cannot be written: the lease runs out by itself
            release_lease(self._store, self._agent, self.fence)

    def _run(self) -> None:
        while self._lost is None and not self._stop.wait(self._renew_s):
            self.renew()


def is_alive(holder: str) -> bool:
    """Whether a lease's holder may still run: a worker of this machine that was killed has no process any more."""
    host, _, pid = holder.rpartition(":")
    if host != socket.gethostname() or not pid.isdigit():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
