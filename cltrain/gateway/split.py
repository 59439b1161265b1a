"""Which new episodes, or which requests, a candidate that is tried on live traffic gets."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, bindparam, select

from cltrain.deploy.readiness import is_ready_somewhere
from cltrain.store.schema import rollouts

OPEN = select(rollouts.c.id, rollouts.c.kind, rollouts.c.release, rollouts.c.incumbent, rollouts.c.weight).where(
    rollouts.c.agent == bindparam("agent"), rollouts.c.state == "open"
)  # built once: making a statement costs more than running it


@dataclass(frozen=True, slots=True)
class Tried:
    """A candidate beside the alias. `is_ready`: somebody proved it and answers."""

    rollout: int
    kind: str
    release: str
    incumbent: str
    weight: float
    is_ready: bool


def read_tried(connection: Connection, agent: str, urls: Sequence[str]) -> Tried | None:
    row = connection.execute(OPEN, {"agent": agent}).first()
    return None if row is None else Tried(*row, is_ready=is_ready_somewhere(connection, row.release, urls))


def takes(tried: Tried, secret: bytes, unit: str) -> bool:
    """Whether this episode or request is one of the candidate's share: by a keyed hash, so that no client can choose.
    What a smaller weight takes, a larger one takes as well."""
    digest = hmac.new(secret, f"{tried.rollout}/{unit}".encode(), hashlib.sha256).digest()
    return int.from_bytes(digest[:8], "big") < tried.weight * 2**64
