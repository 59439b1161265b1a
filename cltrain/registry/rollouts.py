"""A candidate that is tried on live traffic before it serves: at most one per agent, beside an alias that did not move.

It ends in one of two ways: `aliases.move_alias_in` lets it serve, or `take_back_in` goes back to the incumbent,
whatever the reason. Every step is in the log of decisions. Needs no trainer and no server.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from sqlalchemy import Connection, Row, insert, select, update

from cltrain.errors import ConflictError
from cltrain.records import Alias
from cltrain.registry.approvals import refuse_withdrawn
from cltrain.registry.decisions import append
from cltrain.registry.lease import agent_row, require_fence
from cltrain.registry.releases import get_in, retire
from cltrain.store.database import Store
from cltrain.store.schema import aliases, rollout_outcomes, rollouts, screenings, updates
from cltrain.store.trials import is_open

OUTCOME = ("unit", "arm", "fault", "score")  # of one episode, or of one request that both answered
UnitOutcome = tuple[str, Literal["incumbent", "candidate"], bool, float | None]


@dataclass(frozen=True, slots=True)
class Rollout:
    """One that is open. `settings`: those it began with; `evidence`: what the last look found."""

    id: int
    agent: str
    kind: str
    incumbent: str
    release: str
    update: str
    alias_version: int
    raises_high_water: bool
    settings: dict[str, Any]
    step: int
    weight: float
    evidence: dict[str, Any]
    started_at: float


def read_open(store: Store, agent: str) -> Rollout | None:
    with store.read() as connection:
        return open_in(connection, agent)


def require_none(store: Store, agent: str) -> None:
    """Raise ConflictError while something is being tried."""
    if (found := read_open(store, agent)) is not None:
        raise ConflictError(
            f"{found.release} is tried as {found.kind} at {found.weight:g} of the traffic: it serves or goes back "
            "before the next update begins (`cltrain rollback` takes it back, `cltrain promote` lets it serve)"
        )


def open_in(connection: Connection, agent: str) -> Rollout | None:
    """The agent's open rollout, None where there is none."""
    columns = [rollouts.c[name] for name in Rollout.__dataclass_fields__]
    row = connection.execute(select(*columns).where(is_open(agent))).first()
    return None if row is None else Rollout(*row)


def start_in(
    connection: Connection,
    expected: Alias,
    *,
    release: str,
    update_id: str,
    settings: dict[str, Any],
    raises_high_water: bool,
    fence: int,
    now: float,
) -> None:
    """Try `release` beside what serves, in the caller's write transaction.

    Raises ConflictError when the lease or the alias moved, learning is frozen, another one is open, or what `release`
    read was quarantined or removed since.
    """
    agent = expected.agent
    require_fence(connection, agent, fence)
    serving = connection.execute(select(aliases.c.release, aliases.c.version).where(aliases.c.agent == agent)).one()
    if tuple(serving) != (expected.release, expected.version):
        raise ConflictError(f"{agent} serves {serving.release} (version {serving.version}) now: {release} is too late")
    switch = agent_row(connection, agent)
    if switch.is_frozen:
        raise ConflictError(f"{agent} is frozen ({switch.frozen_reason}): unfreeze it to try {release}")
    if (other := open_in(connection, agent)) is not None:
        raise ConflictError(f"{other.release} of {agent} is being tried already")
    refuse_withdrawn(connection, get_in(connection, release))
    values = {
        "agent": agent, "kind": settings["kind"], "incumbent": expected.release, "release": release,
        "update": update_id, "alias_version": expected.version, "raises_high_water": raises_high_water,
        "settings": settings, "step": 0, "weight": settings["weights"][0], "fence": fence, "state": "open",
        "evidence": {}, "started_at": now,
    }  # fmt: skip
    connection.execute(insert(rollouts).values(**values))
    begun = open_in(connection, agent)
    assert begun is not None
    _log(connection, begun, "begun", f"the gate said promote: tried as {settings['kind']}", now)


def step_up_in(connection: Connection, rollout: Rollout, *, reason: str, now: float) -> None:
    """The next of its weights, for what begins from now on."""
    step = rollout.step + 1
    grown = replace(rollout, step=step, weight=rollout.settings["weights"][step])
    values = {"step": step, "weight": grown.weight}
    connection.execute(update(rollouts).where(rollouts.c.id == rollout.id).values(**values))
    _log(connection, grown, "weight", reason, now)


def require_same(connection: Connection, rollout: Rollout, fence: int) -> None:
    """Raise ConflictError unless the lease is still `fence` and the rollout is open, at the same step."""
    require_fence(connection, rollout.agent, fence)
    found = open_in(connection, rollout.agent)
    if found is None or (found.id, found.step) != (rollout.id, rollout.step):
        raise ConflictError(f"{rollout.release} is not being tried any more, or at another weight")


def take_back_in(
    connection: Connection, agent: str, *, reason: str, now: float, is_to_blame: bool = False
) -> Rollout | None:
    """The one way back to the incumbent, whatever failed; None where nothing is being tried.

    New episodes get the incumbent at once, those that the candidate answers at their next turn. Its release is
    rejected.
    `is_to_blame`: what its update learned is quarantined; else it waits for another update.
    """
    found = open_in(connection, agent)
    if found is None:
        return None
    _close(connection, found, "back", reason, now)
    retire(connection, found.release, "rejected", now=now, reason=reason[:300])
    if is_to_blame:
        quarantine_learned(connection, agent, [found.release], now)
    _log(connection, found, "back", reason, now)
    return found


def settle_in(connection: Connection, agent: str, *, serving: str, now: float) -> None:
    """The alias moves to `serving`: what is being tried is promoted by that, or taken back."""
    found = open_in(connection, agent)
    if found is not None and found.release == serving:
        _close(connection, found, "promoted", None, now)
        _log(connection, found, "promoted", "it serves from here on", now)
    elif found is not None:
        take_back_in(connection, agent, reason=f"{serving} serves from here on", now=now)


def quarantine_learned(connection: Connection, agent: str, releases: Collection[str], now: float) -> int:
    """The records that the updates behind these releases learned or rehearsed are never learned again; how many."""
    behind = select(updates.c.id).where(updates.c.agent == agent, updates.c.candidate.in_(releases))
    learned = screenings.c["update"].in_(behind) & screenings.c.status.in_(("waiting", "learned", "replay"))
    values = {"status": "quarantined", "reason": "learned by an update that was rolled back", "changed_at": now}
    result = connection.execute(update(screenings).where(screenings.c.agent == agent, learned).values(**values))
    return int(result.rowcount)


# ---------------------------------------------------------------- what it is judged by


def add_outcomes_in(connection: Connection, rollout: int, outcomes: Sequence[UnitOutcome]) -> None:
    """Those that are new, in this order; none once the rollout is over."""
    state = select(rollouts.c.state).where(rollouts.c.id == rollout)
    if not outcomes or connection.scalar(state) != "open":
        return
    rows = [{"rollout": rollout, **dict(zip(OUTCOME, outcome, strict=True))} for outcome in outcomes]
    connection.execute(insert(rollout_outcomes).prefix_with("OR IGNORE", dialect="sqlite"), rows)


def outcomes_of(connection: Connection, rollout: int) -> list[Row]:
    """(arm, fault, score) in the order in which they are judged."""
    columns = (rollout_outcomes.c.arm, rollout_outcomes.c.fault, rollout_outcomes.c.score)
    query = select(*columns).where(rollout_outcomes.c.rollout == rollout).order_by(rollout_outcomes.c.id)
    return list(connection.execute(query))


def note_evidence_in(connection: Connection, rollout: Rollout, evidence: dict[str, Any]) -> Rollout:
    """Keep what a look found: for status and metrics, and so that the next worker goes on from there."""
    connection.execute(update(rollouts).where(rollouts.c.id == rollout.id).values(evidence=evidence))
    return replace(rollout, evidence=evidence)


def _close(connection: Connection, rollout: Rollout, state: str, reason: str | None, now: float) -> None:
    values = {"state": state, "reason": reason, "ended_at": now}
    connection.execute(update(rollouts).where(rollouts.c.id == rollout.id).values(**values))


def _log(connection: Connection, rollout: Rollout, outcome: str, reason: str, now: float) -> None:
    payload = {
        "outcome": outcome, "kind": rollout.kind, "release": rollout.release, "incumbent": rollout.incumbent,
        "weight": rollout.weight, "evidence": rollout.evidence, "reason": reason[:300],
    }  # fmt: skip
    append(connection, rollout.agent, "rollout", payload, now)
