"""Who may work on an agent: one holder at a time, with a number that grows at every new lease (a fence).

A holder that slept through its lease is stopped by the number, whatever it still believes: every write that matters
checks the fence in its own transaction.
"""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import Connection, Row, insert, select, update
from sqlalchemy.exc import IntegrityError

from cltrain.errors import ConflictError
from cltrain.store.database import Store
from cltrain.store.schema import agents


def acquire(
    store: Store,
    agent: str,
    holder: str,
    ttl_s: float,
    now: float,
    is_alive: Callable[[str], bool] = lambda holder: True,
) -> int:
    """Take the lease for `ttl_s` seconds; returns its fence, larger than any before.

    `is_alive` may know that a holder is gone, whose lease then is not waited for. Raises ConflictError while another
    holder's lease runs, with who and for how long.
    """
    with store.write() as connection:
        row = agent_row(connection, agent)
        is_taken = row.lease_holder not in (None, holder) and row.lease_until is not None and row.lease_until > now
        if is_taken and is_alive(row.lease_holder):
            left = row.lease_until - now
            raise ConflictError(f"{agent} is being worked on by {row.lease_holder} for another {left:.0f} s")
        fence = int(row.fence) + 1
        _set(connection, agent, fence=fence, lease_holder=holder, lease_until=now + ttl_s)
        return fence


def renew(store: Store, agent: str, holder: str, fence: int, ttl_s: float, now: float) -> None:
    """Extend one's own lease. An expired one that nobody took is still one's own. Raises ConflictError when lost."""
    with store.write() as connection:
        require_fence(connection, agent, fence)
        if agent_row(connection, agent).lease_holder != holder:
            raise ConflictError(f"{holder} gave the lease of {agent} back: acquire it again")
        _set(connection, agent, lease_until=now + ttl_s)


def check(store: Store, agent: str, fence: int, now: float) -> None:
    """Raise ConflictError unless `fence` is the current lease of the agent and still runs."""
    with store.read() as connection:
        row = connection.execute(select(agents).where(agents.c.agent == agent)).first()
    if row is None or row.fence != fence or row.lease_holder is None:
        raise ConflictError(f"lease {fence} of {agent} was taken over: drop this work and start again")
    if row.lease_until is None or row.lease_until <= now:
        raise ConflictError(f"lease {fence} of {agent} ran out: renew it")


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
