"""How one turn, one piece of feedback or one whole episode becomes rows, inside the caller's transaction."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, Table, bindparam, delete, exists, func, insert, or_, select, update

from cltrain.errors import ConflictError, DataError
from cltrain.experience.faults import NEVER_CAME
from cltrain.records import Feedback, Generation, Message, Split, Tool, Trajectory
from cltrain.store.schema import (
    earlier_tools,
    feedback,
    generations,
    named_records,
    record_faults,
    records,
    screenings,
    set_aside,
)

# Built once: making a statement costs more than running it.
STATE_OF_RECORD = select(records.c.prefix, records.c.status, records.c.is_mixed).where(records.c.id == bindparam("id"))
OWNER_OF_RECORD = select(records.c.agent, records.c.principal).where(records.c.id == bindparam("id"))
IS_BRANCH = records.c.id.between(bindparam("first"), bindparam("last"))
OWNER_OF_EPISODE = select(records.c.agent, records.c.principal).where(IS_BRANCH).limit(1)
RECORD_OF_GENERATION = select(generations.c.record).where(generations.c.id == bindparam("id"))
FAULT_OF_RECORD = select(record_faults.c.reason).where(record_faults.c.record == bindparam("id"))
SAID = select(
    feedback.c.target, feedback.c.score, feedback.c.text, feedback.c.correction, feedback.c.source, feedback.c.principal
).where(feedback.c.id == bindparam("id"))
EPISODE = select(records.c.agent, records.c.session, records.c.principal, records.c.release, records.c.payload).where(
    records.c.id == bindparam("id")
)

TOLD = ("reward", "chosen")  # what comes with an episode is feedback `<episode>:<name>`: an id that no client may give
BRANCH = re.compile(r"^(traj-[0-9a-f]{32})~[0-9a-f]+$")


class UnknownTarget(DataError):
    """Feedback names neither a record nor a generation of this store."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One answered (or failed) request of an episode, with the whole conversation it leaves behind."""

    record: str
    agent: str
    session: str
    principal: str
    release: str
    messages: tuple[Message, ...]  # the request's, then the answer when there is one
    producers: tuple[str | None, ...]
    tools: tuple[Tool, ...]
    prefix: str  # hash of `messages`
    after: str | None  # the stored record must still have this prefix, else the turn is kept as a branch; None: new
    generation: Generation | None  # None: nothing came, `end` says why
    end: str = "ok"
    fault: str | None = None  # of the answer's form, by the tools that its own request offered
    tools_before: tuple[Tool, ...] | None = None  # offered by the request that this one goes on from
    is_mixed: bool = False
    is_done: bool = False
    is_named: bool = False  # the client asked for the release, not for the agent


def episode_of(record: str) -> str:
    """The episode that a record belongs to; requests of one session that do not extend each other are its branches."""
    branch = BRANCH.match(record)
    return branch.group(1) if branch else record


def write_turn(connection: Connection, turn: Turn, split: Split, now: float) -> str:
    """Store a turn; returns the record it went to: a branch where somebody else went on from `turn.after` first."""
    row = connection.execute(STATE_OF_RECORD, {"id": turn.record}).first()
    record = turn.record
    if turn.generation is None and row is not None:  # nothing came: the conversation stays as it was
        if row.prefix == turn.after:
            connection.execute(update(records).where(records.c.id == record).values(end=turn.end, updated_at=now))
        _note_fault(connection, record, turn)
        return record
    if row is not None and row.prefix != turn.after:
        mark = turn.generation.id if turn.generation else turn.prefix
        record, row = f"{episode_of(record)}~{hashlib.sha256(mark.encode()).hexdigest()[:12]}", None
    values = {
        "release": turn.release,
        "status": "ended" if turn.is_done or (row is not None and row.status == "ended") else "open",
        "is_mixed": turn.is_mixed or (row is not None and row.is_mixed),
        "end": turn.end,
        "prefix": turn.prefix,
        "payload": {"messages": turn.messages, "producers": turn.producers, "tools": turn.tools},
        "updated_at": now,
    }
    if row is not None:
        connection.execute(update(records).where(records.c.id == record).values(**values))
    else:
        origin = {"id": record, "agent": turn.agent, "session": turn.session, "principal": turn.principal}
        _insert(connection, records, {**origin, "split": split, "created_at": now, **values})
        if turn.is_named:
            _insert(connection, named_records, {"record": record})
    if turn.generation is not None:
        write_generation(connection, replace(turn.generation, record=record), now)
        if turn.tools_before not in (None, turn.tools):
            earlier = {"record": record, "before": turn.generation.turn, "tools": turn.tools_before}
            _insert(connection, earlier_tools, earlier)
    _note_fault(connection, record, turn)
    if turn.is_done:
        end_episode(connection, record, now)
    return record


def _note_fault(connection: Connection, record: str, turn: Turn) -> None:
    """A later turn takes the place of what the record says of this one: its fault is kept beside it."""
    fault = turn.end if turn.end in NEVER_CAME else turn.fault
    if fault is not None and connection.scalar(FAULT_OF_RECORD, {"id": record}) is None:
        _insert(connection, record_faults, {"record": record, "reason": fault})


def write_generation(connection: Connection, generation: Generation, now: float) -> None:
    _insert(
        connection,
        generations,
        {
            "id": generation.id,
            "record": generation.record,
            "turn": generation.turn,
            "release": generation.release,
            "prompt_ids": generation.prompt_ids,
            "completion_ids": generation.completion_ids,
            "logprobs": generation.logprobs,
            "finish_reason": generation.finish_reason,
            "created_at": now,
        },
    )


def write_feedback(connection: Connection, given: Feedback, now: float, only_of: str | None = None) -> bool:
    """Store feedback on a generation, a record, or an episode of which perhaps only branches were stored.

    On an episode it is said of each of its branches (see `reading`). `only_of`: the principal whose records may be
    judged; another's is unknown. False where the same is stored already. Raises UnknownTarget, and ConflictError where
    something else is stored under its id: not what, for it may be another's.
    """
    stored = connection.execute(SAID, {"id": given.id}).first()
    if stored is not None:
        if stored == (given.target, given.score, given.text, given.correction, given.source, given.principal):
            return False
        raise ConflictError(f"feedback {given.id!r} is already stored and says something else: use a new id")
    record = connection.scalar(RECORD_OF_GENERATION, {"id": given.target}) or given.target
    owner = (
        connection.execute(OWNER_OF_RECORD, {"id": record}).first()
        or connection.execute(OWNER_OF_EPISODE, _branches(record)).first()
    )
    if owner is None or only_of not in (None, owner.principal):
        raise UnknownTarget(f"no record or generation {given.target!r}: use x-cltrain-record or x-cltrain-trajectory")
    _insert(
        connection,
        feedback,
        {
            "id": given.id,
            "agent": owner.agent,
            "target": given.target,
            "record": record,
            "score": given.score,
            "text": given.text,
            "correction": given.correction,
            "source": given.source,
            "principal": given.principal,
            "created_at": given.created_at or now,
        },
    )
    return True


def write_trajectory(connection: Connection, trajectory: Trajectory) -> bool:
    """Store a whole episode; False where the same is stored already. Raises ConflictError where its id is another's.

    Answers of an imported episode whose producer was unknown get the one that the same episode comes with now, and it
    is screened anew: that too is True.
    """
    stored = connection.execute(EPISODE, {"id": trajectory.id}).first()
    if stored is not None:
        return _named(connection, stored, trajectory)
    _insert(
        connection,
        records,
        {
            "id": trajectory.id,
            "agent": trajectory.agent,
            "session": trajectory.session,
            "principal": trajectory.principal,
            "split": trajectory.split,
            "release": trajectory.release,
            "status": "open" if trajectory.end == "open" else "ended",
            "is_mixed": trajectory.is_mixed,
            "end": "ok" if trajectory.end == "open" else trajectory.end,
            "payload": {
                "messages": trajectory.messages,
                "producers": trajectory.producers,
                "tools": trajectory.tools,
            },
            "created_at": trajectory.created_at,
            "updated_at": trajectory.created_at,
        },
    )
    for generation in trajectory.generations:
        write_generation(connection, replace(generation, record=trajectory.id), trajectory.created_at)
    for given in trajectory.feedback:
        write_feedback(connection, given, trajectory.created_at)
    return True


def _named(connection: Connection, stored: Any, given: Trajectory) -> bool:
    """Whether this episode names producers that the stored one lacks; then they are stored. Raises ConflictError."""
    if stored.agent != given.agent:
        raise ConflictError(f"{given.id!r} is taken: use a new id")  # not by whom: it may be another tenant
    payload = json.loads(json.dumps({"messages": given.messages, "tools": given.tools}))
    ids = [f"{given.id}:{name}" for name in TOLD]
    told = {said.id: (said.score, said.correction) for said in given.feedback if said.id in ids}
    known_of = {id_: said for id_ in ids if (said := connection.execute(SAID, {"id": id_}).first()) is not None}
    pairs = list(zip(stored.payload["producers"], given.producers, strict=False))
    is_same = (
        (stored.session, stored.principal) == (given.session, given.principal)
        and {name: stored.payload[name] for name in payload} == payload
        and {id_: (said.score, said.correction) for id_, said in known_of.items()} == told
        and all(known == named or (known is None and stored.release is None) for known, named in pairs)
    )
    if not is_same:
        raise ConflictError(f"{given.id!r} is already stored for another episode: use a new id")
    if all(known == named for known, named in pairs):
        return False
    changed = {**stored.payload, "producers": given.producers}
    connection.execute(update(records).where(records.c.id == given.id).values(payload=changed))
    connection.execute(delete(screenings).where(screenings.c.record == given.id, screenings.c.status == "unusable"))
    return True


def write_aside(
    connection: Connection, agent: str, source: str, line: int, reason: str, raw: bytes, now: float
) -> bool:
    """The stored source begins with the agent: one file may be imported for several."""
    source = f"{agent}/{source}"
    if connection.scalar(select(exists().where(set_aside.c.source == source, set_aside.c.line == line))):
        return False
    _insert(connection, set_aside, {"source": source, "line": line, "reason": reason, "raw": raw, "created_at": now})
    return True


def num_set_aside(connection: Connection, agent: str) -> int:
    """How many lines were set aside for this agent."""
    is_ours = set_aside.c.source.startswith(f"{agent}/", autoescape=True)
    return connection.scalar(select(func.count()).select_from(set_aside).where(is_ours)) or 0


def end_episode(connection: Connection, record: str, now: float) -> int:
    """End the open records of the episode that this record or generation belongs to; returns how many there were."""
    record = connection.scalar(RECORD_OF_GENERATION, {"id": record}) or record
    is_of_episode = or_(records.c.id == record, IS_BRANCH)
    row = connection.execute(select(records.c.agent, records.c.session).where(is_of_episode), _branches(record)).first()
    if row is None:
        return 0
    episode = episode_of(record)
    is_open = (records.c.agent == row.agent) & (records.c.session == row.session) & (records.c.status == "open")
    ids = [i for i in connection.scalars(select(records.c.id).where(is_open)) if episode_of(i) == episode]
    for part in parts(ids):
        connection.execute(update(records).where(records.c.id.in_(part)).values(status="ended", updated_at=now))
    return len(ids)


def _branches(record: str) -> dict[str, str]:
    """The range of ids that the branches of this episode have."""
    return {"first": f"{record}~", "last": f"{record}~g"}  # after ~ come hex digits


def _insert(connection: Connection, table: Table, values: dict[str, Any]) -> None:
    """What is None is left out: a JSON column would store the text `null`, which IS NOT NULL."""
    connection.execute(insert(table), {name: value for name, value in values.items() if value is not None})


def parts(ids: Sequence[str], size: int = 400) -> Iterator[Sequence[str]]:
    """SQLite takes a limited number of parameters in one statement."""
    return (ids[start : start + size] for start in range(0, len(ids), size))
