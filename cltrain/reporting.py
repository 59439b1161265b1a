"""Pages and sinks of one deployment: what the store holds now, handed to monitoring."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sqlalchemy import func, select

from cltrain import trends
from cltrain.config import Config
from cltrain.errors import DataError
from cltrain.experience.lanes import lane_of
from cltrain.experience.reading import read_trajectories
from cltrain.experience.verify import text_of
from cltrain.monitoring import report
from cltrain.monitoring.outbox import Sink
from cltrain.monitoring.wandb_sink import WandbSink
from cltrain.records import BoundReport, Example, Message, Trajectory, Verdict
from cltrain.registry.decisions import read_decisions
from cltrain.registry.tenants import incumbent_in
from cltrain.store.database import Store
from cltrain.store.schema import agents, aliases, audits, decisions, releases, updates

SHOWN = 8  # records that the page of an update shows
AUDITS_SHOWN = 10
MAX_TEXT = 300  # characters of each of their texts
SAYS = {"success": "good score", "correction": "correction", "critique": "critique", "failure": "bad score"}


def write_report(store: Store, config: Config, number: int | None) -> Path:
    """The page of one update, or of the whole run with one page per update behind it; all as it stands now."""
    mark, facts = _last_decision(store), _facts(store, config)
    chosen = [update for update in facts if number is None or update["number"] == number]
    if number is not None and not chosen:
        last = facts[-1]["number"] if facts else None
        raise DataError(f"{config.agent.name} has no update {number}; the last is {last}")
    for update in chosen:
        _write_update(store, config, update)
    return _page(config, number) if number is not None else _write_run(store, config, facts, mark)


def refresh(store: Store, config: Config) -> None:
    """Write again what is not true any more; nothing where nothing was decided since the run's page was written."""
    mark = _last_decision(store)  # before all else is read: it never claims what is not on the page
    if report.mark_of(_home(config) / "index.html") == mark:
        return
    facts = _facts(store, config)
    for update in facts:
        if report.mark_of(_page(config, update["number"])) != _mark(config, update):
            _write_update(store, config, update)
    _write_run(store, config, facts, mark)


def sinks(config: Config) -> list[Sink]:
    """Where events go beside the store."""
    if config.monitoring.wandb == "off":
        return []
    return [
        WandbSink(
            config.state_dir, agent=config.agent.name, project=config.monitoring.project, mode=config.monitoring.wandb
        )
    ]


def _write_update(store: Store, config: Config, update: dict[str, Any]) -> None:
    bounds = BoundReport(**update["bounds"]) if update.get("bounds") else None
    decision = report.read_decision(update["decision"]) if update.get("decision") else None
    known = {**update, "taught": _taught(store, config, update), "as_of": time.time()}
    report.update_page(
        _page(config, update["number"]), known, decision, bounds, options=config.options(), run_page="index.html",
        mark=_mark(config, update),
    )  # fmt: skip


def _write_run(store: Store, config: Config, facts: list[dict[str, Any]], mark: str) -> Path:
    serving, frozen = _switches(store, config.agent.name)
    return report.run_page(
        _home(config) / "index.html",
        config.agent.name,
        [{**update, "page": _page(config, update["number"]).name} for update in facts],
        options=config.options(),
        serving=serving,
        frozen=frozen,
        as_of=time.time(),
        curves={"Held-out success, by what the gate compared": _curves(facts)},
        audits=_audits(store, config.agent.name),
        trends=[trends.as_json(trend) for trend in trends.read_trends(store, config)],
        mark=mark,
    )


# ---------------------------------------------------------------- what is true now


def _facts(store: Store, config: Config) -> list[dict[str, Any]]:
    """Every update as its pages show it: what was concluded of it, and what became of its candidate since.

    What serves is said where it is the candidate or its parent: a page need not change with every later release.
    """
    agent = config.agent.name
    query = select(updates).where(updates.c.agent == agent, updates.c.state != "training").order_by(updates.c.number)
    with store.read() as connection:
        rows = connection.execute(query).all()
        named = select(releases.c.name, releases.c.status).where(releases.c.agent == agent)
        statuses = {row.name: str(row.status) for row in connection.execute(named)}
    serving, frozen = _switches(store, agent)
    moves = [entry for entry in read_decisions(store, agent) if entry.kind in ("promote", "rollback", "rollout")]
    facts = []
    for row in rows:
        summary = row.summary or {}
        history = [
            {"kind": entry.kind, "at": entry.at, "payload": entry.payload}
            for entry in moves
            if row.candidate is not None and row.candidate in _concerned(entry.payload)
        ]
        update = {
            "agent": agent, "number": row.number, "state": row.state, "verdict": row.verdict, "mode": row.mode,
            "parent": row.parent, "candidate": row.candidate, "started_at": row.started_at,
            "reason": "; ".join(summary.get("reasons", ())[:1]), **summary, "history": history,
            "serving": serving if serving in (row.parent, row.candidate) else None,
        }  # fmt: skip
        update["standing"] = _standing(update, statuses.get(row.candidate or ""))
        is_concerned = row.candidate == serving or update["standing"] == "rolled_back"
        update["frozen"] = frozen if is_concerned and row.candidate is not None else None
        if row.state == "discarded":  # never judged: its page says that instead of showing a verdict
            update |= {"verdict": None, "decision": None}
        facts.append(update)
    return facts


def _concerned(payload: dict[str, Any]) -> set[str]:
    """Whose page a decision stands on."""
    return {*payload.get("undone", ()), payload.get("to", ""), payload.get("release", "")}


def _standing(update: dict[str, Any], status: str | None) -> str | None:
    """What became of a candidate that the gate said yes to; None where it said anything else."""
    if update["verdict"] != Verdict.PROMOTE.value or update["state"] != "done":
        return None
    if update["mode"] == "trial":
        return "trial"
    if status == "rolled_back":
        return "rolled_back"
    if any(move["kind"] == "promote" for move in update["history"]):
        return "serves"
    if any(move["kind"] == "rollout" for move in update["history"]):
        return "tried" if status == "candidate" else "taken_back"
    if status != "candidate" or update["serving"] != update["parent"]:
        return "outdated"
    return "waits" if update["mode"] == "approve" else "observed"


def _mark(config: Config, update: dict[str, Any]) -> str:
    shown = json.dumps([config.options(), update], sort_keys=True, default=str)
    return hashlib.sha256(shown.encode()).hexdigest()[:16]


def _last_decision(store: Store) -> str:
    with store.read() as connection:
        return str(connection.execute(select(func.max(decisions.c.seq))).scalar() or 0)


def _switches(store: Store, agent: str) -> tuple[str | None, str | None]:
    """What serves, and why learning is frozen; None where nothing does, or it is not."""
    with store.read() as connection:
        alias = connection.execute(select(aliases.c.release).where(aliases.c.agent == agent)).scalar()
        serving = None if alias is None else incumbent_in(connection, agent, alias)
        switch = connection.execute(select(agents).where(agents.c.agent == agent)).first()
    return serving, (switch.frozen_reason or "no reason given") if switch is not None and switch.is_frozen else None


def _curves(facts: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    curves: dict[str, list[tuple[float, float]]] = {}
    for update in facts:
        for check in (update.get("decision") or {}).get("checks", ()):
            if check["name"].startswith("stratum ") and "/" not in check["name"] and check["candidate"] is not None:
                curves.setdefault(check["name"].removeprefix("stratum "), []).append(
                    (update["number"], check["candidate"])
                )
    return curves


def _audits(store: Store, agent: str) -> list[dict[str, Any]]:
    """The newest audits, newest first, as the run's page shows them."""
    query = select(audits).where(audits.c.agent == agent).order_by(audits.c.id.desc()).limit(AUDITS_SHOWN)
    with store.read() as connection:
        rows = connection.execute(query).all()
    says = {"promote": "ok", "hold": "warning", "reject": "alarm", "error": "not measured"}
    return [
        {
            **row.summary, "number": row.id,
            "told": list(zip(row.summary["codes"], row.summary["reasons"], strict=True)),
            "checks": [{**check, "says": says[check["verdict"]]} for check in row.summary["checks"]],
        }
        for row in rows
    ]  # fmt: skip


def _home(config: Config) -> Path:
    return config.state_dir / "reports" / config.agent.name


def _page(config: Config, number: int) -> Path:
    return _home(config) / f"update-{number:06d}.html"


# ---------------------------------------------------------------- what an update was taught


def _taught(store: Store, config: Config, update: dict[str, Any]) -> dict[str, Any] | None:
    """Some of the records that an update was trained on, of every stratum in turn, and who judged them all.

    Read from the store as it is now: what was forgotten since is only counted.
    """
    ids: Sequence[str] = (update.get("window") or {}).get("learned", ())
    if not ids:
        return None
    agent = config.agent
    lessons: list[tuple[Trajectory, Example]] = []
    found = read_trajectories(store, agent.name, records_in=ids, with_tenants=True)
    for trajectory in found:
        as_then = tuple(f for f in trajectory.feedback if f.created_at <= update["started_at"])
        example = lane_of(
            replace(trajectory, feedback=as_then), config.trainer.objectives, learn_from=agent.learn_from,
            tools_allowed=agent.tools_allowed,
        )  # fmt: skip
        if isinstance(example, Example):  # else the settings were others then
            lessons.append((trajectory, example))
    judged: defaultdict[str, Counter[str]] = defaultdict(Counter)
    in_turn: list[tuple[int, str, int]] = []
    num_of: Counter[str] = Counter()
    for index, (trajectory, example) in enumerate(lessons):
        judged[trajectory.principal][_judge(trajectory, example)] += 1
        in_turn.append((num_of[example.stratum], example.stratum, index))
        num_of[example.stratum] += 1
    return {
        "num_learned": len(ids),
        "num_gone": len(set(ids)) - len(found),
        "shown": [_lesson(*lessons[index]) for *_, index in sorted(in_turn)[:SHOWN]],
        "judges": {
            who: ", ".join(f"{judge} \N{MULTIPLICATION SIGN}{count}" for judge, count in counts.most_common())
            for who, counts in judged.items()
        },
    }


def _judge(trajectory: Trajectory, example: Example) -> str:
    """Who called it right or wrong, and how: `operator ann: correction`."""
    is_fix = example.kind == "correction"
    said = (f for f in trajectory.feedback if f.source == example.source and (f.correction is not None) is is_fix)
    who = " ".join([str(example.source), *sorted({f.principal for f in said if f.principal is not None})])
    return f"{_cut(who)}: {SAYS.get(example.kind, example.kind)}"


def _lesson(trajectory: Trajectory, example: Example) -> dict[str, str | None]:
    turn = example.targets[-1]
    asked = next((text_of(m) for m in reversed(example.messages[:turn]) if m["role"] == "user"), "")
    answer, before = _spoken(example.messages[turn]), _spoken(trajectory.messages[turn])
    learned = {
        "critique": f"what it says once it has read: {_cut(example.hint or '')}",
        "failure": "to say that less often",
    }.get(example.kind, answer)
    return {
        "record": trajectory.id,
        "principal": _cut(trajectory.principal),
        "by": _judge(trajectory, example),
        "asked": _cut(asked),
        "said": None if example.kind == "success" else before,
        "learned": learned,
    }


def _spoken(message: Message) -> str:
    """An answer's text and its tool calls, as `name(arguments)`."""
    calls = (call["function"] for call in message.get("tool_calls") or ())
    return _cut("\n".join(filter(None, [text_of(message), *(f"{c['name']}({c.get('arguments', '')})" for c in calls)])))


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "\N{HORIZONTAL ELLIPSIS}"
