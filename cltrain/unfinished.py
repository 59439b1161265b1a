"""What a crash left of an update: whether it may carry on, what it was told before, and how it is discarded whole.

An update that ends its own process again and again (too little memory, a broken driver) would do so forever: it is
started twice and then discarded.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, insert, select
from sqlalchemy import update as change

from cltrain import sharing
from cltrain.config import Config
from cltrain.experience import window
from cltrain.monitoring.outbox import emit
from cltrain.monitoring.report import read_decision
from cltrain.monitoring.rows import update_event
from cltrain.plans import CONCLUDED, ROWS_FILE, Plan, plan_of, summary_of
from cltrain.records import Code, Decision, LearningMode, Verdict
from cltrain.registry import aliases
from cltrain.registry.decisions import append
from cltrain.registry.lease import require_fence
from cltrain.registry.releases import retire
from cltrain.registry.tenants import incumbent
from cltrain.store.database import Store
from cltrain.store.families import of_family
from cltrain.store.schema import screenings, update_progress, updates

MAX_STARTS = 2


@dataclass(frozen=True, slots=True)
class Interrupted:
    """An update that no process concluded; `obstacle` says why it must be discarded, None: it may carry on."""

    plan: Plan
    num_starts: int
    obstacle: str | None


def interrupted(store: Store, config: Config, *, base_digest: str, anchors_digest: str) -> Iterator[Interrupted]:
    """Updates that no process concluded, oldest first, each looked at when it is its turn.

    Under another configuration, base or anchors than an update began with it may not carry on: its manifest, which is
    sealed with what it makes, names the old ones.
    What concluded updates left on disk, because a crash came before it was removed, is removed here.
    """
    query = select(updates).where(updates.c.agent == config.agent.name, updates.c.state.in_(("training", "judging")))
    with store.read() as connection:
        found = connection.execute(query.order_by(updates.c.number)).all()
        concluded = select(updates.c.id).where(updates.c.agent == config.agent.name, updates.c.state.in_(CONCLUDED))
        for plan_id in connection.execute(concluded).scalars():
            shutil.rmtree(config.state_dir / "updates" / plan_id, ignore_errors=True)
    for row in found:
        ruling = sharing.stricter(config) if row.manifest.get("shared") else config
        present = {"config": ruling.digest(), "base": base_digest, "anchors": anchors_digest}
        work_dir = config.state_dir / "updates" / row.id
        try:
            encoded = (work_dir / ROWS_FILE).read_bytes()
        except OSError:
            encoded = b""
        has_rows = hashlib.sha256(encoded).hexdigest() == row.manifest["rows"]
        rows = json.loads(encoded) if has_rows else {"fresh": [], "replay": []}
        plan = plan_of(row.id, row.manifest, work_dir, rows)
        with store.read() as connection:
            starts = select(update_progress.c.num_starts).where(update_progress.c["update"] == row.id)
            num_starts = int(connection.execute(starts).scalar() or 1)
        lost = None if has_rows else "its rows were lost in a crash"
        obstacle = lost or _change(plan, present) or _obstacle(store, plan, row.started_at, num_starts)
        yield Interrupted(plan, num_starts, obstacle)


def count_start(store: Store, plan: Plan) -> None:
    """One more process carries on with this update: written down first, because it may end that process too."""
    with store.write() as connection:
        starts = update_progress.c.num_starts
        here = update_progress.c["update"] == plan.id
        changed = connection.execute(change(update_progress).where(here).values(num_starts=starts + 1))
        if changed.rowcount == 0:  # begun by a version that did not count
            connection.execute(insert(update_progress).values(update=plan.id, num_starts=2))


def note_rejection(store: Store, plan: Plan, decision: Decision) -> None:
    """Keep what the gate said of a first attempt before a second one begins."""
    said = json.loads(json.dumps(asdict(decision)))
    with store.write() as connection:
        here = update_progress.c["update"] == plan.id
        if connection.execute(change(update_progress).where(here).values(rejection=said)).rowcount == 0:
            connection.execute(insert(update_progress).values(update=plan.id, num_starts=1, rejection=said))


def rejection_of(store: Store, plan: Plan) -> Decision | None:
    """What `note_rejection` kept, None where no first attempt was rejected so far."""
    with store.read() as connection:
        said = connection.execute(
            select(update_progress.c.rejection).where(update_progress.c["update"] == plan.id)
        ).scalar()
    return None if said is None else read_decision(said)


def discard(store: Store, left: Interrupted, *, mode: LearningMode, fence: int, now: float) -> dict[str, Any]:
    """Forget an update whole; its records wait for the next one. Returns its summary, like that of any other."""
    plan, reason = left.plan, f"discarded: {left.obstacle}"
    decision = Decision(Verdict.ERROR, (reason,), (), codes=(Code.OUTAGE,))
    with store.write() as connection:
        require_fence(connection, plan.agent, fence)
        candidate = connection.execute(select(updates.c.candidate).where(updates.c.id == plan.id)).scalar_one()
        serving = aliases.serving_in(connection, plan.agent)
        said = summary_of(
            plan, decision, candidate=candidate, made=None, learned=(), proof=None, seconds={}, mode=mode,
            serving=serving, is_served=False, now=now,
        )  # fmt: skip
        summary = {**said, "state": "discarded"}
        connection.execute(
            change(updates)
            .where(updates.c.id == plan.id)
            .values(state="discarded", verdict=summary["verdict"], summary=summary, finished_at=now)
        )
        if candidate is not None:
            retire(connection, candidate, "rejected", now=now, reason=reason[:300])
        if left.num_starts >= MAX_STARTS and not plan.is_trial and not plan.shared:
            _set_back(connection, plan, reason, now)
        append(connection, plan.agent, "discard", {"update": plan.id, "reason": left.obstacle}, now)
        emit(connection, plan.agent, "update", update_event(summary, decision, None), now)
    shutil.rmtree(plan.work_dir, ignore_errors=True)
    return summary


def _change(plan: Plan, present: dict[str, str]) -> str | None:
    changed = [name for name, digest in present.items() if plan.manifest[name] != digest]
    return f"{', '.join(changed)} changed since it began" if changed else None


def _obstacle(store: Store, plan: Plan, started_at: float, num_starts: int) -> str | None:
    serving = aliases.read_alias(store, plan.agent)
    if (now := incumbent(store, plan.agent, serving.release)) != plan.parent:
        return f"{now} serves now, not {plan.parent}"
    if serving.version != plan.alias.version:
        return f"{now} serves again, but the alias moved or learning was frozen since"
    if num_starts >= MAX_STARTS:
        return f"it was started {num_starts} times and never ended; the worker's log may say why (out of memory?)"
    read = {record for record, _, _ in plan.window} | {row.record for row in plan.replay}
    is_ours = of_family(screenings.c.agent, plan.agent)
    query = select(screenings).where(is_ours, screenings.c.status.in_(("quarantined", "unusable")))
    with store.read() as connection:
        for row in connection.execute(query):
            # a window may hold what was unusable before it got new feedback, but nothing that was quarantined
            if row.record in read and (row.status == "quarantined" or row.changed_at > started_at):
                return f"record {row.record}, which it reads, is {row.status} by now"
    return None


def _set_back(connection: Connection, plan: Plan, reason: str, now: float) -> None:
    """Records that nothing was said of yet count as looked at: new ones must come in before they are tried again."""
    known = set(connection.scalars(select(screenings.c.record).where(screenings.c.agent == plan.agent)))
    for record, stratum, _ in plan.window:
        if record not in known:
            window.mark(connection, plan.agent, record, "waiting", now=now, reason=reason, stratum=stratum)
