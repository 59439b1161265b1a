"""The audit: what serves now, looked at as a whole, whoever let it serve and however long ago.

The log and the alias, the sealed files and their bounds, what the server answers with, canaries, character, weights,
phrases that were flagged once, how it stands against base, high-water mark and anchor on items of the pool, what the
detectors see in those answers, and what moves between the agents of the store. An alarm acts first and is written down
then; a check that fails to measure is an error and never a pass.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import insert, select

from cltrain import inspection, trends
from cltrain.config import Config
from cltrain.contagion import look_at_contagion
from cltrain.errors import ConflictError
from cltrain.gate.standing import compare, means
from cltrain.records import Check, Code, Release, Verdict
from cltrain.registry import aliases, releases
from cltrain.registry.decisions import append
from cltrain.registry.lease import require_fence
from cltrain.rooms import Rooms
from cltrain.store import schema as s
from cltrain.store.database import Store

OUTCOMES = (  # the worst verdict of a check decides
    (Verdict.REJECT, "alarm"), (Verdict.ERROR, "error"), (Verdict.HOLD, "warning"), (Verdict.PROMOTE, "ok"),
)  # fmt: skip
SPENT = 0.5  # of the drift budget: from here on every release that begins to serve is audited
NOT_THE_RELEASE = ("decision log", "alias", "server")  # checks whose alarm no rollback can answer
AGAIN_S = 3600.0  # after an audit that could not measure

log = logging.getLogger(__name__)

Measure = Callable[[], list[Check]]


def due(store: Store, config: Config, now: float) -> str | None:
    """Why an audit is due: `move` (half of the drift budget is spent, and what serves began to after the last audit),
    `timer` (`gate.audit_hours` are over), or None. One that could not measure is tried again after an hour."""
    agent = config.agent.name
    ours = select(s.audits).where(s.audits.c.agent == agent).order_by(s.audits.c.id.desc())
    with store.read() as connection:
        alias = connection.execute(select(s.aliases).where(s.aliases.c.agent == agent)).first()
        if alias is None:
            return None
        last = connection.execute(ours.limit(1)).first()
        good = connection.execute(ours.where(s.audits.c.outcome != "error").limit(1)).first()
        serving = releases.get_in(connection, alias.release)
        base_at = connection.execute(
            select(s.releases.c.created_at).where(s.releases.c.agent == agent, s.releases.c.number == 0)
        ).scalar()
    if last is not None and last.outcome == "error" and now - last.finished_at < AGAIN_S:
        return None
    was_seen = good is not None and good.release == serving.name and good.started_at >= alias.changed_at
    if is_half_spent(serving) and not was_seen:
        return "move"
    hours = config.gate.audit_hours
    since = good.finished_at if good is not None else base_at
    return "timer" if hours is not None and since is not None and now - since >= 3600 * hours else None


def is_half_spent(release: Release) -> bool:
    """Whether any distance from the base is at half of its limit, as sealed."""
    bounds = release.manifest.get("bounds") or {}
    return any(bounds[name] >= SPENT * bounds[f"{name}_limit"] for name in inspection.DRIFTS if name in bounds)


def run_audit(rooms: Rooms, *, trigger: str) -> dict[str, Any]:
    """Look at everything, act on an alarm as `gate.on_alarm` says, write it down; returns what was found.

    Plain JSON: `outcome` ok, warning, alarm or error (not everything could be measured and nothing is known to be bad),
    `reasons` and their `codes`, `checks`, `scores` (group -> mean of what serves and of each reference), `action`,
    `trends` (see cltrain.trends). Raises DataError when it cannot be written down.
    """
    started = rooms.clock()
    marks = aliases.read_references(rooms.store, rooms.agent)
    serving = releases.get(rooms.store, marks.incumbent)
    scores: dict[str, dict[str, float]] = {}

    def suites() -> list[Check]:
        rooms.evidence.read_suites()
        return []

    def compared() -> list[Check]:
        standing = inspection.standing(rooms, marks, seed=int(started))
        scores.update(means(standing) if standing.items else {})
        return [*compare(standing, rooms.config.gate), *inspection.signs(rooms, serving, standing)]

    looks: list[tuple[str, Measure]] = [
        ("decision log", lambda: inspection.decision_log(rooms)),
        ("alias", lambda: inspection.alias(rooms, serving)),
        ("files", lambda: inspection.files(rooms, serving, is_recomputed=trigger == "asked")),
        ("server", lambda: inspection.server(rooms, serving)),
        ("suites", suites),
        ("canaries", lambda: inspection.canaries(rooms, serving)),
        ("character", lambda: inspection.character(rooms, serving, marks)),
        ("spectrum", lambda: inspection.spectrum(rooms, serving)),
        ("trigger probes", lambda: inspection.triggers(rooms, serving, seed=int(started))),
        ("items", compared),
        ("vault", lambda: inspection.vault(rooms, serving)),
        ("other agents", lambda: look_at_contagion(rooms.store, rooms.rehearsal, rooms.evidence.character.probes)),
    ]
    checks = [check for name, look in looks for check in _measured(name, look)]
    outcome = outcome_of(checks)
    worst = [check for verdict, _ in OUTCOMES[:3] for check in checks if check.verdict is verdict]
    action = _act(rooms, marks.incumbent, worst) if outcome == "alarm" else None
    summary = {
        "agent": rooms.agent, "release": serving.name, "trigger": trigger, "outcome": outcome,
        "reasons": [f"{check.name}: {check.reason}" for check in worst], "codes": [str(check.code) for check in worst],
        "checks": [{**asdict(check), "verdict": str(check.verdict), "code": str(check.code)} for check in checks],
        "scores": scores, "action": action, "started_at": started, "finished_at": rooms.clock(),
    }  # fmt: skip
    number = _write(rooms.store, summary)
    found = [trends.as_json(trend) for trend in trends.read_trends(rooms.store, rooms.config)]
    return {"audit": number, **summary, "trends": found}


def outcome_of(checks: Sequence[Check]) -> str:
    verdicts = {check.verdict for check in checks}
    return next(outcome for verdict, outcome in OUTCOMES if verdict in verdicts or verdict is Verdict.PROMOTE)


def _measured(name: str, look: Measure) -> list[Check]:
    try:
        return look()
    except Exception as error:  # servers, disks and memory fail in every way there is; none of them is a pass
        log.warning("the audit could not look at the %s", name, exc_info=True)
        return [Check(name, Code.OUTAGE, Verdict.ERROR, f"not measured: {type(error).__name__}: {str(error)[:300]}")]


def _act(rooms: Rooms, audited: str, worst: Sequence[Check]) -> str:
    """Freeze learning, roll back, or only report; returns what was done. A rollback is for what the release itself is
    to blame for; where there is nothing before it, or it does not serve any more, learning is frozen instead."""
    alarms = [check for check in worst if check.verdict is Verdict.REJECT]
    reason = f"audit: {alarms[0].name}: {alarms[0].reason}"[:300]
    wanted, now = rooms.config.gate.on_alarm, rooms.clock()
    with rooms.store.read() as connection:
        require_fence(connection, rooms.agent, rooms.fence)  # who lost the lease acts on nothing
    if wanted == "report":
        return "reported"
    is_to_blame = any(check.name not in NOT_THE_RELEASE for check in alarms)
    if wanted == "rollback" and is_to_blame:
        try:
            done = aliases.rollback(rooms.store, rooms.agent, expected=audited, now=now, reason=reason)
            return f"rolled back to {done.alias.release}, learning frozen"
        except ConflictError as error:
            log.warning("the audit could not roll back: %s", error)
    if aliases.frozen_reason(rooms.store, rooms.agent) is not None:
        return "learning was frozen already"
    aliases.freeze(rooms.store, rooms.agent, now=now, reason=reason)
    return "learning frozen"


def _write(store: Store, summary: dict[str, Any]) -> int:
    """The audit's row and its entry in the log of decisions; returns its number."""
    row = {key: summary[key] for key in ("agent", "release", "trigger", "outcome", "started_at", "finished_at")}
    with store.write() as connection:
        made = connection.execute(insert(s.audits).values(summary=summary, **row)).inserted_primary_key
        assert made is not None
        number = int(made[0])
        payload = {key: summary[key] for key in ("release", "trigger", "outcome", "action")}
        payload |= {"audit": number, "codes": sorted(set(summary["codes"]))}
        append(connection, summary["agent"], "audit", payload, summary["finished_at"])
    return number
