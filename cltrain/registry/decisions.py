"""The log of decisions: append-only, each entry hashed over the one before it.

It holds names and numbers, never what people wrote. A cut-off tail cannot be seen from the inside: note the head that
`verify_chain` returns somewhere else if that matters.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, func, insert, select

from cltrain.errors import DataError
from cltrain.store.database import Store
from cltrain.store.schema import decisions

GENESIS = "0" * 64
MAX_TEXT = 500  # characters: a reason fits, an episode does not


@dataclass(frozen=True, slots=True)
class Entry:
    """One decision. `hash` covers the other fields and the previous entry's hash."""

    seq: int
    agent: str
    kind: str
    payload: dict[str, Any]
    at: float
    hash: str


class BrokenChainError(DataError):
    """The log is not the one that was written: an entry was changed, moved or removed."""


@dataclass(frozen=True, slots=True)
class Chain:
    """What `verify_chain` found: how many entries hang together, and the hash of the last."""

    num_entries: int
    head: str


def append(connection: Connection, agent: str, kind: str, payload: dict[str, Any], at: float) -> str:
    """Add one entry inside the caller's write transaction; returns its hash.

    Raises DataError for a payload that is no finite JSON or holds a text longer than 500 characters: names
    and numbers fit, content does not.
    """
    try:
        clean = json.loads(_canonical(payload))
    except (TypeError, ValueError) as error:
        raise DataError(f"the {kind} decision of {agent} is not plain JSON and cannot be logged: {error}") from None
    _refuse_content(clean, kind)
    newest = select(decisions.c.hash).order_by(decisions.c.seq.desc()).limit(1)
    previous = connection.execute(newest).scalar() or GENESIS
    entry_hash = _hash(previous, agent, kind, clean, float(at))
    connection.execute(
        insert(decisions).values(
            agent=agent, kind=kind, payload=clean, at=float(at), previous_hash=previous, hash=entry_hash
        )
    )
    return entry_hash


def read_decisions(store: Store, agent: str, *, kind: str | None = None) -> list[Entry]:
    """Every entry about one agent, oldest first."""
    with store.read() as connection:
        return entries_of(connection, agent, kind=kind)


def read_log(store: Store, agent: str, *, verify: bool, head: str | None) -> dict[str, Any]:
    """The entries about one agent and the log's head as plain JSON; see `Deployment.log`."""
    since = None if head is None else entries_since(store, head)
    chain = verify_chain(store) if verify or head is not None else None
    return {
        "agent": agent,
        "entries": [asdict(entry) for entry in read_decisions(store, agent)],
        "head": head_of(store) if chain is None else chain.head,
        "num_verified": None if chain is None else chain.num_entries,
        "num_since": since,
    }


def entries_of(connection: Connection, agent: str, *, kind: str | None = None) -> list[Entry]:
    query = select(decisions).where(decisions.c.agent == agent).order_by(decisions.c.seq)
    if kind is not None:
        query = query.where(decisions.c.kind == kind)
    return [Entry(r.seq, r.agent, r.kind, r.payload, r.at, r.hash) for r in connection.execute(query)]


def verify_chain(store: Store) -> Chain:
    """Recompute every hash. Raises BrokenChainError naming the first entry that was changed, moved or removed."""
    previous, count = GENESIS, 0
    with store.read() as connection:
        for row in connection.execute(select(decisions).order_by(decisions.c.seq)):
            if row.previous_hash != previous:
                raise BrokenChainError(
                    f"decision {row.seq} does not follow the one before it: an entry was removed or moved"
                )
            if row.hash != _hash(previous, row.agent, row.kind, row.payload, row.at):
                raise BrokenChainError(
                    f"decision {row.seq} ({row.kind} of {row.agent}) was changed after it was written"
                )
            previous, count = row.hash, count + 1
    return Chain(count, previous)


def head_of(store: Store) -> str:
    """The newest entry's hash, as it is written; `verify_chain` says whether it is right."""
    with store.read() as connection:
        return (
            connection.execute(select(decisions.c.hash).order_by(decisions.c.seq.desc()).limit(1)).scalar() or GENESIS
        )


def entries_since(store: Store, head: str) -> int:
    """How many entries were added since the log ended with that hash (or one that begins so, 12 digits at least).

    Raises BrokenChainError when no entry has it: the log was cut off or written anew. Whether the entries in between
    hang together is for `verify_chain` to say.
    """
    start = head.strip().lower()
    if len(start) < 12 or not set(start) <= set("0123456789abcdef"):
        raise DataError(f"{head!r} is no head of a log: give at least 12 of its hexadecimal digits")
    if GENESIS.startswith(start):
        start_seq = 0
    else:
        with store.read() as connection:
            query = select(decisions.c.seq).where(decisions.c.hash.startswith(start)).order_by(decisions.c.seq)
            found = connection.execute(query.limit(1)).scalar()
        if found is None:
            raise BrokenChainError(f"no decision has the hash {head}: the log was cut off or written anew since")
        start_seq = int(found)
    with store.read() as connection:
        query = select(func.count()).select_from(decisions).where(decisions.c.seq > start_seq)
        return int(connection.execute(query).scalar() or 0)


def _hash(previous: str, agent: str, kind: str, payload: dict[str, Any], at: float) -> str:
    return hashlib.sha256(_canonical([previous, agent, kind, payload, at]).encode()).hexdigest()


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _refuse_content(value: Any, kind: str) -> None:
    if isinstance(value, str) and len(value) > MAX_TEXT:
        raise DataError(
            f"a {kind} decision holds {len(value)} characters of text (limit {MAX_TEXT}): log names and numbers"
        )
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _refuse_content(part, kind)
