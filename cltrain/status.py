"""What an owner sees first: what serves, what waits and why, what was decided. Answers within a second."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, func, select

from cltrain import launch, tenants
from cltrain.config import Config
from cltrain.config_tenants import shared_of
from cltrain.deploy import readiness
from cltrain.errors import ConflictError, DataError
from cltrain.experience import rows, waiting
from cltrain.models.digest import changed_anchors
from cltrain.monitoring.outbox import lags
from cltrain.records import Verdict
from cltrain.registry import aliases, approvals, decisions, lease, rollouts
from cltrain.registry.tenants import incumbent
from cltrain.store import schema as s
from cltrain.store.database import Store

NUM_SHOWN = 5  # newest updates and releases
MANY_REJECTED = 3
EXPLAINED = ("unusable", "quarantined")
HOW_BACK = {"quarantined": " (`cltrain unquarantine --dry-run` lists them)"}


def read_status(config: Config, store: Store) -> dict[str, Any]:
    """The state of one agent as plain JSON, with its newest updates and releases.

    `mode`: the running worker's, which may be another than `config_mode`; `awaits`: candidates that `approve` would
    serve, oldest first;
    `replicas`: how each stands to what serves, as the worker found it last (see `deploy.readiness.standings`);
    `items`: of the gate, asked so far and retired;
    `immature`: ended episodes that wait for feedback or for `mature_after_s`; `ready`: those that the next update may
    read; `why`: the most frequent reason of what is unusable or quarantined; `late_feedback`: pieces that came after
    their episode was learned from; `sinks`: events that each has not kept yet.
    """
    agent, now = config.agent.name, time.time()
    is_worked_on = lease.lease_until(store, agent) > now
    theirs = lease.settings_of(store, shared_of(agent)) if is_worked_on else None
    mode = str(config.agent.mode)
    with store.read() as connection:
        alias = connection.execute(select(s.aliases).where(s.aliases.c.agent == agent)).first()
        switch = connection.execute(select(s.agents).where(s.agents.c.agent == agent)).first()

        def newest(table: Any) -> list[Any]:
            query = select(table).where(table.c.agent == agent).order_by(table.c.number.desc()).limit(NUM_SHOWN)
            return list(connection.execute(query))

        def count(table: Any, *where: Any) -> int:
            return int(connection.scalar(select(func.count()).select_from(table).where(*where)) or 0)

        is_asked, is_worn = s.item_uses.c.agent == agent, s.item_uses.c.uses >= config.gate.max_uses
        is_ready = waiting.is_unread(agent, is_mature=waiting.mature(now, config.experience.mature_after_s))
        standing = select(s.screenings.c.status, func.count()).where(s.screenings.c.agent == agent).group_by("status")
        screened = {row[0]: int(row[1]) for row in connection.execute(standing)}
        state: dict[str, Any] = {
            "agent": agent,
            "mode": theirs["agent"]["mode"] if theirs else mode,
            "config_mode": mode,
            "frozen": bool(switch and switch.is_frozen),
            "frozen_reason": switch.frozen_reason if switch else None,
            "release": alias.release if alias else None,
            "previous": alias.previous if alias else None,
            "anchor": alias.anchor if alias else None,
            "high_water": alias.high_water if alias else None,
            "tried": _tried(rollouts.open_in(connection, agent)),
            "records": count(s.records, s.records.c.agent == agent),
            "ready": count(waiting.WITH_SCREENING, is_ready),
            "screenings": screened,
            "why": {status: _most_said(connection, agent, status) for status in EXPLAINED if screened.get(status)},
            "feedback": count(s.feedback, s.feedback.c.agent == agent),
            "set_aside": rows.num_set_aside(connection, agent),
            "items": {"asked": count(s.item_uses, is_asked), "retired": count(s.item_uses, is_asked, is_worn)},
            "sinks": lags(connection),
            "updates": [
                {
                    "number": row.number,
                    "id": row.id,
                    "state": row.state,
                    "verdict": row.verdict,
                    "candidate": row.candidate,
                    "reason": "; ".join((row.summary or {}).get("reasons", ())[:1]),
                }
                for row in newest(s.updates)
            ],
            "releases": [
                {"name": row.name, "status": row.status, "created_at": row.created_at} for row in newest(s.releases)
            ],
        }
        last = connection.execute(
            select(s.audits).where(s.audits.c.agent == agent).order_by(s.audits.c.id.desc())
        ).first()
        state["replicas"] = readiness.standings(connection, agent, config.server.replicas)
        state["audit"] = last and {
            "number": last.id,
            "outcome": last.outcome,
            "release": last.release,
            "at": last.finished_at,
            "reason": "; ".join(last.summary["reasons"][:1]),
        }
    try:
        chain_state, num_decisions = "unbroken", decisions.verify_chain(store).num_entries
    except DataError as error:
        chain_state, num_decisions = f"BROKEN: {error}", -1
    return {
        **state,
        "awaits": _awaiting(store, agent),
        "immature": waiting.num_immature(store, agent, config.experience.mature_after_s, now),
        "late_feedback": waiting.num_late_feedback(store, agent),
        "tenants": tenants.standing_of(config, store, now),
        "notices": [
            f"the anchors {file} were changed since they were pinned: no update begins until they are restored"
            for file in changed_anchors(config.state_dir / "anchors")
        ]
        + _rejected(state["updates"]),
        "decisions": num_decisions,
        "chain": chain_state,
        "processes": {
            "gateway": launch.health_of(launch.gateway_url(config)),
            "server": launch.health_of_servers(config),
            "worker": "up" if is_worked_on else "down",
        },
    }


def _rejected(updates: Sequence[dict[str, Any]]) -> list[str]:
    """What an owner should look at: good records are lost where a feed, a suite or a bound is wrong."""
    verdicts = [update["verdict"] for update in updates if update["verdict"] is not None]
    num_rejected = next((i for i, verdict in enumerate(verdicts) if verdict != Verdict.REJECT), len(verdicts))
    if num_rejected < MANY_REJECTED:
        return []
    return [
        f"the last {num_rejected} updates were rejected, and what they learned is quarantined: see their pages; "
        "`cltrain unquarantine --update NUMBER` gives it back"
    ]


def lines_of(state: dict[str, Any]) -> list[str]:
    """`read_status` for a terminal."""
    frozen = f"  FROZEN: {state['frozen_reason']}" if state["frozen"] else ""
    said = f"{state['feedback']} pieces of feedback, {state['set_aside']} lines set aside"
    screened = ", ".join(f"{count} {status}" for status, count in sorted(state["screenings"].items()))
    worn = state["items"]["retired"]
    is_other = state["mode"] != state["config_mode"]
    mode = f"{state['mode']}{' of the running worker, ' + state['config_mode'] + ' by this config' if is_other else ''}"
    *older, newest = state["awaits"] or [None]
    return [
        f"agent      {state['agent']}  mode {mode}{frozen}",
        *(f"notice     {notice}" for notice in state["notices"]),
        f"serving    {state['release'] or 'nothing yet'}",
        *(f"awaits     {name}: cltrain approve {name}" for name in older),
        *([f"awaits     {newest}: cltrain approve"] if newest else []),
        *([f"trying     {_trying(state['tried'])}"] if state["tried"] else []),
        f"before     {state['previous'] or '-'}   anchor {state['anchor'] or '-'}",
        f"records    {state['records']} episodes, {said}",
        f"waiting    {state['immature']} episodes for feedback; {state['late_feedback']} pieces came too late",
        f"learning   {state['ready']} episodes for the next update; looked at: {screened or 'none yet'}",
        *(f"{status:<10} most often: {reason}{HOW_BACK.get(status, '')}" for status, reason in state["why"].items()),
        *([f"items      {worn} of {state['items']['asked']} that gates asked are retired"] if worn else []),
        *(f"replica    {url}: {standing}" for url, standing in state["replicas"].items()),
        f"processes  {', '.join(f'{name} {up}' for name, up in state['processes'].items())}",
        f"decisions  {state['decisions']} in the log, chain {state['chain']}",
        f"audit      {_audited(state['audit'])}",
        *tenants.lines_of(state["tenants"]),
        *(f"lag        {name}: {lag} events not kept yet" for name, lag in state["sinks"].items() if lag),
        *(f"release    {r['name']:<34} {r['status']:<11} {_time(r['created_at'])}" for r in state["releases"]),
        *(
            f"update {u['number']:>4}  {u['verdict'] or u['state']:<8} {u['candidate'] or '':<34} {u['reason']}"
            for u in state["updates"]
        ),
    ]


def _awaiting(store: Store, agent: str) -> list[str]:
    """Who waits for a person's yes, and was compared with what serves now."""
    found = []
    for name in approvals.waiting_for_yes(store, agent):
        with suppress(ConflictError):
            serving = incumbent(store, agent, aliases.read_alias(store, agent).release)
            approvals.require_judged(store, agent, name, serving)
            found.append(name)
    return found


def _tried(found: rollouts.Rollout | None) -> dict[str, Any] | None:
    """A candidate on live traffic beside what serves; `metrics` as gate.sequential.Weighed."""
    if found is None:
        return None
    return {
        "kind": found.kind, "release": found.release, "weight": found.weight, "step": found.step + 1,
        "steps": len(found.settings["weights"]), "since": found.started_at,
        "episodes": {arm: found.evidence.get("episodes", {}).get(arm, 0) for arm in ("incumbent", "candidate")},
        "metrics": found.evidence.get("metrics", []),
    }  # fmt: skip


def _trying(tried: dict[str, Any]) -> str:
    seen = [f"{m['metric']}: e-value of harm {m['harm']:.2g}, of none {m['no_harm']:.2g}" for m in tried["metrics"]]
    how = f"{tried['kind']} at {tried['weight']:g} (step {tried['step']} of {tried['steps']})"
    counts = f"{tried['episodes']['candidate']} of its episodes beside {tried['episodes']['incumbent']}"
    return f"{tried['release']} as {how} since {_time(tried['since'])}: {'; '.join([counts, *seen])}"


def _audited(audit: dict[str, Any] | None) -> str:
    if audit is None:
        return "none yet (cltrain audit)"
    reason = f": {audit['reason']}" if audit["reason"] else ""
    return f"{audit['outcome']} on {_time(audit['at'])}, of {audit['release']}{reason}"


def _most_said(connection: Connection, agent: str, status: str) -> str:
    """One reason of those that are the same but for names and numbers and are given most often."""
    of_status = (s.screenings.c.agent == agent) & (s.screenings.c.status == status)
    told = [
        (waiting.without_rules(str(row.reason)), row.record)
        for row in connection.execute(select(s.screenings.c.record, s.screenings.c.reason).where(of_status))
    ]
    kinds = [re.sub(r"\d+", "#", reason.replace(record, "#")) for reason, record in told]
    most, _ = Counter(kinds).most_common(1)[0]
    return told[kinds.index(most)][0]


def _time(at: float) -> str:
    return datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M")
