"""What is asked of the running worker: rows that it alone answers, and a wait that ends when nobody will."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import insert, select, update

from cltrain.errors import OF_EXIT_CODE, DataError, ServerError
from cltrain.registry.lease import lease_until
from cltrain.store.database import Store
from cltrain.store.schema import requests

GONE_S = 20.0  # as long as a worker that was started again may take until it has the lease
POLL_S = 0.05


def post(store: Store, agent: str, kind: str, options: dict[str, Any], now: float) -> int:
    """Leave a request for the worker; returns its number."""
    with store.write() as connection:
        row = {"agent": agent, "kind": kind, "options": options, "created_at": now}
        result = connection.execute(insert(requests).values(**row))
        assert result.inserted_primary_key is not None
        return int(result.inserted_primary_key[0])


def outcome_of(store: Store, request: int) -> dict[str, Any] | None:
    """What the worker answered; None as long as it has not."""
    with store.read() as connection:
        outcome: dict[str, Any] | None = connection.scalar(select(requests.c.outcome).where(requests.c.id == request))
    return outcome


def withdraw(store: Store, request: int) -> None:
    """Nobody waits for it any more: a worker that has not begun with it leaves it."""
    unanswered = (requests.c.id == request) & requests.c.outcome.is_(None)
    with store.write() as connection:
        outcome = {"error": "withdrawn: the asker gave up"}
        connection.execute(update(requests).where(unanswered).values(outcome=outcome))


def wait_for(
    store: Store,
    agent: str,
    request: int,
    *,
    wait_s: float,
    on_progress: Callable[[str], None],
    gone_s: float = GONE_S,
) -> dict[str, Any]:
    """The answer to a request, which is withdrawn when there is none.

    Raises what the worker answered if that is an error; ServerError after `wait_s` seconds, and once nobody has had the
    agent's lease for `gone_s` seconds.
    """
    deadline = time.monotonic() + wait_s
    gone_at: float | None = None
    try:
        while (outcome := outcome_of(store, request)) is None:
            now = time.monotonic()
            if now > deadline:
                raise ServerError(f"the worker did not answer request {request} within {wait_s:g} s; see its log")
            if lease_until(store, agent) > time.time():
                gone_at = None
            elif gone_at is None:
                gone_at = now
                on_progress(f"the worker's lease ran out: waiting {gone_s:g} s for it, or for another worker")
            elif now - gone_at > gone_s:
                raise ServerError(
                    f"no worker answers for {agent} any more: it ended, or it cannot write its store (see "
                    "logs/worker.log and `cltrain doctor`). An update that it had begun is concluded by the next one"
                )
            time.sleep(POLL_S)
    except BaseException:
        with contextlib.suppress(DataError):  # a disk that is full: the worker leaves it when it has become too old
            withdraw(store, request)
        raise
    if "error" in outcome:
        kind = OF_EXIT_CODE.get(outcome.get("exit_code", 0), ServerError)
        raise kind(f"the worker could not do it: {outcome['error']}")
    return outcome
