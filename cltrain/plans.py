"""What an update will read, fixed before it trains and kept until it is concluded: the difference between a crash that
costs seconds and one that costs a decision. The rows lie beside the trainer's checkpoint and go when the update ends.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select
from sqlalchemy import update as change

from cltrain import __version__
from cltrain.config import Config
from cltrain.errors import DataError
from cltrain.experience import window
from cltrain.experience.screens import Suspicion
from cltrain.experience.waiting import rules_mark
from cltrain.monitoring.outbox import emit
from cltrain.monitoring.rows import settings_of, tallies, update_event
from cltrain.records import (
    Alias,
    Aside,
    Candidate,
    Decision,
    Example,
    LearningMode,
    Release,
    TokenRow,
    Verdict,
    is_claim,
)
from cltrain.registry.approvals import quarantined_in
from cltrain.registry.decisions import append
from cltrain.store.database import Store
from cltrain.store.schema import update_progress, update_reads, updates
from cltrain.trainer.methods import method_of

ROWS_FILE = "rows.json"
CONCLUDED = ("done", "discarded")
DOUBTFUL = "doubted and not rehearsed"


@dataclass(frozen=True)
class Plan:
    """One update's inputs: `fresh` is learned, `replay` rehearsed, all else of the window is `set_aside`."""

    id: str
    agent: str
    number: int
    parent: str
    alias: Alias  # as it stood when the plan was made: its version is what the swap compares
    is_trial: bool
    seed: int
    work_dir: Path
    window: tuple[tuple[str, str, str], ...]  # (record, stratum, principal)
    fresh: tuple[TokenRow, ...]
    replay: tuple[TokenRow, ...]
    set_aside: tuple[Aside, ...]
    notes: tuple[tuple[str, str], ...]  # record, and what to say of how it was learned
    suspicious: tuple[Suspicion, ...]
    refusal: str | None
    manifest: dict[str, Any]

    @property
    def taught(self) -> frozenset[str]:
        """Strata that make up at least an eighth of what is shown to be right: a stray mislabelled record teaches
        nothing, and what was wrong names no skill that should be better now."""
        counts = Counter(row.stratum for row in self.fresh if is_claim(row))
        return frozenset(name for name, count in counts.items() if 8 * count >= counts.total())

    @property
    def shared(self) -> dict[str, list[str]]:
        """Whose records it reads, by stratum, where tenants propose them (sharing.py): they stay as they are."""
        return dict(self.manifest.get("shared") or {})


def open_plan(
    store: Store,
    config: Config,
    alias: Alias,
    parent: Release,
    *,
    examples: Sequence[Example],
    fresh: Sequence[TokenRow],
    replay: Sequence[TokenRow],
    set_aside: Sequence[Aside],
    notes: Sequence[tuple[str, str]] = (),
    suspicious: Sequence[Suspicion],
    refusal: str | None,
    base_digest: str,
    anchors_digest: str,
    fence: int,
    is_trial: bool,
    request: int | None = None,
    shared: Mapping[str, Sequence[str]] | None = None,
    now: float,
) -> Plan:
    """Number the update and write its plan down: rows to disk and synced first, then the update's row.

    `request` is the one that asked for it: should this process die, the next one knows what to answer.
    """
    agent = config.agent.name
    with store.read() as connection:
        last = connection.execute(select(func.max(updates.c.number)).where(updates.c.agent == agent)).scalar()
    number = int(last or 0) + 1
    key = f"{config.seed}/{agent}/{number}/{parent.name}"
    plan_id = f"{agent}-u{number:06d}"
    rows = {"fresh": [asdict(row) for row in fresh], "replay": [asdict(row) for row in replay]}
    encoded = json.dumps(rows, sort_keys=True).encode()
    manifest = {
        "agent": agent,
        "number": number,
        "parent": parent.name,
        "parent_digest": parent.digest,
        "alias": asdict(alias),
        "seed": int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") * 16,
        "config": config.digest(),
        "base": base_digest,
        "dtype": config.base.dtype,
        "anchors": anchors_digest,
        "rows": hashlib.sha256(encoded).hexdigest(),
        "window": [(e.record, e.stratum, e.principal) for e in examples],
        "set_aside": [asdict(aside) for aside in set_aside],
        "rules": rules_mark(config.agent.learn_from, config.agent.tools_allowed, config.trainer.objectives),
        "notes": list(notes),
        "suspicious": [asdict(s) for s in suspicious],
        "refusal": refusal,
        "is_trial": is_trial,
        "request": request,
        "shared": shared,
        "settings": settings_of(config, method_of(config.trainer).remember),
        "versions": {"cltrain": __version__, "python": platform.python_version()},
    }
    work_dir = config.state_dir / "updates" / plan_id
    shutil.rmtree(work_dir, ignore_errors=True)  # an attempt that never became a row
    try:
        work_dir.mkdir(parents=True)
    except OSError as error:
        raise DataError(f"cannot make {work_dir}: {error.strerror}; nothing was lost, free some space") from None
    _write_synced(work_dir / ROWS_FILE, encoded)
    with store.write() as connection:
        connection.execute(
            insert(updates).values(
                id=plan_id,
                agent=agent,
                number=number,
                state="training",
                parent=parent.name,
                fence=fence,
                mode="trial" if is_trial else str(config.agent.mode),
                manifest=manifest,
                started_at=now,
            )
        )
        connection.execute(insert(update_progress).values(update=plan_id, num_starts=1))
    return plan_of(plan_id, manifest, work_dir, rows)


def judging(store: Store, plan: Plan, candidate: str) -> None:
    """Note which release this update made, before any server hears of it."""
    with store.write() as connection:
        connection.execute(change(updates).where(updates.c.id == plan.id).values(state="judging", candidate=candidate))


def close_plan(
    connection: Connection,
    plan: Plan,
    candidate: Candidate | None,
    summary: dict[str, Any],
    decision: Decision,
    *,
    learned: Sequence[TokenRow],
    is_served: bool,
    now: float,
) -> None:
    """The update's verdict, its reads, its records' new standing and its event, in the transaction that swaps."""
    connection.execute(
        change(updates)
        .where(updates.c.id == plan.id)
        .values(
            state="done", verdict=summary["verdict"], candidate=summary["candidate"], summary=summary, finished_at=now
        )
    )
    connection.execute(delete(update_reads).where(update_reads.c["update"] == plan.id))
    if candidate is not None:
        connection.execute(
            insert(update_reads),
            [{"update": plan.id, "step": r.step, "slot": r.slot, "record": r.record} for r in candidate.reads],
        )
    if not plan.is_trial and not plan.shared:
        _file_records(connection, plan, learned, decision, summary["doubtful"], is_served=is_served, now=now)
    payload = {key: summary[key] for key in ("update", "verdict", "candidate", "is_served")}
    append(connection, plan.agent, "verdict", payload, now)
    event = update_event(summary, decision, candidate.bounds if candidate else None)
    emit(connection, plan.agent, "update", event, now)


def noted_candidate(connection: Connection, plan: Plan) -> str | None:
    """The release that this update made last, perhaps before an interruption."""
    name: str | None = connection.execute(select(updates.c.candidate).where(updates.c.id == plan.id)).scalar()
    return name


def answer_to(store: Store, request: int) -> dict[str, Any] | None:
    """The summary of the concluded update that was made for a request, whose worker died before it could say so."""
    asked = updates.c.manifest["request"].as_integer() == request
    query = select(updates.c.summary).where(asked, updates.c.state.in_(CONCLUDED)).order_by(updates.c.number.desc())
    with store.read() as connection:
        summary: dict[str, Any] | None = connection.execute(query).scalars().first()
    return summary


def manifest_of(plan: Plan, candidate: Candidate, attempt: int, learned: Sequence[TokenRow]) -> dict[str, Any]:
    """What is sealed beside the adapter: how it was made, from which records, and how far it moved."""
    kept = ("agent", "parent", "parent_digest", "config", "base", "dtype", "anchors", "rows", "suspicious", "versions")
    return {
        **{key: plan.manifest[key] for key in kept if key in plan.manifest},
        **({"shared": plan.shared} if plan.shared else {}),
        "update": plan.id,
        "settings": plan.manifest.get("settings", {}),
        "seed": plan.seed + attempt,
        "learned": [row.record for row in learned],
        "objectives": dict(Counter(row.objective for row in learned)),
        "taught": sorted(plan.taught),
        "replayed": sorted({row.record for row in plan.replay}),
        "bounds": asdict(candidate.bounds),
        "metrics": candidate.metrics,
        "num_steps": candidate.num_steps,
    }


def summary_of(
    plan: Plan,
    decision: Decision,
    *,
    candidate: str | None,
    made: Candidate | None,
    learned: Sequence[TokenRow],
    proof: str | None,
    seconds: dict[str, float],
    mode: LearningMode,
    serving: str,
    doubtful: Collection[str] = (),
    is_served: bool,
    now: float,
) -> dict[str, Any]:
    """One update as plain JSON: what the command line, the report, wandb and the outbox show of it."""
    reasons = list(decision.reasons)
    if plan.is_trial:
        reasons[0] = f"{reasons[0]} (a trial: thrown away)"
    elif decision.verdict is Verdict.PROMOTE and not is_served:
        reasons[0] = f"{reasons[0]} (mode {mode}: nothing moved)"
    swap_s = seconds.get("swap")
    return {
        "update": plan.id,
        "id": plan.id,
        "agent": plan.agent,
        "number": plan.number,
        "verdict": str(decision.verdict),
        "reasons": reasons,
        "reason": reasons[0],
        "mode": "trial" if plan.is_trial else str(mode),
        "state": "done",
        "parent": plan.parent,
        "candidate": candidate,
        "serving": serving,
        "is_served": is_served,
        "num_window": len(plan.window),
        "num_kept": len({row.record for row in learned}),
        "is_refused": plan.refusal is not None,
        "suspicious": [asdict(s) for s in plan.suspicious],
        "window": {
            **tallies(plan.window, [row.record for row in learned]),
            "objectives": dict(Counter(row.objective for row in learned)),
            "set_aside": dict(Counter(aside.reason.split(":")[0] for aside in plan.set_aside)),
            "notes": dict(Counter([*(note.split(":")[0] for _, note in plan.notes), *(DOUBTFUL for _ in doubtful)])),
            "suspicious": [asdict(s) for s in plan.suspicious],
            "is_refused": plan.refusal is not None,
            "reason": plan.refusal,
        },
        "replay": dict(Counter(row.stratum for row in plan.replay)),
        "doubtful": sorted(doubtful),
        "shared": plan.shared,
        "bounds": asdict(made.bounds) if made else None,
        "metrics": made.metrics if made else {},
        "proof": proof,
        "timings": seconds,
        "swap_ms": None if not is_served or swap_s is None else round(1000 * (swap_s + seconds.get("load", 0.0)), 2),
        "decision": json.loads(json.dumps(asdict(decision))),
        "num_missing": decision.num_missing,
        "forecast_s": decision.forecast_s,
        "facts": {
            "seed": str(plan.seed),
            "config": plan.manifest["config"][:12],
            "base": plan.manifest["base"][:12],
            "anchors": plan.manifest["anchors"][:12],
        },
        "settings": plan.manifest.get("settings", {}),
        "finished_at": now,
    }


def _file_records(
    connection: Connection,
    plan: Plan,
    learned: Sequence[TokenRow],
    decision: Decision,
    doubtful: Collection[str],
    *,
    is_served: bool,
    now: float,
) -> None:
    """Where each record of the window goes: where it was set aside to, or with the others by the verdict."""
    aside = {one.record: one for one in plan.set_aside}
    claims = {row.record for row in learned if is_claim(row)}
    if is_served:
        window.forget_rehearsal(connection, plan.agent, doubtful, reason=f"update {plan.number}: {DOUBTFUL}", now=now)
    began_at = connection.execute(select(updates.c.started_at).where(updates.c.id == plan.id)).scalar_one()
    barred = quarantined_in(connection, [record for record, _, _ in plan.window])
    for record, stratum, _ in plan.window:
        if record in barred:  # by a rollback, since it was read: that stays
            continue
        one = aside.get(record)
        if one is None:
            is_sure = record not in doubtful
            status = window.standing(decision, is_right=record in claims, is_sure=is_sure, is_served=is_served)
            reason = f"update {plan.number}: {decision.verdict}{'' if is_sure else ', ' + DOUBTFUL}"
            window.mark(connection, plan.agent, record, status, now=now, reason=reason, stratum=stratum, update=plan.id)
        elif one.status == "unusable":  # as of when it was read: what was said since may revive it
            reason = one.reason + plan.manifest["rules"]
            window.mark(connection, plan.agent, record, one.status, now=began_at, reason=reason, stratum=stratum)
        else:
            window.mark(connection, plan.agent, record, one.status, now=now, reason=one.reason, stratum=stratum)
    for record in aside.keys() - {record for record, _, _ in plan.window}:  # scrubbed from what is rehearsed
        one = aside[record]
        window.forget_rehearsal(connection, plan.agent, [record], reason=one.reason, now=now, status=one.status)


def suspicions_of(manifest: dict[str, Any]) -> tuple[Suspicion, ...]:
    """What the scan suspected of the window behind a plan or a release."""
    return tuple(
        Suspicion(**{**s, "records": tuple(s["records"]), "principals": tuple(s["principals"])})
        for s in manifest.get("suspicious", ())
    )


def plan_of(plan_id: str, manifest: dict[str, Any], work_dir: Path, rows: dict[str, Any]) -> Plan:
    """A plan from what was written down of it: the update's manifest, and its rows as they lie in `work_dir`."""
    return Plan(
        id=plan_id,
        agent=manifest["agent"],
        number=manifest["number"],
        parent=manifest["parent"],
        alias=Alias(**manifest["alias"]),
        is_trial=manifest["is_trial"],
        seed=manifest["seed"],
        work_dir=work_dir,
        window=tuple((record, stratum, principal) for record, stratum, principal in manifest["window"]),
        fresh=tuple(map(_token_row, rows["fresh"])),
        replay=tuple(map(_token_row, rows["replay"])),
        set_aside=tuple(Aside(**aside) for aside in manifest["set_aside"]),
        notes=tuple((record, note) for record, note in manifest.get("notes", ())),
        suspicious=suspicions_of(manifest),
        refusal=manifest["refusal"],
        manifest=manifest,
    )


def _token_row(values: dict[str, Any]) -> TokenRow:
    """The row that `asdict` and JSON made lists and dictionaries of."""
    restored: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            value = _token_row(value)
        restored[name] = tuple(value) if isinstance(value, list) else value
    return TokenRow(**restored)


def _write_synced(file: Path, content: bytes) -> None:
    try:
        with file.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        handle = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise DataError(f"cannot write {file}: {error.strerror}; nothing was lost, free some space") from None
