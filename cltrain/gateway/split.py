"""Which new episodes, or which requests, a candidate that is tried on live traffic gets."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, Float, bindparam, select

from cltrain.deploy.readiness import is_ready_somewhere
from cltrain.store.schema import agents, rollouts
from cltrain.store.trials import is_open

UNWATCHED_S = 60.0  # after the worker's lease ran out: one that is begun anew in time goes on
NOW = bindparam("now", type_=Float)
WATCHED = (  # built once: making a statement costs more than running it
    select(rollouts.c.id, rollouts.c.kind, rollouts.c.release, rollouts.c.incumbent, rollouts.c.weight)
    .join(agents, agents.c.agent == rollouts.c.agent)
    .where(is_open(bindparam("agent")), agents.c.lease_until > NOW - UNWATCHED_S)
    .where(rollouts.c.started_at > NOW - 3600.0 * rollouts.c.settings["max_hours"].as_float())
)


@dataclass(frozen=True, slots=True)
class Tried:
    """A candidate beside the alias. `is_ready`: somebody proved it and answers."""

    rollout: int
    kind: str
    release: str
    incumbent: str
    weight: float
    is_ready: bool


def read_tried(connection: Connection, agent: str, urls: Sequence[str], now: float) -> Tried | None:
    """None where nothing is tried, or nobody would take it back: the worker is gone, or its time is over."""
    row = connection.execute(WATCHED, {"agent": agent, "now": now}).first()
    return None if row is None else Tried(*row, is_ready=is_ready_somewhere(connection, row.release, urls))


def takes(tried: Tried, secret: bytes, unit: str) -> bool:
    """Whether this episode or request is one of the candidate's share: by a keyed hash, so that no client can choose.
    What a smaller weight takes, a larger one takes as well."""
    digest = hmac.new(secret, f"{tried.rollout}/{unit}".encode(), hashlib.sha256).digest()
    return int.from_bytes(digest[:8], "big") < tried.weight * 2**64
