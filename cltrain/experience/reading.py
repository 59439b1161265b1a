"""Records, generations and feedback read back as trajectories."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, cast

from sqlalchemy import Connection, Row, Select, func, or_, select

from cltrain.errors import DataError
from cltrain.experience.rows import episode_of, parts
from cltrain.records import Feedback, Generation, Split, Tool, Trajectory
from cltrain.store.database import Store
from cltrain.store.families import of_family
from cltrain.store.schema import earlier_tools, feedback, generations, records


def read_trajectory(connection: Connection, record_id: str) -> Trajectory:
    """One record with its generations and all feedback so far. Raises DataError for an unknown id."""
    rows = connection.execute(select(records).where(records.c.id == record_id)).all()
    if not rows:
        raise DataError(f"no record {record_id!r} in the store")
    return _trajectories(connection, rows)[0]


def last_seq(store: Store) -> int:
    """The newest record's, 0 where there is none."""
    with store.read() as connection:
        return connection.scalar(select(func.max(records.c.seq))) or 0


def read_trajectories(
    store: Store,
    agent: str,
    *,
    records_in: Sequence[str] | None = None,
    split: Split | None = None,
    is_ended: bool | None = None,
    idle_since: float | None = None,
    after_seq: int = 0,
    limit: int | None = None,
    with_tenants: bool = False,
) -> list[Trajectory]:
    """An agent's records in the order they began (`seq`), each with generations and feedback.

    `records_in` keeps these ids only; `idle_since` those whose last turn was at or before that time; `limit` the first.
    `with_tenants`: those of the agent's tenants as well.
    """
    is_ours = of_family(records.c.agent, agent) if with_tenants else records.c.agent == agent
    chosen = select(records).where(is_ours, records.c.seq > after_seq).order_by(records.c.seq)
    if split is not None:
        chosen = chosen.where(records.c.split == split)
    if is_ended is not None:
        chosen = chosen.where(records.c.status == ("ended" if is_ended else "open"))
    if idle_since is not None:
        chosen = chosen.where(records.c.updated_at <= idle_since)
    with store.read() as connection:
        rows = list(_chosen_rows(connection, chosen, records_in))
        return _trajectories(connection, sorted(rows, key=lambda row: row.seq)[:limit])


def _chosen_rows(connection: Connection, chosen: Select[Any], ids: Sequence[str] | None) -> Iterator[Row[Any]]:
    if ids is None:
        yield from connection.execute(chosen)
        return
    for part in parts(sorted(set(ids))):
        yield from connection.execute(chosen.where(records.c.id.in_(part)))


def _trajectories(connection: Connection, rows: Sequence[Row[Any]]) -> list[Trajectory]:
    answers: defaultdict[str, list[Generation]] = defaultdict(list)
    said: defaultdict[str, list[Feedback]] = defaultdict(list)
    tools: defaultdict[str, list[tuple[int, tuple[Tool, ...]]]] = defaultdict(list)
    for part in parts([row.id for row in rows]):
        is_of_part = earlier_tools.c.record.in_(part)
        for e in connection.execute(select(earlier_tools).where(is_of_part).order_by(earlier_tools.c.before)):
            tools[e.record].append((e.before, tuple(e.tools)))
        for g in connection.execute(
            select(generations)
            .where(generations.c.record.in_(part))
            .order_by(generations.c.turn, generations.c.created_at)
        ):
            answers[g.record].append(_generation(g))
        branches: defaultdict[str, list[str]] = defaultdict(list)
        for i in part:
            branches[episode_of(i)].append(i)
        about_part = or_(feedback.c.record.in_(part), feedback.c.target.in_(list(branches)))
        for f in connection.execute(select(feedback).where(about_part).order_by(feedback.c.created_at, feedback.c.id)):
            for i in branches.get(f.target, [f.record]):  # said of the episode: said of each of its branches
                said[i].append(_feedback(f))
    return [_trajectory(row, answers[row.id], said[row.id], tools[row.id]) for row in rows]


def _trajectory(
    row: Row[Any],
    answers: Sequence[Generation],
    said: Sequence[Feedback],
    earlier: Sequence[tuple[int, tuple[Tool, ...]]],
) -> Trajectory:
    return Trajectory(
        id=row.id,
        agent=row.agent,
        session=row.session,
        principal=row.principal,
        messages=tuple(row.payload["messages"]),
        producers=tuple(row.payload["producers"]),
        tools=tuple(row.payload.get("tools", ())),
        generations=tuple(answers),
        feedback=tuple(said),
        earlier_tools=tuple(earlier),
        split=cast(Split, row.split),
        release=row.release,
        is_mixed=row.is_mixed,
        end="open" if row.status == "open" else row.end,
        created_at=row.created_at,
        seq=row.seq,
    )


def _generation(row: Row[Any]) -> Generation:
    return Generation(
        id=row.id,
        record=row.record,
        turn=row.turn,
        release=row.release,
        prompt_ids=_maybe_tuple(row.prompt_ids),
        completion_ids=_maybe_tuple(row.completion_ids),
        logprobs=_maybe_tuple(row.logprobs),
        finish_reason=row.finish_reason,
    )


def _feedback(row: Row[Any]) -> Feedback:
    return Feedback(
        id=row.id,
        target=row.target,
        score=row.score,
        text=row.text,
        correction=row.correction,
        source=row.source,
        principal=row.principal,
        created_at=row.created_at,
    )


def _maybe_tuple(values: list[Any] | None) -> tuple[Any, ...] | None:
    return None if values is None else tuple(values)
