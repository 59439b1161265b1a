"""A candidate on live traffic, from the gate's yes to the alias: its outcomes are collected and judged at every look,
its share grows, and it serves or goes back.

One look is one transaction, and everything is in the store: a worker that was killed is followed by one that goes on
from there. Needs no accelerator.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any, Literal

from sqlalchemy import Connection, Row, select

from cltrain.config_rollout import RolloutConfig
from cltrain.deploy import readiness
from cltrain.errors import ConflictError
from cltrain.experience.examples import judged, score_of
from cltrain.experience.faults import CUT
from cltrain.experience.reading import read_trajectories
from cltrain.gate.sequential import Outcome, Weighed, judge, weigh
from cltrain.records import Alias, LearningMode, Trajectory, Verdict
from cltrain.registry import aliases, approvals, releases, rollouts
from cltrain.registry.rollouts import Rollout
from cltrain.rooms import Rooms, desired, required_ready
from cltrain.store.schema import named_records, record_faults, records

Action = Literal["go on", "step up", "promote", "harm", "back"]
UNKNOWN = ("left", "away")  # nothing is known of the arm: the client hung up, or no replica held the release
HOUR_S = 3600.0
MAX_READ = 500  # episodes at one look


def look(rooms: Rooms) -> str | None:
    """Collect, judge and act, once; what was decided, None where nothing was or nothing is being tried.

    Raises ConflictError when the lease is lost, or the rollout ended meanwhile.
    """
    tried = rollouts.read_open(rooms.store, rooms.agent)
    if tried is None:
        return None
    settings, now = RolloutConfig.model_construct(**tried.settings), rooms.clock()  # checked as it began
    fresh, seq = _settled(rooms, tried, settings.settle_s, now) if tried.kind == "canary" else ([], 0)
    with rooms.store.read() as connection:
        known = [Outcome(*row) for row in rollouts.outcomes_of(connection, tried.id)]
    outcomes = [*known, *(outcome for _, outcome in fresh)]
    num_tried = sum(outcome.arm == "candidate" for outcome in outcomes)
    evidence = weigh(outcomes, settings.judged_by, settings.margin)
    began_with = tried.evidence.get("step_began_with", 0)
    barred = desired(rooms).barred  # no trusted key signed these: hashed here, where no write waits for it
    with rooms.store.write() as connection:
        rollouts.require_same(connection, tried, rooms.fence)
        try:
            _require_leave(rooms, tried, barred)
            approvals.refuse_withdrawn(connection, releases.get_in(connection, tried.release))
            readiness.require_ready(connection, rooms.server.urls, tried.release, required_ready(rooms))
            action, reason = next_action(settings, tried, evidence, num_tried, num_tried - began_with, now)
        except ConflictError as error:
            action, reason = "back", str(error)
        found = {
            "episodes": dict(Counter(outcome.arm for outcome in outcomes)),
            "metrics": [asdict(one) for one in evidence],
            "seq": seq,
            "step_began_with": num_tried if action == "step up" else began_with,
        }
        if action == "go on" and found == tried.evidence:
            return None
        rollouts.add_outcomes_in(connection, tried.id, [(unit, *outcome) for unit, outcome in fresh])
        tried = rollouts.note_evidence_in(connection, tried, found)
        _act(connection, rooms, tried, action, reason, now)
    if action == "go on":
        return None
    said = f"{tried.release} ({tried.kind}): {action}: {reason}"
    rooms.on_progress(said)
    return said


def _require_leave(rooms: Rooms, tried: Rollout, barred: Collection[str]) -> None:
    """Raise ConflictError where a worker that was started with other settings than it began under must not go on."""
    if (mode := rooms.config.agent.mode) is not LearningMode.AUTO:
        raise ConflictError(f"agent.mode is {mode}: only in auto is a candidate tried and promoted without a person")
    if tried.release in barred:
        raise ConflictError(f"{tried.release} is signed by none of the keys that are trusted now (signing)")


def next_action(
    settings: RolloutConfig,
    tried: Rollout,
    evidence: Sequence[Weighed],
    num_tried: int,
    num_at_weight: int,
    now: float,
) -> tuple[Action, str]:
    """What the evidence and the clock ask for. `num_tried`: outcomes of the candidate, so many `num_at_weight` of them.

    Harm goes back at once. Without harm the weight grows after `step_episodes`; at the last one it serves when it is
    shown to do no harm. When the time is over, too little evidence never passes.
    """
    verdict, reason = judge(evidence, settings.alpha)
    if verdict is Verdict.REJECT:
        return "harm", reason
    is_seen = num_at_weight >= settings.step_episodes
    if is_seen and tried.step + 1 < len(settings.weights):
        return "step up", f"no harm at {tried.weight:g}"
    if is_seen and verdict is Verdict.PROMOTE:
        return "promote", reason
    if now - tried.started_at < settings.max_hours * HOUR_S:
        return "go on", reason
    if settings.on_timeout == "promote" and num_tried >= settings.step_episodes:
        return "promote", f"no harm in {settings.max_hours:g} hours (rollout.on_timeout = 'promote'): {reason}"
    return "back", f"{settings.max_hours:g} hours are over: {reason}"


def _act(connection: Connection, rooms: Rooms, tried: Rollout, action: Action, reason: str, now: float) -> None:
    if action == "step up":
        rollouts.step_up_in(connection, tried, reason=reason, now=now)
    elif action in ("harm", "back"):
        rollouts.take_back_in(connection, rooms.agent, reason=reason, now=now, is_to_blame=action == "harm")
    elif action == "promote":
        then = Alias(rooms.agent, tried.incumbent, tried.alias_version, None, 0)
        aliases.move_alias_in(
            connection, rooms.agent, expected=then, to=tried.release, fence=rooms.fence, now=now,
            file_as=f"promoted as {tried.kind}", raises_high_water=tried.raises_high_water,
        )  # fmt: skip


def _settled(rooms: Rooms, tried: Rollout, settle_s: float, now: float) -> tuple[list[tuple[str, Outcome]], int]:
    """(record, outcome) of the episodes that settled since the last look, in the order in which their first answers
    were stored, and the last one's number. One that has not settled keeps later ones waiting: an order by outcome would
    favour the quick. Where a client hung up nothing is known, of either arm: whoever sees who answers could choose what
    is counted; nor where no replica held the release: others answer for that. A fault from before that is known."""
    last = int(tried.evidence.get("seq", 0))
    columns = (records.c.id, records.c.seq, records.c.created_at, records.c.release, records.c.end, records.c.is_mixed)
    is_faulty = records.c.id.in_(select(record_faults.c.record)).label("is_faulty")
    query = (
        select(*columns, is_faulty)
        .where(records.c.agent == rooms.agent, records.c.seq > last, records.c.created_at >= tried.started_at)
        .where(records.c.release.in_((tried.incumbent, tried.release)))
        .where(records.c.prefix.is_not(None))  # the gateway saw it: imported ones have none
        .where(records.c.id.not_in(select(named_records.c.record)))  # for these nobody drew lots
        .order_by(records.c.seq)
        .limit(MAX_READ)
    )
    rows: list[Any] = []
    with rooms.store.read() as connection:
        for row in connection.execute(query):
            if row.created_at > now - settle_s:
                break
            rows.append(row)
    # a branch is no episode of its own
    known = [row for row in rows if row.is_faulty or row.end not in UNKNOWN]
    whole = [row for row in known if not row.is_mixed and "~" not in row.id]
    read = {one.id: one for one in read_trajectories(rooms.store, rooms.agent, records_in=[row.id for row in whole])}
    found = [(row.id, _outcome(row, read[row.id], tried.release, settle_s)) for row in whole]
    return [(unit, outcome) for unit, outcome in found if outcome is not None], rows[-1].seq if rows else last


def _outcome(row: Row[Any], episode: Trajectory, candidate: str, settle_s: float) -> Outcome | None:
    """How an episode went, by what was said of it in its first seconds, however late it is looked at; None where nobody
    rated it and every answer was cut short. Where its last answer never came its score is missing: whatever was said is
    said of the rest."""
    arm: Literal["candidate", "incumbent"] = "candidate" if row.release == candidate else "incumbent"
    if row.end != "ok":
        return Outcome(arm, True)
    said = judged([given for given in episode.feedback if given.created_at <= row.created_at + settle_s])
    is_cut = all(generation.finish_reason == CUT for generation in episode.generations)
    if is_cut and said is None and not row.is_faulty:
        return None
    return Outcome(arm, row.is_faulty, None if said is None else score_of(said))
